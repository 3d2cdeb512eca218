"""`objective: pretrain`: books and novels, without a chat template, split where they are longer than a sample."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.artifacts.workspace import Workspace
from pipelines.errors import DataError
from pipelines.models.tokenizer import TEMPLATE, open_tokenizer
from pipelines.recipe.schema import Recipe
from pipelines.recipe.train import Train, fingerprint_of
from pipelines.train.proof import row_at
from pipelines.train.samples import Samples
from pipelines.train.tokenize import TrainingSource, tokenize
from tests.model_families import write_qwen2
from tests.pipelines.train.conftest import chats, finished_split, place_for, problems_of, train_recipe

BOOK = "那年冬天，雪下得很大。" * 40


def text_rows(*texts: str) -> list[dict[str, Any]]:
    empty = {"system": None, "query": None}
    return [{"row_id": f"b{n}", "pos": n, **empty, "response": text} for n, text in enumerate(texts)]


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a chat template, as base models are."""
    folder = write_qwen2(tmp_path_factory.mktemp("base"))
    (folder / TEMPLATE).unlink()
    return folder


def section_of(**section: Any) -> Train:
    return Train.model_validate({"model": "x", "objective": "pretrain", **section})


def over(recipe: Recipe, file: Path, rows: list[dict[str, Any]]) -> Recipe:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert recipe.ingest
    return recipe.model_copy(update={"ingest": recipe.ingest.model_copy(update={"source": str(file)})})


def test_long_texts_are_split_where_nothing_else_is_said() -> None:
    assert section_of().overlong == "split" and section_of(overlong="drop").overlong == "drop"
    assert Train.model_validate({"model": "x"}).overlong == "truncate"
    assert fingerprint_of(section_of())["objective"] == "pretrain"
    assert "objective" not in fingerprint_of(Train.model_validate({"model": "x"}))


@pytest.mark.parametrize(
    "given",
    [
        {"system": "be kind"},
        {"chat_template": "{{ messages }}"},
        {"merge_system": True},
        {"thinking": "strip"},
        {"loss_on": "last_turn"},
        {"max_input_length": 5, "overlong": "drop"},
        {"max_output_length": 5, "overlong": "drop"},
        {"predict_with_generate": True, "eval_rows": 2},
    ],
)
def test_what_is_of_chats_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=rf"trains plain text, and {next(iter(given))} is of chats"):
        section_of(**given)


@pytest.mark.slow
def test_a_book_is_trained_whole_in_samples_that_follow_one_another(
    ray_cluster: None, base_model: Path, tmp_path: Path
) -> None:
    split = finished_split(Workspace(str(tmp_path / "ws")), text_rows(BOOK, "一句话。"), text_rows("别的。"))
    sources = [TrainingSource(split.paths(split.report.outputs.train), None)]
    data = tokenize(place_for(split), "t", base_model, sources, section_of(max_length=100), seed=1)
    tokenizer, samples = open_tokenizer(base_model), Samples(data)
    pieces = [samples[number] for number in range(len(samples))]
    assert all(len(tokens) <= 100 and tokens.tolist() == labels.tolist() for tokens, labels in pieces)
    joined = [token for tokens, _ in pieces for token in tokens.tolist()]
    assert joined == [
        token
        for text in (BOOK, "一句话。")
        for token in [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    ]
    assert len(samples) > 10 and data.counts["left_out"] == 0


def test_a_chat_is_refused_where_plain_text_is_trained(ray_cluster: None, base_model: Path, tmp_path: Path) -> None:
    split = finished_split(Workspace(str(tmp_path / "ws")), chats(2), text_rows("别的。"))
    sources = [TrainingSource(split.paths(split.report.outputs.train), None)]
    with pytest.raises(DataError, match=r"row r0: train.objective: pretrain .* is a chat; set objective: sft"):
        tokenize(place_for(split), "t", base_model, sources, section_of(), seed=1)


def test_check_asks_for_no_chat_template_and_names_a_row_that_is_a_chat(base_model: Path, tmp_path: Path) -> None:
    recipe = train_recipe(base_model, objective="pretrain")
    assert not problems_of(recipe)
    assert not problems_of(over(recipe, tmp_path / "books.jsonl", [{"text": BOOK}]))
    told = problems_of(over(recipe, tmp_path / "rows.jsonl", [{"text": BOOK}, {"query": "q", "response": "r"}]))
    assert told.startswith("train.objective: pretrain trains plain text") and "seen in row rows.jsonl:2" in told
    assert "no chat template" in problems_of(train_recipe(base_model))
    assert recipe.train
    assert row_at(recipe.train, None, None, 0).text
