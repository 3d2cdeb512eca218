"""Rows in every format that sources have."""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa


def rows_of(count: int) -> list[dict[str, Any]]:
    return [{"query": f"问题{i}？", "response": f"回答{i}。" * (i % 7 + 1), "upvotes": i} for i in range(count)]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows, whose values are texts, in the format that the name says."""
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    if name.endswith(".csv"):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        data = text.getvalue().encode("utf-8-sig")
    elif name.endswith(".json"):
        data = json.dumps(rows, ensure_ascii=False).encode()
    else:
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":
        data = pa.compress(data, codec="zstd", asbytes=True)
    path.write_bytes(data)
    return path
