"""Which files a source has."""

from pathlib import Path

import pytest

from pipelines.errors import InputError
from pipelines.sources.files import list_files
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
