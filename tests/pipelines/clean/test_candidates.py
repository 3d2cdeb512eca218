"""What a cheap test over the column lets through: every text that the operator itself would find something in."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import regex

from pipelines.clean.column import Column, Mask
from pipelines.clean.kernels.kenlm_model import load_hashed_model
from pipelines.clean.kernels.sentences import may_repeat
from pipelines.clean.operators import OPERATORS
from pipelines.clean.operators.garbled import _BYTES, _ENCODED, _MISDECODED
from pipelines.clean.operators.personal_data import _CANDIDATE, _NECESSARY, personal_data_of
from pipelines.clean.operators.promotion import _may_promote, _without_lookaround, without_promotion
from pipelines.clean.operators.quotations import _MAY_QUOTE, only_quotes
from pipelines.clean.operators.words import pieces

LABELLED = sorted((Path(__file__).parents[2] / "data" / "labelled").glob("*.jsonl"))
TEXTS = [
    row["text"] for path in LABELLED for row in map(json.loads, path.read_text("utf-8").splitlines()) if "text" in row
]


def column_of(texts: list[str]) -> Column:
    return Column(pa.array(texts, pa.large_string()))


@pytest.mark.parametrize(
    ("candidates", "finds"),
    [
        (_may_promote, lambda text: without_promotion(text) != text),
        (
            lambda column: ~column.matches(_CANDIDATE) | column.matches(_NECESSARY),
            lambda text: bool(personal_data_of(text)) and column_of([text]).matches(_CANDIDATE).all(),
        ),
        (lambda column: column.matches(_MAY_QUOTE), only_quotes),
        (lambda column: column.matches(_BYTES), lambda text: bool(_ENCODED.search(text) or _MISDECODED.search(text))),
    ],
    ids=["promotion", "personal data", "quotations", "encoded"],
)
def test_no_text_with_something_to_find_is_passed_over(
    candidates: Callable[[Column], Mask], finds: Callable[[str], bool]
) -> None:
    texts = [
        *TEXTS,
        "＋Ｖ：ＡＢ１２３４５ 领资料",
        "电话：１３８ １２３４ ５６７８",
        "我家在幸福路 12 号",
        "名人说过：“路是走出来的，不是等来的。”",
    ]
    found = np.array([finds(text) for text in texts])
    assert found.any()
    assert not (found & ~candidates(column_of(texts))).any()


def test_lookaround_is_taken_out_with_what_stands_in_it() -> None:
    pattern = r"(?<![(\d)])加(?=群|(?:微信|[)）]))[(（]?\d{2}(?:$|。)"
    assert _without_lookaround(pattern) == r"加[(（]?\pN{2}(?:|。)"
    assert regex.search(pattern, "我加（12") is None


@pytest.mark.parametrize(
    ("text", "repeats"),
    [
        ("今天下雨，所以没有出门。今天下雨所以，没有出门！", True),
        ("今天下雨，所以没有出门\n后来 今天下雨，所以没有出门", False),
        ("version 1.25 is out. version 1.25 is out. ", True),
        ("好的。好的。好的。", False),
        ("他说：“今天下雨，没有出门。”她说：“今天下雨，没有出门。”", False),
        ("", False),
    ],
)
def test_a_sentence_of_ten_letters_that_may_come_again(text: str, repeats: bool) -> None:
    assert may_repeat(*column_of([text]).utf8, 10).tolist() == [repeats]
    mapper = OPERATORS["remove_repeat_sentences_mapper"].function
    assert mapper(column_of([text])).to_pylist() == mapper(column_of([text]), lowercase=True).to_pylist()


def test_perplexity_is_what_kenlm_says(assets: dict[str, str], corpus: pa.Table) -> None:
    kenlm = pytest.importorskip("kenlm")
    texts = [
        *corpus["RESPONSE" if "RESPONSE" in corpus.column_names else "response"].to_pylist()[:400],
        "",
        " ",
        "𠮷🙂",
        "a\0b",
    ]
    parameters = {"lang": "zh", "dialect": "data_juicer", "assets": assets}
    found = OPERATORS["perplexity_filter"].function(column_of(texts), **parameters).stats["perplexity"]
    model = kenlm.Model(assets["zh.arpa.bin"])
    split = pieces(texts, assets["zh.sp.model"])
    lines = [" ".join(row) for row in split]
    assert found.tolist() == [
        round(10.0 ** (-model.score(line) / (len(line.split()) + 1)), 1) if line else 0.0 for line in lines
    ]
    hashed = load_hashed_model(assets["zh.arpa.bin"])
    assert hashed is not None
    known = [row for row in split if "a" not in row]
    offsets = np.cumsum([0, *map(len, known)])
    sizes = hashed.scores(hashed.numbers([piece for row in known for piece in row]), offsets)[1]
    theirs = [size for row in known for _, size, _ in model.full_scores(" ".join(row), eos=False)]
    assert [int(size) for size in sizes] == theirs


def test_another_file_is_left_to_kenlm(tmp_path: Path) -> None:
    other = tmp_path / "model.bin"
    other.write_bytes(b"\\data\\\nngram 1=3\n" * 20)
    assert load_hashed_model(str(other)) is None
