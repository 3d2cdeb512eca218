"""Export: where it may write."""

from pathlib import Path

import pytest

from pipelines.errors import RecipeError
from pipelines.export import preflight
from pipelines.recipe.schema import Recipe


def recipe(path: str, source: str = "rows.jsonl", edited: str | None = None) -> Recipe:
    clean = {"process": [{"text_length_filter": {"min_len": 1}}], "edited": edited}
    return Recipe.model_validate({"name": "r", "ingest": {"source": source}, "clean": clean, "export": {"path": path}})


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("rows.jsonl", "rows.jsonl"),
        ("./data/../rows.jsonl", "file://{here}/rows.jsonl"),
        ("{here}/data/all.jsonl", "data"),
        ("data/all.jsonl", "data/*.jsonl"),
        ("data/a/all.jsonl", "data/**/*.jsonl"),
        ("s3://bucket/rows.parquet", "s3://bucket/"),
        ("link.jsonl", "rows.jsonl"),
    ],
)
def test_what_the_recipe_reads_is_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.jsonl").symlink_to("rows.jsonl")
    with pytest.raises(RecipeError, match=r"export\.path: .* is what ingest\.source names"):
        preflight(recipe(path.format(here=tmp_path), source.format(here=tmp_path)))


def test_other_files_may_be_written() -> None:
    for source in ("rows.jsonl", "data/*.csv", "data", "hf://owner/name", "s3://bucket/in/*.jsonl"):
        preflight(recipe("rows-clean.jsonl", source))
        preflight(recipe("s3://bucket/out/rows.jsonl", source))
    with pytest.raises(RecipeError, match=r"edited\.jsonl is what clean\.edited names"):
        preflight(recipe("edited.jsonl", edited="edited.jsonl"))
