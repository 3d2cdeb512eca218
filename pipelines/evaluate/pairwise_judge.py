"""A judge model says which of two answers is better, twice with the answers' places swapped."""

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pipelines.artifacts.workspace import Workspace
from pipelines.llm.dispatch import answers_to
from pipelines.llm.requests import Listed, MalformedError, Request
from pipelines.metrics.bootstrap import bootstrap
from pipelines.recipe.evaluate import Judge

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

SECTION_KEY = "compare.judge"
PLACES = ("base first", "tuned first")


def judge_answers(
    workspace: Workspace, section: Judge, rows: Sequence[dict[str, Any]], base: str, tuned: str, seed: int
) -> dict[str, Any]:
    """Judge the tuned model's answers of `compare` against the base model's; what the ledger knows is not asked again.

    A question is won where both judgements say so, lost where both say so, else a tie, which counts half. Questions
    with a judgement that was refused or names no winner are left out and counted as failed. StageError where the
    judge is stopped.
    """
    asked = [
        ({"judge": str(row["row_id"]), "places": place}, fields)
        for row in rows
        for place, fields in zip(PLACES, _fields(row, base, tuned), strict=True)
    ]
    answers = answers_to(workspace, Listed(section, SECTION_KEY, PROMPT, asked, _check))
    letters = [None if "reason" in known else verdict(known["text"]) for _, known in answers]
    pairs = zip(letters[::2], letters[1::2], strict=True)
    outcomes = {str(row["row_id"]): _outcome(*pair) for row, pair in zip(rows, pairs, strict=True)}
    return {"model": section.model, "tuned": tuned, "base": base, **_tally(outcomes, seed)}


def verdict(text: str) -> str | None:
    """The letter that stands alone in the last line with one: A, B, or C for a tie; None where there is none."""
    found = re.findall(r"(?m)^\W*(?:答案|结论|verdict|winner)?\W*([ABC])\W*$", text, flags=re.IGNORECASE)
    return str(found[-1]).upper() if found else None


def _check(request: Request, text: str) -> None:
    if verdict(text) is None:
        raise MalformedError("no line with A, B or C alone")


def _fields(row: dict[str, Any], base: str, tuned: str) -> list[dict[str, str]]:
    answers = row["answers"][base], row["answers"][tuned]
    return [
        {"query": row["query"], "reference": row["reference"], "first": first, "second": second}
        for first, second in (answers, answers[::-1])
    ]


def _outcome(base_first: str | None, tuned_first: str | None) -> float | None:
    """1 where the tuned model wins, 0 where it loses, 0.5 for a tie, None where a judgement failed."""
    if base_first is None or tuned_first is None:
        return None
    return {("B", "A"): 1.0, ("A", "B"): 0.0}.get((base_first, tuned_first), 0.5)


def _tally(outcomes: dict[str, float | None], seed: int) -> dict[str, Any]:
    judged = [outcome for outcome in outcomes.values() if outcome is not None]
    counts = {name: judged.count(value) for name, value in (("wins", 1.0), ("ties", 0.5), ("losses", 0.0))}
    rate = asdict(bootstrap(judged, seed)) if judged else None
    return {**counts, "failed": len(outcomes) - len(judged), "win_rate": rate, "outcomes": outcomes}
