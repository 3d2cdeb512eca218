"""Finished stages for tests of the stages that read them."""

from collections.abc import Sequence
from typing import Any, TypeVar

from pipelines.artifacts.reports.rows import RowFiles, RowsReport, SideFiles, Sides, SplitReport
from pipelines.artifacts.reports.train import MergeReport, TokenCounts, TrainReport
from pipelines.artifacts.shards import read_tables
from pipelines.artifacts.stage import Manifest, Output, Report
from pipelines.artifacts.workspace import Place

R = TypeVar("R", bound=Report)


def finished(place: Place, report: R) -> Output[R]:
    """The output of a stage that reported that; its manifest is written."""
    manifest = Manifest(stage=place.stage, fingerprint=place.fingerprint, report=report)
    manifest.write(place)
    return Output(place.stage, place, manifest)


def finished_rows(place: Place, rows: int, files: list[str], digest: str = "d") -> Output[RowsReport]:
    """The output of a stage that left rows in files relative to its place."""
    outputs = RowFiles(rows=files)
    return finished(place, RowsReport(summary=f"{rows} rows", digest=digest, rows=rows, outputs=outputs))


def rows_of(output: Output[Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of files that a finished stage's report names."""
    paths = output.paths(names)
    return [row for table in read_tables(output.folder.workspace, paths) for row in table.to_pylist()]


def finished_split(place: Place, train: list[str], test: list[str]) -> Output[SplitReport]:
    """The output of a split that left its sides in files relative to its place."""
    sides = Sides(train=len(train), test=len(test))
    return finished(
        place, SplitReport(summary="split", digest="s", rows=sides, outputs=SideFiles(train=train, test=test))
    )


def train_report(**changed: Any) -> TrainReport:
    """What a training of one step reports that left an adapter and held nothing out, but for what is `changed`."""
    counts = TokenCounts(rows=1, samples=1, truncated=0, left_out=0, tokens=2, loss_tokens=1)
    report: dict[str, Any] = {
        "summary": "1 step",
        "digest": "t",
        "model": "base",
        "adapter": "adapter",
        "trained": None,
        "checkpoints": [],
        "zero_stage": 0,
        "steps": 1,
        "losses": [],
        "eval_losses": [],
        "eval_loss_base": None,
        "eval_loss": None,
        "eval_loss_delta": None,
        "best_step": None,
        "trained_step": 1,
        "samples_while_training": [],
        "files": {},
        "training_seconds": 1.0,
        "samples": counts,
        "held_out_samples": None,
        "tokens_per_second": 2.0,
        "loss_tokens_per_second": 1.0,
        "resumed_at": 0,
        "workers": 1,
        "peak_memory_bytes": 1,
        "peak_device_memory_bytes": None,
        "dtype": "float32",
    }
    return TrainReport.model_validate({**report, **changed})


def merge_report(**changed: Any) -> MergeReport:
    """What a merge reports that went well, but for what is `changed`."""
    report: dict[str, Any] = {
        "summary": "merged",
        "digest": "m",
        "model": "model",
        "bytes": 1,
        "dtype": "float32",
        "merge_difference": 0.0,
        "reload_difference": 0.0,
        "rounding_difference": 0.0,
        "largest_logit": 1.0,
    }
    return MergeReport.model_validate({**report, **changed})
