"""The contract of a stage: its section of the recipe and typed inputs in, a report out, which its manifest keeps.

A stage is a frozen dataclass that holds its own section and whatever else decides what it does. It finds what it reads
in its inputs, writes below its place, and returns a report. The pipeline, not the stage, writes the manifest, last.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, SerializeAsAny, ValidationError

from pipelines.artifacts.files import Destination
from pipelines.artifacts.workspace import Place, to_json
from pipelines.errors import DataError, Problem


class Record(BaseModel):
    """A part of a report; it is never changed, and keys it does not define are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Report(Record):
    """What every stage reports."""

    summary: str
    """One line for people."""
    digest: str
    """By which later stages know whether their input has changed."""

    def row_files(self) -> list[str]:
        """The Parquet files of rows that it names, relative to the stage's folder."""
        return []


class Environment(Record):
    """What the work ran on; nothing that names a machine or a person."""

    danlu: str | None = None
    python: str = ""
    system: str = ""
    cpus: int | None = None
    memory_gib: float = 0
    packages: dict[str, str] = {}


R = TypeVar("R", bound=Report)
R_co = TypeVar("R_co", bound=Report, covariant=True)


class Manifest(Record, Generic[R]):
    """A complete stage, as its folder's `manifest.json` says it."""

    stage: str = ""
    fingerprint: str = ""
    inputs: dict[str, str] = {}
    """Fingerprints of the stages that it read, by name."""
    began: float = 0
    """Seconds since 1970."""
    seconds: float = 0
    environment: Environment = Environment()
    report: SerializeAsAny[R]

    def write(self, place: Place) -> None:
        """Mark the stage complete. The last thing that is done for it."""
        place.finish(to_json(self.model_dump(mode="json")))


def read_manifest(place: Place, report: type[R]) -> Manifest[R] | None:
    """The manifest at `place`, None while the stage is not complete; DataError where it is not one of ours."""
    path = place.path("manifest.json")
    if not place.workspace.exists(path):
        return None
    try:
        return Manifest[report].model_validate(place.workspace.read_json(path))  # type: ignore[valid-type]
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise DataError(
            f"{path}: not a manifest that this version of danlu reads ({key}: {first['msg']}); "
            "delete the folder it lies in and run again"
        ) from None


@dataclass(frozen=True)
class Output(Generic[R_co]):
    """What a stage leaves: its place and, once it is complete, its manifest."""

    stage: str
    place: Place | None = None
    """None where a stage before it is not complete, on which its folder's name depends."""
    manifest: Manifest[R_co] | None = None

    @property
    def is_complete(self) -> bool:
        """Whether the stage is done."""
        return self.manifest is not None

    @property
    def report(self) -> R_co:
        """What the finished stage reported."""
        if self.manifest is None:
            raise DataError(f"stage {self.stage} is not complete; run it again")
        return self.manifest.report

    @property
    def seen_by_all(self) -> "Output[R_co]":
        """The same where every node of the cluster sees it."""
        return replace(self, place=self.folder.seen_by_all)

    @property
    def folder(self) -> Place:
        """The finished stage's place."""
        if self.place is None or self.manifest is None:
            raise DataError(f"stage {self.stage} is not complete; run it again")
        return self.place

    def damaged(self) -> str | None:
        """The first of the finished stage's files of rows that is not there or not whole; see `Workspace.damaged`."""
        return next(iter(self.folder.workspace.damaged(self.paths(self.report.row_files()))), None)

    def paths(self, names: Iterable[str]) -> list[str]:
        """Paths of files that the report names relative to the stage's folder, such as `outputs.rows`."""
        return [self.folder.path(name) for name in names]


@dataclass(frozen=True)
class Inputs:
    """The outputs that a stage reads, one field each; None where the recipe has no such stage."""

    def outputs(self) -> list[Output[Any]]:
        """All of them, in the order of the fields."""
        found = (getattr(self, field.name) for field in fields(self))
        return [output for output in found if output is not None]

    def digests(self) -> dict[str, str]:
        """What of the inputs the stage's output follows from, by stage."""
        return {output.stage: output.report.digest for output in self.outputs()}


I_contra = TypeVar("I_contra", bound=Inputs, contravariant=True)
R_stage = TypeVar("R_stage", bound=Report)


class Stage(Protocol[I_contra, R_stage]):
    """One stage of the pipeline."""

    name: ClassVar[str]
    version: ClassVar[int]
    """Raised when the output changes for the same input."""
    spreads: ClassVar[bool] = False
    """Whether it works on nodes that share no folder, given `Workspace.origin`."""

    @property
    def reports(self) -> type[R_stage]:
        """The class of its report."""

    @property
    def on_disk(self) -> tuple[str, ...]:
        """The stages, and folders of the workspace, whose files it takes by path; it writes to a folder then, too."""
        return ()

    def fingerprint_inputs(self) -> Mapping[str, Any]:
        """What of the recipe and the world decides the output, as JSON; not what only changes speed."""

    def preflight(self) -> list[Problem]:
        """What would stop it, perhaps after hours of those before: files, keys and packages that are not there."""
        return []

    def destinations(self) -> list[Destination]:
        """Files outside the workspace that it writes."""
        return []

    def is_current(self, report: R_stage) -> bool:
        """Whether what the finished stage left outside the workspace is still there."""
        return True

    def forget(self, place: Place) -> None:
        """Delete what lies outside its place and a run would go on from, since the stage is to be done again."""
        return None

    def run(self, place: Place, inputs: I_contra) -> R_stage:
        """Do the work, from the beginning or from where a killed run left it."""


def report_of(outputs: Iterable[Output[Any]], kind: type[R]) -> R | None:
    """The report of the finished stage that reports a `kind`; None where there is none."""
    return next((o.report for o in outputs if o.is_complete and type(o.report) is kind), None)
