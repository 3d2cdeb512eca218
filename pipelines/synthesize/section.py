"""The recipe's section `synthesize`."""

from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipelines.section import Count, Generation, Positive, Section


class Style(Section):
    """One manner of answering: how it is asked for, and what its answers look like."""

    template: str = Field(
        description="prompt; fields: the dimensions, {style}, {injection}, {examples}, {max_length}; {{ is a brace"
    )
    query_suffix: str = Field("", description="put behind the training input, such as `,严肃风格`")
    min_length: int = Field(1, ge=0, description="characters an answer has at least")
    max_length: Count | None = Field(None, description="characters an answer has at most; null: any number")
    emoji: Literal["any", "needed", "forbidden"] = Field("any", description="whether answers hold emoji")
    examples: list[str] = Field([], description="few-shot pool of answers in this style")
    num_examples: int = Field(0, ge=0, description="examples drawn into one prompt, as {examples}, one a line")

    @model_validator(mode="after")
    def _pool_suffices(self) -> "Style":
        if self.num_examples > len(self.examples):
            raise ValueError(f"num_examples {self.num_examples} of a pool of {len(self.examples)} examples")
        if self.max_length is not None and self.max_length < self.min_length:
            raise ValueError(f"max_length {self.max_length} is below min_length {self.min_length}")
        return self


class Compatibility(Section):
    """Which cells of the grid make sense; of several rules that match a cell, the last one counts."""

    where: dict[str, str | list[str]] = Field(
        min_length=1, description="value or values by dimension, or style; * and ? are wildcards"
    )
    fits: bool = Field(False, description="whether the cells that match are asked")


class Endpoint(Section):
    """An OpenAI-compatible API and what its key allows."""

    base_url: Annotated[str, Field(pattern=r"^https?://")] = Field(description="address that ends in /v1 or the like")
    api_key_env: str | None = Field(None, description="environment variable that holds the key; null: no key is sent")
    model: str | None = Field(None, description="the model's name there; null: what `model` beside endpoints says")
    weight: Positive = Field(1, description="share of the requests, relative to the other endpoints")
    requests_per_minute: Count | None = Field(None, description="null: no limit")
    input_tokens_per_minute: Count | None = Field(None, description="null: no limit")
    output_tokens_per_minute: Count | None = Field(None, description="null: no limit")
    max_in_flight: Count = Field(64, description="requests that wait for an answer at the same time")
    initial_in_flight: Count | None = Field(None, description="as many at first, then more; null: max_in_flight")


class Price(Section):
    """What tokens cost, as decimal numbers."""

    input: Annotated[Decimal, Field(ge=0)] = Field(description="per million input tokens")
    output: Annotated[Decimal, Field(ge=0)] = Field(description="per million output tokens")
    currency: str = Field("CNY", description="for people; nothing is converted")


class Passages(Section):
    """Texts cut into passages; each is a value of the dimension `passage`."""

    source: str = Field(description="text files: path, glob or fsspec URL")
    size: Count = Field(800, description="characters of a passage at most; cut at the end of a paragraph or sentence")
    overlap: int = Field(0, ge=0, description="characters that a passage repeats of the one before")

    @model_validator(mode="after")
    def _goes_on(self) -> "Passages":
        if self.overlap > self.size // 2:
            raise ValueError(f"overlap {self.overlap} is more than half of size {self.size}")
        return self


class Answer(Section):
    """What an answer is read as. All but text are JSON, mended where it is nearly valid."""

    shape: Literal["text", "json", "pairs", "dialogue"] = Field(
        "text",
        description="text: the response as it is; json: a value that json_schema allows; pairs: a list of {question, "
        "answer}, each a conversation; dialogue: a list of {speaker, text}, one conversation",
    )
    json_schema: dict[str, Any] | None = Field(None, description="JSON schema of the value; for json, required")
    response_format: Literal["json_object", "json_schema"] | None = Field(
        None, description="have the endpoint enforce it, where it can"
    )
    user: str = Field("user", description="speaker of a dialogue who becomes the user; may name dimensions")
    assistant: str = Field("assistant", description="speaker of a dialogue who is trained; may name dimensions")

    @model_validator(mode="after")
    def _has_a_schema(self) -> "Answer":
        if (self.shape == "json") != (self.json_schema is not None):
            raise ValueError("shape json needs json_schema, and the others have their own")
        if self.json_schema is not None:
            from pipelines.synthesize.shapes import check_schema  # it reads these sections

            check_schema(self.json_schema)
        if self.response_format is not None and self.shape == "text":
            raise ValueError("response_format needs a shape of JSON")
        return self


UNPAID = ("endpoints", "timeout", "max_attempts", "circuit_breaker", "price", "budget", "workers")
"""Keys that do not change what is asked."""


class Sampling(Generation):
    """Sampling parameters, and where an answer ends."""

    stop: list[str] | None = Field(None, description="texts at which an answer ends, such as a line break")


class Asking(Section):
    """A model, where it answers, and what asking it may take."""

    model: str = Field(description="the model asked")
    endpoints: list[Endpoint] = Field(min_length=1, description="where it answers; the requests are shared by weight")
    generation: Sampling = Sampling()
    timeout: Positive = Field(120, description="seconds one answer may take")
    max_attempts: Count = Field(6, description="tries at one answer; waiting for a rate limit is not one")
    circuit_breaker: Positive = Field(30, description="seconds without any answer, only errors, that stop the run")
    price: Price | None = Field(None, description="null: costs are not computed")
    budget: Annotated[Decimal, Field(gt=0)] | None = Field(None, description="stop before it costs more; with price")
    workers: Count = Field(1, description="processes that send requests; one sends a few hundred a second")

    @model_validator(mode="after")
    def _budget_has_a_price(self) -> "Asking":
        if self.budget is not None and self.price is None:
            raise ValueError("budget needs price")
        return self


class Synthesize(Asking):
    """Conversations from a grid of dimensions and styles, answered by a model."""

    engine: Literal["api", "vllm"] = Field(
        "api",
        description="api: endpoints; vllm: the model, a folder, hf://, modelscope://, pypi:// or a shipped recipe's "
        "name, is loaded in the cluster, as serve says (that recipe's serve, with its name)",
    )
    endpoints: list[Endpoint] = Field([], description="where it answers; needed unless engine is vllm")
    system: str | None = Field(None, description="system prompt of the requests")
    dimensions: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], Annotated[list[str], Field(min_length=1)]] = (
        Field({}, description="values by name; every combination with a style is a cell")
    )
    passages: Passages | None = Field(None, description="null: no dimension `passage`")
    styles: dict[str, Style] = Field(min_length=1, description="manners of answering, by name")
    compatibility: list[Compatibility] = Field([], description="cells that do not fit are not asked")
    samples_per_cell: Count = Field(1, description="answers to each cell")
    injections: list[str] = Field([""], min_length=1, description="extra conditions, one drawn into each prompt")
    queries: list[str] = Field(
        [], description="phrasings of the training input, one drawn for each answer; pairs and dialogue bring theirs"
    )
    query_system: str | None = Field(
        None, description="system prompt of the conversations that come out; may name dimensions"
    )
    generation: Sampling = Sampling(temperature=1.0)
    answer: Answer = Answer()

    @model_validator(mode="after")
    def _templates_name_what_exists(self) -> "Synthesize":
        from pipelines.synthesize.grid import check_grid  # it reads these sections

        if self.engine == "api" and not self.endpoints:
            raise ValueError("endpoints: at least one is needed, or engine: vllm")
        check_grid(self)
        return self
