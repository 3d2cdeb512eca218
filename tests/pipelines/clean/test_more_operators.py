"""Operators beyond the zhihu recipe. Expected values are data-juicer 1.6.1's own answers unless a test says `zh`."""

import inspect
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines.clean.column import Column
from pipelines.clean.operators import OPERATORS
from pipelines.similarity.hamming import find_here
from pipelines.similarity.minhash import optimal_bands

TEXTS = [
    "好好好好好好好好好好好好",
    "今天天气很好，今天天气很好，今天天气很好。",
    "abcdefghijklmnop",
    "短",
    "",
    "the cat sat the cat sat the cat",
    "一行\n第二行更长一些\r\n三",
    "ａｂ\u2028ｃｄｅ",
]


def ask(name: str, texts: list[str], dialect: str = "data_juicer", **parameters: Any) -> Any:
    function = OPERATORS[name].function
    given = {"dialect": dialect, "assets": {}}
    wanted = inspect.signature(function).parameters
    filled_in = {key: value for key, value in given.items() if key in wanted}
    return function(Column(pa.array(texts, pa.large_string())), **parameters, **filled_in)


def kept(name: str, texts: list[str], dialect: str = "data_juicer", **parameters: Any) -> list[int]:
    """Rows that a deduplicator keeps."""
    keys, cluster = ask(name, texts, dialect, **parameters), OPERATORS[name].cluster
    assert cluster
    return np.flatnonzero(cluster(keys, parameters, find_here) == np.arange(len(texts))).tolist()


@pytest.mark.parametrize(
    ("name", "parameters", "stats", "keep"),
    [
        (
            "character_repetition_filter",
            {"rep_len": 3, "max_ratio": 0.3},
            [1, 0.3157894736842105, 0, 0, 0, 0.3448275862068966, 0, 0],
            [0, 0, 1, 1, 1, 0, 1, 1],
        ),
        (
            "character_repetition_filter",
            {},
            [1, 0.3333333333333333, 0, 0, 0, 0.2727272727272727, 0, 0],
            [0, 1, 1, 1, 1, 1, 1, 1],
        ),
        (
            "word_repetition_filter",
            {"rep_len": 2, "max_ratio": 0.3},
            [0, 0, 0, 0, 0, 1, 0, 0],
            [1, 1, 1, 1, 1, 0, 1, 1],
        ),
        (
            "maximum_line_length_filter",
            {"min_len": 2, "max_len": 10},
            [12, 21, 16, 1, 0, 31, 7, 3],
            [0, 0, 0, 0, 0, 0, 1, 1],
        ),
    ],
)
def test_filters(name: str, parameters: dict[str, Any], stats: list[float], keep: list[int]) -> None:
    verdict = ask(name, TEXTS, **parameters)
    (values,) = verdict.stats.values()
    np.testing.assert_allclose(values, stats, atol=1e-12)
    assert verdict.keep.tolist() == [bool(k) for k in keep]


def test_whitespace() -> None:
    texts = ["\u3000　首行\u3000缩进\t制表\n换行 ", "\x1cx\u200b\u200b", "没有"]
    assert ask("whitespace_normalization_mapper", texts).to_pylist() == ["首行 缩进 制表\n换行", "x  ", "没有"]


def test_unicode() -> None:
    pytest.importorskip("ftfy")
    texts = ["schÃ¶n", "ＡＢ，“好”", "&lt;b&gt;", "e\u0301"]
    assert ask("fix_unicode_mapper", texts).to_pylist() == ["schön", 'AB,"好"', "<b>", "é"]
    in_zh = ["schön", "ＡＢ，“好”", "<b>", "é"]  # Chinese punctuation stays
    assert ask("fix_unicode_mapper", texts, "zh").to_pylist() == in_zh


def test_chinese_variants() -> None:
    pytest.importorskip("opencc")
    simplified = ["发展中国家的面条，头发后面", "abc"]
    answer = ask("chinese_convert_mapper", simplified, mode="s2t").to_pylist()
    assert answer == ["發展中國家的麪條，頭髮後面", "abc"]
    assert ask("chinese_convert_mapper", ["a\0b"], mode="s2twp").to_pylist() == ["a"]
    assert ask("chinese_convert_mapper", ["a\0b", "后\0b"], "zh", mode="s2twp").to_pylist() == ["a\0b", "後\0b"]
    assert ask("chinese_convert_mapper", ["開發軟體", "程式"], mode="tw2sp").to_pylist() == ["开发软件", "程序"]


def test_exact_duplicates() -> None:
    texts = ["a b", "ab", "AB", " a b ", "a1b!", "甲"]
    assert kept("document_deduplicator", texts) == [0, 1, 2, 4, 5]
    assert kept("document_deduplicator", texts, lowercase=True, ignore_non_character=True) == [0, 5]


def test_minhash() -> None:
    texts = [
        "今天天气很好我们去公园散步吧大家一起走",
        "今天天气很好我们去公园散步吧大家一起走。",
        "今天天气很好我们去公园散步吧大家一起去",
        "完全不同的一段话讲的是另外一件事情",
        "短",
        "小",
        "",
    ]
    parameters = {"tokenization": "character", "window_size": 3, "ignore_pattern": r"\p{P}", "jaccard_threshold": 0.7}
    parameters["num_permutations"] = 256
    assert kept("document_minhash_deduplicator", texts, **parameters) == [0, 3, 4]
    assert kept("document_minhash_deduplicator", texts, "zh", **parameters) == [0, 2, 3, 4, 5, 6]  # short ones differ


@pytest.mark.parametrize(
    ("threshold", "permutations", "bands"), [(0.7, 256, (25, 10)), (0.5, 64, (14, 4)), (0.8, 128, (9, 13))]
)
def test_bands_are_those_datasketch_chooses(threshold: float, permutations: int, bands: tuple[int, int]) -> None:
    assert optimal_bands(threshold, permutations) == bands
