"""Ingest: any of the usual sources and schemas in, one canonical table out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pipelines.artifacts.reports.rows import IngestReport, RowsReport
from pipelines.artifacts.stage import Inputs, Output, Stage
from pipelines.artifacts.workspace import Place
from pipelines.errors import DataError, InputError, Problem
from pipelines.recipe.ingest import Ingest
from pipelines.sources.joined import Part, join, read_several, report_of
from pipelines.sources.read import VERSION, check_source, read_source, source_fingerprint


@dataclass(frozen=True)
class IngestStage(Stage[Inputs, IngestReport]):
    """The sources of the recipe's section `ingest` as rows."""

    section: Ingest

    name: ClassVar[str] = "ingest"
    version: ClassVar[int] = VERSION

    @property
    def reports(self) -> type[IngestReport]:
        """The class of its report."""
        return IngestReport

    def fingerprint_inputs(self) -> Mapping[str, Any]:
        """The sections without what only changes speed or tolerance, and the content of the sources' files."""
        further = {name: source_fingerprint(source) for name, source in self.section.sources.items()}
        return {**source_fingerprint(self.section), **({"sources": further} if further else {})}

    def preflight(self) -> list[Problem]:
        """Whether the sources' files are there, and an adapter reads the first of them."""
        problems = []
        for key, source in {"": self.section, **self.section.sources}.items():
            try:
                check_source(source)
            except (DataError, InputError) as error:
                problems.append(Problem(f"ingest.sources.{key}" if key else "", str(error)))
        return problems

    def run(self, place: Place, inputs: Inputs) -> IngestReport:
        """Read the sources; the report counts rows and broken rows."""
        return read_several(self.section, place) if self.section.sources else read_source(self.section, place)


@dataclass(frozen=True)
class CombineInputs(Inputs):
    """What the stage reads."""

    ingested: Output[RowsReport]
    synthesized: Output[RowsReport]
    """Refined, where the recipe refines."""


@dataclass(frozen=True)
class CombineStage(Stage[CombineInputs, RowsReport]):
    """Rows of one's own, then those that were synthesized, as one data set."""

    name: ClassVar[str] = "combine"
    version: ClassVar[int] = 1

    @property
    def reports(self) -> type[RowsReport]:
        """The class of its report."""
        return RowsReport

    def fingerprint_inputs(self) -> Mapping[str, Any]:
        """Nothing: what it reads decides."""
        return {}

    def run(self, place: Place, inputs: CombineInputs) -> RowsReport:
        """Write both, one after the other; what was set aside or dropped stays with the stages that did."""
        parts = [Part("", output, with_dropped=False) for output in (inputs.ingested, inputs.synthesized)]
        _, _, commits = join(place, parts, None)
        return report_of(place, commits)
