"""Finished stages for tests of the stages that read them."""

from typing import TypeVar

from pipelines.artifacts.reports.rows import RowFiles, RowsReport
from pipelines.artifacts.stage import Manifest, Output, Report
from pipelines.artifacts.workspace import Place

R = TypeVar("R", bound=Report)


def finished(place: Place, report: R) -> Output[R]:
    """The output of a stage that reported that; its manifest is written."""
    manifest: Manifest[R] = Manifest[type(report)](stage=place.stage, fingerprint=place.fingerprint, report=report)  # type: ignore[misc]
    manifest.write(place)
    return Output(place.stage, place, manifest)


def finished_rows(place: Place, rows: int, files: list[str], digest: str = "d") -> Output[RowsReport]:
    """The output of a stage that left rows in files relative to its place."""
    outputs = RowFiles(rows=files)
    return finished(place, RowsReport(summary=f"{rows} rows", digest=digest, rows=rows, outputs=outputs))
