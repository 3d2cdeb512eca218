"""Answers of the model while it is trained, so that a person can see where it learns and where it overfits.

`samples.jsonl`: {"step": 50, "input": "你是谁？", "output": "…"}, one line per input and step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipelines.models.tokenizer import load_tokenizer
from pipelines.train.journal import append
from pipelines.train.loss_mask import with_system
from pipelines.train.run import Run


def sample(run: Run, model: Any, step: int) -> None:
    """Answer the recipe's evaluation inputs, greedily, and add the answers to the samples.

    Every rank must call it. Under ZeRO-3 all of them compute every answer, because each holds a part of the
    weights; else they share the inputs.
    """
    import torch.distributed as dist

    section = run.section
    rank, ranks = dist.get_rank(), dist.get_world_size()
    numbers = range(len(section.evaluation_inputs))
    mine = numbers if section.zero_stage == 3 else numbers[rank::ranks]
    with generating(model):
        answers = {number: _answer(run, model, section.evaluation_inputs[number]) for number in mine}
    gathered: list[Any] = [None] * ranks
    dist.all_gather_object(gathered, answers)
    if rank == 0:
        merged = {number: answer for part in gathered for number, answer in part.items()}
        for number in numbers:
            append(run.samples, {"step": step, "input": section.evaluation_inputs[number], "output": merged[number]})


def _answer(run: Run, model: Any, text: str) -> str:
    import torch

    tokenizer, _ = load_tokenizer(run.model)
    prompt = text
    if run.section.objective == "sft":  # plain text is gone on with as it stands
        messages = with_system([{"role": "user", "content": text}], run.section.system)
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    encoded = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(model.device)
    with torch.no_grad():
        output = model.generate(
            **encoded,
            max_new_tokens=run.section.evaluation_max_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
    answer: str = tokenizer.decode(output[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer.strip()  # ChatGLM3 begins its answers with a line break


@contextmanager
def generating(model: Any) -> Iterator[None]:
    """The model as generation needs it: no dropout, and attention that knows a cache."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    attention = base.config._attn_implementation
    training = model.training
    model.eval()
    # PyTorch's own attention knows no caps of scores and no sinks
    plain = getattr(base.config, "attn_logit_softcapping", None) is None and base._supports_sdpa
    base.set_attn_implementation("sdpa" if plain else "eager")
    try:
        yield
    finally:
        base.set_attn_implementation(attention)
        model.train(training)
