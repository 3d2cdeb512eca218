"""Which models are served for evaluation, and how often engines start."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import serve.app
from pipelines.evaluate.compare import compare
from pipelines.evaluate.endpoint import model_names, models_endpoint, served_models, shared_endpoints
from tests.pipelines.evaluate.fake_endpoint import ChatServer, finished, make_place, make_recipe

ROWS = [{"row_id": "r0", "query": "问？", "response": "答。"}]


@pytest.fixture
def started(chat_server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happened to engines, whose start is replaced by the local server."""
    events: list[str] = []

    @contextmanager
    def endpoint(models: list[Any], section: Any, **_: Any) -> Iterator[str]:
        events.append("start " + " ".join(name for model in models for name in (model.name, *model.adapters)))
        yield chat_server.url
        events.append("stop")

    monkeypatch.setattr(serve.app, "endpoint", endpoint)
    return events


def test_base_carries_the_adapter_and_the_merged_model_stands_alone(tmp_path: Path) -> None:
    place = make_place(tmp_path, "compare", ROWS)
    base, merged = served_models(make_recipe("unused"), place)
    assert (base.name, base.path, base.adapters) == ("base", "base", {"tiny": f"{tmp_path}/train/{'0' * 16}/adapter"})
    assert (merged.name, merged.path, merged.adapters) == ("tiny-merged", f"{tmp_path}/merge/{'0' * 16}/model", {})


@pytest.mark.parametrize("merged", [True, False])
def test_a_model_trained_as_a_whole_has_an_engine_of_its_own(tmp_path: Path, merged: bool) -> None:
    place = make_place(tmp_path, "compare", ROWS)
    finished(place.inputs["train"], {"digest": "t", "model": "base", "adapter": None, "trained": "trained"})
    if not merged:
        del place.inputs["merge"]
    recipe = make_recipe("unused", train={"method": "full"})
    base, whole = served_models(recipe, place)
    folder = f"{tmp_path}/merge/{'0' * 16}/model" if merged else f"{tmp_path}/train/{'0' * 16}/trained"
    assert (base.name, base.path, base.has_adapters) == ("base", "base", False)
    assert (whole.name, whole.path, whole.has_adapters) == ("tiny", folder, False)
    assert model_names(recipe) == ["base", "tiny"]


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"r": 513}])
def test_of_an_adapter_that_vllm_cannot_load_the_merged_model_is_served(tmp_path: Path, lora: dict[str, Any]) -> None:
    place, recipe = make_place(tmp_path, "compare", ROWS), make_recipe("unused", train={"lora": lora})
    base, merged = served_models(recipe, place)
    assert (base.has_adapters, merged.has_adapters) == (False, False)
    assert (merged.name, merged.path) == ("tiny", f"{tmp_path}/merge/{'0' * 16}/model")
    assert model_names(recipe) == ["base", "tiny"]


def test_stages_of_one_run_share_the_engines(started: list[str], tmp_path: Path) -> None:
    recipe = make_recipe("", compare={"endpoint": None})
    place = make_place(tmp_path, "compare", ROWS)
    with shared_endpoints():
        with models_endpoint(recipe, place, None) as first:
            pass
        assert started == ["start base tiny tiny-merged"]
        with models_endpoint(recipe, place, None) as second:
            assert second == first
        compare(recipe, place)
        assert started == ["start base tiny tiny-merged"]
    assert started == ["start base tiny tiny-merged", "stop"]


def test_a_stage_by_itself_stops_what_it_started(started: list[str], tmp_path: Path) -> None:
    compare(make_recipe("", compare={"endpoint": None}), make_place(tmp_path, "compare", ROWS))
    assert started == ["start base tiny tiny-merged", "stop"]


def test_nothing_is_started_when_everything_is_answered(started: list[str], tmp_path: Path) -> None:
    recipe, place = make_recipe("", compare={"endpoint": None}), make_place(tmp_path, "compare", ROWS)
    compare(recipe, place)
    started.clear()
    compare(recipe, place)
    assert started == []
