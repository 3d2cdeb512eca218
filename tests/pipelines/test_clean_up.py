"""Clean-up neither hangs nor hides why it was needed."""

import ast
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.clean_up import clean_up


def test_the_first_error_is_the_one_that_is_raised(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise TimeoutError("applications weren't deleted")

    def work() -> None:
        try:
            raise ValueError("the real cause")
        finally:
            clean_up("stopping engines", fail, 5)

    with pytest.raises(ValueError, match="the real cause") as caught:
        work()
    assert caught.value.__context__ is None
    assert "stopping engines: TimeoutError: applications weren't deleted" in capsys.readouterr().err


def test_what_hangs_is_left_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    clean_up("stopping Ray", lambda: time.sleep(30), 0.2)
    assert time.monotonic() - began < 5
    assert "stopping Ray: not done after 0.2 s; going on without it" in capsys.readouterr().err


def test_an_exit_in_a_clean_up_does_not_end_the_process(capsys: pytest.CaptureFixture[str]) -> None:
    def leave() -> None:
        raise SystemExit(15)

    clean_up("stopping Ray", leave, 5)
    assert "stopping Ray: SystemExit: 15" in capsys.readouterr().err


PROJECT = Path(__file__).parents[2]
BOUNDED_OTHERWISE = {
    "pipelines/beside.py: thread.join",  # of what looks at files and stores, which has limits of its own
    "pipelines/evaluate/evalscope/parent.py: process.wait",  # it was killed in the line before
    "pipelines/progress.py: thread.join",  # which sleeps until it is told that all is over
}
OF_RAY = {"ray", "ray_serve", "serve", "remove_placement_group"}
WITHOUT_END = {"join", "wait", "get", "result"}
"""Methods that wait, for ever where no argument says how long."""


def unbounded(tree: ast.Module) -> Iterator[str]:
    """Calls in `finally` and `__exit__` that talk to Ray, or wait without an end, by themselves."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Try | ast.TryStar):
            body = node.finalbody
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name in ("__exit__", "__aexit__"):
            body = node.body
        else:
            continue
        waiting: list[ast.AST] = [*body]
        while waiting:
            found = waiting.pop()
            if isinstance(found, ast.Call):
                name = ast.unparse(found.func)
                if name == "clean_up":
                    continue
                root, method = name.partition(".")[0], name.rpartition(".")[2]
                waits = method in WITHOUT_END and "." in name and not found.args and not found.keywords
                if (root in OF_RAY and method != "is_initialized") or waits:
                    yield name
            waiting += ast.iter_child_nodes(found)


def test_what_ends_things_of_ray_s_is_bounded_and_raises_nothing() -> None:
    found = {
        f"{path.relative_to(PROJECT)}: {call}"
        for package in ("pipelines", "rayjobs", "serve")
        for path in sorted((PROJECT / package).rglob("*.py"))
        for call in unbounded(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found == BOUNDED_OTHERWISE


def test_a_planted_call_is_found() -> None:
    planted = "try:\n    work()\nfinally:\n    ray.kill(actor)\n    thread.join()\n    clean_up('x', ray.shutdown, 5)\n"
    assert [*unbounded(ast.parse(planted))] == ["thread.join", "ray.kill"]
