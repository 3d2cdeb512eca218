"""Answers to the held-out rows while training, and how close they come to what the rows say.

Imported in training workers only.
"""

from typing import Any

import torch
import torch.distributed as dist

from pipelines.metrics.rouge import rouge_l_f
from pipelines.models.tokenizer import load_tokenizer
from pipelines.train.loss_mask import IGNORE_INDEX, Encoded
from pipelines.train.run import Run
from pipelines.train.samples import Samples
from pipelines.train.sampling import generating
from pipelines.train.truncation import answer_begin

BATCH = 8
"""Rows answered together."""


def predict(run: Run, model: Any, samples: Samples) -> dict[str, float]:
    """Answer the last question of every held-out sample, greedily; mean ROUGE-L F1 and BLEU-4 of the answers.

    Every rank must call it. Under ZeRO-3 all of them compute every answer, else they share them.
    """
    rank, ranks = (0, 1) if run.section.zero_stage == 3 else (dist.get_rank(), dist.get_world_size())
    mine = range(rank, len(samples), ranks)
    scores = torch.zeros(3, dtype=torch.float64)
    with generating(model):
        for begin in range(0, len(mine), BATCH):
            for answer, reference in _answers(run, model, [samples[i] for i in mine[begin : begin + BATCH]]):
                scores += torch.tensor([rouge_l_f(answer, reference), bleu_4(answer, reference), 1])
    scores = scores.to(model.device)
    if ranks > 1:
        dist.all_reduce(scores)
    return {"rouge-l-f": float(scores[0] / scores[2]), "bleu-4": float(scores[1] / scores[2])}


def bleu_4(answer: str, reference: str) -> float:
    """BLEU of up to four characters, smoothed by method 3 of Chen and Cherry (2014), as ChatGLM3's recipes score."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    if not answer:
        return 0.0
    return float(sentence_bleu([list(reference)], list(answer), smoothing_function=SmoothingFunction().method3))


def _answers(run: Run, model: Any, rows: list[Any]) -> list[tuple[str, str]]:
    """What the model answers and what it should have, for a few samples at once, filled up on the left."""
    tokenizer, _ = load_tokenizer(run.model)
    encoded = [Encoded(tokens.tolist(), labels.tolist()) for tokens, labels in rows]
    prompts = [sample.tokens[: answer_begin(sample)] for sample in encoded]
    longest = max(map(len, prompts))
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([[padding] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    with torch.no_grad():
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=run.section.evaluation_max_tokens,
            do_sample=False,
            pad_token_id=padding,
        )
    answers = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
    wanted = [[label for label in sample.labels[answer_begin(sample) :] if label != IGNORE_INDEX] for sample in encoded]
    references = tokenizer.batch_decode(wanted, skip_special_tokens=True)
    return [(answer.strip(), reference.strip()) for answer, reference in zip(answers, references, strict=True)]
