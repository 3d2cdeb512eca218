"""Whatever is said comes back, and whatever is broken is set aside: random conversations, columns and damage."""

import json
import random
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.artifacts.rows import turns_said
from pipelines.artifacts.shards import Attempt
from pipelines.artifacts.workspace import Workspace
from pipelines.errors import DataError
from pipelines.export.formats import conversation_as
from pipelines.recipe.ingest import Ingest
from pipelines.sources.cut import plan_shards
from pipelines.sources.files import names_of
from pipelines.sources.read import _reader as reader_of
from tests.pipelines.sources.samples import write_lines, written

Row = dict[str, Any]


def read_here(folder: Path, files: list[Path], shard_bytes: int = 1 << 20) -> tuple[list[Row], list[Row], list[Row]]:
    """Rows, what was set aside, and results of the shards, read in this process."""
    paths = [str(path) for path in files]
    numbers = iter(range(10**6))

    def store(part: bytes) -> str:
        path = folder / f"part-{next(numbers)}"
        path.write_bytes(part)
        return str(path)

    work = reader_of(Ingest(source=paths[0]))
    rows, dropped, results = [], [], []
    for shard in plan_shards(paths, shard_bytes, None, store):
        attempt = Attempt(Workspace(str(folder)), str(folder), f"out-{shard['index']}", {})
        results.append(work({**shard, "name": names_of(paths)[shard["path"]]}, attempt))
        rows += pq.read_table(attempt.files["rows"]).to_pylist()
        dropped += pq.read_table(attempt.files["dropped"]).to_pylist()
    return rows, dropped, results


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@st.composite
def conversations(draw: st.DrawFn, plain: bool) -> Row:
    """A canonical row of one to three exchanges."""
    turns: list[Row] = []
    for _ in range(draw(st.integers(1, 3))):
        turns += [{"role": "user", "content": draw(TEXT)}, {"role": "assistant", "content": draw(TEXT)}]
        if not plain:
            if draw(st.booleans()):
                turns[-1]["loss"] = draw(st.booleans())
            if draw(st.booleans()):
                turns[-1]["reasoning"] = draw(TEXT)
    if draw(st.booleans()):
        turns.insert(0, {"role": "system", "content": draw(TEXT)})
    return {"row_id": "r", "messages": turns}


EXTRA = st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), TEXT, st.lists(st.integers()))


def same(one: list[Row], other: list[Row]) -> bool:
    """Whether turns say the same; `train` and `true` are said of themselves."""
    return [dict(turn) for turn in one] == [dict(turn) for turn in other]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), name=st.sampled_from(["messages", "alpaca", "sharegpt", "swift", "llamafactory", "xtuner"]))
def test_random_conversations_come_back(data: st.DataObject, name: str) -> None:
    talks = data.draw(st.lists(conversations(plain=name != "messages"), min_size=1, max_size=5))
    lines = [conversation_as(name, talk) for talk in talks]
    extras = data.draw(st.lists(st.dictionaries(st.sampled_from(["k1", "k2", "甲"]), EXTRA), max_size=len(lines)))
    for line, extra in zip(lines, extras, strict=False):
        line |= extra
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows, dropped, _ = read_here(folder, [write_lines(folder / "a.jsonl", lines)])
        assert dropped == [] and len(rows) == len(talks)
        for row, talk, extra in zip(rows, talks, [*extras, *[{}] * len(talks)], strict=False):
            assert same(turns_said(row), talk["messages"])
            for key, value in extra.items():
                assert (row[key] is None) == (value is None)


def written_by(writer: str, path: Path, lines: list[Row]) -> Path:
    """The lines as a file of a usual program."""
    if writer == "pandas":
        pd.DataFrame(lines).to_parquet(path.with_suffix(".parquet"))
    elif writer == "pandas, as lines":
        pd.DataFrame(lines).to_json(path.with_suffix(".jsonl"), orient="records", lines=True, force_ascii=False)
    elif writer == "pandas, as an array":
        pd.DataFrame(lines).to_json(path.with_suffix(".json"), orient="records", indent=1)
    elif writer == "datasets":
        datasets.Dataset.from_list(lines).to_parquet(path.with_suffix(".parquet"))
    elif writer == "datasets, as lines":
        datasets.Dataset.from_list(lines).to_json(path.with_suffix(".jsonl"), force_ascii=False)
    else:
        pq.write_table(pa.Table.from_pylist(lines), path.with_suffix(".parquet"))
    (found,) = path.parent.glob("a.*")
    return found


@pytest.mark.parametrize(
    "writer", ["pandas", "pandas, as lines", "pandas, as an array", "datasets", "datasets, as lines", "pyarrow"]
)
@pytest.mark.parametrize("name", ["messages", "sharegpt", "alpaca", "xtuner"])
def test_what_other_programs_write_comes_back(tmp_path: Path, writer: str, name: str) -> None:
    plain = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "甲乙丙丁", strict=True)]
    marked = [*plain[:1], {**plain[1], "loss": False, "reasoning": "想"}, *plain[2:]] if name == "messages" else plain
    talks: list[Row] = [
        {"row_id": "1", "messages": [{"role": "system", "content": "S"}, *plain]},
        {"row_id": "2", "messages": marked},
        {"row_id": "3", "messages": plain[:2]},
    ]
    lines = [{**conversation_as(name, talk), "n": n} for n, talk in enumerate(talks)]
    names = dict.fromkeys(key for line in lines for key in line)
    lines = [{key: line.get(key) for key in names} for line in lines]
    rows, dropped, _ = read_here(tmp_path, [written_by(writer, tmp_path / "a", lines)])
    assert dropped == []
    assert [turns_said(row) for row in rows] == [talk["messages"] for talk in talks]
    assert [row["n"] for row in rows] == [0, 1, 2]


SEEDS: list[Row] = [
    {"query": "问", "response": "答", "upvotes": 3, "system": None},
    {"instruction": "译", "input": "猫", "output": "cat", "history": [["一", "二"]]},
    {"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答", "loss": False}], "id": 7},
    {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}], "tools": "[]"},
    {"conversation": [{"system": "S", "input": "问", "output": "答"}, {"input": "再", "output": "好"}]},
    {"INSTRUCTION": "问", "RESPONSE": "答", "METADATA": '{"upvotes": "赞同 1.2 万"}'},
    {"chat": {"turn_1": {"Human": "<|Human|>: 问<eoh>", "MOSS": "<|MOSS|>: 答<eom>"}}, "x": {"y": [1, {}]}},
]
JUNK = (
    '[null, true, -1, 1e308, NaN, "", "\\ud83d", "\\u0000", [], {}, [[]], {"a": {}}, ["x", "y"], '
    "1000000000000000000000, 0.5]"
)


def mutated(random_: random.Random) -> bytes:
    """A line with one to three changes: in its values, its keys or its bytes."""
    row = json.loads(json.dumps(random_.choice(SEEDS)))
    for _ in range(random_.randint(0, 2)):
        place: Any = row
        while isinstance(place, dict | list) and place and random_.random() < 0.7:
            key = random_.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if not isinstance(place[key], dict | list) or random_.random() < 0.4:
                place[key] = random_.choice(json.loads(JUNK))
                break
            place = place[key]
        if isinstance(place, dict) and random_.random() < 0.3:
            place[random_.choice(["label", "loss", "name", "images", "键", "", "pos", "row_id"])] = random_.choice(
                json.loads(JUNK)
            )
    line = bytearray(json.dumps(row, ensure_ascii=random_.random() < 0.5).encode("utf-8", "surrogatepass"))
    for _ in range(random_.choice([0, 0, 0, 1, 3])):
        line[random_.randrange(len(line))] = random_.randrange(256)
    return bytes(line).replace(b"\n", b" ")


@pytest.mark.parametrize("seed", range(4))
def test_mutated_lines_are_kept_or_set_aside_with_a_reason(tmp_path: Path, seed: int) -> None:
    random_ = random.Random(seed)
    lines = [mutated(random_) for _ in range(2500)]
    lines = [line for line in lines if line.strip()]
    source = tmp_path / "a.jsonl"
    source.write_bytes(b"\n".join([b'{"query": "q", "response": "r"}', *lines]))
    for size in (1 << 24, 20_000):
        rows, dropped, results = read_here(tmp_path, [source], size)
        assert len(rows) + len(dropped) == len(lines) + 1
        assert sum(result["rows"] for result in results) == len(rows)
        assert all(row["reason"] and row["operator"] for row in dropped)
        positions = Counter(row["pos"] for row in (*rows, *dropped))
        assert positions == Counter(range(len(lines) + 1))
        assert 200 < len(rows) < len(lines)


FILES = ("jsonl", "json", "csv", "tsv", "jsonl.gz", "parquet")


def damaged(random_: random.Random, path: Path) -> None:
    """A file of whole rows in its format, of which then a part is changed, doubled, or cut out."""
    rows = [{"query": f"问\n{n}", "response": f'答"{n}", [{{' * 3, "n": str(n)} for n in range(random_.randint(1, 40))]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=random_.randint(1, 20))
    elif path.suffix == ".tsv":
        pd.DataFrame(rows).to_csv(path, sep="\t", index=False)
    else:
        written(path, rows)
    data = bytearray(path.read_bytes())
    for _ in range(random_.choice([0, 1, 1, 2])):
        begin = random_.randrange(len(data))
        end = min(len(data), begin + random_.choice([1, 2, 30]))
        part = bytes(data[begin:end])
        data[begin:end] = random_.choice([b"", part * 2, random_.randbytes(end - begin), b'"', b"\n", b"\x00", b"]"])
        if not data:
            data = bytearray(b" ")
    path.write_bytes(data)


@pytest.mark.parametrize("suffix", FILES)
def test_damaged_files_are_read_or_refused_by_name(tmp_path: Path, suffix: str) -> None:
    random_ = random.Random(suffix)
    read = refused = 0
    for number in range(120):
        path = tmp_path / f"{number}.{suffix}"
        damaged(random_, path)
        try:
            rows, dropped, results = read_here(tmp_path, [path], random_.choice([1 << 24, 300]))
        except DataError as error:
            assert f"{number}.{suffix}" in str(error)
            refused += 1
            continue
        read += 1
        assert sum(result["rows"] for result in results) == len(rows)
        assert sum(result["broken"] for result in results) == len(dropped)
        assert all(row["reason"] and row["row_id"].startswith(f"{number}.{suffix}") for row in dropped)
        positions = [row["pos"] for row in (*rows, *dropped)]
        assert len(set(positions)) == len(positions)
    assert read > 20 and read + refused == 120
