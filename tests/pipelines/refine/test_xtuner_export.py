import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.artifacts.files import Destination
from pipelines.artifacts.reports.rows import RowsReport
from pipelines.artifacts.rows import ROW
from pipelines.artifacts.stage import Output
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.errors import InputError
from pipelines.refine.xtuner_export import export_conversations
from pipelines.sources.adapters import conversation
from tests.outputs import finished_rows

TALK = [("system", "师"), ("user", "一"), ("assistant", "二"), ("user", "三"), ("assistant", "四")]
ROWS = [
    {"row_id": "a", "pos": 0, "system": "送祝福大师", "query": "祝姐姐生日", "response": "生日快乐🎂"},
    {"row_id": "b", "pos": 1, "query": "祝大家", "response": '引号"与\n换行'},
    {
        "row_id": "c",
        "pos": 2,
        "system": "师",
        "query": "三",
        "response": "四",
        "messages": [{"role": role, "content": text} for role, text in TALK],
    },
]


def to(path: Path) -> Destination:
    return Destination("--export", str(path), "--overwrite")


def output_of(folder: Path, files: list[list[dict[str, object]]]) -> Output[RowsReport]:
    place = Place(Workspace(str(folder)), "refine", "f")
    for number, rows in enumerate(files):
        path = Path(place.path(f"{number}.parquet"))
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, schema=ROW), path)
    names = [f"{number}.parquet" for number in range(len(files))]
    return finished_rows(place, sum(map(len, files)), names)


def test_what_is_exported_comes_back_through_ingest(tmp_path: Path) -> None:
    path = tmp_path / "out" / "wishes.json"
    assert export_conversations(output_of(tmp_path, [ROWS[:2], [], ROWS[2:]]), to(path)) == 3
    made = json.loads(path.read_text(encoding="utf-8"))
    assert made[0] == {"conversation": [{"system": "送祝福大师", "input": "祝姐姐生日", "output": "生日快乐🎂"}]}
    for row, exported in zip(ROWS, made, strict=True):
        back = conversation(exported)
        assert {name: row.get(name) for name in back} == back
    assert [path.name for path in path.parent.iterdir()] == ["wishes.json"]


def test_nothing_and_nowhere(tmp_path: Path) -> None:
    empty = output_of(tmp_path, [[]])
    assert export_conversations(empty, to(tmp_path / "none.json")) == 0
    assert json.loads((tmp_path / "none.json").read_text()) == []
    (tmp_path / "file").write_text("x")
    export_conversations(empty, to(tmp_path / "none.json"))  # it wrote it itself, and nobody changed it since
    (tmp_path / "none.json").write_text("hours of work")
    with pytest.raises(InputError, match=r"none\.json was changed since it was written; name another file"):
        export_conversations(empty, to(tmp_path / "none.json"))
    with pytest.raises(InputError, match=r"x\.json: cannot be written"):
        export_conversations(empty, to(tmp_path / "file" / "x.json"))
