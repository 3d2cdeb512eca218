"""Engines in the cluster, asked without HTTP."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

pytest.importorskip("vllm")

from pipelines.llm import vllm_batch
from pipelines.llm.vllm_batch import Prompt, complete
from pipelines.models.served import ServedModel
from pipelines.recipe.serve import Engine, Serve

SERVE = Serve(num_cpus=0.5, engine=Engine(max_model_len=256, max_num_seqs=8, kv_cache_memory_bytes=64 << 20))
SEEDS = [5, 5, 6, None, None, 0, -3, (1 << 63) - 1]


def prompt_of(row: dict[str, Any]) -> Prompt:
    """The same question each time, answered at random."""
    sampling = {"max_tokens": 24, "temperature": 1.5, "ignore_eos": True}
    seed = {} if row["seed"] is None else {"seed": row["seed"]}
    return Prompt([{"role": "user", "content": "hello"}], {**sampling, **seed})


def test_seeds_stay_whole_numbers_beside_requests_without_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(vllm_batch, "tokenize", lambda *_: [1])
    monkeypatch.setattr(vllm_batch, "_tokenizer", lambda _: SimpleNamespace(eos_token_id=None))
    asked = vllm_batch._preprocess(ServedModel("tiny", str(tmp_path)), prompt_of)
    made = [asked({"pos": pos, "seed": seed})["sampling_params"] for pos, seed in enumerate(SEEDS)]
    arrived = pa.array(made).to_numpy(zero_copy_only=False)  # as Ray Data gives them to the engine's stage
    assert [sampling["seed"] for sampling in arrived] == [5, 5, 6, -1, -1, 0, -3, (1 << 63) - 1]
    assert {type(sampling["seed"]) for sampling in arrived} == {int}


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_seed_gives_the_same_answer_again_and_another_seed_another_one(tiny_model: Path) -> None:
    rows = pa.table({"pos": range(2 * len(SEEDS)), "seed": pa.array(SEEDS * 2, pa.int64())})
    found = [c for block in complete(SERVE, ServedModel("tiny", str(tiny_model)), rows, prompt_of) for c in block]
    assert [completion.error for completion in found] == [""] * len(rows)
    texts = {completion.pos: completion.text for completion in found}
    first, second = ([texts[pos] for pos in range(start, start + len(SEEDS))] for start in (0, len(SEEDS)))
    assert first[0] == first[1]
    seeded = [n for n, seed in enumerate(SEEDS) if seed is not None]
    assert [first[n] for n in seeded] == [second[n] for n in seeded]
    assert len({*first, *second}) == len({SEEDS[n] for n in seeded}) + 4  # without a seed each is its own
