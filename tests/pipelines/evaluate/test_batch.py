"""Answers without an endpoint: by engines in the cluster, filed as they come, scored as those of an endpoint are."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic import ValidationError

from pipelines.errors import StageError
from pipelines.evaluate import batch
from pipelines.evaluate.endpoint import ModelInputs
from pipelines.llm.vllm_batch import Completion
from pipelines.models.lineup import served_models
from pipelines.models.served import ServedModel
from pipelines.recipe.schema import Recipe
from pipelines.recipe.serve import Serve
from tests.outputs import merge_report, train_report
from tests.pipelines.evaluate.evalscope.test_datasets import CHOICES, choose, write
from tests.pipelines.evaluate.fake_endpoint import (
    ChatServer,
    compare,
    evaluate,
    lineup,
    make_inputs,
    make_recipe,
    place_beside,
)

ROWS = [{"row_id": f"r{i}", "query": f"第{i}个问题？", "response": f"答案：{'AB'[i % 2]}"} for i in range(20)]


def said(model: str, query: str) -> str:
    """The answer of a model, once a cut one."""
    return choose(model, query) + ("…" if "第8" in query else "")


class Engines:
    """In place of real ones: answers by a formula, a block of eight rows at a time, and dies when it is told to."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.blocks_to_live = 100
        self.refuses = ""

    def complete(
        self, _: Any, model: ServedModel, rows: pa.Table, prompt: Callable[[dict[str, Any]], Any]
    ) -> Iterator[list[Completion]]:
        for start in range(0, len(rows), 8):
            if not self.blocks_to_live:
                raise StageError("the engine died")
            self.blocks_to_live -= 1
            yield [self._one(model, row["pos"], prompt(row)) for row in rows.slice(start, 8).to_pylist()]

    def _one(self, model: ServedModel, pos: int, prompt: Any) -> Completion:
        query, name = prompt.messages[-1]["content"], prompt.adapter or model.name
        self.asked.append((name, query))
        assert prompt.sampling == {"max_tokens": 32, "temperature": 0.0, "top_p": 1.0}
        error = "too long" if self.refuses and self.refuses in query else ""
        text = "" if error else said(name, query)
        return Completion(pos, text, 9, 4, text.endswith("…"), 0.1, error)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Engines:
    made = Engines()
    monkeypatch.setattr(batch, "complete", made.complete)
    return made


def by_vllm(**sections: Any) -> Recipe:
    evaluating = {"endpoint": None, "engine": "vllm", **sections.pop("evaluate", {})}
    comparing = {"endpoint": None, "engine": "vllm", **sections.pop("compare", {})}
    return make_recipe(None, evaluate=evaluating, compare=comparing, **sections)


@pytest.mark.slow
def test_scores_are_those_of_the_same_answers_over_http(
    engines: Engines, chat_server: ChatServer, tmp_path: Path
) -> None:
    chat_server.answer = said
    write(tmp_path / "mcq" / "animals_val.jsonl", CHOICES)
    write(tmp_path / "ceval" / "logic_val.jsonl", CHOICES)
    write(tmp_path / "ceval" / "logic_dev.jsonl", CHOICES[:3])
    datasets = [
        "test",
        {"benchmark": "general_mcq", "path": str(tmp_path / "mcq"), "subsets": ["animals"]},
        {"benchmark": "ceval", "path": str(tmp_path / "ceval"), "subsets": ["logic"], "few_shot_num": 2},
    ]
    over_http = evaluate(
        make_recipe(chat_server.url, evaluate={"datasets": datasets}), make_inputs(tmp_path / "h", ROWS)
    )
    inputs = make_inputs(tmp_path / "v", ROWS)
    without = evaluate(by_vllm(evaluate={"datasets": datasets}), inputs)
    assert without == over_http
    assert sorted(engines.asked) == sorted(chat_server.asked())
    assert len(engines.asked) == 3 * (20 + 8 + 8)
    file = place_beside(inputs, "evaluate").local("answers-by-engine.jsonl")
    cut = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert {row["finish_reason"] for row in cut if "第8" in row["query"]} == {"length"}


@pytest.mark.slow
def test_what_was_answered_before_the_engine_died_is_not_asked_again(engines: Engines, tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path, ROWS)
    engines.blocks_to_live = 4  # base and its adapter are one engine's 40 rows
    with pytest.raises(StageError, match="the engine died"):
        evaluate(by_vllm(), inputs)
    assert len(engines.asked) == 32
    with open(place_beside(inputs, "evaluate").local("answers-by-engine.jsonl"), "a", encoding="utf-8") as torn:
        torn.write('{"key": "0123')
    engines.blocks_to_live = 100
    report = evaluate(by_vllm(), inputs)
    assert len(engines.asked) == len(set(engines.asked)) == 60
    assert report.results["test"].rows == 20
    assert evaluate(by_vllm(), inputs) == report
    assert len(engines.asked) == 60


def test_a_refused_question_is_named_and_the_others_are_kept(engines: Engines, tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path, ROWS)
    engines.refuses = "第3个"
    with pytest.raises(StageError, match="3 questions were refused, the first: 第3个问题？: too long"):
        evaluate(by_vllm(), inputs)
    engines.refuses = ""
    evaluate(by_vllm(), inputs)
    assert len(engines.asked) == 60 + 3


def test_compare_asks_engines_too(engines: Engines, tmp_path: Path) -> None:
    report = compare(by_vllm(), make_inputs(tmp_path, ROWS))
    assert [row.answers["tiny"] for row in report.rows] == ["答案：B"] * 3
    assert len(engines.asked) == 9


def test_an_endpoint_and_engines_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match=r"engine: vllm asks no endpoint"):
        by_vllm(evaluate={"endpoint": "http://127.0.0.1:8000/v1"})


@pytest.fixture
def trained(
    tmp_path: Path, tiny_model: Path, marker_adapters: dict[str, Path], merged_model: Path
) -> Callable[[str], ModelInputs]:
    """What a training left whose adapter says R, and its merge."""
    train = train_report(model=str(tiny_model), adapter=str(marker_adapters["red"]))
    return lambda name: make_inputs(tmp_path / name, ROWS, train, merge_report(model=str(merged_model)))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_real_engines_answer_as_the_endpoint_does(trained: Callable[[str], ModelInputs]) -> None:
    from serve.app import endpoint

    engine = {"max_model_len": 256, "max_num_seqs": 16, "kv_cache_memory_bytes": 64 << 20}
    serving = {"num_cpus": 0.5, "engine": engine}
    recipe = by_vllm().model_copy(update={"serve": Serve.model_validate(serving)})
    inputs = trained("v")
    place = place_beside(inputs, "evaluate")
    without = evaluate(recipe, inputs)
    models = served_models(lineup(recipe), inputs.train, inputs.merge)
    with endpoint(models, recipe.serve, log_dir=place.local("logs")) as url:
        over_http = evaluate(make_recipe(url), trained("h"))
    assert without == over_http
    lines = place.local("answers.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line)["answers"] for line in lines]
    assert len(answers) == 20
    assert {row["tiny"] for row in answers} == {row["tiny-merged"] for row in answers} == {"R" * 32}
    assert not [row for row in answers if "RRRR" in row["base"]]
