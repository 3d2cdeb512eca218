"""What a group of workers is refused for, and what is said of one that Ray ended."""

import re
from collections.abc import Callable
from pathlib import Path

import psutil
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


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (OSError(28, "No space left on device", "checkpoint-2"), r"a disk is full at step 3 .*save_total_limit"),
        (RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/7"), r"a disk is full at step 3"),
        (OSError(122, "Disk quota exceeded"), r"a disk is full at step 3"),
        (IndexError("index 301 is out of range"), r"training failed at step 3:(?s:.)*the loop"),
        (PermissionError(13, "Permission denied", "journal"), r"training failed at step 3"),
    ],
)
def test_an_exception_of_the_loop_ends_training_with_its_cause(failure: Exception, told: str) -> None:
    from ray.train.v2.api.exceptions import WorkerGroupError

    peer = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1")
    ended = workers._of_loop(WorkerGroupError("the loop", {0: peer, 1: failure}), 3)
    assert isinstance(ended, StageError)
    assert re.search(told, str(ended))


def test_what_follows_from_a_lost_worker_is_no_exception_of_the_loop() -> None:
    from ray.exceptions import ActorDiedError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
    from ray.train.v2.api.exceptions import WorkerGroupError

    peer = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1")
    for lost in (ActorDiedError(), WorkerHealthCheckFailedError("no answer", ActorDiedError())):
        assert workers._of_loop(WorkerGroupError("a worker died", {0: peer, 1: lost}), 3) is None


def test_workers_meet_at_the_interface_by_which_ray_reaches_their_node() -> None:
    from pipelines.train.process_group import interface_of

    found = interface_of("127.0.0.1")
    assert found and "127.0.0.1" in {address.address for address in psutil.net_if_addrs()[found]}
    assert interface_of("192.0.2.1") is None
