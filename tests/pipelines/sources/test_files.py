"""Which files a source has."""

from pathlib import Path

import pytest

from pipelines.errors import InputError
from pipelines.sources.files import list_files, rows_of_file
from tests.pipelines.sources.samples import write_lines


def test_missing_file_and_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        list_files(str(tmp_path / "none.jsonl"))
    (tmp_path / "a.xls").write_bytes(b"x")
    with pytest.raises(InputError, match=r"not one of .*save a spreadsheet as \.xlsx"):
        list_files(str(tmp_path / "a.xls"))


def test_globs_and_folders_are_read_in_name_order(tmp_path: Path) -> None:
    for number in (2, 0, 1):
        write_lines(tmp_path / f"part-{number}.jsonl", [{"query": str(number), "response": "x"}])
    for source in (tmp_path / "part-*.jsonl", tmp_path):
        assert [Path(path).name for path in list_files(str(source))] == [f"part-{n}.jsonl" for n in range(3)]


@pytest.mark.parametrize("line", [",", '"",""'])
def test_a_row_of_empty_fields_is_set_aside(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.csv").write_text(f"query,response\na,b\n{line}\n\nc,\n", encoding="utf-8")
    first, second, third = rows_of_file(str(tmp_path / "a.csv"))
    assert (first[1], third) == ({"query": "a", "response": "b"}, (2, {"query": "c", "response": ""}, ""))
    assert second == (1, None, "all of its fields are empty; delete the line")
