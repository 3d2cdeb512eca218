"""What became of one row, stage by stage."""

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow.compute as pc

from pipelines.artifacts.shards import read_tables
from pipelines.artifacts.workspace import Place
from pipelines.errors import DataError


def trace(finished: Mapping[str, Place], row_id: str) -> Iterator[str]:
    """Lines that tell where a row is, or which operator dropped it and on what grounds.

    `finished` maps stage names to their places, in stage order. Raises DataError for a row no stage knows.
    """
    known = False
    for stage, place in finished.items():
        for kind in place.report().get("outputs", {}):
            for row in _find(place, kind, row_id):
                known = True
                yield _dropped(stage, row) if kind == "dropped" else _kept(stage, kind, row)
    if not known:
        raise DataError(f"row {row_id}: no finished stage has a row of this id")


def _find(place: Place, kind: str, row_id: str) -> Iterator[dict[str, Any]]:
    for table in read_tables(place.workspace, place.outputs(kind)):
        if "row_id" in table.column_names:
            yield from table.filter(pc.equal(table["row_id"], row_id)).to_pylist()


def _kept(stage: str, kind: str, row: dict[str, Any]) -> str:
    return f"{stage}: kept ({kind}), position {row['pos']}: {_shortened(row.get('response'))}"


def _dropped(stage: str, row: dict[str, Any]) -> str:
    stats = ", ".join(f"{name} {value:g}" for name, value in row["stats"] or [])
    grounds = f"{row['reason']} [{stats}]" if stats else row["reason"]
    return f"{stage}: dropped by {row['operator']}: {grounds}: {_shortened(row['text'])}"


def _shortened(text: str | None) -> str:
    line = " ".join((text or "").split())
    return line if len(line) <= 60 else line[:59] + "…"
