"""Entries of LLaMA-Factory's dataset_info.json are read as they say, or refused by what is not read of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import InputError
from pipelines.recipe.dataset_info import file_of
from pipelines.recipe.ingest import Ingest
from pipelines.recipe.paths import paths_read
from pipelines.sources.dataset_info import resolved
from pipelines.sources.read import check_source, describe_source, first_rows, source_fingerprint
from tests.pipelines.sources.samples import write_lines


def source_of(tmp_path: Path, entry: Any, name: str = "mine") -> Ingest:
    (tmp_path / "dataset_info.json").write_text(json.dumps({name: entry}, ensure_ascii=False), encoding="utf-8")
    return Ingest(source=f"{tmp_path}/dataset_info.json#mine")


def test_an_entry_names_file_and_columns(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"问": "一", "补": "二", "答": "三", "前": [["零", "半"]], "别": 1}])
    columns = {"prompt": "问", "query": "补", "response": "答", "history": "前"}
    section = source_of(tmp_path, {"file_name": "a.jsonl", "columns": columns})
    check_source(section)
    (row,) = first_rows(section, 5)
    assert [turn["content"] for turn in row["messages"]] == ["零", "半", "一\n二", "三"]
    assert describe_source(section) == "as alpaca; carried, not trained: 别"
    files = {"source": f"{tmp_path}/dataset_info.json", "source.file_name": f"{tmp_path}/a.jsonl"}
    assert paths_read(section) == files
    before = source_fingerprint(section)
    (tmp_path / "a.jsonl").write_text('{"问": "改", "答": "了"}\n', encoding="utf-8")
    assert source_fingerprint(section) != before


@pytest.mark.parametrize(
    ("columns", "tags", "row"),
    [
        (
            {"messages": "messages"},
            {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
            {"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]},
        ),
        (
            {"messages": "talk", "system": "prompt"},
            {},
            {"talk": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}], "prompt": "S"},
        ),
    ],
)
def test_conversations_are_read_by_their_tags(tmp_path: Path, columns: Any, tags: Any, row: Any) -> None:
    write_lines(tmp_path / "a.json", [row])
    entry = {"file_name": "a.json", "formatting": "sharegpt", "columns": columns, "tags": tags}
    (found,) = first_rows(source_of(tmp_path, entry), 1)
    assert (found["query"], found["response"], found["system"]) == ("问", "答", row.get("prompt"))


def test_an_entry_on_a_hub_is_its_name_there(tmp_path: Path) -> None:
    entry = {"hf_hub_url": "owner/name", "ms_hub_url": "Owner/name"}
    assert resolved(source_of(tmp_path, entry)).source == "hf://owner/name"
    assert resolved(source_of(tmp_path, {"ms_hub_url": "Owner/name"})).source == "modelscope://Owner/name"


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"file_name": "a.jsonl", "ranking": True}, "ranking: it tells good answers from bad ones"),
        ({"file_name": "a.jsonl", "columns": {"images": "images"}}, r"columns\.images is not read"),
        ({"file_name": "a.jsonl", "num_samples": 10}, "num_samples is not read"),
        ({"file_name": "a.jsonl", "formatting": "other"}, "formatting 'other' is not alpaca or sharegpt"),
        ({"file_name": "a.jsonl", "formatting": "sharegpt", "tags": {"user_tag": "gpt"}}, r"tags\.user_tag 'gpt'"),
        ({"script_url": "x"}, "has neither file_name nor"),
        ([], "no such entry"),
    ],
)
def test_what_an_entry_says_and_is_not_read_is_refused(tmp_path: Path, entry: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_source(source_of(tmp_path, entry))


@pytest.mark.parametrize(
    ("folder", "file_name", "path"),
    [
        ("", "a.jsonl", "a.jsonl"),
        ("data/", "more/a.jsonl", "data/more/a.jsonl"),
        ("memory://lists/", "a.jsonl", "memory://lists/a.jsonl"),
        ("data/", "/elsewhere/a.jsonl", "/elsewhere/a.jsonl"),
    ],
)
def test_a_file_lies_beside_its_list(folder: str, file_name: str, path: str) -> None:
    assert file_of(f"{folder}dataset_info.json#mine", {"file_name": file_name}) == path


def test_lists_that_are_none_are_named(tmp_path: Path) -> None:
    missing = Ingest(source=f"{tmp_path}/dataset_info.json#mine")
    with pytest.raises(InputError, match=r"dataset_info\.json: cannot be read"):
        check_source(missing)
    assert paths_read(missing) == {"source": f"{tmp_path}/dataset_info.json"}
    (tmp_path / "dataset_info.json").write_text("[1, 2]", encoding="utf-8")
    with pytest.raises(InputError, match=r"dataset_info\.json: not a JSON object whose keys name data sets"):
        check_source(missing)
    with pytest.raises(InputError, match=r"no such entry; .*mini"):
        check_source(source_of(tmp_path, {"file_name": "x"}, name="mini"))
