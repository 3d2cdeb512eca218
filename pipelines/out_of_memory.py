"""Ray ends processes where a node's memory runs out: whatever stage runs, say which one, and who had how much."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from pipelines.errors import DanluError, StageError

_USED = re.compile(r"was (\S+ used / \S+ limit)")
_ENDED = re.compile(r"task name=([^,\n]*),.*?pid=(\d+), actual memory used=([\d.]+GB)")
_ROW = re.compile(r"^\d+\t[\d.]+\t.*$", re.M)


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn an error behind which Ray's killer stands into a StageError with the table of memory by process."""
    try:
        yield
    except Exception as error:
        if (said := _killer_said(error)) is None:
            raise
        ours = str(error).splitlines()[0] if isinstance(error, DanluError) else f"{what}: a node's main memory ran out"
        raise StageError(f"{ours}\n{_told(said)}") from error


def _killer_said(error: BaseException) -> str | None:
    """What Ray said when it ended a process for its memory; None where nothing of the kind is behind an error."""
    ray = sys.modules.get("ray")  # which is slow to load, and without which it ended nothing
    behind: list[object] = [error] if ray is not None else []
    seen: set[int] = set()
    while behind:
        found = behind.pop(0)
        if not isinstance(found, BaseException) or id(found) in seen:
            continue
        seen.add(id(found))
        if ray is not None and isinstance(found, ray.exceptions.OutOfMemoryError):
            return str(found)
        # Ray's own errors keep what is behind them in places of their own
        behind += [getattr(found, "cause", None), found.__cause__, found.__context__]
        behind += getattr(found, "worker_failures", {}).values()
    return None


def _told(said: str) -> str:
    used, ended = _USED.search(said), _ENDED.search(said)
    lines = ["Ray's memory monitor ended a process to save its node" + (f" ({used[1]})" if used else "")]
    if ended:
        lines[0] += f": {ended[1]}, process {ended[2]}, which had {ended[3]}"
    if rows := _ROW.findall(said):
        lines += ["  process  memory, GB  command"]
        lines += [f"  {pid:>7}  {size:>10}  {name}" for pid, size, name in (row.split("\t", 2) for row in rows)]
    lines.append(
        "stop what else takes memory, or let fewer tasks run at a time (concurrency, where the stage's section has "
        "it); what is finished is kept, and the same command goes on from there"
    )
    return "\n".join(lines)
