"""Clocks that jump: what waits, limits, pays or renews goes by a clock that does not; the wall clock is for showing."""

import ast
import asyncio
import time
from pathlib import Path

import pytest

from pipelines.artifacts import lease
from pipelines.artifacts.workspace import Workspace
from pipelines.errors import StageError
from pipelines.recipe.serve import Limits
from serve.asgi import RequestError
from serve.gateway.limits import OwnLimits

PROJECT = Path(__file__).parents[1]
DAY = 86_400.0
WALL_CLOCK = {
    "pipelines/llm/replies.py": "how far off the date of a Retry-After is; what is waited is bounded by `max_wait`",
    "pipelines/report/page.py": "when the report was drawn",
    "pipelines/train/curves.py": "the time that TensorBoard shows beside a value",
    "rayjobs/cli.py": "how long a job has run, in a table, by the time that its cluster says it began",
    "rayjobs/pipeline.py": "when a stage began, in its manifest",
    "serve/adapter_registry.py": "the age of a file that another machine may have made: a jump deletes early or late",
    "serve/gateway/access_log.py": "the time of a line of the log",
    "serve/gateway/app.py": "`created` of models",
}
"""Files that ask what time it is, and what for."""
NOW = {("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("datetime", "utcnow"), ("datetime", "today")}
NOW |= {("date", "today")}
CONVERTS = {("time", "localtime"), ("time", "gmtime"), ("time", "ctime")}
"""What asks the wall clock unless a time is given to it."""


def asks(tree: ast.AST) -> bool:
    """Whether a file asks the wall clock."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "time":
            found = any(("time", alias.name) in NOW for alias in node.names)
        elif isinstance(node, ast.Call) and not node.args:
            found = _named(node.func) in CONVERTS
        else:
            found = _named(node) in NOW
        if found:
            return True
    return False


def _named(node: ast.AST) -> tuple[str, str]:
    """The last two parts of a dotted name: ("datetime", "now") of `datetime.datetime.now`."""
    if not isinstance(node, ast.Attribute):
        return "", ""
    owner = node.value
    return owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", ""), node.attr


def test_only_named_files_ask_the_wall_clock() -> None:
    files = [file for package in ("pipelines", "serve", "rayjobs") for file in (PROJECT / package).rglob("*.py")]
    found = {str(file.relative_to(PROJECT)) for file in files if asks(ast.parse(file.read_text(encoding="utf-8")))}
    assert found == set(WALL_CLOCK)


@pytest.mark.parametrize(
    "planted",
    ["import time\nuntil = time.time() + 5", "from time import time", "import datetime\ndatetime.datetime.now()"],
)
def test_a_planted_question_is_found(planted: str) -> None:
    assert asks(ast.parse(planted))
    assert not asks(ast.parse("import time\ntime.monotonic(); time.localtime(0); time.sleep(1)"))


@pytest.fixture(params=[DAY, -DAY], ids=["forwards", "backwards"])
def jumping(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wall clock that is a day further, or behind, each time it is asked."""
    real, asked = time.time, [0]

    def jumped() -> float:
        asked[0] += 1
        return real() + asked[0] * request.param

    monkeypatch.setattr(time, "time", jumped)
    monkeypatch.setattr(time, "time_ns", lambda: int(jumped() * 1e9))


@pytest.mark.usefixtures("jumping")
def test_the_limits_of_the_endpoint_stay_what_they_are() -> None:
    async def ask(limits: OwnLimits, times: int) -> None:
        for _ in range(times):
            limits.leave(await limits.enter("caller"), 1)

    limits = OwnLimits(Limits(requests_per_minute=5, tokens_per_minute=100))
    asyncio.run(ask(limits, 5))
    with pytest.raises(RequestError, match=r"requests per minute; try again in (\d|1\d) s"):
        asyncio.run(ask(limits, 1))


@pytest.mark.slow  # who cannot renew a lease in time, as on a busy machine, ends its process, which is pytest
@pytest.mark.usefixtures("jumping")
def test_a_workspace_on_a_bucket_stays_whose_it_is(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("LEASE_SECONDS", 10.0), ("BEAT_SECONDS", 0.1), ("LOOK_SECONDS", 0.05)):
        monkeypatch.setattr(lease, name, seconds)
    workspace = Workspace(f"{bucket}/leased")
    with workspace.held(), pytest.raises(StageError, match="is at work here"), workspace.held():
        pass
    workspace.write(workspace.path(".running"), b"{}")  # of a run that was killed
    began = time.monotonic()
    with workspace.held():
        assert 10.0 <= time.monotonic() - began < 300
