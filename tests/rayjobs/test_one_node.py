"""The node of a cluster that does all work by paths: what it must have, and what becomes of a run when it is lost."""

import os
import queue
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pipelines.errors import HardwareError, RecipeError
from pipelines.recipe.evaluate import Evaluate
from pipelines.recipe.synthesize import Synthesize
from rayjobs import one_node
from rayjobs.one_node import node_needs
from tests.pipelines.train.conftest import train_recipe

ONE = {"CPU": 1.0}


def test_one_node_has_to_hold_what_merges_and_the_engines(tmp_path: Path) -> None:
    recipe = train_recipe(tmp_path, num_workers=2, resources_per_worker={"CPU": 4, "GPU": 1})
    recipe = recipe.model_copy(update={"serve": recipe.serve.model_copy(update={"num_gpus": 2, "num_cpus": 3})})
    assert node_needs(recipe) == {"CPU": 1}  # no stage asks engines
    assert node_needs(recipe.model_copy(update={"evaluate": Evaluate()})) == {"CPU": 6, "GPU": 4}
    local = {
        "model": "m",
        "engine": "vllm",
        "queries": ["q"],
        "dimensions": {"n": ["a"]},
        "styles": {"s": {"template": "{n}"}},
    }
    asking = recipe.model_copy(update={"synthesize": Synthesize.model_validate(local)})
    assert node_needs(asking) == {"CPU": 3, "GPU": 2}


def test_copies_of_checkpoints_have_no_place_beside_a_bucket(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"train\.checkpoint_copies.*lie already"):
        one_node.require_no_copies(train_recipe(tmp_path, checkpoint_copies="s3://elsewhere"))


@pytest.mark.slow
def test_a_run_goes_on_on_another_node_where_the_first_is_lost(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "lost"

    def lines(name: str, text: bytes, options: list[str]) -> Iterator[str | int]:
        yield f"runs {name} {text.decode()} {options}"
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        yield 7

    monkeypatch.setattr(one_node, "_lines", lines)
    assert one_node._follow(ONE, "mine.yaml", b"name: mine", ["--to", "train"]) == 7
    said = capsys.readouterr().err
    assert "runs mine.yaml name: mine ['--to', 'train']" in said
    assert "the node was lost" in said and "going on from what was stored" in said


@pytest.mark.slow
def test_a_run_that_is_told_to_end_ends_there_too(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "ended"

    def lines(name: str, text: bytes, options: list[str]) -> Iterator[str | int]:
        try:
            yield "begun"
            with suppress(KeyboardInterrupt):  # as where it is lost
                time.sleep(3)  # an interrupt is seen after it
            one_node._next(queue.Queue())
        finally:
            mark.touch()

    def told(text: str) -> None:
        raise SystemExit(143)

    monkeypatch.setattr(one_node, "_lines", lines)
    monkeypatch.setattr(one_node, "say", told)
    with pytest.raises(SystemExit):
        one_node._follow(ONE, "mine.yaml", b"", [])
    assert mark.exists()


def test_what_no_node_has_is_said_with_what_would_do(ray_cluster: None) -> None:
    told = r"needs one node of .*; the cluster lacks 8 GPU \(there: 0\); give a folder that every node sees"
    with pytest.raises(HardwareError, match=told):
        one_node._follow({"GPU": 8}, "mine.yaml", b"", [])
