"""What a cluster has room for, and how long room is waited for."""

import pytest

from pipelines import placement
from pipelines.placement import lacking, lacking_for_good


@pytest.mark.parametrize(
    ("bundles", "nodes", "short"),
    [
        ([{"CPU": 1}] * 3, [{"CPU": 2}, {"CPU": 1}], ""),
        ([{"CPU": 0.1}] * 30, [{"CPU": 3}], ""),
        ([], [], ""),
        ([{"CPU": 2}] * 2, [{"CPU": 3}, {"CPU": 1}], "nodes with room for 2 CPU"),
        ([{"CPU": 1, "GPU": 1}] * 2, [{"CPU": 8}, {"CPU": 1, "GPU": 2}], "nodes with room for 1 CPU, 1 GPU"),
        ([{"CPU": 1, "GPU": 1}] * 2, [{"CPU": 1}], "2 CPU (there: 1), 2 GPU (there: 0)"),
        ([{"GPU": 1, "accelerator_type:H100": 0.01}], [{"GPU": 8}], "0.01 accelerator_type:H100 (there: 0)"),
        ([{"CPU": 1}], [], "1 CPU (there: 0)"),
    ],
)
def test_what_is_lacking_is_what_no_sharing_out_over_nodes_gives(
    bundles: list[dict[str, float]], nodes: list[dict[str, float]], short: str
) -> None:
    assert lacking(bundles, nodes) == short


def test_on_a_cluster_that_cannot_grow_nothing_is_waited_for_but_lost_nodes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = [{"CPU": 2.0}]
    looks: list[int] = []

    def alive() -> list[dict[str, float]]:
        looks.append(1)
        return nodes * 2 if len(looks) > 4 else nodes

    monkeypatch.setattr(placement, "alive", alive)
    monkeypatch.setattr(placement, "can_grow", lambda: False)
    monkeypatch.setattr(placement, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(placement, "SAY_SECONDS", 0.02)
    assert lacking_for_good([{"CPU": 1}] * 4, "training") == "4 CPU (there: 2)"
    assert len(looks) == 1
    assert lacking_for_good([{"CPU": 1, "GPU": 0}] * 4, "training", patience=60) == ""
    assert len(looks) == 5
    looks.clear()
    assert lacking_for_good([{"CPU": 1}] * 9, "training", patience=0.3) == "9 CPU (there: 4)"
    assert "training: waiting for nodes to return (0 s)" in capsys.readouterr().err
