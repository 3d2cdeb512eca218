"""Names that rows bring themselves: what is one, and that no two rows have the same."""

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from pipelines.artifacts.shards import read_tables
from pipelines.artifacts.workspace import Workspace
from pipelines.errors import DataError

SHOWN = 5
"""Rows of one name that an error message shows."""


def own_id(value: Any) -> str | None:
    """The source's own key as a row's name; None where it is none, and file and line stay the name."""
    if isinstance(value, str):
        return value or None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return str(int(value)) if isinstance(value, float) and value.is_integer() else None


def require_own_names(workspace: Workspace, paths: list[str]) -> None:
    """DataError where two rows have the same name, which can be only where a source names them itself.

    In memory are eight bytes for each row, never the names.
    """
    hashes = np.concatenate([_hashes(table) for table in read_tables(workspace, paths, ["row_id"])])
    values, times = np.unique(hashes, return_counts=True)
    repeated = values[times > 1]
    times_of, found = Counter[str](), dict[str, list[int]]()  # two names may have one hash: the names decide
    for table in read_tables(workspace, paths, ["row_id", "pos"]):
        few = table.filter(pa.array(np.isin(_hashes(table), repeated[:SHOWN])))
        for name, pos in zip(few["row_id"].to_pylist(), few["pos"].to_pylist(), strict=True):
            times_of[name] += 1
            if len(where := found.setdefault(name, [])) < SHOWN:
                where.append(pos)
    name = next((name for name in found if times_of[name] > 1), None)
    if name is None:
        return
    raise DataError(
        f"{times_of[name]} rows have the key {name!r} (rows {', '.join(map(str, found[name]))} of the data, from 0), "
        f"and {len(repeated)} keys are there more than once; rows are told apart by it. Make it unique, name another "
        "column under ingest.columns as row_id, or say ingest.columns={row_id: null} to name rows by file and line"
    )


def _hashes(table: pa.Table) -> npt.NDArray[np.uint64]:
    hashes = (xxhash.xxh3_64_intdigest(name.encode()) for name in table["row_id"].to_pylist())
    return np.fromiter(hashes, np.uint64, table.num_rows)
