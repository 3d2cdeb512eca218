"""The operators against a row-by-row computation, and the refusal of versions they were not written for."""

import pytest
import torch

vllm = pytest.importorskip("vllm")

from serve.engine import cpu_lora  # noqa: E402
from serve.engine.cpu_lora import expand, register, rows_by_adapter, shrink  # noqa: E402

SLOTS, RANK, INPUT, OUTPUT = 3, 4, 6, 5


@pytest.mark.parametrize("indices", [[-1, 0, 2, -1, 0], [1, 1, 1, 1, 1], [-1] * 5, [2, -1, -1, -1, 1]])
def test_rows_get_their_own_adapter_and_rows_without_one_get_nothing(indices: list[int]) -> None:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(5, INPUT, generator=generator)
    lora_a = torch.randn(SLOTS, 1, RANK, INPUT, generator=generator)
    lora_b = torch.randn(SLOTS, 1, OUTPUT, RANK, generator=generator)
    before = torch.randn(5, OUTPUT + 4, generator=generator)
    inner, out = torch.full((5, RANK), 9.0), before.clone()
    groups = rows_by_adapter(torch.tensor(indices))

    shrink(inner, x, lora_a, groups, 0.5)
    expand(out, inner, lora_b, groups, 2, True)

    for row, slot in enumerate(indices):
        expected = before[row].clone()
        if slot >= 0:
            expected[2 : 2 + OUTPUT] += lora_b[slot, 0] @ (0.5 * lora_a[slot, 0] @ x[row])
        torch.testing.assert_close(out[row], expected)


def test_a_vllm_it_was_not_written_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_lora.vllm, "__version__", "0.99.0")
    with pytest.raises(RuntimeError, match=r"vLLM 0\.99\.0: adapters on a CPU are known to be correct with 0\.29\.0"):
        register()


def test_the_entry_point_is_installed() -> None:
    from importlib.metadata import entry_points

    (found,) = [e for e in entry_points(group="vllm.general_plugins") if e.name == "danlu_cpu_lora"]
    assert found.load() is register
