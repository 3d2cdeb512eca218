"""A judge model says which of two answers is better, twice with the answers' places swapped."""

import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines.bootstrap import bootstrap
from pipelines.evaluate.asking import Answer, Manner, Request, ask
from pipelines.evaluate.endpoint import api_key
from pipelines.evaluate.section import Judge
from pipelines.section import Generation

PROMPT = """你是公正的评审。下面是一个问题和两个回答。哪个回答更好？好的回答切题、真实、自然、不重复；不因篇幅长而更好。

问题：
{query}

参考回答（可能为空）：
{reference}

回答 A：
{first}

回答 B：
{second}

先用一句话说明理由，然后在最后一行只写一个字母：A、B，或 C（不相上下）。"""
"""After the pairwise prompt of Zheng et al. 2023, Judging LLM-as-a-Judge, without a score and with a tie."""

PLACES = ("base first", "tuned first")


def judge_answers(
    section: Judge, rows: Sequence[dict[str, Any]], base: str, tuned: str, file: Path, seed: int
) -> dict[str, Any]:
    """Judge the tuned model's answers of `compare` against the base model's.

    A question is won where both judgements say so, lost where both say so, else a tie, which counts half. Questions
    with a judgement that was refused or names no winner are left out and counted as failed.
    """
    manner = Manner(
        section.endpoint, os.environ.get("JUDGE_API_KEY") or api_key(), section.concurrency, section.timeout
    )
    generation = Generation(max_tokens=256, temperature=0.0)
    requests = [
        Request(_key(row, place), section.model, [{"role": "user", "content": prompt}], generation)
        for row in rows
        for place, prompt in zip(PLACES, _prompts(row, base, tuned), strict=True)
    ]
    judgements = ask(manner, requests, file, "judgements", may_refuse=True)
    outcomes = {str(row["row_id"]): _outcome(row, judgements) for row in rows}
    return {"model": section.model, "tuned": tuned, "base": base, **_tally(outcomes, seed)}


def verdict(text: str) -> str | None:
    """The letter that stands alone in the last line with one: A, B, or C for a tie; None where there is none."""
    found = re.findall(r"(?m)^\W*(?:答案|结论|verdict|winner)?\W*([ABC])\W*$", text, flags=re.IGNORECASE)
    return str(found[-1]).upper() if found else None


def _prompts(row: dict[str, Any], base: str, tuned: str) -> list[str]:
    answers = row["answers"][base], row["answers"][tuned]
    return [
        PROMPT.format(query=row["query"], reference=row["reference"], first=first, second=second)
        for first, second in (answers, answers[::-1])
    ]


def _key(row: dict[str, Any], place: str) -> str:
    return f"{row['row_id']}/{place}"


def _outcome(row: dict[str, Any], judgements: dict[str, Answer]) -> float | None:
    """1 where the tuned model wins, 0 where it loses, 0.5 for a tie, None where a judgement failed."""
    letters = [
        verdict(judgements[_key(row, place)].answer) if _key(row, place) in judgements else None for place in PLACES
    ]
    if None in letters:
        return None
    return {("B", "A"): 1.0, ("A", "B"): 0.0}.get((str(letters[0]), str(letters[1])), 0.5)


def _tally(outcomes: dict[str, float | None], seed: int) -> dict[str, Any]:
    judged = [outcome for outcome in outcomes.values() if outcome is not None]
    counts = {name: judged.count(value) for name, value in (("wins", 1.0), ("ties", 0.5), ("losses", 0.0))}
    rate = asdict(bootstrap(judged, seed)) if judged else None
    return {**counts, "failed": len(outcomes) - len(judged), "win_rate": rate, "outcomes": outcomes}
