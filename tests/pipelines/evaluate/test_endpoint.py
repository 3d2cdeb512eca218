"""How often engines start for evaluation."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import serve.app
from pipelines.evaluate.endpoint import models_endpoint, shared_endpoints
from tests.pipelines.evaluate.fake_endpoint import ChatServer, compare, lineup, make_inputs, make_recipe

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


def test_stages_of_one_run_share_the_engines(started: list[str], tmp_path: Path) -> None:
    recipe = make_recipe(None)
    inputs = make_inputs(tmp_path, ROWS)
    with shared_endpoints():
        with models_endpoint(lineup(recipe), recipe.serve, inputs, None) as first:
            pass
        assert started == ["start base tiny tiny-merged"]
        with models_endpoint(lineup(recipe), recipe.serve, inputs, None) as second:
            assert second == first
        compare(recipe, inputs)
        assert started == ["start base tiny tiny-merged"]
    assert started == ["start base tiny tiny-merged", "stop"]


def test_a_stage_by_itself_stops_what_it_started(started: list[str], tmp_path: Path) -> None:
    compare(make_recipe(None), make_inputs(tmp_path, ROWS))
    assert started == ["start base tiny tiny-merged", "stop"]


def test_nothing_is_started_when_everything_is_answered(started: list[str], tmp_path: Path) -> None:
    recipe, inputs = make_recipe(None), make_inputs(tmp_path, ROWS)
    compare(recipe, inputs)
    started.clear()
    compare(recipe, inputs)
    assert started == []
