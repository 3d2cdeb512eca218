"""Batch inference: prompts in, completions out, by vLLM engines in the cluster through ray.data.llm, without HTTP.

Prompts are made and tokenized where the blocks are; engines answer block after block with several under way. Which
completions are kept, and where, is the caller's matter: they come block by block, so that a crash loses little.
"""

import functools
import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.errors import HardwareError, StageError
from pipelines.models.served import ServedModel
from pipelines.placement import lacking_for_good
from pipelines.recipe.base import LEAST_RESOURCE
from pipelines.recipe.serve import Serve
from serve.engine.command import (
    CPU_EXTENSION,
    CPU_KV_CACHE_BYTES,
    adapter_room,
    cpu_dtype,
    cpu_environment,
    memory_share,
    overridden,
)

BLOCKS = 4
"""Blocks that fill an engine. What goes through it in one block is kept when all of it is answered."""
MIN_BLOCK = 8
"""Requests in a block, so that a small engine does not pay for a task with each."""
RESTARTS = 2
"""Times an engine that dies is started again; Ray Data by itself would do so for ever."""

MODEL_MAY_SAY = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")
NEUTRAL = {"repetition_penalty": 1.0, "top_k": 0, "seed": -1}
"""What a request may leave out, so that the parameters of all requests have one schema, and none is null: beside a null
Arrow gives whole numbers as floats, and an engine dies of a seed that is one. A seed of -1 is vLLM's word for none."""


@dataclass(frozen=True)
class Prompt:
    """What an engine is sent: chat messages, sampling parameters by vLLM's names, and the adapter's name, if any."""

    messages: list[dict[str, str]]
    sampling: dict[str, Any]
    adapter: str | None = None


@dataclass(frozen=True)
class Completion:
    """What an engine answered to the row numbered `pos`.

    `is_cut`: it ended at the most tokens it might have. `error`: why there is no answer, or empty.
    """

    pos: int
    text: str
    input_tokens: int
    output_tokens: int
    is_cut: bool
    seconds: float
    error: str


OF_THE_ENDPOINT = ("max_loras", "max_lora_rank", "tool_call_parser", "reasoning_parser", "extra")
"""Keys of `serve.engine` that are no arguments of an engine without an endpoint, or are given to it in another way."""

COMPLETED = tuple(field.name for field in fields(Completion) if field.name != "error")


def complete(
    serve: Serve, model: ServedModel, rows: pa.Table, prompt: Callable[[dict[str, Any]], Prompt]
) -> Iterator[list[Completion]]:
    """The completions of `rows`, a list for each block as it is done, in any order.

    `rows` has a column `pos`, the number of the row, and whatever `prompt` makes the prompt of a row from; `prompt`
    is sent to the workers, so it must pickle. Engines are those that `serve` describes. HardwareError where the
    cluster has no room for them, StageError where one dies more than `RESTARTS` times.
    """
    if not len(rows):
        return
    require_room(serve)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # what there is to know is said here, once
    import ray.data
    from ray.data.llm import build_processor

    for name in ("ray._private.worker", "ray.data", "ray.llm"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # one process an engine is far ahead of it, and each loads the tokenizer, which takes seconds
    beside = {"num_cpus": 0.1, "concurrency": serve.num_replicas}
    processor = build_processor(
        _configuration(serve, model),
        preprocess=_preprocess(model, prompt),
        postprocess=_kept,
        preprocess_map_kwargs=beside,
        postprocess_map_kwargs=beside,
    )
    processor.get_stage_by_name("vLLMEngineStage").map_batches_kwargs.update(
        max_restarts=RESTARTS, max_task_retries=RESTARTS
    )
    size = _block(serve)
    blocks = [rows.slice(start, size) for start in range(0, len(rows), size)]
    batches = processor(ray.data.from_arrow(blocks)).iter_batches(
        batch_size=None, batch_format="pyarrow", prefetch_batches=0
    )
    try:
        for batch in batches:
            assert isinstance(batch, pa.Table)
            yield [_completion(row) for row in batch.to_pylist()]
    except ray.exceptions.RayError as error:
        raise StageError(f"the engine of {model.path} died; what it answered is kept\n{error}") from None


def _configuration(serve: Serve, model: ServedModel) -> Any:
    from ray.data.llm import vLLMEngineProcessorConfig

    engine = serve.engine
    arguments: dict[str, Any] = engine.model_dump(exclude_none=True, exclude=set(OF_THE_ENDPOINT))
    arguments |= engine.extra | overridden(model.path, engine)
    size = engine.tensor_parallel_size
    variables = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if serve.num_gpus:
        arguments["gpu_memory_utilization"] = memory_share(engine, serve.num_gpus)
    else:
        arguments |= {"dtype": cpu_dtype(engine.dtype), "enforce_eager": True, "worker_extension_cls": CPU_EXTENSION}
        arguments.setdefault("kv_cache_memory_bytes", CPU_KV_CACHE_BYTES)
        del arguments["gpu_memory_utilization"]
        variables |= cpu_environment(size)
    if model.adapters:
        slots, rank = adapter_room(model, engine)
        arguments |= {"enable_lora": True, "max_loras": slots, "max_lora_rank": rank}
    return vLLMEngineProcessorConfig(
        model_source=model.path,
        engine_kwargs=arguments,
        batch_size=_block(serve),
        max_concurrent_batches=math.ceil(engine.max_num_seqs / _block(serve)) + 1,
        concurrency=(serve.num_replicas, serve.num_replicas),
        placement_group_config={"bundles": _bundles(serve)},
        runtime_env={"env_vars": variables},
        chat_template_stage=False,  # prompts come tokenized, so that no actor waits beside the engine
        tokenize_stage=False,
        detokenize_stage=False,
        should_continue_on_error=True,
        log_engine_metrics=False,
    )


def _bundles(serve: Serve) -> list[dict[str, float]]:
    """Ray resources of one engine, those of each of its processes."""
    size = serve.engine.tensor_parallel_size
    gpus = {"GPU": serve.num_gpus / size} if serve.num_gpus else {}
    return [{"CPU": max(serve.num_cpus / size, LEAST_RESOURCE), **gpus}] * size


def _block(serve: Serve) -> int:
    """Requests that go through an engine together."""
    return max(MIN_BLOCK, serve.engine.max_num_seqs // BLOCKS)


def require_room(serve: Serve) -> None:
    """Wait where the cluster must grow for the engines; HardwareError where it never could place them.

    Ray Data would wait for ever.
    """
    bundles = _bundles(serve) * serve.num_replicas
    what = f"the engines need {serve.num_replicas} × {serve.num_cpus:g} CPU and {serve.num_gpus:g} GPU"
    if lacking := lacking_for_good(bundles, what):
        raise HardwareError(
            f"{what}; the cluster lacks {lacking}; lower serve.num_cpus, serve.num_gpus or serve.num_replicas"
        )


def _preprocess(
    model: ServedModel, prompt: Callable[[dict[str, Any]], Prompt]
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def request(row: dict[str, Any]) -> dict[str, Any]:
        made = prompt(row)
        end = _tokenizer(model.path).eos_token_id
        return {
            "pos": row["pos"],
            "model": model.adapters[made.adapter] if made.adapter else model.path,
            "tokenized_prompt": tokenize(model.path, made.messages),
            "sampling_params": {**NEUTRAL, **_model_defaults(model.path), **made.sampling},
            "max_tokens": made.sampling["max_tokens"],
            "end": -1 if end is None else end,  # for `_kept`, which need not load the tokenizer again
        }

    return request


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


@functools.lru_cache(maxsize=1)
def _model_defaults(model: str) -> dict[str, Any]:
    """What the model's generation_config.json says of sampling, as vLLM's server takes it where a request is silent."""
    from transformers import GenerationConfig

    if not Path(model, "generation_config.json").is_file():
        return {}
    own = GenerationConfig.from_pretrained(Path(model)).to_diff_dict()
    return {name: own[name] for name in MODEL_MAY_SAY if own.get(name) is not None}


def _kept(row: dict[str, Any]) -> dict[str, Any]:
    """Of what ray.data.llm knows of an answer, what a `Completion` has; it does not say why an answer ended."""
    count = row["num_generated_tokens"]
    return {
        "pos": row["pos"],
        "text": row["generated_text"],
        "input_tokens": row["num_input_tokens"],
        "output_tokens": count,
        "is_cut": count >= row["max_tokens"] and row["generated_tokens"][-1] != row["end"],
        "seconds": row["time_taken_llm"],
    }


def _completion(row: dict[str, Any]) -> Completion:
    if error := row["__inference_error__"]:  # such rows come past `_postprocess`, with columns of their own
        return Completion(row["pos"], "", 0, 0, False, 0.0, error)
    return Completion(error="", **{name: row[name] for name in COMPLETED})
