"""The judge: a model that scores every answer by a rubric; what scores too low is dropped with its reason."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.artifacts.rows import messages_of
from pipelines.artifacts.workspace import Workspace
from pipelines.llm.dispatch import answers_to
from pipelines.llm.json_answers import read_json
from pipelines.llm.requests import RequestList
from pipelines.recipe.refine import RefineJudge

SECTION_KEY = "refine.judge"
MAX_SCORE = 10
SCORE = {
    "type": "object",
    "properties": {"reason": {"type": "string"}, "score": {"type": "number", "minimum": 1, "maximum": MAX_SCORE}},
    "required": ["score"],
}
PROMPT = """请按评分标准给下面对话里助手的回答打分，1 分最差，{best} 分最好。

评分标准：
{rubric}

对话：
{conversation}

只回答 JSON，先写一句理由，再写分数：{{"reason": "……", "score": 分数}}"""
SPEAKERS = {"system": "设定", "user": "用户", "assistant": "助手"}


@dataclass(frozen=True)
class Judgement:
    """What the judge says of one row; `score` is None where it gave no usable answer, and `reason` then says why."""

    score: float | None
    reason: str


def judge_rows(workspace: Workspace, section: RefineJudge, rows: Sequence[Mapping[str, Any]]) -> dict[int, Judgement]:
    """A judgement of each row, by its `pos`; what the ledger knows is not sent again."""
    fields = {"best": MAX_SCORE, "rubric": section.rubric}
    entries = [({"judge": str(row["row_id"])}, {**fields, "conversation": _shown(row)}) for row in rows]
    requests = RequestList(section, SECTION_KEY, PROMPT, entries, lambda request, text: read_json(text, SCORE))
    answers = answers_to(workspace, requests)
    return {int(row["pos"]): _judgement(known) for row, (_, known) in zip(rows, answers, strict=True)}


def _judgement(known: Mapping[str, Any]) -> Judgement:
    if "reason" in known:
        return Judgement(None, known["reason"])
    value = read_json(known["text"], SCORE)
    return Judgement(float(value["score"]), str(value.get("reason", "")))


def _shown(row: Mapping[str, Any]) -> str:
    return "\n".join(f"{SPEAKERS[turn['role']]}：{turn['content']}" for turn in messages_of(dict(row)))
