"""The recipe's sections `evaluate` and `compare`."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import regex
from pydantic import AfterValidator, Field, ValidationInfo, model_validator

from pipelines.errors import nearest
from pipelines.recipe.base import Count, Generation, Penalty, Ratio, ReadPath, Seconds, Section
from pipelines.recipe.llm import ApiAddress, ModelRequests


def _belongs_to_api(endpoint: str | None, known: ValidationInfo) -> str | None:
    if endpoint is not None and known.data.get("engine") == "vllm":
        raise ValueError("engine: vllm asks no endpoint; leave one of them out")
    return endpoint


EndpointAddress = Annotated[ApiAddress | None, AfterValidator(_belongs_to_api)]
Temperature = Annotated[float, Field(ge=0, le=2)]


class Benchmark(Section):
    """What is asked: `test`, the split's held-out rows, or a data set of evalscope's, by name or from a folder."""

    benchmark: str = Field(description="test, or evalscope's name, such as general_qa, general_mcq, ceval")
    path: Annotated[str | None, ReadPath()] = Field(
        None, description="folder of SUBSET.jsonl or SUBSET_SPLIT.jsonl; null: fetched by name"
    )
    subsets: list[str] = Field([], description="subsets asked; empty: the benchmark's own")
    few_shot_num: int | None = Field(None, ge=0, description="solved examples before each question; null: its own")

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, given: Any) -> Any:
        return {"benchmark": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _is_there(self) -> "Benchmark":
        if self.benchmark == "test":
            return self
        known = _known_benchmarks()
        if self.benchmark not in known:
            raise ValueError(f"no benchmark {self.benchmark!r}; {nearest(self.benchmark, ['test', *known])}")
        if self.path is not None and not Path(self.path).is_dir():
            raise ValueError(f"path {self.path}: no such folder")
        if self.benchmark.startswith("general_") and not (self.path and self.subsets):
            raise ValueError(f"{self.benchmark} needs path and subsets")
        return self


def _known_benchmarks() -> list[str]:
    """The names evalscope's own index lists; read from its file, since importing it takes seconds."""
    found = find_spec("evalscope")
    if found is None or found.origin is None:
        raise ValueError("evalscope is not installed; pip install 'danlu[evaluate]'")
    index = Path(found.origin).parent / "benchmarks" / "_index.json"
    return list(json.loads(index.read_text(encoding="utf-8")))


class Mark(Section):
    """Something that answers should hold, counted over the questions it applies to; regular expressions."""

    where: str = Field("", description="questions that it applies to; empty: all")
    each: str | None = Field(None, description="what of the question the answer should repeat, as the first group")
    answer: str | None = Field(None, description="what the answer should match")

    @model_validator(mode="after")
    def _can_be_counted(self) -> "Mark":
        if (self.each is None) == (self.answer is None):
            raise ValueError("give either each or answer")
        for pattern in (self.where, self.each or "", self.answer or ""):
            try:
                regex.compile(pattern)
            except regex.error as error:
                raise ValueError(f"not a regular expression: {pattern!r}: {error}") from None
        if self.each is not None and regex.compile(self.each).groups != 1:
            raise ValueError(f"each needs one group, such as '#([^*]+)': {self.each!r}")
        return self


class Evaluate(Section):
    """Scores by evalscope against the served endpoint."""

    datasets: list[Benchmark] = Field(
        [Benchmark(benchmark="test")], min_length=1, description="data sets, by name or with path and subsets"
    )
    limit: Count | None = Field(None, description="rows asked per data set and subset; null: all")
    eval_batch_size: Count = Field(8, description="requests in flight")
    generation: Generation = Generation()
    timeout: Seconds = Field(300, description="seconds one answer may take")
    stock_phrases: list[str] = Field(
        ["作为一个人工智能", "作为一个AI", "首先", "总之", "综上所述", "需要注意的是", "as an AI", "in conclusion"],
        description="turns of phrase that mark machine-made text; answers that hold one are counted",
    )
    marks: dict[str, Mark] = Field({}, description="by name: what answers should hold, such as names or attributes")
    engine: Literal["api", "vllm"] = Field(
        "api", description="who answers: a /v1 endpoint, or vLLM in the cluster without HTTP, as serve describes it"
    )
    endpoint: EndpointAddress = Field(None, description="a /v1 address to use instead of starting one")


class Sweep(Section):
    """The fine-tuned model at a grid of sampling settings, to find one at which it does not loop."""

    temperature: list[Temperature] = Field([0.0, 0.4, 0.8], min_length=1, description="0: the likeliest token")
    repetition_penalty: list[Penalty] = Field([1.0, 1.1, 1.2], min_length=1, description="1: none")
    rows: Count = Field(10, description="test questions asked at each setting")


class Checkpoints(Section):
    """Every checkpoint that training kept, side by side."""

    rows: Count = Field(10, description="test questions asked of each checkpoint")


class PairwiseJudge(ModelRequests):
    """A model that says which of two answers is better."""


class Compare(Section):
    """The same questions to every model, side by side."""

    queries: int = Field(10, ge=0, description="questions taken from the test split")
    probes: dict[str, Annotated[list[str], Field(min_length=1)]] = Field(
        {"identity": ["你是谁？"]}, description="questions asked before those, in named groups; a list is one group"
    )
    concurrency: Count = Field(4, description="requests in flight")
    generation: Generation = Generation()
    timeout: Seconds = Field(300, description="seconds one answer may take")
    max_loop_share: Ratio = Field(0.02, description="share of looping answers up to which a setting is recommended")
    sweep: Sweep | None = Field(None, description="{}: with its defaults")
    checkpoints: Checkpoints | None = Field(None, description="{}: with its defaults")
    judge: PairwiseJudge | None = Field(None, description="judge the tuned model's answers against the base model's")
    engine: Literal["api", "vllm"] = Field(
        "api", description="who answers: a /v1 endpoint, or vLLM in the cluster without HTTP, as serve describes it"
    )
    endpoint: EndpointAddress = Field(None, description="a /v1 address to use instead of starting one")

    @model_validator(mode="before")
    @classmethod
    def _one_group(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(given.get("probes"), list):
            return {**given, "probes": {"probes": given["probes"]} if given["probes"] else {}}
        return given
