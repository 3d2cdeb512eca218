"""Operators whose answers data-juicer 1.6.1 itself gave, in an environment of its own."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.clean.assets import locate_asset
from pipelines.clean.operators import OPERATORS
from pipelines.clean.operators.words import PYTHIA
from pipelines.clean.plan import build_plan, check_process
from tests.model_families import byte_level_tokenizer
from tests.pipelines.clean.test_operators import ask, column, mapped

NEAR = ("document_minhash_deduplicator", "ray_bts_minhash_deduplicator")
TEXTS = [
    "",
    "你好，世界。",
    "Hello world, this is 3 words!",
    "a  b\tc\nd",
    "第一行\n第二行长一点\r\n第三\u2028行",
    "“引”『』《书》【注】—— … １％ ～",
    "... !!! ???",
    "一 士 上 ン",
    "it's (fine); 甲：乙",
    "\n\n\n",
    "词 词 词  ，词",
    "x\u000by\fz",
]
NUM_WORDS = [0, 1, 5, 4, 3, 2, 0, 0, 3, 0, 4, 1]
AVERAGE_LINE_LENGTH = [0.0, 6.0, 29.0, 4.0, 4.0, 20.0, 11.0, 7.0, 16.0, 1.0, 9.0, 1.6666666666666667]
ENGLISH_MARKS = [
    "",
    "你好,世界.",
    "Hello world, this is 3 words!",
    "a  b\tc\nd",
    "第一行\n第二行长一点\r\n第三\u2028行",
    '"引"『』"书"[注] -  -  ... "% ~',
    "... !!! ???",
    "一 士 上 ン",
    "it's (fine); 甲:乙",
    "\n\n\n",
    "词 词 词  ,词",
    "x\u000by\fz",
]
STOPWORDS = {
    "zh": [0.0, 0.0, 0.4, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.8333333333333334],
    "en": [0.0, 0.0, 0.2, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.3333333333333333],
    "all": [0.0, 0.0, 0.4, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0],
    "aug": [0.0, 0.0, 0.2222222222222222, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.45454545454545453],
}
"""Of `TEXTS` and one more, by what the operator is told; its file lists `WORDS`."""
WORDS = {"zh": ["的", "了", "is", "this"], "en": ["is", "the"]}


def test_words_and_lines_are_counted_as_there() -> None:
    assert ask("words_num_filter", column(*TEXTS), assets={}).stats["num_words"].tolist() == NUM_WORDS
    found = ask("average_line_length_filter", column(*TEXTS)).stats["avg_line_length"].tolist()
    assert found == AVERAGE_LINE_LENGTH


def test_marks_become_english_ones() -> None:
    assert mapped("punctuation_normalization_mapper", *TEXTS) == ENGLISH_MARKS


@pytest.mark.parametrize("told", STOPWORDS)
def test_the_share_of_stop_words(tmp_path: Path, told: str) -> None:
    (tmp_path / "stopwords.json").write_text(json.dumps(WORDS), encoding="utf-8")
    given = {"lang": "zh", "use_words_aug": True} if told == "aug" else {"lang": told}
    texts = column(*TEXTS, "this is the 的 了 的")
    found = ask("stopwords_filter", texts, assets={}, stopwords_dir=str(tmp_path), **given)
    assert found.stats["stopwords_ratio"].tolist() == STOPWORDS[told]


ANSWERS = json.loads((Path(__file__).parents[2] / "data" / "data_juicer_answers.json").read_text(encoding="utf-8"))


def _called(entry: dict[str, Any]) -> str:
    return f"{entry['operator']}-{entry['given']}"


MAPPED = [entry for entry in ANSWERS["answers"] if entry["operator"].endswith("_mapper")]
COUNTED = [entry for entry in ANSWERS["answers"] if entry["operator"].endswith("_filter")]


@pytest.mark.parametrize("entry", MAPPED, ids=_called)
def test_mappers_answer_as_there(entry: dict[str, Any]) -> None:
    operator = OPERATORS[entry["operator"]]
    told = {"dialect": "data_juicer"} if "dialect" in inspect.signature(operator.function).parameters else {}
    found = operator.function(column(*ANSWERS["texts"]), **entry["given"], **told)
    assert found.to_pylist() == entry["answers"]


def small_tokenizer(folder: Path) -> Path:
    """A tokenizer of bytes, of which data-juicer's answers were counted too."""
    folder.mkdir(parents=True, exist_ok=True)
    byte_level_tokenizer(["<|endoftext|>"], "<|endoftext|>", "{{ 1 }}").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("entry", COUNTED, ids=_called)
def test_tokens_are_counted_as_there(tmp_path: Path, entry: dict[str, Any]) -> None:
    folder = small_tokenizer(tmp_path / PYTHIA)
    operator = OPERATORS[entry["operator"]]
    (name,) = operator.assets({"tokenization": True, "hf_tokenizer": PYTHIA}, "data_juicer")
    path = locate_asset(name, operator.name, {PYTHIA: str(folder)})
    found = operator.function(column(*ANSWERS["texts"]), **entry["given"], assets={name: str(path)})
    (values,) = found.stats.values()
    assert values.tolist() == entry["answers"]


def test_a_tokenizer_that_is_not_there_is_named_with_how_to_get_it(tmp_path: Path) -> None:
    (problem,) = check_process([{"token_num_filter": {"hf_tokenizer": str(tmp_path)}}], "data_juicer")
    assert problem.key == "clean.process[0].token_num_filter"
    assert "hf download" in problem.message


def test_replacements_that_do_not_fit_their_patterns_are_refused() -> None:
    process = [
        {"replace_content_mapper": {"pattern": ["a", "b"], "repl": ["x"]}},
        {"replace_content_mapper": {"pattern": "a", "repl": "\\2"}},
        {"alphanumeric_filter": {"min_ratio": 1.5}},
    ]
    assert [problem.key for problem in check_process(process, "data_juicer")] == [
        "clean.process[0].replace_content_mapper.repl",
        "clean.process[1].replace_content_mapper.repl",
        "clean.process[2].alphanumeric_filter.min_ratio",
    ]


def test_the_deduplicator_of_its_ray_mode_joins_the_same_rows() -> None:
    texts = ["一二三四五六七八九十。" * 3, "一二三四五六七八九十。" * 3 + "！", "另外的一段文字，没有什么相同的地方。"]
    given = {"tokenization": "character", "union_find_parallel_num": 2, "minhash_batch_size": "auto"}
    plans = [build_plan([{name: given}], "data_juicer", "text") for name in NEAR]
    keys = [plan.steps[0].run(column(*texts)) for plan in plans]
    assert keys[0].equals(keys[1])
    assert [plan.steps[0].operator.name for plan in plans] == list(NEAR)


@pytest.mark.parametrize(
    "name", ["image_aspect_ratio_filter", "generate_qa_from_text_mapper", "text_entity_dependency_filter"]
)
def test_an_operator_that_only_data_juicer_has_is_called_so(name: str) -> None:
    (problem,) = check_process([name], "data_juicer")
    assert problem.message == "data-juicer's, not in Danlu"
