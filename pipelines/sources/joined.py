"""Rows of several origins as one data set: one schema, one order, and names that tell the origin."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.artifacts.reports.rows import IngestReport, RowFiles, RowsReport
from pipelines.artifacts.rows import DROPPED, RowDigest
from pipelines.artifacts.shards import Attempt, Commit, Shard, Work, read_tables, run_shards
from pipelines.artifacts.stage import Output
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.recipe.ingest import Ingest
from pipelines.sources.column_types import as_schema
from pipelines.sources.one_schema import common_schema
from pipelines.sources.own_names import require_own_names
from pipelines.sources.read import read_once


@dataclass(frozen=True)
class Part:
    """Rows of one origin."""

    prefix: str
    """Stands before the names of its rows."""
    output: Output[Any]
    """Of a stage that leaves rows."""
    with_dropped: bool
    """Whether what it set aside is listed again."""


def read_several(section: Ingest, place: Place) -> IngestReport:
    """The rows of the source, then those of each of `sources`, whose names begin with its name."""
    sources = {"": section, **section.sources}
    outputs = {
        name: read_once(source, place.within("sources", str(number)))
        for number, (name, source) in enumerate(sources.items())
    }
    parts = [Part(f"{name}/" if name else "", output, with_dropped=True) for name, output in outputs.items()]
    schema, widened, commits = join(place, parts, section.concurrency)
    reports = [output.report for output in outputs.values()]
    types = {name: kind for report in reports for name, kind in report.widened.items()}
    types |= {name: str(schema.field(name).type) for name in widened}
    counts: dict[str, int] = {}
    for report in reports:
        for what, number in report.counts.items():
            counts[what] = counts.get(what, 0) + number
    joined = report_of(place, commits)
    of_each = "; ".join(f"{name or section.source}: {output.report.summary}" for name, output in outputs.items())
    return IngestReport(
        summary=f"{joined.rows} rows of {len(sources)} sources; {of_each}",
        digest=joined.digest,
        rows=joined.rows,
        broken=sum(report.broken for report in reports),
        adapter=", ".join(sorted({name for report in reports for name in report.adapter.split(", ")})),
        source=", ".join(source.source for source in sources.values()),
        columns=list(schema.names),
        carried=list(dict.fromkeys(name for report in reports for name in report.carried)),
        widened=types,
        counts=counts,
        outputs=joined.outputs,
    )


def join(place: Place, parts: Sequence[Part], concurrency: int | None) -> tuple[pa.Schema, list[str], list[Commit]]:
    """Write the parts' rows one after another; returns their schema and the columns that had to be widened for it.

    DataError where two rows come to have the same name.
    """
    workspace = place.workspace
    schema, widened = _schema_of(workspace, parts)

    def plan() -> list[Shard]:
        shards: list[Shard] = []
        begin = 0
        for part in parts:
            rows, dropped = _files(part)
            for number, path in enumerate(rows):
                beside = dropped[number] if part.with_dropped else None
                shards.append(
                    {"index": len(shards), "rows": path, "dropped": beside, "pos": begin, "prefix": part.prefix}
                )
            begin += 1 + max(map(_last_pos, [workspace] * len(rows + dropped), rows + dropped))
        return shards

    work = _writer(workspace, schema.serialize().to_pybytes())
    commits = run_shards(place, "rows", plan, work, concurrency=concurrency, title=place.stage)
    require_own_names(workspace, [commit["files"]["rows"] for commit in commits])
    return schema, widened, commits


def report_of(place: Place, commits: Sequence[Commit]) -> RowsReport:
    """What was written."""
    digest = RowDigest()
    for commit in commits:
        digest.add(commit["result"]["digest"], commit["result"]["rows"])
    return RowsReport(
        summary=f"{digest.rows} rows",
        digest=digest.hexdigest(),
        rows=digest.rows,
        outputs=RowFiles(
            rows=place.relative(commit["files"]["rows"] for commit in commits),
            dropped=place.relative(commit["files"]["dropped"] for commit in commits),
        ),
    )


def _files(part: Part) -> tuple[list[str], list[str]]:
    files = part.output.report.outputs
    return part.output.paths(files.rows), part.output.paths(files.dropped)


def _schema_of(workspace: Workspace, parts: Sequence[Part]) -> tuple[pa.Schema, list[str]]:
    """The schema that the rows of all parts fit into; within a part, all files have one."""
    schemas = []
    for part in parts:
        with workspace.parquet_file(_files(part)[0][0]) as file:
            schemas.append(file.schema_arrow.remove_metadata())
    return common_schema(workspace, schemas, [_files(part)[0] for part in parts])


def _last_pos(workspace: Workspace, path: str) -> int:
    ends = [pc.max(table["pos"]).as_py() for table in read_tables(workspace, [path], ["pos"])]
    return max((end for end in ends if end is not None), default=-1)


def _writer(workspace: Workspace, serialized: bytes) -> Work:
    """The work on one file: the same rows at their place in the whole."""

    def work(shard: Shard, attempt: Attempt) -> dict[str, Any]:
        schema = pa.ipc.read_schema(pa.py_buffer(serialized))
        digest = RowDigest()
        with attempt.writer("rows", schema) as writer:
            for table in read_tables(workspace, [shard["rows"]]):
                table = as_schema(_moved(table, shard), schema)
                writer.write_table(table)
                digest.update(table)
        with attempt.writer("dropped", DROPPED) as writer:
            for table in read_tables(workspace, [shard["dropped"]] if shard["dropped"] else []):
                writer.write_table(_moved(table, shard).cast(DROPPED))
        return {"rows": digest.rows, "digest": digest.hexdigest()}

    return work


def _moved(table: pa.Table, shard: Shard) -> pa.Table:
    """The table with the names and positions that its rows have in the whole."""
    names = pc.binary_join_element_wise(shard["prefix"], table["row_id"], "")
    columns = {"row_id": names, "pos": pc.add(table["pos"], shard["pos"])}
    return pa.table({name: columns.get(name, table[name]) for name in table.column_names})
