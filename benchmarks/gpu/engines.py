"""What needs vLLM: engines in turn without HTTP, rows of base and adapter in one batch, the endpoint beside vLLM's own
server."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks import serving
from benchmarks.gpu.setting import SEED, Figures, Setting, need
from pipelines.llm.vllm_batch import Completion, Prompt, complete
from pipelines.models.served import ServedModel
from pipelines.recipe.serve import Engine, Serve
from rayjobs.cluster import Cluster

ADAPTER_RANK = 8
QUESTIONS = 16
BEGINNING = 2
"""Characters of an answer, about its first token."""
SAMPLING = {"max_tokens": 16, "temperature": 0.0}


def _serve(setting: Setting, rows_at_once: int = 32) -> Serve:
    """One engine on the card, or on a quarter of a CPU."""
    engine = Engine(
        max_model_len=512, max_num_seqs=rows_at_once, max_lora_rank=ADAPTER_RANK, enable_prefix_caching=False
    )
    if setting.dry:
        return Serve(engine=engine.model_copy(update={"kv_cache_memory_bytes": 64 << 20}))
    return Serve(engine=engine, num_gpus=1)


def batch(setting: Setting) -> Figures:
    """RuntimeError where rows of a mixed batch are not answered as they are one at a time.

    The two engines take the whole card one after the other, as `evaluate.engine: vllm` has them do for the base and the
    merged model: the second finds no room if the first leaves anything behind. In bfloat16 a batch of another size may
    take another token, since a model of random weights finds many nearly as good; so on a card it is counted how many
    answers are equal, and nine of ten must begin like their own model's.
    """
    need("vllm", "peft")
    model = setting.model("1.5b")
    served = ServedModel("base", str(model), {"adapter": str(_random_adapter(setting, model))})
    asked = range(QUESTIONS // 2 if setting.dry else QUESTIONS)
    questions = [(number, name) for number in asked for name in (None, "adapter")]
    with ExitStack() as stack:
        stack.enter_context(Cluster()).connect()
        mixed, alone = (_answers(_serve(setting, rows_at_once), served, questions) for rows_at_once in (32, 1))
    equal = sum(mixed[question] == alone[question] for question in questions)
    alike = sum(mixed[question][:BEGINNING] == alone[question][:BEGINNING] for question in questions)
    if alike < (len(questions) if setting.dry else 0.9 * len(questions)):
        raise RuntimeError(f"{len(questions) - alike} of {len(questions)} rows are not answered as by themselves")
    changed = sum(mixed[number, None] != mixed[number, "adapter"] for number in asked)
    if not changed:
        raise RuntimeError("the adapter changes no answer, so that nothing was shown")
    return {"engines": 2, "rows": len(questions), "equal": equal, "changed by the adapter": changed}


def _random_adapter(setting: Setting, model: Path) -> Path:
    """An adapter of random weights, large enough to change answers; written once."""
    folder = setting.folder / "models" / f"{model.name}-adapter"
    if not (folder / "adapter_config.json").is_file():
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(SEED)
        base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        config: Any = LoraConfig(
            r=ADAPTER_RANK,
            lora_alpha=8 * ADAPTER_RANK,
            target_modules="all-linear",
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        get_peft_model(base, config).save_pretrained(str(folder))
    return folder


def _answers(
    section: Serve, served: ServedModel, questions: list[tuple[int, str | None]]
) -> dict[tuple[int, str | None], str]:
    """The answer to each question, by the question and the adapter that it is asked of."""
    rows = pa.table(
        {
            "pos": pa.array(range(len(questions)), pa.int64()),
            "number": pa.array([number for number, _ in questions], pa.int64()),
            "adapter": pa.array([adapter for _, adapter in questions], pa.string()),
        }
    )
    found: list[Completion] = [c for block in complete(section, served, rows, prompt_of) for c in block]
    if wrong := [completion.error for completion in found if completion.error]:
        raise RuntimeError(f"{len(wrong)} questions were refused, the first: {wrong[0]}")
    return {questions[completion.pos]: completion.text for completion in found}


def prompt_of(row: dict[str, Any]) -> Prompt:
    """The question of a row."""
    text = f"{row['number']}: tell me about this number"
    return Prompt([{"role": "user", "content": text}], SAMPLING, row["adapter"])


def endpoint_beside_vllm(setting: Setting) -> Figures:
    """Requests per second and time to the first token of our endpoint and of vLLM's own server, one model each on half
    the card."""
    need("vllm")
    model = str(setting.model("1.5b"))
    if setting.dry:  # on the Ray of all parts
        runs = serving.beside_vllm(model, rounds=1, quick=True, ray_address=None, compared=2)
    else:
        runs = serving.beside_vllm(model, rounds=1, quick=True, num_gpus=0.5)
    ours, theirs = runs["danlu"], runs["vllm"]
    return {
        "requests/s": ours["requests_per_second"],
        "vLLM's": theirs["requests_per_second"],
        "ratio": round(ours["requests_per_second"] / theirs["requests_per_second"], 3),
        "added ms to first": round(ours["to_first_ms"] - theirs["to_first_ms"], 2),
        "equal": ours["equal"] and theirs["equal"],
    }
