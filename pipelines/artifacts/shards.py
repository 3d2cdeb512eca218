"""Work over data, shard by shard, that a crash at any moment cannot damage.

The driver writes a plan once. One Ray Data task per shard writes its files under a name unique to the attempt,
then commits with one small object that is created only if absent: the first attempt to commit wins, and
what other attempts left is swept. Running again does only the shards without a commit.

    <place>/<pass>/plan.json
    <place>/<pass>/data/<shard>-<attempt>.<kind>.parquet
    <place>/<pass>/commits/<shard>.json
"""

import json
import logging
import os
import pickle
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.artifacts.workspace import Place, Workspace, readable, to_json
from pipelines.errors import DanluError, StageError
from pipelines.progress import progress, say

INDEX_DIGITS = 5
"""Digits of a shard's index in names of files, at least; the order of shards never follows from the names."""

HERE = "<workspace>/"
"""What the workspace's root is called in a plan."""

Shard = dict[str, Any]
"""One unit of work, as JSON: `index` and whatever its work needs to know."""

Commit = dict[str, Any]
"""What one finished shard left: `index`, `files` by kind, and `result`, what its work returned."""


@dataclass
class Attempt:
    """The output of one try at one shard."""

    workspace: Workspace
    folder: str
    name: str
    files: dict[str, str]

    def path(self, kind: str, suffix: str = "parquet") -> str:
        """The path of this attempt's file of the given kind, such as `kept` or `dropped`."""
        path = f"{self.folder}/{self.name}.{kind}.{suffix}"
        self.files[kind] = path
        return path

    def writer(self, kind: str, schema: pa.Schema) -> AbstractContextManager[pq.ParquetWriter]:
        """A Parquet file of the given kind, written row group by row group."""
        return self.workspace.parquet_writer(self.path(kind), schema)


Work = Callable[[Shard, Attempt], dict[str, Any]]
"""Reads a shard, writes through the attempt, returns a JSON result."""


def run_shards(
    place: Place, name: str, plan: Callable[[], Sequence[Shard]], work: Work, *, concurrency: int | None, title: str
) -> list[Commit]:
    """Do `work` on every shard that has no commit yet; returns all commits in shard order.

    `plan` is called only where no plan was written before. `work` is sent to the workers, so it must pickle. A
    DanluError raised by `work` stops the run and is raised here as it was; other exceptions keep their traceback.
    """
    workspace = place.workspace
    folder = place.path(name)
    shards = _plan_once(workspace, f"{folder}/plan.json", plan)
    _take_back_damaged(workspace, folder)
    done = {commit["index"] for commit in _commits(workspace, folder)}
    pending = [shard for shard in shards if shard["index"] not in done]
    if pending:
        _run(workspace, folder, pending, work, concurrency, title, done=len(done))
    commits = _commits(workspace, folder)
    if missing := {shard["index"] for shard in shards} - {commit["index"] for commit in commits}:
        raise StageError(f"{folder}: the commits of shards {sorted(missing)} are not listed; nothing is deleted")
    _sweep(workspace, folder, commits)
    return commits


def _plan_once(workspace: Workspace, path: str, plan: Callable[[], Sequence[Shard]]) -> list[Shard]:
    if not workspace.exists(path):
        workspace.write_if_absent(path, to_json(_moved(list(plan()), f"{workspace.root}/", HERE)))
    shards: list[Shard] = _moved(workspace.read_json(path), HERE, f"{workspace.root}/")
    return shards


def _moved(value: Any, old: str, new: str) -> Any:
    """JSON with paths below `old` as paths below `new`, so that a workspace can be moved while a pass is half done."""
    if isinstance(value, dict):
        return {key: _moved(item, old, new) for key, item in value.items()}
    if isinstance(value, list):
        return [_moved(item, old, new) for item in value]
    return new + value.removeprefix(old) if isinstance(value, str) and value.startswith(old) else value


def _commits(workspace: Workspace, folder: str) -> list[Commit]:
    """The commits of a pass in the order of their shards' numbers."""
    commits = [workspace.read_json(path) for path in workspace.list(f"{folder}/commits") if path.endswith(".json")]
    for commit in commits:  # files are named relative to the pass, so that a workspace can be moved
        commit["files"] = {kind: f"{folder}/data/{name}" for kind, name in commit["files"].items()}
    return sorted(commits, key=lambda commit: int(commit["index"]))


def _take_back_damaged(workspace: Workspace, folder: str) -> None:
    """Delete the commits of shards whose files are damaged, in a workspace that was copied in part."""
    commits = _commits(workspace, folder)
    files = [path for commit in commits for path in commit["files"].values()]
    for path in workspace.damaged(files):
        index = next(commit["index"] for commit in commits if path in commit["files"].values())
        say(f"{path}: not there, or not whole; its shard is done again")
        with suppress(FileNotFoundError):  # a shard has several files
            workspace.remove(f"{folder}/commits/{index:0{INDEX_DIGITS}d}.json")


def _run(
    workspace: Workspace, folder: str, pending: list[Shard], work: Work, concurrency: int | None, title: str, done: int
) -> None:
    import ray.data

    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            # Its file in Ray's folder keeps everything; what is wrong is raised, and progress is shown here, once.
            handler.setLevel(logging.CRITICAL)

    def attempt(row: dict[str, Any]) -> dict[str, Any]:
        return {"error": _attempt(workspace, folder, row["name"], json.loads(row["shard"]), work)}

    items = [{"name": f"{shard['index']:0{INDEX_DIGITS}d}", "shard": json.dumps(shard)} for shard in pending]
    rows = ray.data.from_items(items, override_num_blocks=len(pending))
    # Ray Data shares CPUs out by what it is told of the cluster, and in a pass's first second it is told of none: one
    # task would run then. A pass has nothing to share with; Ray itself starts as many tasks as there are CPUs.
    rows.context.op_resource_reservation_enabled = False
    outcomes = rows.map(attempt, concurrency=concurrency)
    with progress(title, total=done + len(pending), unit="shards", done=done) as advance:
        for row in outcomes.iter_rows():
            if row["error"]:
                raise pickle.loads(row["error"])  # made by our own worker, a few lines below
            advance(1)


def _attempt(workspace: Workspace, folder: str, name: str, shard: Shard, work: Work) -> bytes:
    """Try one shard and commit it under `name`; returns b"", or the pickled DanluError that stopped it."""
    attempt = Attempt(workspace, f"{folder}/data", f"{name}-{uuid.uuid4().hex[:8]}", {})
    try:
        result = work(shard, attempt)
        files = {kind: os.path.basename(path) for kind, path in attempt.files.items()}
        commit = {"index": shard["index"], "files": files, "result": result}
        workspace.write_if_absent(f"{folder}/commits/{name}.json", to_json(commit))
    except DanluError as error:
        return pickle.dumps(error)
    return b""


def _sweep(workspace: Workspace, folder: str, commits: list[Commit]) -> None:
    """Delete what attempts left that did not commit."""
    kept = {os.path.basename(path) for commit in commits for path in commit["files"].values()}
    for path in workspace.list(f"{folder}/data"):
        if os.path.basename(path) not in kept:
            workspace.remove(path)


def read_tables(workspace: Workspace, paths: Sequence[str], columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The row groups of Parquet files, one table each, in order; memory is bounded by one row group."""
    for path in paths:
        with workspace.parquet_file(path) as file:
            for group in range(file.num_row_groups):
                with readable(path):
                    table = file.read_row_group(group, columns=columns)
                yield table
