from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines.artifacts.rows import DROPPED, MESSAGES
from pipelines.clean.column import Column
from pipelines.clean.fused import Outcome, apply
from pipelines.clean.operators import OPERATORS, operator
from pipelines.clean.plan import build_plan
from pipelines.errors import DataError


def rows(responses: list[str | None], **columns: Any) -> pa.Table:
    fixed = {"row_id": [f"r{i}" for i in range(len(responses))], "pos": list(range(len(responses)))}
    return pa.table({**fixed, "response": pa.array(responses, pa.string()), **columns})


def run(table: pa.Table, *process: Any) -> Outcome:
    (phase,) = build_plan(process, "zh", "response").phases
    return apply(phase.row_ops, table, "response", phase.dataset_ops)


@pytest.fixture
def picky() -> Iterator[None]:
    """Operators that fail on the text `boom`."""

    @operator("filter")
    def picky_filter(column: Column) -> Any:
        if "boom" in column.texts():
            raise ZeroDivisionError("cannot")
        return np.ones(len(column), bool), {"fine": np.ones(len(column))}

    @operator("mapper")
    def picky_mapper(column: Column) -> pa.Array:
        return column.rewrite(column.contains(""), lambda text: str(1 // (text != "boom")) + text)

    yield
    del OPERATORS["picky_filter"], OPERATORS["picky_mapper"]


def test_a_row_leaves_with_operator_reason_statistics_and_text() -> None:
    table = rows(["短", "足够长的一段话 a@b.com", "！！！！！！"], upvotes=[1, 2, 3])
    done = run(
        table,
        {"text_length_filter": {"min_len": 3}},
        "clean_email_mapper",
        {"special_characters_filter": {"max_ratio": 0.4}},
    )
    assert done.kept.to_pylist() == [{"row_id": "r1", "pos": 1, "response": "足够长的一段话 ", "upvotes": 2}]
    assert done.dropped.schema == DROPPED
    assert done.dropped.to_pylist() == [
        {
            "row_id": "r0",
            "pos": 0,
            "stage": "clean",
            "operator": "text_length_filter",
            "reason": "text_len 1 is below min_len 3",
            "stats": [("text_len", 1.0)],
            "text": "短",
        },
        {
            "row_id": "r2",
            "pos": 2,
            "stage": "clean",
            "operator": "special_characters_filter",
            "reason": "special_char_ratio 1 is above max_ratio 0.4",
            "stats": [("text_len", 6.0), ("special_char_ratio", 1.0)],
            "text": "！！！！！！",
        },
    ]
    assert done.stats["text_len"].to_pylist() == [1, 15, 6]
    assert done.stats["special_char_ratio"].to_pylist() == [None, 0, 1]
    assert [(o.operator, o.rows_in, o.rows_out, o.changed) for o in done.operators] == [
        ("text_length_filter", 3, 2, 0),
        ("clean_email_mapper", 2, 2, 1),
        ("special_characters_filter", 2, 1, 0),
    ]
    (sample,) = done.samples
    assert (sample.row_id, sample.before, sample.after) == ("r1", "足够长的一段话 a@b.com", "足够长的一段话 ")


def test_an_operator_that_raises_names_the_row(picky: None) -> None:
    table = rows(["甲", "乙", "丙", "boom", "丁"])
    with pytest.raises(DataError, match=r"process\[0\].picky_filter: row r3 \(pos 3\) fails with ZeroDivisionError"):
        run(table, "picky_filter")
    with pytest.raises(DataError, match=r"process\[1\].picky_mapper: row r3 \(pos 3\)"):
        run(table, {"text_length_filter": {"min_len": 1}}, "picky_mapper")


def test_a_row_that_fails_is_set_aside_where_the_recipe_says_so(picky: None) -> None:
    table = rows(["甲", "boom", "丙", "boom"])
    done = run(table, {"picky_mapper": {"if_error": "drop"}})
    assert done.kept["response"].to_pylist() == ["1甲", "1丙"]
    assert done.dropped["row_id"].to_pylist() == ["r1", "r3"]
    assert done.dropped["reason"][0].as_py().startswith("error ZeroDivisionError")


def test_missing_columns_and_values() -> None:
    table = rows(["甲", None, "丙"])
    votes = {"specified_numeric_field_filter": {"field_key": "votes", "min_value": 1}}
    with pytest.raises(DataError, match="the rows have no column votes"):
        run(table, votes)
    with pytest.raises(DataError, match=r"row r1 \(pos 1\) has no response"):
        run(table, {"text_length_filter": {"min_len": 1}})
    kept = run(
        table, {"text_length_filter": {"min_len": 1, "if_missing": "keep"}}, {"clean_ip_mapper": {"if_missing": "keep"}}
    )
    assert kept.kept["response"].to_pylist() == ["甲", None, "丙"]
    assert kept.stats["text_len"].to_pylist() == [1, None, 1]
    dropped = run(table, {"text_length_filter": {"min_len": 1, "if_missing": "drop"}})
    assert dropped.dropped["reason"].to_pylist() == ["no response"]
    votes["specified_numeric_field_filter"]["if_missing"] = "keep"
    assert run(table, votes).kept.num_rows == 3
    some = rows(["甲", "乙", "丙"], votes=[None, 50, 0])
    assert run(some, votes).kept["row_id"].to_pylist() == ["r0", "r1"]  # without a value it stays


def test_nested_fields_and_other_text_columns() -> None:
    table = rows(["甲", "乙"], query=["问题一", "问"], meta=[{"votes": "9"}, {"votes": "1"}])
    done = run(table, {"specified_numeric_field_filter": {"field_key": "meta.votes", "min_value": 5}})
    assert done.kept["row_id"].to_pylist() == ["r0"]
    done = run(table, {"text_length_filter": {"min_len": 2, "text_key": "query"}})
    assert done.kept["row_id"].to_pylist() == ["r0"]
    assert done.dropped["text"].to_pylist() == ["问"]


def turn(role: str, content: str) -> dict[str, str | None]:
    return {"role": role, "content": content, "reasoning": None, "loss": None, "tool_calls": None, "tool_call_id": None}


def test_turns_of_the_assistant_are_the_text_of_a_conversation() -> None:
    talk = [
        turn("user", "写信 u@x.com"),
        turn("assistant", "写 a@x.com"),
        turn("user", "谢"),
        turn("assistant", "客气b@x.com"),
    ]
    short = [turn("user", "很长很长很长的问题"), turn("assistant", "短")]
    table = rows(
        ["客气b@x.com", "单轮 c@x.com 回答", "短"],
        messages=pa.array([talk, None, short], MESSAGES),
        query=["谢", "问", "问"],
    )
    done = run(table, "clean_email_mapper", {"text_length_filter": {"min_len": 3}})
    assert done.kept.to_pylist() == [
        {
            "row_id": "r0",
            "pos": 0,
            "response": "客气",
            "messages": [
                turn("user", "写信 u@x.com"),
                turn("assistant", "写 "),
                turn("user", "谢"),
                turn("assistant", "客气"),
            ],
            "query": "谢",
        },
        {"row_id": "r1", "pos": 1, "response": "单轮  回答", "messages": None, "query": "问"},
    ]
    assert done.dropped["row_id"].to_pylist() == ["r2"]
    assert done.stats["text_len"].to_pylist() == [5, 6, 1]  # turns are joined by newlines
    assert done.operators[0].changed == 2


def test_turns_of_the_user_and_the_system_are_read_and_written_where_they_are_trained() -> None:
    talk = [
        turn("system", "我是 s@x.com"),
        turn("user", "写信 u@x.com"),
        turn("assistant", "写 a@x.com"),
        turn("user", "给b@x.com"),
        turn("assistant", "好"),
    ]
    bare = [turn("user", "一"), turn("assistant", "二"), turn("user", "三"), turn("assistant", "四")]
    table = rows(
        ["好", "四", "单轮"],
        messages=pa.array([talk, bare, None], MESSAGES),
        query=["给b@x.com", "三", "问 q@x.com"],
        system=["我是 s@x.com", None, "单 s@x.com"],
    )
    mappers = [{"clean_email_mapper": {"text_key": key, "if_missing": "keep"}} for key in ("query", "system")]
    done = run(table, *mappers, {"text_length_filter": {"min_len": 1, "text_key": "query"}})
    first, second, third = done.kept.to_pylist()
    assert [said["content"] for said in first["messages"]] == ["我是 ", "写信 ", "写 a@x.com", "给", "好"]
    assert (first["query"], first["system"], first["response"]) == ("给", "我是 ", "好")
    assert second == table.to_pylist()[1]
    assert (third["query"], third["system"], third["messages"]) == ("问 ", "单 ", None)
    assert [stats.changed for stats in done.operators] == [2, 2, 0]
    assert done.stats["text_len"].to_pylist() == [5, 3, 2]  # both questions and the newline between them


def test_real_rows_leave_where_data_juicer_drops_them(
    corpus: pa.Table, assets: dict[str, str], zhihu_process: Any, shared_data: Any
) -> None:
    """Every statistic and every changed text of the whole corpus; perplexity, an extra, is tested by itself."""
    import pyarrow.parquet as pq

    golden = pq.read_table(shared_data / "goldens" / "zhihu_real_m1.parquet").to_pylist()
    (phase,) = build_plan(zhihu_process(1, 100), "data_juicer", "response", assets).phases
    done = apply(phase.row_ops, corpus, "response", phase.dataset_ops)
    stats = {row["pos"]: row for row in done.stats.to_pylist()}
    dropped = {row["pos"]: row["operator"] for row in done.dropped.to_pylist()}
    kept = {row["pos"]: row["response"] for row in done.kept.to_pylist()}
    signatures = dict(zip(done.keys["pos"].to_pylist(), done.keys["key_11"].to_pylist(), strict=True))
    columns = ("text_len", "alnum_ratio", "flagged_words_ratio", "special_char_ratio")
    compared = 0
    for row in golden:
        pos = row["id"]
        for name in columns:
            if row[name] is not None:
                assert stats[pos][name] == pytest.approx(row[name], abs=1e-9), (pos, name)
                compared += 1
        if row["lang"] is not None:
            assert stats[pos]["lang"] == row["lang"]
            assert stats[pos]["lang_score"] == pytest.approx(row["lang_score"], rel=1e-6)
        if row["drop_step"] is not None and row["drop_step"] < 11:
            assert dropped[pos] == row["dropped_by"]
        if row["clean_text"] is not None and pos in kept:
            assert kept[pos] == row["clean_text"]
        if row["simhash"] is not None:
            assert signatures[pos] == int(row["simhash"])
    assert compared > 8_000
