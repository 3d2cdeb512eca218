"""evalscope itself, asked of a local server; its numbers against the plain definitions."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import jieba
import pytest

from pipelines.artifacts.reports.evaluate import EvaluateReport
from pipelines.artifacts.workspace import Place
from pipelines.errors import DataError, StageError
from tests.pipelines.evaluate.fake_endpoint import (
    ChatServer,
    chat_server_running,
    evaluate,
    make_inputs,
    make_recipe,
    place_beside,
)

PROJECT = Path(__file__).parents[3]

KEY = "sk-not-to-be-seen"
ROWS = [
    {"row_id": "r0", "query": "苹果是什么？", "response": "谢邀。苹果是一种常见的水果，又甜又脆。以上。"},
    {"row_id": "r1", "query": "怎么睡得好？", "response": "谢邀。先关手机，再看几页书，很快就困了。以上。"},
    {"row_id": "r2", "query": "What is rain?", "response": "Rain is water that falls from clouds. Mr. Li likes it."},
    {"row_id": "r3", "query": "今天吃什么？", "response": "谢邀。吃面。以上。"},
]
ANSWERS = {
    ("base", "苹果是什么？"): "An apple is a fruit. Dr. Wang says so.",
    ("base", "怎么睡得好？"): "先睡觉，先睡觉，先睡觉…",  # the server says that it was cut
    ("base", "What is rain?"): "Rain is water. Rain is water.",
    ("base", "今天吃什么？"): "",
    ("tiny", "苹果是什么？"): "谢邀。苹果是水果，又甜又脆，又甜又脆。以上。",
    ("tiny", "怎么睡得好？"): "谢邀。先关手机，再看书。以上。",
    ("tiny", "What is rain?"): "Rain is water that falls from the clouds. Mr. Li likes rain.",
    ("tiny", "今天吃什么？"): "谢邀。吃面。以上。",
}


def answer(model: str, query: str) -> str:
    return ANSWERS[model.removesuffix("-merged"), query]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[EvaluateReport, Place]:
    inputs = make_inputs(tmp_path_factory.mktemp("evaluated"), ROWS)
    with chat_server_running() as server, pytest.MonkeyPatch.context() as environment:
        environment.setenv("OPENAI_API_KEY", KEY)
        server.answer = answer
        report = evaluate(make_recipe(server.url), inputs)
        assert server.keys == {f"Bearer {KEY}"}
    return report, place_beside(inputs, "evaluate")


# --- the plain definitions, over the words that evalscope makes of a text ---


def rouge_words(text: str) -> list[str]:
    return (" ".join(jieba.cut(text)) if any("一" <= c <= "龥" for c in text) else text).split()


def bleu_words(text: str) -> list[str]:
    if any("一" <= c <= "龥" for c in text):
        return list(jieba.cut(text))
    return {  # as the Penn Treebank writes them: punctuation stands alone, abbreviations keep their stop
        "An apple is a fruit. Dr. Wang says so.": "An apple is a fruit . Dr. Wang says so .",
        "Rain is water. Rain is water.": "Rain is water . Rain is water .",
        ANSWERS["tiny", "What is rain?"]: "Rain is water that falls from the clouds . Mr. Li likes rain .",
        ROWS[2]["response"]: "Rain is water that falls from clouds . Mr. Li likes it .",
        "": "",
    }[text].split()


def grams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def prf(common: float, of_answer: int, of_reference: int) -> tuple[float, float, float]:
    p, r = common / max(of_answer, 1), common / max(of_reference, 1)
    return p, r, 2 * p * r / (p + r) if p + r else 0.0


def rouge_n(answer: str, reference: str, n: int) -> tuple[float, float, float]:
    a, r = set(grams(rouge_words(answer), n)), set(grams(rouge_words(reference), n))
    return prf(len(a & r), len(a), len(r))


def longest_common(a: list[str], b: list[str]) -> int:
    best = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            best[i + 1][j + 1] = best[i][j] + 1 if x == y else max(best[i][j + 1], best[i + 1][j])
    return best[-1][-1]


def rouge_l(answer: str, reference: str) -> tuple[float, float, float]:
    a, r = rouge_words(answer), rouge_words(reference)
    return prf(longest_common(a, r), len(a), len(r))


def bleu(answer: str, reference: str, n: int) -> float:
    a, r = bleu_words(answer), bleu_words(reference)
    have, want = Counter(grams(a, n)), Counter(grams(r, n))
    if not a or not have:
        return 0.0
    clipped = sum(min(count, want[gram]) for gram, count in have.items())
    penalty = 1.0 if len(a) > len(r) else math.exp(1 - len(r) / len(a))
    return penalty * clipped / sum(have.values())


def test_rouge_and_bleu_equal_the_plain_definitions(evaluated: tuple[EvaluateReport, Place]) -> None:
    report, _ = evaluated
    pairs = [(row["query"], row["response"]) for row in ROWS]
    for model in ("base", "tiny"):
        scores = report.results["test"].models[model].scores
        expected: dict[str, list[float]] = {}
        for query, reference in pairs:
            text = ANSWERS[model, query]
            triples = {
                "1": rouge_n(text, reference, 1),
                "2": rouge_n(text, reference, 2),
                "l": rouge_l(text, reference),
            }
            for order, triple in triples.items():
                for stat, value in zip("prf", triple, strict=True):
                    expected.setdefault(f"rouge-{order}-{stat}", []).append(value)
            for n in range(1, 5):
                expected.setdefault(f"bleu-{n}", []).append(bleu(text, reference, n))
        for name, values in expected.items():
            assert scores[name] == pytest.approx(sum(values) / len(values), abs=1e-6), (model, name)
    models = report.results["test"].models
    assert models["tiny"].scores["rouge-l-f"] > models["base"].scores["rouge-l-f"] > 0


def test_report_counts_empty_answers_and_compares_with_base(evaluated: tuple[EvaluateReport, Place]) -> None:
    report, place = evaluated
    result = report.results["test"]
    models = result.models
    assert result.rows == 4
    assert report.models == list(models) == ["base", "tiny", "tiny-merged"]
    assert models["base"].empty == 1
    assert models["tiny"].empty == 0
    assert [scores.truncated for scores in models.values()] == [1, 0, 0]
    assert report.summary.endswith(" (cut at max_tokens: base 1)")
    assert result.changed.improved[0].query == "今天吃什么？"  # from nothing to the reference itself
    assert result.changed.improved[0].difference == pytest.approx(1, abs=1e-6)
    assert result.changed.harmed == []
    assert models["base"].style["loop"] == 0.25
    lengths = [len(ANSWERS["tiny", str(row["query"])]) for row in ROWS]
    assert models["tiny"].style["length"] == sum(lengths) / 4
    delta = result.deltas["tiny"]["rouge-l-f"]
    difference = models["tiny"].scores["rouge-l-f"] - models["base"].scores["rouge-l-f"]
    assert delta.value == pytest.approx(difference)
    assert delta.low <= delta.value <= delta.high
    lines = [json.loads(line) for line in place.local("answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["row_id"] for line in lines] == ["r0", "r1", "r2", "r3"]
    assert lines[3]["answers"] == {"base": "", "tiny": "谢邀。吃面。以上。", "tiny-merged": "谢邀。吃面。以上。"}


def test_the_training_system_prompt_is_asked_with(chat_server: ChatServer, tmp_path: Path) -> None:
    chat_server.answer = answer
    inputs = make_inputs(tmp_path, ROWS)
    recipe = make_recipe(chat_server.url, train={"system": "你是知乎答主。"}, evaluate={"limit": 1}, merge=None)
    evaluate(recipe, inputs)
    assert {request["messages"][0]["content"] for request in chat_server.requests} == {"你是知乎答主。"}
    assert chat_server.asked() == [("base", "苹果是什么？"), ("tiny", "苹果是什么？")]
    assert chat_server.requests[0]["max_tokens"] == 32


def test_packages_in_the_current_folder_are_not_taken_for_ours(
    chat_server: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("pipelines", "serve", "rayjobs"):
        (tmp_path / "mine" / package).mkdir(parents=True)
        (tmp_path / "mine" / package / "__init__.py").touch()
    monkeypatch.chdir(tmp_path / "mine")
    chat_server.answer = answer
    recipe = make_recipe(chat_server.url, evaluate={"limit": 1}, merge=None)
    report = evaluate(recipe, make_inputs(tmp_path / "run", ROWS))
    assert report.results["test"].rows == 1


DRIVER = """
import sys
from pathlib import Path
from tests.pipelines.evaluate.fake_endpoint import evaluate, make_recipe, read_inputs
evaluate(make_recipe(sys.argv[2], evaluate={"eval_batch_size": 2}, merge=None), read_inputs(Path(sys.argv[1])))
"""


@pytest.mark.slow
def test_killed_half_way_it_asks_only_for_what_is_missing(chat_server: ChatServer, tmp_path: Path) -> None:
    rows = [{"row_id": f"r{i}", "query": f"问题{i}？", "response": f"谢邀。答案是{i}。以上。"} for i in range(10)]
    inputs = make_inputs(tmp_path, rows)
    chat_server.delay = 0.15
    command = [sys.executable, "-c", DRIVER, str(tmp_path), chat_server.url]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL, cwd=PROJECT)
    deadline = time.monotonic() + 300
    while len(chat_server.requests) < 13 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.5)  # requests that were in flight
    before = len(chat_server.requests)
    assert 13 <= before < 20
    files = sorted(place_beside(inputs, "evaluate").local("evalscope").rglob("predictions/*/*.jsonl"))
    kept = sum(file.read_bytes().count(b"\n") for file in files)
    with open(files[-1], "ab") as torn:
        torn.write(b'{"index": 3, "model": "ti')

    chat_server.delay = 0.0
    report = evaluate(make_recipe(chat_server.url, merge=None), inputs)

    assert len(chat_server.requests) - before == 20 - kept
    assert before - kept <= 2  # what was in flight, two at a time, is all that is asked twice
    assert set(Counter(chat_server.asked()).values()) <= {1, 2}
    assert report.results["test"].models["tiny"].empty == 0

    asked = len(chat_server.requests)
    again = evaluate(make_recipe(chat_server.url, merge=None), inputs)
    assert len(chat_server.requests) == asked
    assert again == report


def test_a_row_without_reference_is_named(chat_server: ChatServer, tmp_path: Path) -> None:
    rows = [*ROWS, {"row_id": "r9", "query": "问？", "response": " \n"}]
    with pytest.raises(DataError, match="test row r9: no reference"):
        evaluate(make_recipe(chat_server.url), make_inputs(tmp_path, rows))


def test_an_empty_test_split_is_an_error(chat_server: ChatServer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the test split is empty"):
        evaluate(make_recipe(chat_server.url), make_inputs(tmp_path, []))


def test_an_endpoint_that_is_down_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"http://127\.0\.0\.1:9/v1: the endpoint does not list its models"):
        evaluate(make_recipe("http://127.0.0.1:9/v1"), make_inputs(tmp_path, ROWS))


def test_a_model_that_is_not_served_is_named(chat_server: ChatServer, tmp_path: Path) -> None:
    chat_server.models = ["base", "tiny"]
    with pytest.raises(StageError, match="serves base, tiny; missing: tiny-merged"):
        evaluate(make_recipe(chat_server.url), make_inputs(tmp_path, ROWS))


def test_a_refused_question_is_not_taken_for_an_answer(chat_server: ChatServer, tmp_path: Path) -> None:
    chat_server.status, chat_server.error = 400, "maximum context length is 64 tokens"
    recipe = make_recipe(chat_server.url, evaluate={"limit": 1}, merge=None)
    with pytest.raises(StageError, match=r"refused the question: .*maximum context length is 64"):
        evaluate(recipe, make_inputs(tmp_path, ROWS))


def test_a_server_error_stops_with_its_message(chat_server: ChatServer, tmp_path: Path) -> None:
    chat_server.status, chat_server.error = 401, "wrong key"
    recipe = make_recipe(chat_server.url, evaluate={"limit": 1}, merge=None)
    with pytest.raises(StageError, match=r"evalscope stopped: .*wrong key"):
        evaluate(recipe, make_inputs(tmp_path, ROWS))


def test_the_key_is_written_nowhere(evaluated: tuple[EvaluateReport, Place]) -> None:
    files = [file for file in Path(evaluated[1].workspace.root).rglob("*") if file.is_file()]
    assert len(files) > 10
    assert not [file for file in files if KEY.encode() in file.read_bytes()]
