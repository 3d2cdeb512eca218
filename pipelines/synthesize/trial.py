"""A trial: send the requests of a few cells, and say what the whole grid will take in tokens, money and time."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.artifacts.workspace import Workspace
from pipelines.errors import InputError
from pipelines.llm.coordinator import cost_of
from pipelines.llm.dispatch import look_up, read_answers
from pipelines.llm.ledger import RecordKind, read_index
from pipelines.llm.requests import Positions
from pipelines.recipe.llm import Endpoint
from pipelines.recipe.serve import Serve
from pipelines.recipe.synthesize import Synthesize
from pipelines.synthesize.grid import Grid
from pipelines.synthesize.local import model_of
from pipelines.synthesize.stage import answer_pending, grid_of


@dataclass(frozen=True)
class Measured:
    """What the trial's requests took: how many, tokens and seconds per request, and some answers."""

    requests: int
    failed: int
    input_tokens: float
    output_tokens: float
    seconds: float
    shown: list[tuple[str, str]]


def try_cells(
    section: Synthesize,
    serve: Serve,
    seed: int,
    workspace: Workspace,
    count: int,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[str]:
    """Ask up to `count` cells, evenly over the grid, and project the rest; the answers are in the ledger and count.

    Returns lines for people. InputError where nothing is left to ask.
    """
    grid = grid_of(section, seed)
    section = grid.section  # without a price where engines in the cluster answer
    before = look_up(workspace, grid)
    pending = before.pending
    if not len(pending):
        raise InputError("synthesize: every cell has its answer; there is nothing to try")
    chosen = answer_pending(serve, workspace, grid, lambda state: _spread(state.pending, count), chat_template_kwargs)
    measured = _measure(workspace, grid, chosen)
    if section.engine == "vllm":
        _, serve, _ = model_of(section.model, serve, {})
    return _projection(section, serve, measured, before.tokens, len(pending) - len(chosen))


def _spread(positions: Positions, count: int) -> Positions:
    """Up to `count` of them, evenly over all."""
    return positions[np.unique(np.linspace(0, len(positions) - 1, min(count, len(positions))).round().astype(np.int64))]


def _measure(workspace: Workspace, grid: Grid, positions: Positions) -> Measured:
    index = read_index(workspace)
    answers = list(read_answers(workspace, grid, index, positions.tolist()))
    numbers = index.find([request.key for request, _ in answers])
    return Measured(
        requests=len(answers),
        failed=int((index.kind[numbers] == RecordKind.FAILURE).sum()),
        input_tokens=float(index.input[numbers].mean()),
        output_tokens=float(index.output[numbers].mean()),
        seconds=sum(known.get("seconds", 0.0) for _, known in answers) / len(answers),
        shown=[(request.name, known["text"]) for request, known in answers if "reason" not in known][:5],
    )


def _projection(section: Synthesize, serve: Serve, measured: Measured, spent: tuple[int, int], left: int) -> list[str]:
    tokens = measured.input_tokens * left, measured.output_tokens * left
    rate = sum(_per_second(endpoint, measured) for endpoint in section.endpoints)
    if section.engine == "vllm":
        rate = serve.num_replicas * serve.engine.max_num_seqs / max(measured.seconds, 0.01)
    lines = [f"{name}: {text}" for name, text in measured.shown]
    lines.append(
        f"{measured.requests} cells tried, {measured.failed} failed; {measured.seconds:.1f} s, "
        f"{measured.input_tokens:.0f} input and {measured.output_tokens:.0f} output tokens each"
    )
    lines.append(
        f"{left} are left: about {tokens[0]:.0f} input and {tokens[1]:.0f} output tokens, {_duration(left / rate)}"
    )
    if section.price is not None:
        trial = [count * measured.requests for count in (measured.input_tokens, measured.output_tokens)]
        already = cost_of(section.price, *(old + new for old, new in zip(spent, trial, strict=True)))
        rest = cost_of(section.price, *tokens)
        currency = section.price.currency
        lines.append(f"spent {already:.4f} {currency}, about {rest:.4f} more, {already + rest:.4f} {currency} in all")
    return lines


def _per_second(endpoint: Endpoint, measured: Measured) -> float:
    """Requests a second that an endpoint allows at these sizes."""
    limits = [endpoint.max_in_flight / max(measured.seconds, 0.01)]
    if endpoint.requests_per_minute:
        limits.append(endpoint.requests_per_minute / 60)
    if endpoint.input_tokens_per_minute and measured.input_tokens:
        limits.append(endpoint.input_tokens_per_minute / 60 / measured.input_tokens)
    if endpoint.output_tokens_per_minute and measured.output_tokens:
        limits.append(endpoint.output_tokens_per_minute / 60 / measured.output_tokens)
    return min(limits)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
