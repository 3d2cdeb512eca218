"""Data sets from folders: general_qa, general_mcq and ceval, scored by evalscope from local files."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.artifacts.reports.evaluate import ModelBenchmark
from pipelines.errors import DataError, StageError
from tests.pipelines.evaluate.fake_endpoint import ChatServer, evaluate, make_inputs, make_recipe

ROWS = [{"row_id": "r0", "query": "问？", "response": "答。"}]

CHOICES = [
    {
        "id": i,
        "question": f"第{i}题？",
        "A": "甲",
        "B": "乙",
        "C": "丙",
        "D": "丁",
        "answer": letter,
        "explanation": "略",
    }
    for i, letter in enumerate("ABCDABBB")
]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def choose(model: str, query: str) -> str:
    """base always says A; the tuned models always B, and once nothing that can be read."""
    if model == "base":
        return "答案：A"
    return "我不知道。" if "第7题" in query else "答案：B"


def test_multiple_choice_and_a_folder_of_questions(chat_server: ChatServer, tmp_path: Path) -> None:
    chat_server.answer = choose
    write(tmp_path / "mcq" / "animals_val.jsonl", CHOICES)
    write(tmp_path / "ceval" / "logic_val.jsonl", CHOICES)
    write(tmp_path / "ceval" / "logic_dev.jsonl", CHOICES[:3])
    write(
        tmp_path / "qa" / "mine.jsonl",
        [{"query": "你好？", "response": "答案：B"}, {"question": "再见？", "answer": "好"}],
    )
    datasets = [
        {"benchmark": "general_mcq", "path": str(tmp_path / "mcq"), "subsets": ["animals"]},
        {"benchmark": "ceval", "path": str(tmp_path / "ceval"), "subsets": ["logic"], "few_shot_num": 2},
        {"benchmark": "general_qa", "path": str(tmp_path / "qa"), "subsets": ["mine"]},
    ]
    recipe = make_recipe(chat_server.url, evaluate={"datasets": datasets}, merge=None)
    report = evaluate(recipe, make_inputs(tmp_path / "run", ROWS))

    for name in ("general_mcq", "ceval"):
        result = report.benchmarks[name]
        assert result.rows == 8
        assert result.models["base"] == ModelBenchmark(scores={"accuracy": 2 / 8}, unread=0)
        assert result.models["tiny"] == ModelBenchmark(scores={"accuracy": 3 / 8}, unread=1)
        assert result.deltas["tiny"]["accuracy"].value == pytest.approx(1 / 8)
    prompts = [request["messages"][-1]["content"] for request in chat_server.requests]
    assert sum("以下是一些示例问题" in prompt and prompt.count("解析：略") == 2 for prompt in prompts) == 16
    mine = report.results["general_qa"]
    assert mine.rows == 2
    assert mine.models["tiny"].scores["rouge-1-f"] == pytest.approx(0.5, abs=1e-6)  # one of two is the same
    assert math.isclose(mine.models["tiny"].style["length"], len("答案：B"))
    assert "ceval, 8 rows: accuracy base 0.250, tiny 0.375" in report.summary


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"query": "问？", "response": ""}\n', r"mine\.jsonl, line 1: no reference answer"),
        ('{"query": "", "response": "答"}\n', r"mine\.jsonl, line 1: no question"),
        ('{"query": "问？", "response": "答"}\n{"query"\n', r"mine\.jsonl, line 2: not valid JSON"),
    ],
)
def test_broken_rows_are_named_before_anything_is_asked(
    chat_server: ChatServer, tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "mine.jsonl").write_text(content, encoding="utf-8")
    datasets = [{"benchmark": "general_qa", "path": str(tmp_path), "subsets": ["mine"]}]
    with pytest.raises(DataError, match=message):
        evaluate(make_recipe(chat_server.url, evaluate={"datasets": datasets}), make_inputs(tmp_path, ROWS))
    assert not chat_server.requests


def test_a_missing_subset_names_those_that_are_there(chat_server: ChatServer, tmp_path: Path) -> None:
    write(tmp_path / "other.jsonl", ROWS)
    datasets = [{"benchmark": "general_qa", "path": str(tmp_path), "subsets": ["mine"]}]
    with pytest.raises(DataError, match=r"mine\.jsonl: no such file; subsets in that folder: other"):
        evaluate(make_recipe(chat_server.url, evaluate={"datasets": datasets}), make_inputs(tmp_path, ROWS))


def test_files_of_ceval_must_say_their_split(chat_server: ChatServer, tmp_path: Path) -> None:
    write(tmp_path / "logic.jsonl", CHOICES)
    datasets = [{"benchmark": "ceval", "path": str(tmp_path), "subsets": ["logic"]}]
    with pytest.raises(DataError, match=r"logic\.jsonl: not called SUBSET_SPLIT\.jsonl"):
        evaluate(make_recipe(chat_server.url, evaluate={"datasets": datasets}), make_inputs(tmp_path, ROWS))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("tset", "did you mean 'test'"),
        ({"benchmark": "cevall"}, "did you mean 'ceval'"),
        ({"benchmark": "general_mcq"}, "general_mcq needs path and subsets"),
        ({"benchmark": "ceval", "path": "/no/such/folder"}, "no such folder"),
    ],
)
def test_wrong_data_sets_are_refused_with_the_recipe(dataset: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make_recipe(None, evaluate={"datasets": [dataset]})


def test_a_data_set_may_be_given_by_name_alone() -> None:
    recipe = make_recipe(None, evaluate={"datasets": ["test", "gsm8k"]})
    assert recipe.evaluate and [entry.benchmark for entry in recipe.evaluate.datasets] == ["test", "gsm8k"]


def test_the_english_sentence_model_is_the_one_in_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk
    from nltk.tokenize.punkt import PunktTokenizer
    from punkt.data import english

    from pipelines.evaluate.evalscope.child import provide_punkt

    monkeypatch.setattr(nltk.data, "path", [])
    provide_punkt(tmp_path)
    tokenizer = PunktTokenizer("english")
    assert tokenizer._params.abbrev_types == set(english.ABBREV_TYPES)
    assert tokenizer._params.collocations == set(english.COLLOCATIONS)
    assert tokenizer._params.sent_starters == set(english.SENT_STARTERS)
    assert dict(tokenizer._params.ortho_context) == dict(english.ORTHO_CONTEXT)
    assert list(tokenizer.tokenize("Mr. Li likes rain. Dr. Wu does not.")) == ["Mr. Li likes rain.", "Dr. Wu does not."]


@pytest.mark.slow
def test_code_in_a_folder_of_a_data_set_does_not_run(chat_server: ChatServer, tmp_path: Path) -> None:
    chat_server.answer = choose
    ran = tmp_path / "ran"
    for name in ("logic", "mcq", "conftest", "__init__"):
        for folder in ("ceval", "mcq"):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{name}.py").write_text(f"open({str(ran)!r}, 'w').close()\n", encoding="utf-8")
    write(tmp_path / "ceval" / "logic_val.jsonl", CHOICES)
    write(tmp_path / "mcq" / "animals_val.jsonl", CHOICES)
    datasets = [
        {"benchmark": "ceval", "path": str(tmp_path / "ceval"), "subsets": ["logic"], "few_shot_num": 0},
        {"benchmark": "general_mcq", "path": str(tmp_path / "mcq"), "subsets": ["animals"]},
    ]
    recipe = make_recipe(chat_server.url, evaluate={"datasets": datasets}, merge=None)
    report = evaluate(recipe, make_inputs(tmp_path / "run", ROWS))
    assert report.benchmarks["ceval"].rows == report.benchmarks["general_mcq"].rows == 8
    assert not ran.exists()
    (tmp_path / "mcq" / "mcq.py").rename(tmp_path / "ceval" / "ceval.py")  # as a loading script is called
    with pytest.raises(StageError, match=r"scripts are no longer supported, but found ceval\.py"):
        evaluate(recipe, make_inputs(tmp_path / "again", ROWS))
    assert not ran.exists()


FROM_A_HUB = """
import sys
from pathlib import Path

import modelscope
from pipelines.evaluate.evalscope.child import own_caches, run_no_code_of_datasets, task_config
from pipelines.evaluate.evalscope.job import ScoringJob

def load(**asked):
    print("trust_remote_code:", asked["trust_remote_code"])
    sys.exit()

modelscope.MsDataset.load = load
folder = sys.argv[1]
with own_caches(Path(folder, "scratch")):
    run_no_code_of_datasets()
    from evalscope.api.registry import get_benchmark

    job = ScoringJob("m", "http://127.0.0.1:1/v1", folder, "gsm8k", {}, 1, {}, 1, 1.0, "")
    get_benchmark("gsm8k", task_config(job, "none")).load_dataset()
"""


def test_code_of_a_data_set_from_a_hub_is_not_trusted(tmp_path: Path) -> None:
    environment = {**os.environ, "EVALSCOPE_CACHE": str(tmp_path), "MODELSCOPE_CACHE": str(tmp_path)}
    said = subprocess.run(
        [sys.executable, "-c", FROM_A_HUB, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert "trust_remote_code: False" in said.stdout, said.stderr
