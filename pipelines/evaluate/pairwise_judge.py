"""A judge model says which of two answers is better, twice with the answers' places swapped."""

import re
from collections.abc import Sequence
from dataclasses import asdict

from pipelines.artifacts.reports.evaluate import ComparedRow, JudgeResult
from pipelines.artifacts.reports.interval import Interval
from pipelines.artifacts.workspace import Workspace
from pipelines.llm.dispatch import answers_to
from pipelines.llm.requests import ChatRequest, MalformedError, RequestList
from pipelines.metrics.bootstrap import bootstrap
from pipelines.recipe.evaluate import PairwiseJudge

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
    workspace: Workspace, section: PairwiseJudge, rows: Sequence[ComparedRow], base: str, tuned: str, seed: int
) -> JudgeResult:
    """Judge the tuned model's answers of `compare` against the base model's; what the ledger knows is not asked again.

    A question is won where both judgements say so, lost where both say so, else a tie, which counts half. Questions
    with a judgement that was refused or names no winner are left out and counted as failed. StageError where the
    judge is stopped.
    """
    entries = [
        ({"judge": row.row_id, "places": place}, fields)
        for row in rows
        for place, fields in zip(PLACES, _fields(row, base, tuned), strict=True)
    ]
    answers = answers_to(workspace, RequestList(section, SECTION_KEY, PROMPT, entries, _check_answer))
    letters = [None if "reason" in known else winning_letter(known["text"]) for _, known in answers]
    pairs = zip(letters[::2], letters[1::2], strict=True)
    outcomes = {row.row_id: _outcome(*pair) for row, pair in zip(rows, pairs, strict=True)}
    judged = [outcome for outcome in outcomes.values() if outcome is not None]
    return JudgeResult(
        model=section.model,
        tuned=tuned,
        base=base,
        wins=judged.count(1.0),
        ties=judged.count(0.5),
        losses=judged.count(0.0),
        failed=len(outcomes) - len(judged),
        win_rate=Interval(**asdict(bootstrap(judged, seed))) if judged else None,
        outcomes=outcomes,
    )


def winning_letter(text: str) -> str | None:
    """The letter that stands alone in the last line with one: A, B, or C for a tie; None where there is none."""
    found = re.findall(r"(?m)^\W*(?:答案|结论|verdict|winner)?\W*([ABC])\W*$", text, flags=re.IGNORECASE)
    return str(found[-1]).upper() if found else None


def _check_answer(request: ChatRequest, text: str) -> None:
    if winning_letter(text) is None:
        raise MalformedError("no line with A, B or C alone")


def _fields(row: ComparedRow, base: str, tuned: str) -> list[dict[str, str]]:
    answers = row.answers[base], row.answers[tuned]
    return [
        {"query": row.query, "reference": row.reference, "first": first, "second": second}
        for first, second in (answers, answers[::-1])
    ]


def _outcome(base_first: str | None, tuned_first: str | None) -> float | None:
    """1 where the tuned model wins, 0 where it loses, 0.5 for a tie, None where a judgement failed."""
    if base_first is None or tuned_first is None:
        return None
    return {("B", "A"): 1.0, ("A", "B"): 0.0}.get((base_first, tuned_first), 0.5)
