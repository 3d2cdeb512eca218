"""Synthesize: send a model the requests of every cell of the grid, and make conversations of the answers.

The conversations are written by Ray Data tasks, shard by shard, from the ledger.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyarrow as pa

from pipelines.artifacts.reports.rows import RowFiles
from pipelines.artifacts.reports.synthesize import SynthesizeReport
from pipelines.artifacts.rows import DROPPED, ROW, RowDigest, Turn
from pipelines.artifacts.shards import Attempt, Commit, Shard, run_shards
from pipelines.artifacts.stage import Inputs, Stage
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.errors import DataError, Problem, StageError
from pipelines.llm.coordinator import cost_of
from pipelines.llm.dispatch import (
    CHUNK,
    LedgerState,
    dispatch,
    has_every_record,
    missing_keys,
    read_answers,
)
from pipelines.llm.ledger import FOLDER as LEDGER
from pipelines.llm.ledger import LedgerIndex, read_index
from pipelines.llm.requests import MAX_CONVERSATIONS, ChatRequest, Positions
from pipelines.models.served import MODELS
from pipelines.recipe.llm import NOT_IN_FINGERPRINT
from pipelines.recipe.serve import Serve
from pipelines.recipe.synthesize import Synthesize
from pipelines.synthesize.grid import Grid, compatibility_map
from pipelines.synthesize.local import generate
from pipelines.synthesize.passages import check_passages, read_passages, with_examples

TOLD = ("estimated", "cached_tokens", "reasoning_tokens")
"""What answers tell of their tokens: whether they are estimated, and how many were cached or reasoning."""


@dataclass(frozen=True)
class SynthesizeStage(Stage[Inputs, SynthesizeReport]):
    """Conversations from a grid of prompts; `serve` describes the engines where the cluster answers, not an API."""

    section: Synthesize
    serve: Serve
    seed: int
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """What the chat template of a model in the cluster is given."""

    name: ClassVar[str] = "synthesize"
    version: ClassVar[int] = 3

    @property
    def reports(self) -> type[SynthesizeReport]:
        """The class of its report."""
        return SynthesizeReport

    @property
    def on_disk(self) -> tuple[str, ...]:
        """The model of engines in the cluster, and what they have answered; APIs are asked on a URL as well."""
        return (MODELS, LEDGER) if self.section.engine == "vllm" else ()

    def fingerprint_inputs(self) -> dict[str, Any]:
        """What decides the prompts and the training inputs; not where they are sent, how fast, or at what price."""
        grid = grid_of(self.section, self.seed)
        section = grid.section.model_dump(mode="json", exclude={"engine", *NOT_IN_FINGERPRINT})
        if grid.passages is not None:
            section["passages"] = grid.passages.digest()
        return {"section": section, "seed": self.seed}

    def preflight(self) -> list[Problem]:
        """The keys of endpoints that are not set, and documents or examples that are not there."""
        problems = missing_keys(self.section, Grid.section_key) if self.section.engine == "api" else []
        try:
            with_examples(self.section)
            if self.section.passages:
                check_passages(self.section.passages)
        except DataError as error:
            problems.append(Problem("", str(error)))
        return problems

    def run(self, place: Place, inputs: Inputs) -> SynthesizeReport:
        """Send what the ledger does not know yet, then write the conversations that the answers hold.

        RecipeError where a key is missing; StageError where the run was stopped, with all answers kept.
        """
        grid = grid_of(self.section, self.seed)
        if not has_every_record(place.workspace, grid):
            answer_pending(self.serve, place.workspace, grid, lambda state: state.pending, self.chat_template_kwargs)
        shards = [{"index": number, "start": start} for number, start in enumerate(range(0, grid.size, CHUNK))]
        work = _writer(place.workspace, grid)
        commits = run_shards(place, "rows", lambda: shards, work, concurrency=None, title="conversations")
        return _report(place, grid, commits)


def grid_of(section: Synthesize, seed: int) -> Grid:
    """The grid, its passages and examples read; DataError where they cannot be."""
    if section.engine == "vllm":
        section = section.model_copy(update={"price": None, "budget": None})  # what an API would cost
    passages = read_passages(section.passages) if section.passages else None
    return Grid(with_examples(section), seed, passages)


def answer_pending(
    serve: Serve,
    workspace: Workspace,
    grid: Grid,
    choose: Callable[[LedgerState], Positions],
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Positions:
    """Have the pending positions that `choose` takes answered, by endpoints or in the cluster; returns them."""
    if grid.section.engine == "vllm":
        return generate(serve, workspace, grid, choose, chat_template_kwargs or {})
    return dispatch(workspace, grid, choose)


def schema(grid: Grid) -> pa.Schema:
    """A canonical row, then the cell it answers."""
    cell = [pa.field(name, pa.string()) for name in grid.axes]
    return pa.schema([*ROW, *cell, pa.field("sample", pa.int64())])


def _writer(workspace: Workspace, grid: Grid) -> Callable[[Shard, Attempt], dict[str, Any]]:
    import ray

    shared = ray.put(read_index(workspace))  # once for all shards

    def work(shard: Shard, attempt: Attempt) -> dict[str, Any]:
        index: LedgerIndex = ray.get(shared)
        positions = list(grid.positions(shard["start"], min(shard["start"] + CHUNK, grid.size)))
        rows, failures, told = _rows(workspace, grid, index, positions)
        table = pa.Table.from_pylist(rows, schema=schema(grid))
        digest = RowDigest()
        digest.update(table)
        with attempt.writer("rows", table.schema) as writer:
            writer.write_table(table)
        with attempt.writer("dropped", DROPPED) as writer:
            writer.write_table(pa.Table.from_pylist(failures, schema=DROPPED))
        _, keys = grid.keys(shard["start"], min(shard["start"] + CHUNK, grid.size))
        return {
            "rows": digest.rows,
            "digest": digest.hexdigest(),
            "failures": dict(Counter(failure["reason"] for failure in failures)),
            "tokens": index.tokens(keys),
            **told,
        }

    return work


def _rows(
    workspace: Workspace, grid: Grid, index: LedgerIndex, positions: Sequence[int]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Counter[str]]:
    """Conversations of the positions that have an answer, what is left of the others, and what is told of tokens."""
    rows, failures = [], []
    told = Counter(dict.fromkeys(TOLD, 0))
    for request, known in read_answers(workspace, grid, index, positions):
        told.update({name: int(known.get(name, 0)) for name in TOLD})
        place = {"row_id": request.name, "pos": request.pos}
        if "reason" in known:
            failures.append(
                {**place, "stage": "synthesize", "operator": "ask", "reason": known["reason"], "text": known["text"]}
            )
            continue
        rows += _conversations(grid, request, known)
    return rows, failures, told


def _conversations(grid: Grid, request: ChatRequest, known: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one answer; where answers may hold several, positions leave room for as many as there can be."""
    found: list[list[Turn]] = [[*turns] for turns in grid.conversations(request, known["text"])]
    thought = known.get("reasoning") if grid.section.answer.reasoning else None
    if thought:
        found[0][-1] = {**found[0][-1], "reasoning": thought}
    several = grid.section.answer.shape == "pairs"
    system = grid.section.query_system.format_map(request.cell) if grid.section.query_system else None
    head = [{"role": "system", "content": system}] if system else []
    return [
        {
            "row_id": f"{request.name}.{number}" if several else request.name,
            "pos": request.pos * MAX_CONVERSATIONS + number if several else request.pos,
            "system": system,
            "query": turns[-2]["content"],
            "response": turns[-1]["content"],
            "messages": [*head, *turns] if len(turns) > 2 or thought else None,
            **request.cell,
            "sample": request.sample,
        }
        for number, turns in enumerate(found)
    ]


def _report(place: Place, grid: Grid, commits: list[Commit]) -> SynthesizeReport:
    digest, failures, tokens, told = RowDigest(), Counter[str](), [0, 0], Counter[str]()
    for commit in commits:
        result = commit["result"]
        digest.add(result["digest"], result["rows"])
        failures.update(result["failures"])
        told.update({name: result.get(name, 0) for name in TOLD})  # a run of an earlier version says less
        tokens = [total + count for total, count in zip(tokens, result["tokens"], strict=True)]
    reasons = ", ".join(f"{reason} {count}" for reason, count in failures.most_common())
    if not digest.rows:
        raise StageError(f"synthesize: no request has an answer ({reasons}); mend the cause and use --retry-failed")
    price = grid.section.price
    cost = cost_of(price, tokens[0], tokens[1], told["cached_tokens"], told["reasoning_tokens"])
    paid = f", {cost:.4f} {price.currency}" if price else ""
    if told["estimated"]:
        paid += f" (tokens of {told['estimated']} answers are estimated, the endpoint reports none)"
    return SynthesizeReport(
        summary=f"{digest.rows} conversations{f', failed: {reasons}' if reasons else ''}{paid}",
        digest=digest.hexdigest(),
        rows=digest.rows,
        failed=dict(failures),
        input_tokens=tokens[0],
        output_tokens=tokens[1],
        cost=str(cost) if price else None,
        currency=price.currency if price else None,
        **told,
        outputs=RowFiles(
            rows=place.relative(commit["files"]["rows"] for commit in commits),
            dropped=place.relative(commit["files"]["dropped"] for commit in commits),
        ),
        map=compatibility_map(grid),
    )
