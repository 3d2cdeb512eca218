"""What a recipe reads follows from the types of its fields, so no field that names a file may be without its mark."""

import re
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic.fields import FieldInfo

from pipelines.recipe.base import ReadPath, Section, WrittenPath
from pipelines.recipe.paths import paths_read
from pipelines.recipe.schema import Recipe
from pipelines.recipe.train import Train

NAMES_A_FILE = re.compile(r"\b(files?|paths?|folders?)\b|://|\.(jsonl|csv|json)\b", re.IGNORECASE)
NEITHER = {
    "Ingest.encoding": "how files are encoded",
    "Source.encoding": "how files are encoded",
    "Merge.max_shard_size": "a size",
    "Serve.allow_origins": "addresses of web pages",
}
"""Texts whose descriptions speak of files without naming one."""


def fields(model: type[Section], seen: set[type[Section]]) -> Iterator[tuple[str, FieldInfo]]:
    """Every field of a section and of those below it, as `Section.field`."""
    if model in seen:
        return
    seen.add(model)
    for name, field in model.model_fields.items():
        yield f"{model.__name__}.{name}", field
        for kind in kinds(field.annotation):
            if isinstance(kind, type) and issubclass(kind, Section):
                yield from fields(kind, seen)


def kinds(annotation: Any) -> Iterator[Any]:
    """A type and all that it is made of."""
    yield annotation
    for part in get_args(annotation):
        yield from kinds(part)


def test_every_field_that_names_a_file_says_whether_it_is_read_or_written() -> None:
    marked, unmarked = set(), set()
    for key, field in fields(Recipe, set()):
        if any(isinstance(mark, ReadPath | WrittenPath) for mark in field.metadata):
            marked.add(key)
        elif str in kinds(field.annotation) and NAMES_A_FILE.search(field.description or ""):
            unmarked.add(key)
    assert unmarked == set(NEITHER)
    assert len(marked) > 12
    assert not [key for key in marked if str not in kinds(dict(fields(Recipe, set()))[key].annotation)]


def test_what_is_read_is_found_by_its_key() -> None:
    recipe = Recipe.model_validate(
        {
            "name": "r",
            "ingest": {"source": "in/*.jsonl"},
            "refine": {"styles": {"甲": {}}, "edited": "refined.csv"},
            "clean": {
                "process": ["clean_email_mapper"],
                "assets": {"lid.176.ftz": f"models/lid.176.ftz#sha256={'0' * 64}"},
                "custom_operators": ["mine.py", "more.py"],
                "edited": "edited.csv",
            },
            "export": {"path": "out.jsonl"},
            "split": {"test_source": "test.jsonl"},
            "train": {
                "model": "hf://owner/model",
                "data": ["train", "test#3", "own#7", "a/b.jsonl#9", "c.json"],
                "sources": {"own": {"source": "own.csv"}},
                "checkpoint_copies": "s3://bucket/run",
            },
        }
    )
    assert paths_read(recipe) == {
        "ingest.source": "in/*.jsonl",
        "refine.edited": "refined.csv",
        "clean.assets.lid.176.ftz": "models/lid.176.ftz",
        "clean.custom_operators[0]": "mine.py",
        "clean.custom_operators[1]": "more.py",
        "clean.edited": "edited.csv",
        "split.test_source": "test.jsonl",
        "train.model": "hf://owner/model",
        "train.data[3]": "a/b.jsonl",
        "train.data[4]": "c.json",
        "train.sources.own.source": "own.csv",
        "train.checkpoint_copies": "s3://bucket/run",
    }


@pytest.mark.parametrize(
    ("engine", "model", "read"), [("vllm", "models/own", True), ("vllm", "tiny", False), ("api", "models/own", False)]
)
def test_a_model_that_is_asked_is_read_where_it_is_loaded(engine: str, model: str, read: bool) -> None:
    synthesize = {
        "engine": engine,
        "model": model,
        "endpoints": [{"base_url": "http://127.0.0.1:1/v1"}] if engine == "api" else [],
        "dimensions": {"who": ["妈妈"]},
        "styles": {"plain": {"template": "{who}"}},
        "queries": ["{who}"],
        "passages": {"source": "book.txt"},
    }
    found = paths_read(Recipe.model_validate({"name": "r", "synthesize": synthesize}))
    assert found == {**({"synthesize.model": model} if read else {}), "synthesize.passages.source": "book.txt"}


def test_a_chat_template_is_read_where_it_is_a_file(tmp_path: Any) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages }}", encoding="utf-8")
    section = Train(model="m", chat_template=str(file))
    assert section.chat_template == "{{ messages }}"
    assert paths_read(section)["chat_template"] == str(file)
    assert "chat_template" not in paths_read(Train(model="m", chat_template="{{ messages }}"))
