"""Compare: the same questions to every model at the same settings, side by side."""

import hashlib
import html
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pipelines.artifacts.reports.evaluate import ComparedRow, CompareReport, ProbeScores
from pipelines.artifacts.stage import Stage
from pipelines.artifacts.workspace import Place
from pipelines.errors import Problem
from pipelines.evaluate.answers import EvaluationAnswer, EvaluationRequest, kept_answers, unanswered
from pipelines.evaluate.ask import RequestOptions, ask_endpoint
from pipelines.evaluate.batch import answer_in_batch
from pipelines.evaluate.endpoint import ON_DISK, ModelInputs, models_endpoint
from pipelines.evaluate.pairwise_judge import SECTION_KEY, judge_answers
from pipelines.evaluate.questions import Question, held_out_questions, probe_questions
from pipelines.evaluate.sweep import (
    checkpoint_requests,
    checkpoint_result,
    recommendation,
    sweep_requests,
    sweep_result,
)
from pipelines.llm.dispatch import missing_keys
from pipelines.metrics.rouge import rouge_l_f
from pipelines.metrics.style import loops
from pipelines.models.lineup import Lineup, checkpoint_adapters, served_models
from pipelines.models.served import BASE
from pipelines.recipe.evaluate import Compare
from pipelines.recipe.keys import endpoint_key
from pipelines.recipe.llm import NOT_IN_FINGERPRINT
from pipelines.recipe.serve import Serve

Answers = Mapping[str, EvaluationAnswer]


@dataclass(frozen=True)
class _Plan:
    """What is asked: probes by group and test questions of every model; `rated` of every checkpoint, whose names
    are in `steps`; `swept` of the tuned model at every setting."""

    probes: dict[str, list[Question]]
    questions: list[Question]
    rated: list[Question]
    swept: list[Question]
    steps: dict[int, str]
    requests: list[EvaluationRequest]


@dataclass(frozen=True)
class CompareStage(Stage[ModelInputs, CompareReport]):
    """Ask every model the probes and the first test questions; write `compare.md` and all answers as JSONL.

    Where the recipe asks for them: the same of every checkpoint, the tuned model over a grid of settings, a judge's
    opinion.
    """

    name: ClassVar[str] = "compare"
    version: ClassVar[int] = 2
    on_disk: ClassVar[tuple[str, ...]] = ON_DISK

    section: Compare
    models: Lineup
    serve: Serve
    system: str | None
    """The system prompt of rows that bring none."""
    seed: int

    @property
    def reports(self) -> type[CompareReport]:
        """The class of its report."""
        return CompareReport

    def fingerprint_inputs(self) -> dict[str, Any]:
        """The section, and what the answers further follow from; not what only changes speed."""
        return {
            "section": self.section.model_dump(
                mode="json", exclude={"concurrency": True, "timeout": True, "judge": set(NOT_IN_FINGERPRINT)}
            ),
            "system": self.system,
            "engine": self.serve.engine.model_dump(include={"dtype", "max_model_len"}),
            "models": self.models.names(),
            **self.models.fingerprint(),
        }

    def preflight(self) -> list[Problem]:
        """The keys of the judge's endpoints that are not set."""
        return missing_keys(self.section.judge, SECTION_KEY) if self.section.judge else []

    def run(self, place: Place, inputs: ModelInputs) -> CompareReport:
        """Ask what is not answered yet; an answer is kept when it arrives. StageError where a model cannot be asked."""
        section = self.section
        plan = self._plan(inputs)
        answers = self._answers(plan.requests, place.local("answers.jsonl"), inputs)
        names = self.models.names()
        questions = [*itertools.chain(*plan.probes.values()), *plan.questions]
        rows = [_row(question, names, answers) for question in questions]
        place.workspace.write(place.path("compare.md"), _markdown(rows, names).encode())
        judged = swept = checkpoints = None
        if section.judge:
            judged = judge_answers(place.workspace, section.judge, rows, BASE, self.models.name, self.seed)
        if section.sweep:
            swept = sweep_result(section.sweep, plan.swept, answers, section.max_loop_share)
        if plan.steps:
            checkpoints = checkpoint_result(plan.steps, plan.rated, answers, section.max_loop_share)

        empty = {name: sum(not row.answers[name].strip() for row in rows) for name in names}
        summary = [f"{len(rows)} questions to {', '.join(names)}"]
        summary += [f"{name} gave {count} empty answers" for name, count in empty.items() if count]
        if swept:
            summary.append(f"the sweep recommends {recommendation(swept.recommended)}")
        said = json.dumps([row.model_dump(exclude_defaults=True) for row in rows], ensure_ascii=False)
        return CompareReport(
            summary="; ".join(summary),
            digest=hashlib.sha256(said.encode()).hexdigest(),
            models=names,
            rows=rows,
            empty=empty,
            generation=section.generation,
            files={"table": "compare.md", "answers": "answers.jsonl"},
            groups={group: _group(questions, names, answers) for group, questions in plan.probes.items()},
            sweep=swept,
            checkpoints=checkpoints,
            judge=judged,
        )

    def _plan(self, inputs: ModelInputs) -> _Plan:
        section = self.section
        wanted = {
            "questions": section.queries,
            "rated": section.checkpoints.rows if section.checkpoints else 0,
            "swept": section.sweep.rows if section.sweep else 0,
        }
        held_out: list[Question] = []
        if any(wanted.values()):
            held_out = held_out_questions(inputs.split, self.system, max(wanted.values()))
        questions, rated, swept = (held_out[:count] for count in wanted.values())
        probes = probe_questions(section.probes, self.system)
        steps = {step: name for step, (name, _) in checkpoint_adapters(self.models, inputs.train).items()}
        requests = [
            EvaluationRequest(_key(name, question), name, question.messages, section.generation)
            for name in self.models.names()
            for question in [*itertools.chain(*probes.values()), *questions]
        ]
        requests += checkpoint_requests(list(steps.values()), rated, section.generation)
        if section.sweep:
            requests += sweep_requests(section.sweep, self.models.name, swept, section.generation, self.seed)
        return _Plan(probes, questions, rated, swept, steps, requests)

    def _answers(self, requests: list[EvaluationRequest], file: Path, inputs: ModelInputs) -> Answers:
        """The answers to all requests; no endpoint is started where they are there already."""
        section = self.section
        if not unanswered(requests, file):
            return kept_answers(file)
        if section.engine == "vllm":
            models = served_models(self.models, inputs.train, inputs.merge)
            return answer_in_batch(self.serve, models, requests, file)
        with models_endpoint(self.models, self.serve, inputs, section.endpoint) as url:
            given = self.models.chat_template_kwargs
            options = RequestOptions(url, endpoint_key(), section.concurrency, section.timeout, given)
            return ask_endpoint(options, requests, file, "answers")


def _group(questions: list[Question], models: list[str], answers: Answers) -> dict[str, ProbeScores]:
    """How each model answers a group of probes."""
    said = {model: [answers[_key(model, question)].answer for question in questions] for model in models}
    return {
        model: ProbeScores(
            length=sum(map(len, texts)) / len(texts),
            loop=sum(map(loops, texts)) / len(texts),
            base=sum(rouge_l_f(text, old) for text, old in zip(texts, said[BASE], strict=True)) / len(texts),
        )
        for model, texts in said.items()
    }


def _key(model: str, question: Question) -> str:
    return f"{model}/{question.row_id}"


def _row(question: Question, models: list[str], answers: Answers) -> ComparedRow:
    said = {model: answers[_key(model, question)].answer for model in models}
    thought = {model: text for model in models if (text := answers[_key(model, question)].reasoning)}
    return ComparedRow(
        row_id=question.row_id,
        query=question.query,
        reference=question.reference,
        answers=said,
        reasoning=thought,
    )


def _markdown(rows: list[ComparedRow], models: list[str]) -> str:
    """The rows as a Markdown table: query, reference, then a column per model; what models thought in another."""
    header = ["query", "reference", *models]
    lines = [_line(header), _line(["---"] * len(header))]
    lines += [_line([row.query, row.reference, *row.answers.values()]) for row in rows]
    thoughts = [(row.query, model, text) for row in rows for model, text in row.reasoning.items()]
    if thoughts:
        lines += ["\n", _line(["query", "model", "what it thought before"]), _line(["---"] * 3), *map(_line, thoughts)]
    return "".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_cell, cells)) + " |\n"


def _cell(text: str) -> str:
    """Text as it stands, kept inside one cell: no character of it is Markdown or HTML."""
    escaped = re.sub(r"([\\`*_\[\]|~])", r"\\\1", html.escape(text.strip(), quote=False))
    return re.sub(r"\s*\n\s*", "<br>", escaped)
