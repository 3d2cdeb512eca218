"""Local generation: the requests of a grid, answered by engines in the cluster, into the same ledger.

What comes out is appended to the ledger before it counts. A run that is killed loses what the engines were at work on.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa

from pipelines.artifacts.workspace import Workspace
from pipelines.clean_up import clean_up
from pipelines.errors import InputError
from pipelines.llm.dispatch import LedgerState, look_up
from pipelines.llm.ledger import LedgerRecord, LedgerWriter
from pipelines.llm.requests import Outcome, OutcomeKind, Positions, checked, record_of
from pipelines.llm.vllm_batch import Completion, Prompt, complete, require_room
from pipelines.models.resolve import resolve
from pipelines.models.served import MODELS, ServedModel
from pipelines.models.tokenizer import (
    default_template,
    open_tokenizer,
    with_chat_template,
    with_template_arguments,
)
from pipelines.progress import progress
from pipelines.recipe.load import load_recipe, shipped_recipes
from pipelines.recipe.serve import Serve
from pipelines.synthesize.grid import Grid
from pipelines.synthesize.shapes import schema_of

CLOSE_SECONDS = 60
"""What closing the ledger may take where something went wrong: on object storage it joins what was written."""


def generate(
    serve: Serve,
    workspace: Workspace,
    grid: Grid,
    choose: Callable[[LedgerState], Positions],
    chat_template_kwargs: Mapping[str, Any],
) -> Positions:
    """Answer the pending positions that `choose` takes; returns them when each has its record.

    The engines are those that `serve` describes, or a shipped recipe's where the model is one's, and so is what its
    chat template is given. RecipeError where that reads no such variables, InputError where the model cannot be had,
    HardwareError where the cluster has no room for them.
    """
    named, serve, arguments = model_of(grid.section.model, serve, chat_template_kwargs)
    require_room(serve)  # before gigabytes of a model are fetched
    cache = workspace.local(MODELS)
    folder = resolve(named, cache)
    if arguments:
        template = with_template_arguments(default_template(open_tokenizer(folder)), arguments)
        folder = with_chat_template(folder, template, cache)
    model = ServedModel("model", str(folder))
    writer = LedgerWriter(workspace)
    try:
        chosen = choose(look_up(workspace, grid))
        with progress("synthesize", total=len(chosen), unit="requests") as advance:
            rows = pa.table({"pos": pa.array(chosen, pa.int64())})
            for completions in complete(serve, model, rows, _prompt_maker(grid)):
                writer.append([_record(grid, completion) for completion in completions])
                advance(len(completions))
    except BaseException:
        clean_up("closing the ledger", writer.close, CLOSE_SECONDS)
        raise
    writer.close()
    return chosen


def model_of(name: str, serve: Serve, chat_template_kwargs: Mapping[str, Any]) -> tuple[str, Serve, Mapping[str, Any]]:
    """The model of that name, how it is served, and what its chat template is given.

    A shipped recipe's name means its model, served as it says.
    """
    if name not in shipped_recipes():
        return name, serve, chat_template_kwargs
    recipe = load_recipe(name)
    if recipe.train is None:
        raise InputError(f"synthesize.model: the recipe {name} trains no model; name a folder or hf://")
    return recipe.train.model, recipe.serve, recipe.chat_template_kwargs


def _prompt_maker(grid: Grid) -> Callable[[dict[str, Any]], Prompt]:
    sampling = grid.section.generation.model_dump(exclude_none=True)
    if grid.section.answer.response_format == "json_schema":
        sampling["structured_outputs"] = {"json": json.dumps(schema_of(grid.section.answer))}
    elif grid.section.answer.response_format == "json_object":
        sampling["structured_outputs"] = {"json_object": True}

    def prompt(row: dict[str, Any]) -> Prompt:
        return Prompt(grid.request(row["pos"]).messages, sampling)

    return prompt


def _record(grid: Grid, completion: Completion) -> LedgerRecord:
    request = grid.request(completion.pos)
    if completion.error:
        return record_of(request, Outcome(OutcomeKind.FAILED, "rejected", completion.error), 1, 0.0)
    return record_of(request, checked(grid, request, _outcome(completion)), 1, completion.seconds)


def _outcome(completion: Completion) -> Outcome:
    text, tokens = completion.text, (completion.input_tokens, completion.output_tokens)
    if completion.is_cut:
        return Outcome(OutcomeKind.FAILED, "truncated", text, *tokens)
    if not text.strip():
        return Outcome(OutcomeKind.FAILED, "empty", text, *tokens)
    return Outcome(OutcomeKind.ANSWERED, "", text, *tokens)
