"""Synthesize: ask a model for every cell of the grid, and make conversations of the answers.

The conversations are written by Ray Data tasks, shard by shard, from the ledger.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

import pyarrow as pa

from pipelines.artifacts.rows import DROPPED, ROW, RowDigest
from pipelines.artifacts.shards import Attempt, Commit, Shard, run_shards
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.errors import StageError
from pipelines.llm.coordinator import cost_of
from pipelines.llm.dispatch import CHUNK, Positions, State, ask, is_complete, read_answers, read_keys
from pipelines.llm.ledger import Index, read_index
from pipelines.llm.requests import MOST, Request
from pipelines.recipe.llm import UNPAID
from pipelines.recipe.schema import Recipe
from pipelines.recipe.synthesize import Synthesize
from pipelines.synthesize.grid import Grid, heat_map
from pipelines.synthesize.passages import with_passages

VERSION = 2


def determinants(recipe: Recipe) -> dict[str, Any]:
    """What decides the prompts and the training inputs; not where they are asked, how fast, or at what price."""
    return {
        "section": grid_of(recipe).section.model_dump(mode="json", exclude={"engine", *UNPAID}),
        "seed": recipe.seed,
    }


def preflight(recipe: Recipe) -> None:
    """RecipeError naming the keys of endpoints that are not set."""
    assert recipe.synthesize
    if recipe.synthesize.engine == "api":
        read_keys(recipe.synthesize, Grid.section_key)


def grid_of(recipe: Recipe) -> Grid:
    """The recipe's grid, its passages read; DataError where they cannot be."""
    section = recipe.synthesize
    assert section
    if section.engine == "vllm":
        section = section.model_copy(update={"price": None, "budget": None})  # what an API would cost
    return Grid(with_passages(section), recipe.seed)


def answer(recipe: Recipe, workspace: Workspace, grid: Grid, choose: Callable[[State], Positions]) -> Positions:
    """Have the pending positions that `choose` takes answered, by endpoints or in the cluster; returns them."""
    if grid.section.engine == "vllm":
        from pipelines.synthesize.local import generate  # vLLM is an extra

        return generate(recipe, workspace, grid, choose)
    return ask(workspace, grid, choose)


def synthesize(recipe: Recipe, place: Place) -> dict[str, Any]:
    """Ask what the ledger does not know yet, then write the conversations that the answers hold.

    RecipeError where a key is missing; StageError where the run was stopped, with all answers kept.
    """
    grid = grid_of(recipe)
    if not is_complete(place.workspace, grid):
        answer(recipe, place.workspace, grid, lambda state: state.pending)
    shards = [{"index": number, "start": start} for number, start in enumerate(range(0, grid.size, CHUNK))]
    work = _writer(place.workspace, grid)
    commits = run_shards(place, "rows", lambda: shards, work, concurrency=None, title="conversations")
    return {**_report(place, grid.section, commits), "map": heat_map(grid)}


def schema(section: Synthesize) -> pa.Schema:
    """A canonical row, then the cell it answers."""
    cell = [pa.field(name, pa.string()) for name in [*section.dimensions, "style"]]
    return pa.schema([*ROW, *cell, pa.field("sample", pa.int64())])


def _writer(workspace: Workspace, grid: Grid) -> Callable[[Shard, Attempt], dict[str, Any]]:
    def work(shard: Shard, attempt: Attempt) -> dict[str, Any]:
        index = read_index(workspace)
        positions = list(grid.positions(shard["start"], min(shard["start"] + CHUNK, grid.size)))
        rows, failures = _rows(workspace, grid, index, positions)
        table = pa.Table.from_pylist(rows, schema=schema(grid.section))
        digest = RowDigest()
        digest.update(table)
        with attempt.writer("rows", table.schema) as writer:
            writer.write_table(table)
        with attempt.writer("dropped", DROPPED) as writer:
            writer.write_table(pa.Table.from_pylist(failures, schema=DROPPED))
        keys = [grid.request(pos).key for pos in positions]
        return {
            "rows": digest.rows,
            "digest": digest.hexdigest(),
            "failures": dict(Counter(failure["reason"] for failure in failures)),
            "tokens": index.tokens(keys),
        }

    return work


def _rows(
    workspace: Workspace, grid: Grid, index: Index, positions: Sequence[int]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Conversations of the positions that have an answer, and what is left of the others."""
    rows, failures = [], []
    for request, known in read_answers(workspace, index, [grid.request(pos) for pos in positions]):
        place = {"row_id": request.name, "pos": request.pos}
        if "reason" in known:
            failures.append(
                {**place, "stage": "synthesize", "operator": "ask", "reason": known["reason"], "text": known["text"]}
            )
            continue
        rows += _conversations(grid, request, known["text"])
    return rows, failures


def _conversations(grid: Grid, request: Request, text: str) -> list[dict[str, Any]]:
    """The rows of one answer; where answers may hold several, positions leave room for as many as there can be."""
    found = grid.conversations(request, text)
    several = grid.section.answer.shape == "pairs"
    system = grid.section.query_system.format_map(request.cell) if grid.section.query_system else None
    head = [{"role": "system", "content": system}] if system else []
    return [
        {
            "row_id": f"{request.name}.{number}" if several else request.name,
            "pos": request.pos * MOST + number if several else request.pos,
            "system": system,
            "query": turns[-2]["content"],
            "response": turns[-1]["content"],
            "messages": [*head, *turns] if len(turns) > 2 else None,
            **request.cell,
            "sample": request.sample,
        }
        for number, turns in enumerate(found)
    ]


def _report(place: Place, section: Synthesize, commits: list[Commit]) -> dict[str, Any]:
    digest, failures, tokens = RowDigest(), Counter[str](), [0, 0]
    for commit in commits:
        result = commit["result"]
        digest.add(result["digest"], result["rows"])
        failures.update(result["failures"])
        tokens = [total + count for total, count in zip(tokens, result["tokens"], strict=True)]
    reasons = ", ".join(f"{reason} {count}" for reason, count in failures.most_common())
    if not digest.rows:
        raise StageError(f"synthesize: no request has an answer ({reasons}); mend the cause and use --retry-failed")
    cost = cost_of(section.price, *tokens)
    paid = f", {_money(cost)} {section.price.currency}" if section.price else ""
    return {
        "summary": f"{digest.rows} conversations{f', failed: {reasons}' if reasons else ''}{paid}",
        "digest": digest.hexdigest(),
        "rows": digest.rows,
        "failed": dict(failures),
        "input_tokens": tokens[0],
        "output_tokens": tokens[1],
        "cost": str(cost) if section.price else None,
        "currency": section.price.currency if section.price else None,
        "outputs": {kind: place.relative(commit["files"][kind] for commit in commits) for kind in ("rows", "dropped")},
    }


def _money(amount: Decimal) -> str:
    return f"{amount:.4f}"
