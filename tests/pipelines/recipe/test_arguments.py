"""What the schema of recipes accepts, every stage's building of arguments accepts: values drawn by its own bounds."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipelines.errors import DanluError, RecipeError
from pipelines.recipe.load import load_recipe
from pipelines.recipe.schema import Recipe
from pipelines.recipe.yaml_text import parse_yaml

pytest.importorskip("vllm")
pytest.importorskip("evalscope")

Builder = Callable[[Recipe, Path], None]

SCHEMA = Recipe.model_json_schema()
ENDPOINT = {"base_url": "http://127.0.0.1:1/v1"}
BASE: dict[str, Any] = {
    "name": "drawn",
    "ingest": {"source": "rows.jsonl"},
    "synthesize": {
        "model": "m",
        "endpoints": [ENDPOINT],
        "dimensions": {"scene": ["a", "b"]},
        "styles": {"plain": {"template": "{scene}"}},
        "queries": ["q"],
        "price": {"input": 1, "output": 2},
    },
    "split": {"test_ratio": 0.5},
    "train": {"model": "m"},
    "merge": {},
    "evaluate": {},
    "compare": {},
}
"""A recipe of which some values are replaced."""

STRANGE = ["", " ", "a..b", "x" * 300, "甲", "\0", "\n", "{", "[::1", "http://", "-1", "nan", "/", "~", "\\", "%", "*"]
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(STRANGE),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=2),
    max_leaves=3,
)


def values(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that a part of the schema allows, within its bounds and at them."""
    if "$ref" in schema:
        return values(SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]])
    if "anyOf" in schema:
        return st.one_of(*map(values, schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    kind = schema.get("type")
    low, high = schema.get("minimum"), schema.get("maximum")
    if kind == "integer":
        above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
        low, high = above + 1 if above is not None else low, below - 1 if below is not None else high
        at = [bound for bound in (low, high) if bound is not None]
        return st.integers(low, high) | (st.sampled_from(at) if at else st.nothing())
    if kind == "number":
        above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
        return st.floats(
            low if above is None else float(above),
            high if below is None else float(below),
            exclude_min=above is not None,
            exclude_max=below is not None,
            allow_nan=False,
            allow_infinity=False,
        )
    if kind == "string":
        return (
            st.from_regex(schema["pattern"]) if "pattern" in schema else st.sampled_from(STRANGE) | st.text(max_size=9)
        )
    if kind == "array":
        return st.lists(values(schema["items"]), min_size=schema.get("minItems", 0), max_size=3)
    if kind == "object" and "properties" in schema:
        needed = schema.get("required", [])
        fields = {name: values(part) for name, part in schema["properties"].items()}
        optional = {name: strategy for name, strategy in fields.items() if name not in needed}
        return st.fixed_dictionaries({name: fields[name] for name in needed}, optional=optional)
    if kind == "object":
        names = values({"type": "string", **schema.get("propertyNames", {})})
        inner = schema.get("additionalProperties")
        return st.dictionaries(names, values(inner if isinstance(inner, dict) else {}), max_size=3)
    return {"boolean": st.booleans(), "null": st.none()}.get(str(kind), ANYTHING)


def places(schema: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Every key of a section and of the sections in it, with its part of the schema."""
    for name, part in schema["properties"].items():
        yield (*path, name), part
        for option in (part, *part.get("anyOf", [])):
            inner = SCHEMA["$defs"].get(option.get("$ref", "").rpartition("/")[2], {})
            if "properties" in inner:
                yield from places(inner, (*path, name))


def recipes(*sections: str) -> st.SearchStrategy[Recipe]:
    """Recipes that the schema accepts, with up to five values of these sections drawn."""
    keys = [place for place in places(SCHEMA) if place[0][0] in sections and len(place[0]) > 1]
    if "synthesize" in sections:
        keys += [(("synthesize", "endpoints", "0", *path), part) for path, part in places(SCHEMA["$defs"]["Endpoint"])]
    changes = st.lists(
        st.sampled_from(keys).flatmap(lambda key: st.tuples(st.just(key[0]), values(key[1]))), min_size=1, max_size=5
    )
    drawn: Any = changes.map(accepted).filter(lambda recipe: recipe is not None)
    found: st.SearchStrategy[Recipe] = drawn
    return found


def accepted(changes: list[tuple[tuple[str, ...], Any]]) -> Recipe | None:
    """The recipe with some values replaced; None where the schema refuses it."""
    tree = deepcopy(BASE)
    for (*parents, last), value in changes:
        node: Any = tree
        for parent in parents:
            if isinstance(node, dict):
                node = node.setdefault(parent, {})
            elif isinstance(node, list) and node:
                node = node[int(parent)]
        if not isinstance(node, dict):  # another change has put something else there
            return None
        node[last] = deepcopy(value)
    try:
        return Recipe.model_validate(tree)
    except ValidationError:
        return None


def build_training(recipe: Recipe, folder: Path) -> None:
    """What transformers' Trainer and DeepSpeed are given."""
    from pipelines.train.arguments import training_arguments
    from pipelines.train.run import Run
    from pipelines.train.tokenize import Tokenized

    section = recipe.train
    assert section is not None
    stage = 2 if section.zero_stage == "auto" else section.zero_stage
    section = section.model_copy(update={"zero_stage": stage, "report_to": []})
    steps = section.max_steps or 1000
    run = Run(section, recipe.seed, steps, folder, folder / "a" / "b", Tokenized([], "", 100, {}), None)
    training_arguments(run, universal=False).get_warmup_steps(run.steps)


def build_worker_group(recipe: Recipe, folder: Path) -> None:
    """What Ray Train is given."""
    from ray.train import ScalingConfig

    from pipelines.placement import lacking
    from pipelines.recipe.train import numbers_of_workers

    section = recipe.train
    assert section is not None
    each = section.resources_per_worker
    lacking([each] * numbers_of_workers(section)[0], [{"CPU": 4.0}])
    ScalingConfig(num_workers=section.num_workers, use_gpu=each.get("GPU", 0) > 0, resources_per_worker=dict(each))
    take_from_ray(each)


def take_from_ray(resources: dict[str, float]) -> None:
    """Ask Ray for resources, of a task and of a placement group."""
    import ray
    from ray.util.placement_group import _validate_bundles

    library: Any = ray
    rest = dict(resources)
    library.remote(num_cpus=rest.pop("CPU", 1), num_gpus=rest.pop("GPU", 0), resources=rest)(take_from_ray)
    _validate_bundles([dict(resources)])
    counted = [amount * 10_000 for amount in resources.values() if amount]  # as Ray does
    assert all(1 <= amount < 2**63 for amount in counted)


def build_adapter(recipe: Recipe, folder: Path) -> None:
    """What peft is given."""
    from pipelines.train.targets import adapter_config

    assert recipe.train is not None
    adapter_config(recipe.train, loaded(folder))


@cache
def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def build_merge(recipe: Recipe, folder: Path) -> None:
    """What the merging process and its files are given."""
    from huggingface_hub import split_torch_state_dict_into_shards

    assert recipe.merge is not None
    take_from_ray({"CPU": recipe.merge.num_cpus})
    split_torch_state_dict_into_shards({}, max_shard_size=recipe.merge.max_shard_size)


def build_endpoint(recipe: Recipe, folder: Path) -> None:
    """What Ray Serve, KubeRay, vLLM's server and the gateway's socket are given."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from pipelines.models.lineup import lineup_of
    from pipelines.models.served import ServedModel, check_models
    from rayjobs.deploy import served_section
    from serve.app import claim_port, engine_application
    from serve.engine.command import EnginePlan, vllm_arguments
    from serve.engine.extra import check_extra
    from serve.gateway.limits import OwnLimits
    from serve.kuberay import configuration, ray_service

    section = served_section(recipe)
    lineup = lineup_of(recipe)
    assert lineup is not None
    models = [ServedModel(name, str(folder), {}, str(folder)) for name in {"base", *lineup.names()}]
    check_models(models)
    plan = EnginePlan("app", models[0], section.engine, section.num_gpus, "127.0.0.1", "key", str(folder))
    engine_application(plan, section)
    ray_service(recipe.name, yaml.safe_dump(configuration(recipe.name, models, section, "logs")), 1, section, "w")
    OwnLimits(section.limits)
    with suppress(DanluError):  # a name that nobody has, or a port that somebody has
        claim_port(section.host, section.port)
    try:
        check_extra(section.engine)
    except DanluError:  # the installed vLLM has no such argument or parser
        return
    parser: Any = make_arg_parser(FlexibleArgumentParser())
    AsyncEngineArgs.from_cli_args(parser.parse_args(vllm_arguments(plan)))


def build_batch_engines(recipe: Recipe, folder: Path) -> None:
    """What ray.data.llm is given, and vLLM with each request."""
    from vllm import SamplingParams

    from pipelines.llm import vllm_batch
    from pipelines.models.served import ServedModel

    configuration = vllm_batch._configuration(recipe.serve, ServedModel("model", str(folder)))
    for bundle in configuration.placement_group_config["bundles"][:1]:
        take_from_ray(bundle)
    for section in (recipe.synthesize, recipe.evaluate, recipe.compare, recipe.merge):
        if section is not None and section.generation is not None:
            SamplingParams(**section.generation.model_dump(exclude_none=True))


def build_requests(recipe: Recipe, folder: Path) -> None:
    """What an API is asked with, and what bounds it."""
    from pipelines.llm.client import Client
    from pipelines.llm.coordinator import Coordinator, cost_of
    from pipelines.llm.rate_limiter import RateLimiter, Usage
    from pipelines.synthesize.grid import Grid

    section = recipe.synthesize
    assert section is not None
    grid = Grid(section, recipe.seed)
    first = next(grid.positions())
    grid.request(first)
    assert grid.size <= 10**9  # which are listed in parts of some thousands
    Coordinator(section)
    cost = cost_of(section.price, 10**12, 10**12, 10**6, 10**6)
    assert cost.is_finite()
    for endpoint in section.endpoints:
        limiter = RateLimiter(endpoint, 100.0, 100.0)
        limiter.lease("w", Usage(waiting=10), 1.0)
        limiter.lease("w", Usage(in_flight=1, waiting=10), 2.0)
        asyncio.run(ask(Client(endpoint, section, None, grid.response_format)))


async def ask(client: Any) -> None:
    await client.send([{"role": "user", "content": "x"}])
    await client.close()


def build_scoring(recipe: Recipe, folder: Path) -> None:
    """What evalscope is given."""
    from pipelines.evaluate.evalscope.child import task_config
    from pipelines.evaluate.evalscope.job import ScoringJob

    section = recipe.evaluate
    assert section is not None
    job = ScoringJob(
        model=recipe.name,
        url=section.endpoint or "http://127.0.0.1/v1",
        folder=str(folder / "scores"),
        benchmark="general_qa",
        arguments={},
        limit=section.limit,
        generation=section.generation.model_dump(exclude_none=True),
        eval_batch_size=section.eval_batch_size,
        timeout=section.timeout,
        prompts="p",
    )
    task_config(job, "key")


BUILDERS: dict[Builder, list[str]] = {
    build_training: ["train"],
    build_worker_group: ["train"],
    build_adapter: ["train"],
    build_merge: ["merge"],
    build_endpoint: ["serve"],
    build_batch_engines: ["serve", "synthesize", "compare", "merge"],
    build_requests: ["synthesize"],
    build_scoring: ["evaluate"],
}


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """This process as the only one of a training: `dtype: auto` asks all of them."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
def test_what_the_schema_accepts_every_stage_accepts(build: Builder, tiny_model: Path) -> None:
    @settings(max_examples=200, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(recipes(*BUILDERS[build]))
    def holds(recipe: Recipe) -> None:
        build(recipe, tiny_model)

    holds()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(
            ("train.resources_per_worker", value)
            for value in ("{CPU: 0.00001}", "{CPU: 1.0e+15}", "{GPU: 0.00001}", "{}")
        ),
        *(("train.num_workers", 1 << 40), ("train.global_batch_size", 1 << 50), ("train.max_length", 1 << 31)),
        *(("merge.max_shard_size", value) for value in ("0GB", "2GiB")),
        *(("serve.num_gpus", "0.00001"), ("serve.num_cpus", "1.0e-9"), ("serve.engine.tensor_parallel_size", 1 << 40)),
        *(("serve.engine.gpu_memory_utilization", 0), ("serve.engine.extra", "{a: [.nan]}")),
        *(("serve.host", value) for value in ("a..b", '""', "a b", "x" * 64, "h/v1")),
        *(
            ("synthesize.endpoints[0].base_url", value)
            for value in ("http://", "http://[::1", "http://h:99999", "h/v1")
        ),
        *(("synthesize.endpoints[0].extra_body", "{a: .inf}"), ("synthesize.timeout", "1.0e+12")),
        *(("synthesize.price.input", "1.0e+300"), ("synthesize.samples_per_cell", 1 << 50)),
        *(("synthesize.generation.stop", '[""]'), ("synthesize.generation.top_k", 1 << 40)),
        ("compare.generation.repetition_penalty", "1.0e-300"),
        *(("split.test_ratio", value) for value in (0, 1)),
        ("ingest.shard_bytes", 1 << 50),
    ],
)
def test_what_a_stage_could_not_take_is_refused_by_its_key(key: str, value: object, tmp_path: Path) -> None:
    tree = deepcopy(BASE)
    node: Any = tree
    *parents, last = key.replace("[0]", ".0").split(".")
    for parent in parents:
        node = node[int(parent)] if isinstance(node, list) else node.setdefault(parent, {})
    node[last] = parse_yaml(str(value))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    with pytest.raises(RecipeError) as refused:
        load_recipe(str(tmp_path / "mine.yaml"))
    assert all(problem.key.startswith(key) for problem in refused.value.problems), refused.value
