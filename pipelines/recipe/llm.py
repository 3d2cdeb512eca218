"""What the sections that send requests to a model have in common: endpoints, prices, sampling, and limits."""

import re
from decimal import Decimal
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from pipelines.recipe.base import Count, Generation, Json, Number, Positive, Processes, Seconds, Section

TAKEN = {
    *("messages", "model", "stream", "stream_options", "n", "tools", "tool_choice", "functions", "response_format"),
    *("chat_template_kwargs", "reasoning_effort", "max_tokens", "max_completion_tokens", "temperature", "top_p"),
    *("top_k", "repetition_penalty", "seed", "stop"),
}
TAKEN_HINT = "it follows from the recipe, or would make an answer something else than one text"


def _address(given: str) -> str:
    parts = urlsplit(given)
    try:
        is_whole = parts.scheme in ("http", "https") and parts.port != 0 and (parts.hostname or "").encode("idna")
    except (UnicodeError, ValueError):
        is_whole = False
    if not is_whole or re.search(r"[\s\0-\x1f\x7f]", given):
        raise ValueError(f"{given!r} is no address such as https://HOST/v1 or http://HOST:PORT/v1")
    if parts.query or parts.fragment:
        raise ValueError(f"{given!r}: /chat/completions is added to an address, which nothing can stand behind")
    if parts.username or parts.password:
        raise ValueError("a user and a password stand in no address; a key comes from the environment (api_key_env)")
    return given


ApiAddress = Annotated[str, AfterValidator(_address)]


class Endpoint(Section):
    """An OpenAI-compatible API and what its key allows."""

    base_url: ApiAddress = Field(description="address that ends in /v1 or the like")
    api_key_env: str | None = Field(None, description="environment variable that holds the key; null: no key is sent")
    model: str | None = Field(None, description="the model's name there; null: what `model` beside endpoints says")
    weight: Positive = Field(1, description="share of the requests, relative to the other endpoints")
    requests_per_minute: Count | None = Field(None, description="null: no limit")
    input_tokens_per_minute: Count | None = Field(None, description="null: no limit")
    output_tokens_per_minute: Count | None = Field(None, description="null: no limit")
    max_in_flight: Count = Field(64, description="requests that wait for an answer at the same time")
    initial_in_flight: Count | None = Field(None, description="as many at first, then more; null: max_in_flight")
    reasoning_effort: str | None = Field(None, description="how long the model thinks, such as low; null: not sent")
    chat_template_kwargs: dict[str, Json] = Field(
        {},
        description="arguments of the chat template, such as {enable_thinking: false}, where the endpoint takes them",
    )
    extra_body: dict[str, Json] = Field({}, description="further parameters of requests, by the endpoint's names")

    @model_validator(mode="after")
    def _leaves_ours_alone(self) -> "Endpoint":
        if taken := sorted(TAKEN & self.extra_body.keys()):
            raise ValueError(f"extra_body: {', '.join(taken)} cannot stand here; {TAKEN_HINT}")
        return self


Amount = Annotated[Decimal, Field(ge=0, le=10**9), Number]


class Price(Section):
    """What tokens cost, as decimal numbers."""

    input: Amount = Field(description="per million input tokens")
    output: Amount = Field(description="per million output tokens")
    cached: Amount | None = Field(
        None, description="per million input tokens that the endpoint had in its cache; null: as input"
    )
    reasoning: Amount | None = Field(None, description="per million output tokens of reasoning; null: as output")
    currency: str = Field("CNY", description="for people; nothing is converted")


NOT_IN_FINGERPRINT = (
    *("endpoints", "timeout", "max_attempts", "max_wait", "circuit_breaker", "price", "budget", "workers"),
)
"""Keys that change where and how requests are sent, not what they are: fingerprints leave them out."""


class Sampling(Generation):
    """Sampling parameters, and where an answer ends."""

    stop: list[Annotated[str, Field(min_length=1)]] | None = Field(
        None, description="texts at which an answer ends, such as a line break"
    )


class ModelRequests(Section):
    """A model, where it answers, and what its requests may take."""

    model: str = Field(description="the model asked")
    endpoints: list[Endpoint] = Field(min_length=1, description="where it answers; the requests are shared by weight")
    generation: Sampling = Sampling()
    timeout: Seconds = Field(120, description="seconds one answer may take")
    max_attempts: Count = Field(6, description="tries at one answer; waiting for a rate limit is not one")
    max_wait: Seconds = Field(120, description="seconds that an endpoint's Retry-After is obeyed at most")
    circuit_breaker: Seconds = Field(30, description="seconds without any answer, only errors, that stop the run")
    price: Price | None = Field(None, description="null: costs are not computed")
    budget: Annotated[Decimal, Field(gt=0, le=10**15), Number] | None = Field(
        None, description="stop before it costs more; with price"
    )
    workers: Processes = Field(1, description="processes that send requests; one sends a few hundred a second")

    @model_validator(mode="after")
    def _budget_has_a_price(self) -> "ModelRequests":
        if self.budget is not None and self.price is None:
            raise ValueError("budget needs price")
        return self
