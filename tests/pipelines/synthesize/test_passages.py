"""Documents cut into passages, and question-answer pairs from them."""

import itertools
import json
from pathlib import Path
from typing import Any

import cloudpickle
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from benchmarks.answering_server import Behaviour
from pipelines.artifacts.rows import messages_of
from pipelines.errors import DataError
from pipelines.recipe.synthesize import Passages
from pipelines.synthesize.grid import Grid
from pipelines.synthesize.passages import cut
from tests.outputs import rows_of
from tests.pipelines.synthesize.serving import grid, in_thread, place, recipe, run, stage


def pieces(text: str, **section: Any) -> list[str]:
    return list(cut(text, Passages(source="x", **section)))


def test_passages_end_with_sentences_and_leave_nothing_out(shared_data: Path) -> None:
    rows = json.loads((shared_data / "advertisegen_dev.json").read_text(encoding="utf-8").splitlines()[0])
    text = rows["summary"] * 20
    found = pieces(text, size=200)
    assert "".join(found) == text
    assert all(100 <= len(piece) <= 200 for piece in found[:-1])
    assert all(piece[-1] in "。！？" for piece in found[:-1])
    assert pieces("一。二！三？" * 6, size=4) == ["一。二！", "三？一。", "二！三？"] * 3


def test_overlap_repeats_the_end_of_the_one_before() -> None:
    found = pieces("".join(map(str, range(10))) * 10, size=20, overlap=5)
    assert all(piece[:5] == before[-5:] for before, piece in itertools.pairwise(found))
    assert found[0] + "".join(piece[5:] for piece in found[1:]) == "0123456789" * 10
    assert pieces("", size=10) == [] and pieces(" \n\n ", size=1) == []


def section(source: Path, **more: Any) -> dict[str, Any]:
    return {
        "dimensions": {},
        "passages": {"source": str(source), "size": 20},
        "styles": {"问答": {"template": "根据这段文字写问答：\n{passage}"}},
        "queries": [],
        "answer": {"shape": "pairs"},
        **more,
    }


def test_what_counts_is_what_the_files_hold(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("第二个文件。", encoding="utf-8-sig")
    (tmp_path / "a.txt").write_text("春节是农历新年。\r\n人们贴春联、放鞭炮，全家团圆吃年夜饭。", encoding="utf-8")
    what = recipe("http://x/v1", **section(tmp_path / "*.txt"))
    assert what.synthesize
    assert list(grid(what).axes["passage"]) == [
        "春节是农历新年。",
        "人们贴春联、放鞭炮，全家团圆吃年夜饭。",
        "第二个文件。",
    ]
    before = stage(what).fingerprint_inputs()
    (tmp_path / "b.txt").rename(tmp_path / "c.txt")
    assert stage(what).fingerprint_inputs() == before
    (tmp_path / "c.txt").write_text("改了。", encoding="utf-8")
    assert stage(what).fingerprint_inputs() != before


def test_documents_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    (tmp_path / "b.txt").write_text("  ")
    (tmp_path / "marks.txt").write_text("……\n\n。。。\u200b", encoding="utf-8")
    (tmp_path / "half.jsonl").write_text('{"text": "一"}\n{"text": "\\ud83d"}\n', encoding="utf-8")
    for name, said in (
        ("a.txt", "a.txt: byte 3 is not UTF-8"),
        ("b.txt", "no text in it"),
        ("c.txt", "No such file"),
        ("marks.txt", "no text in it"),
        ("half.jsonl", "half.jsonl: row 2 holds half a character"),
    ):
        what = recipe("http://x/v1", **section(tmp_path / name))
        with pytest.raises(DataError, match=said):
            stage(what).fingerprint_inputs()


def test_documents_may_be_rows(tmp_path: Path) -> None:
    rows = [{"id": 1, "body": "春节是农历新年。"}, {"id": 2, "body": "人们贴春联。"}, {"id": 3, "body": "人们贴春联。"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        passages = {"source": str(tmp_path / name), "text_key": "body"}
        assert list(grid(recipe("http://x/v1", **section(tmp_path, passages=passages))).axes["passage"]) == [
            "春节是农历新年。",
            "人们贴春联。",
        ]
        with pytest.raises(DataError, match=rf"{name}: row 1 has no text in 'text'; see synthesize.passages.text_key"):
            grid(recipe("http://x/v1", **section(tmp_path / name)))


@pytest.mark.usefixtures("ray_cluster")
def test_a_corpus_is_in_rays_store_once_and_not_in_what_workers_are_sent(tmp_path: Path) -> None:
    text = "".join(f"这是第{number}句话，说的是第{number}件事。" for number in range(20_000))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    made = grid(recipe("http://x/v1", **section(tmp_path / "a.txt")))
    assert made.passages is not None and len(made.passages) > 10_000
    sent = cloudpickle.dumps(made)
    assert len(sent) < 20_000 < len(text)

    @ray.remote
    def request(source: Grid, pos: int) -> str:
        return source.request(pos).messages[0]["content"]

    assert ray.get(request.remote(made, 9_999)) == made.request(9_999).messages[0]["content"]
    assert made.passages[9_999] in made.request(9_999).messages[0]["content"]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_pairs_and_dialogues_become_rows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("春节是农历新年。人们贴春联、放鞭炮，全家团圆吃年夜饭。", encoding="utf-8")
    answers = {
        "pairs": '```json\n[{"question": "春节是什么？", "answer": "农历新年。"},\n'
        '{"question": "吃什么？", "answer": "年夜饭。"},]\n```',
        "dialogue": '[{"speaker": "user", "text": "你好"}, {"speaker": "assistant", "text": "你好呀"},'
        '{"speaker": "user", "text": "春节呢"}, {"speaker": "assistant", "text": "新年"}]',
        "text": "不是 JSON",
    }
    for shape, text in answers.items():
        completion = {"choices": [{"message": {"content": text}}]}
        with in_thread(Behaviour(delay=0.01, body=json.dumps(completion).encode())) as url:
            kind = shape if shape != "text" else "pairs"
            more = {"answer": {"shape": kind}, "query_system": "按{style}回答", "samples_per_cell": 2, "model": shape}
            what = recipe(url, **section(tmp_path / "a.txt", **more))
            where = place(tmp_path, shape)
            if shape == "text":
                with pytest.raises(Exception, match="malformed 4"):
                    run(what, where)
                continue
            output = run(what, where)
            rows = rows_of(output, output.report.outputs.rows)
        if shape == "pairs":
            assert [row["pos"] for row in rows] == [0, 1, 1000, 1001, 2000, 2001, 3000, 3001]
            assert [(row["query"], row["response"]) for row in rows[:2]] == [
                ("春节是什么？", "农历新年。"),
                ("吃什么？", "年夜饭。"),
            ]
            assert rows[1]["row_id"] == "春节是农历新年。/问答#0.1"
            assert rows[0]["passage"] == "春节是农历新年。" and rows[0]["messages"] is None
        else:
            assert len(rows) == 4
            turns = [("system", "按问答回答"), ("user", "你好"), ("assistant", "你好呀")]
            turns += [("user", "春节呢"), ("assistant", "新年")]
            assert [(turn["role"], turn["content"]) for turn in messages_of(rows[0])] == turns
            assert (rows[0]["query"], rows[0]["response"]) == ("春节呢", "新年")
