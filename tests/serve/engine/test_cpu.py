"""What is put right in vLLM's CPU build, and the refusal of versions it was not written for."""

from importlib.metadata import entry_points

import pytest
import torch

vllm = pytest.importorskip("vllm")

from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.model_executor.layers.rotary_embedding import get_rope  # noqa: E402

from serve.engine.cpu import register  # noqa: E402


def test_a_vllm_it_was_not_written_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    with pytest.raises(RuntimeError, match=r"vLLM 0\.99\.0: answers on a CPU are known to be correct with 0\.29\.0"):
        register()


def test_the_entry_point_is_installed() -> None:
    (found,) = [e for e in entry_points(group="vllm.general_plugins") if e.name == "danlu_cpu"]
    assert found.load() is register


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("shape", [(7, 4, 32), (7, 128)])
def test_every_head_is_turned(is_neox: bool, shape: tuple[int, ...]) -> None:
    register()
    with set_current_vllm_config(VllmConfig()):
        rope = get_rope(
            32,
            max_position=64,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            is_neox_style=is_neox,
            dtype=torch.float32,
        )
    torch.manual_seed(0)
    query, key, places = torch.randn(shape), torch.randn(7, 32), torch.arange(7)
    expected = rope.forward_native(places, query.clone(), key.clone())
    for found, right in zip(rope(places, query, key), expected, strict=True):
        torch.testing.assert_close(found, right)
