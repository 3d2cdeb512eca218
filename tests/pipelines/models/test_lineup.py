"""Which models a recipe leaves, and how they are served."""

from pathlib import Path
from typing import Any

import pytest

from pipelines.models.lineup import lineup_of, served_models
from pipelines.recipe.schema import Recipe
from tests.outputs import train_report
from tests.pipelines.evaluate.fake_endpoint import lineup, make_inputs, make_recipe

ROWS = [{"row_id": "r0", "query": "问？", "response": "答。"}]


def test_base_carries_the_adapter_and_the_merged_model_stands_alone(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path, ROWS)
    base, merged = served_models(lineup(make_recipe(None)), inputs.train, inputs.merge)
    assert (base.name, base.path, base.adapters) == (
        "base",
        f"{tmp_path}/base",
        {"tiny": f"{tmp_path}/train/{'0' * 16}/adapter"},
    )
    assert (merged.name, merged.path, merged.adapters) == ("tiny-merged", f"{tmp_path}/merge/{'0' * 16}/model", {})


def test_what_chat_templates_are_given_goes_with_every_model(tmp_path: Path) -> None:
    given = {"enable_thinking": False}
    inputs, models = (
        make_inputs(tmp_path, ROWS),
        lineup(make_recipe(None, chat_template_kwargs=given)),
    )
    assert [model.chat_template_kwargs for model in served_models(models, inputs.train, inputs.merge)] == [given] * 2
    assert models.fingerprint() == {"chat_template_kwargs": given}
    assert lineup(make_recipe(None)).fingerprint() == {}


@pytest.mark.parametrize("merged", [True, False])
def test_a_model_trained_as_a_whole_has_an_engine_of_its_own(tmp_path: Path, merged: bool) -> None:
    inputs = make_inputs(tmp_path, ROWS, train_report(adapter=None, trained="trained"))
    models = lineup(make_recipe(None, train={"method": "full"}))
    base, whole = served_models(models, inputs.train, inputs.merge if merged else None)
    folder = f"{tmp_path}/merge/{'0' * 16}/model" if merged else f"{tmp_path}/train/{'0' * 16}/trained"
    assert (base.name, base.path, base.has_adapters) == ("base", f"{tmp_path}/base", False)
    assert (whole.name, whole.path, whole.has_adapters) == ("tiny", folder, False)
    assert models.names() == ["base", "tiny"]


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"r": 513}])
def test_of_an_adapter_that_vllm_cannot_load_the_merged_model_is_served(tmp_path: Path, lora: dict[str, Any]) -> None:
    inputs, models = make_inputs(tmp_path, ROWS), lineup(make_recipe(None, train={"lora": lora}))
    base, merged = served_models(models, inputs.train, inputs.merge)
    assert (base.has_adapters, merged.has_adapters) == (False, False)
    assert (merged.name, merged.path) == ("tiny", f"{tmp_path}/merge/{'0' * 16}/model")
    assert models.names() == ["base", "tiny"]


def test_a_recipe_that_trains_nothing_leaves_no_models() -> None:
    assert lineup_of(Recipe.model_validate({"name": "tiny", "ingest": {"source": "rows.jsonl"}})) is None
