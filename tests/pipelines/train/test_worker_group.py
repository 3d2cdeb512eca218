"""What a group of workers is refused for, and what is said of one that Ray ended."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.errors import HardwareError, StageError
from pipelines.recipe.schema import Recipe
from pipelines.train import worker_group as workers
from pipelines.train.run import Run
from pipelines.train.tokenize import Tokenized


def test_processors_that_something_else_holds_are_named(
    ray_cluster: None, recipe_of: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    section = recipe_of().train
    assert section
    monkeypatch.setattr(workers, "FREE_SECONDS", 1)
    held = placement_group([{"CPU": 2}])
    ray.get(held.ready())
    try:
        told = r"2 workers of .*; something else on the cluster holds 2 CPU \(there: 0\); stop it, or lower train.num"
        with pytest.raises(HardwareError, match=told):
            workers.check_resources(section)
    finally:
        remove_placement_group(held)


def test_a_worker_that_ray_ended_to_save_its_node_is_explained(
    recipe_of: Callable[..., Recipe], tiny_model: Path, tmp_path: Path
) -> None:
    from ray.exceptions import OutOfMemoryError
    from ray.train.v2.api.exceptions import WorkerGroupError

    section = recipe_of(method="full", zero_stage=2).train
    assert section
    run = Run(section, 1, 1, tiny_model, tmp_path, Tokenized([], "", 0, {}), None)
    lost = WorkerGroupError("a worker died", {1: OutOfMemoryError("Task was killed due to the node running low")})
    cause = workers._own(lost, run)
    assert isinstance(cause, StageError)
    told = "training: a node's main memory ran out; set train.gradient_checkpointing: true, lower train.max_length, "
    told += "lower train.num_workers, use train.method: lora, or raise train.zero_stage, or add memory"
    assert str(cause) == told
