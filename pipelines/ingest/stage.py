"""Ingest: any of the usual sources and schemas in, one canonical table out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pipelines.artifacts.reports.rows import IngestReport
from pipelines.artifacts.stage import Inputs, Stage
from pipelines.artifacts.workspace import Place
from pipelines.errors import DataError, InputError, Problem
from pipelines.recipe.ingest import Ingest
from pipelines.sources.read import VERSION, check_source, read_source, source_fingerprint


@dataclass(frozen=True)
class IngestStage(Stage[Inputs, IngestReport]):
    """The source of the recipe's section `ingest` as rows."""

    section: Ingest

    name: ClassVar[str] = "ingest"
    version: ClassVar[int] = VERSION

    @property
    def reports(self) -> type[IngestReport]:
        """The class of its report."""
        return IngestReport

    def fingerprint_inputs(self) -> Mapping[str, Any]:
        """The section without what only changes speed or tolerance, and the content of the source's files."""
        return source_fingerprint(self.section)

    def preflight(self) -> list[Problem]:
        """Whether the source's files are there, and an adapter reads the first of them."""
        try:
            check_source(self.section)
        except (DataError, InputError) as error:
            return [Problem("", str(error))]
        return []

    def run(self, place: Place, inputs: Inputs) -> IngestReport:
        """Read the source; the report counts rows and broken rows."""
        return read_source(self.section, place)
