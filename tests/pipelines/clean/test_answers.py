"""What operators return, and a person's operators that use what Python uses."""

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import cloudpickle
import pyarrow as pa
import pytest

from pipelines.clean.dataset_ops import decide
from pipelines.clean.fused import apply
from pipelines.clean.plan import Plan, build_plan, check_process
from pipelines.errors import DataError
from pipelines.similarity.on_ray import find_near

HEAD = """
import numpy as np
import pyarrow as pa
from pipelines.clean.column import Column
from pipelines.clean.operators import operator


"""


def own(folder: Path, code: str, *process: Any, text_key: str = "response") -> Plan:
    (folder / "my_ops.py").write_text(HEAD + code, encoding="utf-8")
    return build_plan(process, "zh", text_key, custom=[str(folder / "my_ops.py")])


def table(*texts: str) -> pa.Table:
    return pa.table({"row_id": [f"r{i}" for i in range(len(texts))], "pos": range(len(texts)), "response": texts})


@pytest.mark.parametrize(
    ("kind", "body", "told"),
    [
        ("mapper", "[text.strip() for text in column.texts()]", "a mapper returns an Arrow array of 3 texts, not list"),
        ("filter", "np.array([len(t) > 2 for t in column.texts()])", "a filter returns (keep, {statistic: values})"),
        ("filter", "(np.array([False]), {})", "not keep of 1 values"),
        ("filter", "(np.ones(3), {})", "not keep as ndarray of float64"),
        ("filter", "(np.ones(3, bool), {'n': np.zeros(2)})", "not statistic n of 2 values"),
        ("mapper", "pa.array(['a', None, 'b'])", "not with 1 nulls"),
        ("mapper", "pa.array([1, 2, 3])", "not Int64Array of int64"),
        ("mapper", "pa.array(['a'])", "not of 1"),
    ],
)
def test_a_wrong_answer_is_refused_by_name(tmp_path: Path, kind: str, body: str, told: str) -> None:
    plan = own(tmp_path, f"@operator({kind!r})\ndef wrong(column: Column):\n    return {body}\n", "wrong")
    with pytest.raises(DataError) as caught:
        apply(plan.phases[0].row_ops, table(" 你好世界", "坏", "第三"), "response")
    assert str(caught.value).startswith("clean.process[0].wrong: ")
    assert told in str(caught.value)


def test_a_selector_that_takes_a_row_twice_is_refused(tmp_path: Path) -> None:
    code = (
        "@operator('selector', reads='field')\n"
        "def twice(values: pa.Array, *, field_key: str = 'pos'):\n"
        "    return [0, 0]\n"
    )
    plan = own(tmp_path, code, "twice")
    keys = apply((), table("甲", "乙"), "response", plan.phases[0].dataset_ops).keys
    with pytest.raises(DataError, match=r"clean\.process\[0\]\.twice: a selector .* not one of them twice"):
        decide(plan.phases[0].dataset_ops, keys, False, find_near)


@pytest.mark.parametrize("kind", ["filtre", "Mapper", "dedup"])
def test_an_unknown_kind_is_a_problem_of_the_recipe(tmp_path: Path, kind: str) -> None:
    (tmp_path / "my_ops.py").write_text(f"{HEAD}@operator({kind!r})\ndef wrong(column): return column\n")
    (problem,) = check_process(["text_length_filter"], "zh", custom=[str(tmp_path / "my_ops.py")])
    assert problem.key == "clean.custom_operators[0]"
    assert f"{kind!r} is no kind; it is one of filter, mapper, deduplicator, selector" in problem.message


CACHED = """
from functools import cache

@cache
def words() -> frozenset[str]:
    return frozenset({"你好"})

@operator("filter")
def known_words_filter(column: Column):
    return np.array([any(word in text for word in words()) for text in column.texts()]), {}
"""
LOCKED = """
import threading

LOCK = threading.Lock()

@operator("filter")
def known_words_filter(column: Column):
    with LOCK:
        return np.array(["你好" in text for text in column.texts()]), {}
"""
HELPED = """
from greetings import is_greeting

@operator("filter")
def known_words_filter(column: Column):
    return np.array([is_greeting(text) for text in column.texts()]), {}
"""
WORKER = """
import pickle, sys
import pyarrow as pa
from pipelines.clean.fused import apply
table = pa.table({"row_id": ["a", "b"], "pos": [0, 1], "response": ["你好世界", "坏"]})
with open(sys.argv[1], "rb") as stream:
    steps = pickle.load(stream)
print(apply(steps, table, "response").kept["row_id"].to_pylist())
"""


@pytest.mark.parametrize("code", [CACHED, LOCKED, HELPED], ids=["cache", "lock", "helper"])
def test_a_persons_operator_reaches_workers_without_its_file(tmp_path: Path, code: str) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "greetings.py").write_text("def is_greeting(text): return '你好' in text\n", encoding="utf-8")
    plan = own(folder, code, "known_words_filter")
    (tmp_path / "steps").write_bytes(cloudpickle.dumps(plan.phases[0].row_ops))
    assert pickle.loads((tmp_path / "steps").read_bytes())
    for file in folder.glob("*.py"):
        file.unlink()
    command = [sys.executable, "-c", WORKER, str(tmp_path / "steps")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "['a']", done.stderr[-2000:]


NESTED = [
    ("meta.text", [{"meta": {"text": "  你好　", "n": 1}}], [{"meta": {"text": "你好", "n": 1}}]),
    ("a.b.text", [{"a": {"b": {"text": " 甲 "}, "c": 2}}], [{"a": {"b": {"text": "甲"}, "c": 2}}]),
    ("meta.text", [{"meta": {"text": " 乙"}}, {"meta": None}], [{"meta": {"text": "乙"}}, {"meta": None}]),
]


@pytest.mark.parametrize(("key", "given", "wanted"), NESTED)
def test_a_mapper_reaches_a_nested_column(key: str, given: list[Any], wanted: list[Any]) -> None:
    rows = pa.Table.from_pylist([{"row_id": str(n), "pos": n, **row} for n, row in enumerate(given)])
    plan = build_plan([{"whitespace_normalization_mapper": {"if_missing": "keep"}}], "zh", key)
    kept = apply(plan.phases[0].row_ops, rows, key).kept.drop_columns(["row_id", "pos"]).to_pylist()
    assert kept == wanted
