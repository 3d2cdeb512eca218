"""The recipe's section `synthesize`."""

from decimal import Decimal
from typing import Annotated, Literal

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
    model: str | None = Field(None, description="the model's name there; null: synthesize.model")
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


class Synthesize(Section):
    """Conversations from a grid of dimensions and styles, answered by a model."""

    model: str = Field(description="the model asked")
    endpoints: list[Endpoint] = Field(min_length=1, description="where it answers")
    system: str | None = Field(None, description="system prompt of the requests")
    dimensions: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], Annotated[list[str], Field(min_length=1)]] = (
        Field(min_length=1, description="values by name; every combination with a style is a cell")
    )
    styles: dict[str, Style] = Field(min_length=1, description="manners of answering, by name")
    compatibility: list[Compatibility] = Field([], description="cells that do not fit are not asked")
    samples_per_cell: Count = Field(1, description="answers to each cell")
    injections: list[str] = Field([""], min_length=1, description="extra conditions, one drawn into each prompt")
    queries: list[str] = Field(min_length=1, description="phrasings of the training input, one drawn for each answer")
    query_system: str | None = Field(None, description="system prompt of the conversations that come out")
    generation: Generation = Generation(temperature=1.0)
    timeout: Positive = Field(120, description="seconds one answer may take")
    max_attempts: Count = Field(6, description="tries at one answer; waiting for a rate limit is not one")
    circuit_breaker: Positive = Field(30, description="seconds without any answer, only errors, that stop the run")
    price: Price | None = Field(None, description="null: costs are not computed")
    budget: Annotated[Decimal, Field(gt=0)] | None = Field(None, description="stop before it costs more; with price")
    workers: Count = Field(1, description="processes that send requests; one sends a few hundred a second")

    @model_validator(mode="after")
    def _templates_name_what_exists(self) -> "Synthesize":
        from pipelines.synthesize.grid import check_grid  # it reads these sections

        check_grid(self)
        if self.budget is not None and self.price is None:
            raise ValueError("budget needs price")
        return self
