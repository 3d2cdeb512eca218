"""Training on a cluster that an autoscaler plans."""

import time
from collections.abc import Callable

import pytest

from pipelines import placement
from pipelines.errors import HardwareError, StageError
from pipelines.placement import lacking_for_good
from pipelines.recipe.schema import Recipe
from pipelines.train.worker_group import check_resources
from tests.autoscaling_cluster import autoscaling_cluster


@pytest.mark.slow
def test_a_cluster_grows_from_nothing_for_workers_and_shrinks_after(
    recipe_of: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    monkeypatch.setattr(placement, "SAY_SECONDS", 3)
    types = {
        "cpu": {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 2},
        "gpu": {
            "resources": {"CPU": 1, "GPU": 1, "accelerator_type:T4": 1},
            "node_config": {},
            "min_workers": 0,
            "max_workers": 1,
        },
    }
    with autoscaling_cluster(types, idle_minutes=0.2) as address:
        ray.init(address, log_to_driver=False)
        try:
            assert [node.get("CPU", 0) for node in placement.alive()] == [0]
            section = recipe_of(num_workers=2, resources_per_worker={"CPU": 2}).train
            assert section
            began = time.monotonic()
            wrong = section.model_copy(update={"resources_per_worker": {"GPU": 1, "accelerator_type:H100": 0.01}})
            told = r"2 workers of .*; the cluster lacks 2 GPU \(there: 0\), 0.02 accelerator_type:H100 .*or add nodes"
            with pytest.raises(HardwareError, match=told):
                check_resources(wrong)
            assert time.monotonic() - began < placement.GROW_SECONDS / 20
            check_resources(section)
            assert sorted(node.get("CPU", 0) for node in placement.alive()) == [0, 2, 2]
            assert "waiting for the cluster to grow" in capsys.readouterr().err
            with pytest.raises(HardwareError, match=r"4 workers of .*lacks 8 CPU"):
                check_resources(section.model_copy(update={"num_workers": 4}))
            one = {"num_workers": 1, "resources_per_worker": {"GPU": 1, "accelerator_type:T4": 0.01}}
            check_resources(section.model_copy(update=one))
            assert sum(node.get("GPU", 0) for node in placement.alive()) == 1
            until = time.monotonic() + 300
            while len(placement.alive()) > 1 and time.monotonic() < until:
                time.sleep(1)
            assert [node.get("CPU", 0) for node in placement.alive()] == [0]
            monkeypatch.setattr(placement, "GROW_SECONDS", 0)
            monkeypatch.setattr(placement, "LOOK_SECONDS", 0.01)  # sooner than a node of this cluster comes
            with pytest.raises(StageError, match=r"did not grow to it .*`ray status` says why"):
                lacking_for_good([{"CPU": 2}], "training needs 1 worker")
        finally:
            ray.shutdown()
