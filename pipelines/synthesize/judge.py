"""The judge: a model that scores every answer by a rubric; what scores too low is dropped with its reason."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.records import messages_of
from pipelines.synthesize.asking import ask, is_complete, read_answers
from pipelines.synthesize.ledger import read_index
from pipelines.synthesize.questions import Request, key_of
from pipelines.synthesize.refine_section import Judge
from pipelines.synthesize.shapes import read_json
from pipelines.workspace import Workspace

BEST = 10
SCORE = {
    "type": "object",
    "properties": {"reason": {"type": "string"}, "score": {"type": "number", "minimum": 1, "maximum": BEST}},
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


class Judging:
    """One question for each row, by its number."""

    response_format = None

    def __init__(self, section: Judge, rows: Sequence[Mapping[str, Any]]) -> None:
        self.section = section
        self._rows = [(str(row["row_id"]), _shown(row)) for row in rows]

    @property
    def size(self) -> int:
        """As many as there are rows."""
        return len(self._rows)

    def positions(self, start: int = 0, stop: int | None = None) -> Iterator[int]:
        """All of them."""
        yield from range(start, self.size if stop is None else stop)

    def request(self, pos: int) -> Request:
        """The question about one row."""
        row_id, conversation = self._rows[pos]
        prompt = PROMPT.format(best=BEST, rubric=self.section.rubric, conversation=conversation)
        messages = [{"role": "user", "content": prompt}]
        cell = {"judge": row_id}
        return Request(pos, cell, 0, messages, "", key_of(self.section, messages, cell, 0))

    def check(self, request: Request, text: str) -> None:
        """Raise MalformedError where an answer holds no score."""
        read_json(text, SCORE)


def judge_rows(workspace: Workspace, section: Judge, rows: Sequence[Mapping[str, Any]]) -> dict[int, Judgement]:
    """A judgement of each row, by its `pos`; what the ledger knows is not asked again."""
    questions = Judging(section, rows)
    if not is_complete(workspace, questions):
        ask(workspace, questions, lambda state: state.pending)
    requests = list(map(questions.request, questions.positions()))
    answers = read_answers(workspace, read_index(workspace), requests)
    return {int(row["pos"]): _judgement(known) for row, (_, known) in zip(rows, answers, strict=True)}


def _judgement(known: Mapping[str, Any]) -> Judgement:
    if "reason" in known:
        return Judgement(None, known["reason"])
    value = read_json(known["text"], SCORE)
    return Judgement(float(value["score"]), str(value.get("reason", "")))


def _shown(row: Mapping[str, Any]) -> str:
    return "\n".join(f"{SPEAKERS[turn['role']]}：{turn['content']}" for turn in messages_of(dict(row)))
