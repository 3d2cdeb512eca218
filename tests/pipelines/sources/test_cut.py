"""Cutting files: every row is in one shard, and no file is in memory whole."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.sources.cut import plan_shards
from pipelines.sources.files import read_shard
from tests.pipelines.sources.samples import rows_of, write_lines, written


@pytest.fixture
def store(tmp_path: Path) -> Callable[[bytes], str]:
    """Keeps parts as the stage does."""
    (tmp_path / "parts").mkdir()

    def keep(part: bytes) -> str:
        path = tmp_path / "parts" / str(len(list((tmp_path / "parts").iterdir())))
        path.write_bytes(part)
        return str(path)

    return keep


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.json", "a.json.zst", "a.jsonl.gz", "a.jsonl.zst"])
def test_every_format_is_cut_without_loss(tmp_path: Path, store: Callable[[bytes], str], name: str) -> None:
    rows = [{"query": f'问"{i}"', "response": f"第一行,\n第{i}行\r\n" * (i % 5)} for i in range(400)]
    source = written(tmp_path / name, rows)
    for size, fewest in ((700, 20), (5000, 5), (1 << 20, 1)):
        shards = plan_shards([str(source)], size, None, store)
        assert [(number, row) for shard in shards for number, row, _ in read_shard(shard)] == list(enumerate(rows))
        assert len(shards) >= fewest
        assert [shard["pos"] for shard in shards] == [shard["first"] for shard in shards]
    some = plan_shards([str(source)], 700, 250, store)
    assert [row for shard in some for _, row, _ in read_shard(shard)] == rows[:250]


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.json", "a.json.zst", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_large_file_is_streamed(tmp_path: Path, store: Callable[[bytes], str], name: str) -> None:
    source = written(tmp_path / name, [{"query": str(i), "response": "答" * 500} for i in range(8000)])
    tracemalloc.start()
    try:
        shards = plan_shards([str(source)], 1 << 19, None, store)
        planning = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        assert sum(1 for _ in read_shard(shards[-1])) == shards[-1]["rows"]
        reading = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(shards) > 15
    assert max(planning, reading) < 6 << 20  # of 12 MB of text


def test_byte_ranges_cover_every_line_once(tmp_path: Path, store: Callable[[bytes], str]) -> None:
    source = write_lines(tmp_path / "a.jsonl", rows_of(300))
    with source.open("a", encoding="utf-8") as stream:
        stream.write('\n{"query": "末", "response": "无换行"}')
    for size in (1, 50, 333, 5000, 1 << 20):
        shards = plan_shards([str(source)], size, None, store)
        numbers = [number for shard in shards for number, row, _ in read_shard(shard) if row]
        assert numbers == [*range(300), 301]


def test_a_large_row_group_is_cut(tmp_path: Path, store: Callable[[bytes], str]) -> None:
    rows = rows_of(3000)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for size in (500, 5000, 1 << 20):
        shards = plan_shards([str(tmp_path / "a.parquet")], size, 2500, store)
        found = [(number, row) for shard in shards for number, row, _ in read_shard(shard)]
        assert found == list(enumerate(rows[:2500]))
        assert sum(shard["rows"] for shard in shards) == 2500
        assert (len(shards) > 1) == (size < 1 << 20)
