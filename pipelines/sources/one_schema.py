"""One schema for rows that were written file by file: what all fit into, and files of another one written anew."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from pipelines.artifacts.rows import RowDigest
from pipelines.artifacts.shards import Attempt, Commit, Shard, Work, read_tables, run_shards
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.sources.column_types import as_schema, settled, union


def common_schema(
    workspace: Workspace, schemas: Sequence[pa.Schema], paths: Sequence[Sequence[str]]
) -> tuple[pa.Schema, list[str]]:
    """The schema that all rows fit into, and the columns whose types were widened for it.

    `paths`: the files of each schema.
    """
    schema, widened = union(
        schemas, lambda number, name: (table[name] for table in read_tables(workspace, paths[number], [name]))
    )
    return pa.schema([pa.field(field.name, settled(field.type), field.nullable) for field in schema]), widened


def as_one_schema(
    place: Place, commits: list[Commit], concurrency: int | None
) -> tuple[pa.Schema, list[str], list[Commit]]:
    """The schema of all shards' rows, the columns that had to be widened, and commits whose files all have it.

    Each shard's result has its `schema`, in hexadecimal digits, and what was `widened` in it.
    """
    schemas = [_read(commit["result"]["schema"]) for commit in commits]
    schema, widened = common_schema(place.workspace, schemas, [[commit["files"]["rows"]] for commit in commits])
    widened = sorted({*widened, *(name for commit in commits for name in commit["result"]["widened"])})
    wanted = schema.serialize().to_pybytes().hex()
    shards = [
        {"index": commit["index"], "path": commit["files"]["rows"]}
        for commit in commits
        if commit["result"]["schema"] != wanted
    ]
    if not shards:
        return schema, widened, commits
    work = _rewriter(place.workspace, wanted)
    rewritten = run_shards(place, "one-schema", lambda: shards, work, concurrency=concurrency, title="ingest types")
    by_index = {commit["index"]: commit for commit in rewritten}
    commits = [
        {
            **commit,
            "files": {**commit["files"], **by_index[commit["index"]]["files"]},
            "result": {**commit["result"], **by_index[commit["index"]]["result"]},
        }
        if commit["index"] in by_index
        else commit
        for commit in commits
    ]
    return schema, widened, commits


def _rewriter(workspace: Workspace, serialized: str) -> Work:
    def work(shard: Shard, attempt: Attempt) -> dict[str, Any]:
        schema = _read(serialized)
        digest = RowDigest()
        with attempt.writer("rows", schema) as writer:
            for table in read_tables(workspace, [shard["path"]]):
                table = as_schema(table, schema)
                writer.write_table(table)
                digest.update(table)
        return {"digest": digest.hexdigest()}

    return work


def _read(serialized: str) -> pa.Schema:
    return pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(serialized)))
