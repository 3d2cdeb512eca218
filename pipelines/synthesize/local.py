"""Local generation: the requests of a grid, answered by vLLM through ray.data.llm, into the same ledger.

Prompts are made and tokenized where the blocks are, engines answer block after block with several under way, and what
comes out is appended to the ledger before it counts. A run that is killed loses what the engines were at work on.
"""

import functools
import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.errors import HardwareError, InputError, StageError
from pipelines.progress import progress
from pipelines.recipe import Recipe, load_recipe, shipped_recipes
from pipelines.synthesize.asking import Positions, State, look_up
from pipelines.synthesize.grid import Grid
from pipelines.synthesize.ledger import Record, Writer
from pipelines.synthesize.questions import Outcome, Verdict, checked, record_of
from pipelines.synthesize.shapes import schema_of
from pipelines.workspace import Workspace
from serve.section import Serve

BLOCKS = 4
"""Blocks that fill an engine. What goes through it in one block is on disk when all of it is answered."""
LEAST_BLOCK = 8
"""Requests in a block, so that a small engine does not pay for a task with each."""
RESTARTS = 2
"""Times an engine that dies is started again; Ray Data by itself would do so for ever."""


def generate(recipe: Recipe, workspace: Workspace, grid: Grid, choose: Callable[[State], Positions]) -> Positions:
    """Answer the pending positions that `choose` takes; returns them when each has its record.

    The engines are those that `serve` describes, or a shipped recipe's where the model is one's. InputError where the
    model cannot be had, HardwareError where the cluster has no room for them.
    """
    from pipelines.train.models import resolve

    named, serve = model_of(grid.section.model, recipe.serve)
    if grid.section.generation.seed is not None and not serve.num_gpus:
        raise InputError("synthesize.generation.seed: vLLM's CPU build cannot seed single requests; leave it out")
    _require_room(serve)
    model = str(resolve(named, workspace.local("models")))
    writer = Writer(workspace)
    try:
        chosen = choose(look_up(workspace, grid))
        with progress("synthesize", total=len(chosen), unit="requests") as advance:
            for records in _records(serve, grid, model, chosen) if len(chosen) else ():
                writer.append(records)
                advance(len(records))
    finally:
        writer.close()
    return chosen


def model_of(name: str, serve: Serve) -> tuple[str, Serve]:
    """The model of that name and how it is served: where a shipped recipe has the name, its model in its manner."""
    if name not in shipped_recipes():
        return name, serve
    recipe = load_recipe(name)
    if recipe.train is None:
        raise InputError(f"synthesize.model: the recipe {name} trains no model; name a folder or hf://")
    return recipe.train.model, recipe.serve


def _records(serve: Serve, grid: Grid, model: str, chosen: Positions) -> Iterator[list[Record]]:
    """One list of records for each block that comes out of the engines."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # what there is to know is said here, once
    import ray.data
    from ray.data.llm import build_processor

    for name in ("ray._private.worker", "ray.data", "ray.llm"):
        logging.getLogger(name).setLevel(logging.ERROR)
    processor = build_processor(
        _configuration(serve, model),
        preprocess=_prompt_maker(grid, model),
        postprocess=_answer_reader(model, grid.section.generation.max_tokens),
        preprocess_map_kwargs={"num_cpus": 0.1},
        postprocess_map_kwargs={"num_cpus": 0.1},
    )
    processor.get_stage_by_name("vLLMEngineStage").map_batches_kwargs.update(
        max_restarts=RESTARTS, max_task_retries=RESTARTS
    )
    positions = ray.data.from_items(
        [{"pos": int(pos)} for pos in chosen], override_num_blocks=math.ceil(len(chosen) / _block(serve))
    )
    answers = processor(positions).iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    try:
        for batch in answers:
            assert isinstance(batch, pa.Table)
            yield [_record(grid, row) for row in batch.to_pylist()]
    except ray.exceptions.RayError as error:
        raise StageError(f"synthesize: the engine of {model} died; what it answered is kept\n{error}") from None


def _configuration(serve: Serve, model: str) -> Any:
    from ray.data.llm import vLLMEngineProcessorConfig

    engine = serve.engine
    arguments: dict[str, Any] = engine.model_dump(exclude_none=True, exclude={"max_loras", "max_lora_rank"})
    bundle = {"CPU": serve.num_cpus} | ({"GPU": serve.num_gpus} if serve.num_gpus else {})
    variables = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if not serve.num_gpus:
        from serve.engine import CPU_KV_CACHE_BYTES, cpu_dtype, cpu_environment

        arguments |= {"dtype": cpu_dtype(engine.dtype), "enforce_eager": True}
        arguments.setdefault("kv_cache_memory_bytes", CPU_KV_CACHE_BYTES)
        del arguments["gpu_memory_utilization"]
        variables |= cpu_environment(engine.tensor_parallel_size)
    return vLLMEngineProcessorConfig(
        model_source=model,
        engine_kwargs=arguments,
        batch_size=_block(serve),
        max_concurrent_batches=math.ceil(engine.max_num_seqs / _block(serve)) + 1,
        concurrency=(serve.num_replicas, serve.num_replicas),
        placement_group_config={"bundles": [bundle] * engine.tensor_parallel_size},
        runtime_env={"env_vars": variables},
        chat_template_stage=False,  # prompts come tokenized, so that no actor waits beside the engine
        tokenize_stage=False,
        detokenize_stage=False,
        should_continue_on_error=True,
        log_engine_metrics=False,
    )


def _block(serve: Serve) -> int:
    """Requests that go through an engine together."""
    return max(LEAST_BLOCK, serve.engine.max_num_seqs // BLOCKS)


def _require_room(serve: Serve) -> None:
    """HardwareError where the cluster could never place the engines; Ray Data would wait for ever."""
    import ray

    have = ray.cluster_resources()
    for resource, each in (("CPU", serve.num_cpus), ("GPU", serve.num_gpus)):
        needed = each * serve.num_replicas * serve.engine.tensor_parallel_size
        if needed > have.get(resource, 0.0):
            raise HardwareError(
                f"the engines need {needed:g} {resource}, the cluster has {have.get(resource, 0.0):g}; "
                f"lower serve.num_{resource.lower()}s or serve.num_replicas"
            )


def _prompt_maker(grid: Grid, model: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    parameters = grid.section.generation.model_dump(exclude_none=True)
    if grid.section.answer.response_format == "json_schema":
        parameters["structured_outputs"] = {"json": json.dumps(schema_of(grid.section.answer))}
    elif grid.section.answer.response_format == "json_object":
        parameters["structured_outputs"] = {"json_object": True}

    def prompt(row: dict[str, Any]) -> dict[str, Any]:
        request = grid.request(row["pos"])
        return {
            "pos": request.pos,
            "tokenized_prompt": tokenize(model, request.messages),
            "sampling_params": parameters,
        }

    return prompt


def tokenize(model: str, messages: list[dict[str, str]]) -> list[int]:
    """The prompt of messages by the model's chat template."""
    tokenizer = _tokenizer(model)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]  # the template brings its own
    return tokens


@functools.lru_cache(maxsize=1)
def _tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(Path(model))


def _answer_reader(model: str, max_tokens: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def kept(row: dict[str, Any]) -> dict[str, Any]:
        """Of what ray.data.llm knows of an answer, what is filed; it does not say why an answer ended."""
        count = row["num_generated_tokens"]
        return {
            "pos": row["pos"],
            "text": row["generated_text"],
            "input": row["num_input_tokens"],
            "output": count,
            "is_cut": count >= max_tokens and row["generated_tokens"][-1] != _tokenizer(model).eos_token_id,
            "seconds": row["time_taken_llm"],
        }

    return kept


def _record(grid: Grid, row: dict[str, Any]) -> Record:
    request = grid.request(row["pos"])
    if row["__inference_error__"]:
        outcome = Outcome(Verdict.FAILURE, "rejected", row["__inference_error__"])
        return record_of(request, outcome, 1, 0.0)
    return record_of(request, checked(grid, request, _outcome(grid, row)), 1, row["seconds"])


def _outcome(grid: Grid, row: dict[str, Any]) -> Outcome:
    tokens = row["input"], row["output"]
    if row["is_cut"]:
        return Outcome(Verdict.FAILURE, "truncated", row["text"], *tokens)
    if not row["text"].strip():
        return Outcome(Verdict.FAILURE, "empty", row["text"], *tokens)
    return Outcome(Verdict.ANSWER, "", row["text"], *tokens)
