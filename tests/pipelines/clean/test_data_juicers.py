"""Operators whose answers data-juicer 1.6.1 itself gave, in an environment of its own."""

import json
from pathlib import Path

import pytest

from pipelines.clean.plan import check_process
from tests.pipelines.clean.test_operators import ask, column, mapped

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


@pytest.mark.parametrize(
    "name", ["image_aspect_ratio_filter", "generate_qa_from_text_mapper", "text_entity_dependency_filter"]
)
def test_an_operator_that_only_data_juicer_has_is_called_so(name: str) -> None:
    (problem,) = check_process([name], "data_juicer")
    assert problem.message == "data-juicer's, not in Danlu"
