"""The recipe's section `serve`: engines, and what the gateway before them accepts."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from pipelines.recipe.base import Count, GpuCount, Json, Positive, Processes, ResourceAmount, Section, Tokens

MAX_LORA_RANK = 512
"""The largest adapter rank that vLLM makes room for."""


SET_BY_DANLU = (
    *("model", "model_tag", "served_model_name", "host", "port", "uds", "api_key", "middleware", "root_path"),
    *("shutdown_timeout", "worker_extension_cls", "enable_lora", "lora_modules", "api_server_count", "config"),
    *("allowed_origins", "allow_credentials", "allowed_methods", "allowed_headers", "enable_auto_tool_choice"),
    *("disable_log_stats", "disable_uvicorn_access_log", "enable_force_include_usage", "trust_remote_code"),
    "headless",
)
"""vLLM's arguments that no recipe may set: where engines listen, who may ask, which model and adapters they serve, and
whether code of a model folder runs."""


def _host(given: str) -> str:
    try:
        named = given.encode("idna")
    except UnicodeError:
        named = b""
    if not re.fullmatch(rb"[\w.:%-]+", named):
        raise ValueError(f"{given!r} is no address of a machine and no name of one")
    return given


Host = Annotated[str, AfterValidator(_host)]


class Engine(Section):
    """vLLM's engine arguments that a recipe may set, by vLLM's names."""

    max_model_len: Tokens | None = Field(None, description="tokens of prompt and answer; null: the model's own")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="weights and computation")
    tensor_parallel_size: Processes = Field(1, description="GPUs one engine is spread over")
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = Field(
        0.9, description="share of GPU memory an engine may take"
    )
    kv_cache_memory_bytes: Count | None = Field(None, description="key-value cache, bytes; null: vLLM's own choice")
    max_num_seqs: Annotated[int, Field(ge=1, le=65_536)] = Field(32, description="requests computed together")
    enable_prefix_caching: bool = Field(True, description="compute what prompts begin with in common only once")
    enforce_eager: bool = Field(False, description="skip compilation: faster start, slower tokens on a GPU")
    max_loras: Annotated[int, Field(ge=1, le=4096)] = Field(4, description="adapters in one batch")
    max_lora_rank: Annotated[int, Field(ge=1, le=MAX_LORA_RANK)] = Field(
        64, description="largest adapter rank; that of train.lora.r if larger"
    )

    tool_call_parser: str | None = Field(
        None, description="vLLM's parser of the model's tool calls, such as hermes; null: tool calls stay text"
    )
    reasoning_parser: str | None = Field(
        None, description="vLLM's parser of the model's reasoning, such as qwen3; null: it stays in the text"
    )
    extra: dict[str, Json] = Field(
        default_factory=dict,
        description="any other argument of the installed vLLM, by its name, checked before it starts",
    )

    @field_validator("extra")
    @classmethod
    def _extra_is_not_ours(cls, extra: dict[str, Any]) -> dict[str, Any]:
        for name, value in extra.items():
            if not name.isidentifier() or name.startswith("_"):
                raise ValueError(f"{name!r} is no name of an argument; vLLM's names have underscores, as swap_space")
            if name in cls.model_fields:
                raise ValueError(f"{name} has a key of its own: serve.engine.{name}")
            if name in SET_BY_DANLU or name.startswith("ssl_"):
                raise ValueError(f"{name} is set by danlu: the gateway and its keys would not hold with another")
            if name == "default_chat_template_kwargs":
                raise ValueError(f"{name} is the recipe's chat_template_kwargs, at its top, which training needs too")
            if value is None:
                raise ValueError(f"{name} is null; leave it out for vLLM's own choice")
        return extra


class Limits(Section):
    """What the gateway accepts; the rates hold for each API key by itself (for all callers where there are no keys)."""

    max_body_bytes: Count = Field(4 << 20, description="size of a request, bytes; 413 above it")
    max_prompt_characters: Count | None = Field(
        None,
        description="characters of all messages or prompts, with those of tools and documents, or tokens where given "
        "as such; 400 above it",
    )
    max_tokens: Count | None = Field(
        None, description="tokens of an answer, all choices together: 400 for more; given to who names none"
    )
    max_in_flight: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        256, description="requests at the engines at a time; more of them wait"
    )
    max_in_flight_per_key: Count | None = Field(
        None, description="of those, requests of one key; null: no limit of its own"
    )
    max_queued: int = Field(1024, ge=0, le=1_000_000, description="requests that wait; 429 above it")
    requests_per_minute: Count | None = Field(None, description="requests of one key per minute; 429 above it")
    tokens_per_minute: Count | None = Field(None, description="tokens of one key per minute; 429 above it")


class Autoscaling(Section):
    """Replicas of each engine by the requests they have, within bounds."""

    min_replicas: Processes = Field(1, description="replicas when there is nothing to do")
    max_replicas: Processes = Field(description="replicas at most")
    target_ongoing_requests: Positive = Field(16, description="requests per replica that are aimed at")
    upscale_delay_s: float = Field(10, ge=0, le=10_000_000, description="seconds that more replicas must be wanted")
    downscale_delay_s: float = Field(300, ge=0, le=10_000_000, description="seconds that fewer replicas must be wanted")

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> "Autoscaling":
        if self.min_replicas > self.max_replicas:
            raise ValueError("min_replicas is above max_replicas")
        return self


class Serve(Section):
    """The endpoint: engines and the gateway before them."""

    host: Host = Field("127.0.0.1", description="address the gateway listens on")
    port: Annotated[int, Field(ge=1, le=65535)] = Field(8000, description="port the gateway listens on")
    open: bool = Field(False, description="answer anyone who reaches host; false: beyond this machine keys are needed")
    gateway_per_node: bool = Field(
        False, description="a gateway on every node that is there at the start, with limits that hold for all together"
    )
    num_replicas: Processes = Field(1, description="replicas of each engine")
    autoscaling: Autoscaling | None = Field(None, description="instead of num_replicas")
    num_cpus: ResourceAmount = Field(0.25, description="CPUs reserved per engine replica; fractions fit small machines")
    num_gpus: GpuCount = Field(
        0, description="GPUs per engine replica; at 0.5 two engines share one, half its memory each"
    )
    allow_origins: list[str] = Field(
        default_factory=list, description="web origins whose pages may ask (CORS), such as https://chat.example.org"
    )
    open_metrics: bool = Field(False, description="answer /metrics without a key, where keys are set")
    access_log: bool = Field(
        False, description="write a JSON line for each request, without texts and keys, to logs/serve/access.jsonl"
    )
    limits: Limits = Limits()
    engine: Engine = Engine()

    @model_validator(mode="after")
    def _engine_has_its_gpus(self) -> "Serve":
        spread = self.engine.tensor_parallel_size
        if spread > 1 and self.num_gpus not in (0, spread):
            raise ValueError(
                f"engine.tensor_parallel_size {spread} spreads an engine over as many GPUs, and num_gpus is "
                f"{self.num_gpus:g}; give num_gpus: {spread}, or 0 for CPUs"
            )
        return self
