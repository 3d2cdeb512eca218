"""Every operator against data-juicer 1.6.1's own answers, and the `zh` dialect where it differs."""

import inspect
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import regex

from pipelines.clean.column import Column
from pipelines.clean.operators import OPERATORS
from pipelines.similarity.hamming import find_here

MAPPERS = (
    "clean_email_mapper",
    "clean_html_mapper",
    "clean_ip_mapper",
    "clean_links_mapper",
    "clean_copyright_mapper",
)
Case = dict[str, Any]


def column(*texts: str) -> Column:
    return Column(pa.array(texts, pa.large_string()))


def ask(name: str, argument: Any, dialect: str = "zh", assets: dict[str, str] | None = None, **parameters: Any) -> Any:
    """An operator's answer, with what the plan fills in."""
    function = OPERATORS[name].function
    given = {"dialect": dialect, "assets": assets or {}}
    return function(
        argument, **parameters, **{k: v for k, v in given.items() if k in inspect.signature(function).parameters}
    )


def mapped(name: str, *texts: str, dialect: str = "zh", **parameters: Any) -> list[str]:
    return ask(name, column(*texts), dialect, **parameters).to_pylist()


@pytest.fixture(scope="module")
def cases(shared_data: Path) -> dict[tuple[str, str], list[Case]]:
    grouped = defaultdict(list)
    for case in pq.read_table(shared_data / "goldens" / "operator_cases.parquet").to_pylist():
        grouped[case["op"], case["params_json"]].append(case)
    return grouped


def of(cases: dict[tuple[str, str], list[Case]], name: str) -> list[tuple[dict[str, Any], list[Case]]]:
    found = [(json.loads(params), group) for (op, params), group in cases.items() if op == name]
    assert found
    return found


@pytest.mark.parametrize("name", MAPPERS)
def test_mappers_change_every_text_as_data_juicer_does(cases: dict[tuple[str, str], list[Case]], name: str) -> None:
    ((parameters, group),) = of(cases, name)
    answer = mapped(name, *(case["text"] for case in group), dialect="data_juicer", **parameters)
    assert answer == [case["out_text"] for case in group]


def test_mappers_in_a_chain(cases: dict[tuple[str, str], list[Case]]) -> None:
    ((_, group),) = of(cases, "five_mappers_chain")
    texts = [case["text"] for case in group]
    for name in MAPPERS:
        texts = mapped(name, *texts, dialect="data_juicer")
    assert texts == [case["out_text"] for case in group]


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("text_length_filter", 0),
        ("alphanumeric_filter", 1e-9),
        ("special_characters_filter", 1e-9),
        ("flagged_words_filter", 1e-9),
        ("perplexity_filter", 1e-6),
    ],
)
def test_filters_measure_as_data_juicer_does(
    cases: dict[tuple[str, str], list[Case]], assets: dict[str, str], name: str, tolerance: float
) -> None:
    if name == "perplexity_filter":
        pytest.importorskip("kenlm")
    for parameters, group in of(cases, name):
        verdict = ask(name, column(*(case["text"] for case in group)), "data_juicer", assets, **parameters)
        (values,) = verdict.stats.values()
        np.testing.assert_allclose(values, [float(case["stat"]) for case in group], rtol=tolerance, atol=tolerance)
        assert verdict.keep.tolist() == [case["keep"] for case in group]


def test_language_as_data_juicer_does(cases: dict[tuple[str, str], list[Case]], assets: dict[str, str]) -> None:
    ((parameters, group),) = of(cases, "language_id_score_filter")
    stats = [json.loads(case["stat"]) for case in group]
    texts = column(*(case["text"] for case in group))
    verdict = ask("language_id_score_filter", texts, "data_juicer", assets=assets, **parameters)
    assert verdict.stats["lang"].tolist() == [stat["lang"] for stat in stats]
    np.testing.assert_allclose(verdict.stats["lang_score"], [stat["lang_score"] for stat in stats], rtol=1e-6)
    assert verdict.keep.tolist() == [case["keep"] for case in group]


def test_numeric_field_as_data_juicer_does(cases: dict[tuple[str, str], list[Case]]) -> None:
    for parameters, group in of(cases, "specified_numeric_field_filter"):
        for case in group:
            values = pa.array([json.loads(case["text"])])
            if case["error"]:
                with pytest.raises(TypeError, match="float"):
                    ask("specified_numeric_field_filter", values, "data_juicer", **parameters)
            else:
                verdict = ask("specified_numeric_field_filter", values, "data_juicer", **parameters)
                assert verdict.keep.tolist() == [case["keep"]], case["text"]


def test_simhash_of_tricky_texts(cases: dict[tuple[str, str], list[Case]]) -> None:
    ((parameters, group),) = of(cases, "document_simhash_deduplicator")
    texts = column(*(case["text"] for case in group))
    keys = ask("document_simhash_deduplicator", texts, "data_juicer", **parameters)
    assert keys.to_pylist() == [int(case["stat"]) for case in group]


def test_small_data_sets(shared_data: Path, simhash: dict[str, Any]) -> None:
    for case in pq.read_table(shared_data / "goldens" / "dataset_op_cases.parquet").to_pylist():
        rows, kept = json.loads(case["input_json"]), json.loads(case["kept_json"])
        if case["kind"] == "dedup":
            keys = ask("document_simhash_deduplicator", column(*rows), "data_juicer", **simhash)
            assert [str(key) for key in keys.to_pylist()] == json.loads(case["hashes_json"]), case["label"]
            cluster = OPERATORS["document_simhash_deduplicator"].cluster
            assert cluster
            assert np.flatnonzero(cluster(keys, simhash, find_here) == np.arange(len(rows))).tolist() == kept
        else:
            reverse = case["label"].endswith("True")
            order = ask("topk_specified_field_selector", pa.array(rows), field_key="v", topk=5, reverse=reverse)
            assert order.tolist() == kept, case["label"]


def test_prefilters_miss_nothing_on_real_text(shared_data: Path) -> None:
    """Every row through the mapper by itself and unfiltered, against the whole column."""
    rows = pq.read_table(shared_data / "corpora" / "mixed_100k.parquet")["response"].slice(0, 20_000).to_pylist()
    for name in ("clean_email_mapper", "clean_ip_mapper", "clean_links_mapper"):
        pattern = inspect.getmodule(OPERATORS[name].function).__dict__[name.split("_")[1].upper()]
        fast = mapped(name, *rows, dialect="data_juicer")
        slow = mapped(name, *rows, dialect="data_juicer", pattern=pattern)
        assert fast == slow


def test_html_prefilter_misses_nothing_on_real_text(shared_data: Path) -> None:
    from selectolax.lexbor import LexborHTMLParser

    rows = pq.read_table(shared_data / "corpora" / "mixed_100k.parquet")["response"].slice(20_000, 5_000).to_pylist()
    rows += [
        "\x0bx",
        "\x85x",
        "\u3000x",
        "\ufeffx",
        "x\ufeff",
        "\x1fx",
        "a\x0cb",
        "x ",
        "x\n",
        "\x7fx",
        "\ufffex",
        "\x01",
    ]
    plain = [row for row in rows if "<" not in row and "&" not in row]
    assert mapped("clean_html_mapper", *plain, dialect="data_juicer") == [LexborHTMLParser(r).text() for r in plain]


def test_zh_cuts_a_link_out_of_chinese_text() -> None:
    texts = {
        "请看https://a.com/b，谢谢": "请看，谢谢",
        "地址http://t.cn/Rxyz后面的中文": "地址后面的中文",
        "在www.zhihu.com/question/1上": "在上",
        "(https://a.com/x?y=1&z=2)。": "",
        "看 baidu.com/s?wd=a 吧": "看吧",
        "比例是3:4，ab:cd，std::vector，PS:这样": "比例是3:4，ab:cd，std::vector，PS:这样",
        "知乎.com很好": "知乎.com很好",
        "http://后面没有": "http://后面没有",
    }
    assert mapped("clean_links_mapper", *texts) == list(texts.values())


def test_zh_keeps_headings_and_topics() -> None:
    kept = ["#话题#\n正文", "# 标题\n正文", "-- 引子\n正文", "\n\n正文"]
    assert mapped("clean_copyright_mapper", *kept) == kept
    assert mapped("clean_copyright_mapper", "// Copyright 2020\n// x\nint y;", "# 版权所有\n正文") == ["int y;", "正文"]


def test_zh_leaves_what_is_not_markup() -> None:
    kept = ["如果 a<b 那么", "  缩进", ">_<", "AT&T", "x\r\ny"]
    assert mapped("clean_html_mapper", *kept) == kept
    assert mapped("clean_html_mapper", "<p>甲</p>&amp;乙") == ["甲\n&乙"]


def test_zh_finds_flagged_words_in_unsegmented_text() -> None:
    words = {"flagged_words": ["妈的", "性", "sb"], "max_ratio": 0.0005}
    texts = column("我妈的天", "可能性很大", "这人SB啊", "usb接口", "性 福")
    verdict = ask("flagged_words_filter", texts, **words)
    assert verdict.keep.tolist() == [False, True, False, True, False]
    np.testing.assert_allclose(verdict.stats["flagged_words_ratio"], [1 / 4, 0, 1 / 4, 0, 1 / 2])
    as_data_juicer = ask("flagged_words_filter", texts, "data_juicer", **words)
    assert as_data_juicer.keep.tolist() == [True, True, True, True, False]


def test_zh_letters_are_not_special_characters() -> None:
    texts = column("一士上一", "好！", "")
    assert ask("special_characters_filter", texts).stats["special_char_ratio"].tolist() == [0, 0.5, 0]
    as_data_juicer = ask("special_characters_filter", texts, "data_juicer")
    assert as_data_juicer.stats["special_char_ratio"].tolist() == [1, 0.5, 0]


def test_zh_takes_zero_for_a_number() -> None:
    for values in (pa.array([0, 5]), pa.array([0.0, 5.0]), pa.array(["0", "5"])):
        verdict = ask("specified_numeric_field_filter", values, field_key="upvotes", min_value=0)
        assert verdict.keep.tolist() == [True, True]
    assert ask("specified_numeric_field_filter", pa.array([0]), "data_juicer", field_key="u").keep.tolist() == [False]


def test_zh_short_texts_are_duplicates_only_where_equal(simhash: dict[str, Any]) -> None:
    texts = column("一二", "啊", "", "好的呀", "一二。", "。。", "！")
    keys = ask("document_simhash_deduplicator", texts, **simhash)
    assert OPERATORS["document_simhash_deduplicator"].cluster(keys, simhash, find_here).tolist() == [
        0,
        1,
        2,
        3,
        0,
        5,
        6,
    ]


def test_reasons_say_what_was_measured_and_the_bound() -> None:
    verdict = ask("text_length_filter", column("一二", "一二三四"), min_len=3, max_len=9)
    assert verdict.reasons(np.array([0])) == ["text_len 2 is below min_len 3"]
    votes = ask("specified_numeric_field_filter", pa.array(["1,000", None, "7"]), field_key="upvotes", max_value=5)
    told = ["upvotes '1,000' is not a number", "upvotes None is not a number", "upvotes 7 is above max_value 5"]
    assert votes.reasons(np.arange(3)) == told


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [False, True, True, True, False]),
        ({"min_closed_interval": False}, [False, False, True, True, False]),
        ({"max_closed_interval": False}, [False, True, True, False, False]),
        ({"reversed_range": True}, [True, True, False, True, True]),
    ],
)
def test_interval_options(options: dict[str, bool], kept: list[bool]) -> None:
    from pipelines.clean.operators.registry import Interval

    texts = column(*("一" * n for n in range(1, 6)))
    assert ask("text_length_filter", texts, min_len=2, max_len=4, interval=Interval(**options)).keep.tolist() == kept


def test_word_search_agrees_with_a_regular_expression_on_real_text(shared_data: Path) -> None:

    from pipelines.clean.kernels.trie import build_trie, flagged_characters

    words = json.loads((shared_data / "assets" / "flagged_words.json").read_text(encoding="utf-8"))["zh"]
    patterns = []
    for word in sorted({word.lower() for word in words}, key=lambda word: (-len(word), word)):
        letter = r"[^\W_]|_" if len(word) == 1 else "[a-zA-Z0-9]"
        before = f"(?<!{letter})" if len(word) == 1 or regex.match("[a-zA-Z0-9]", word) else ""
        after = f"(?!{letter})" if len(word) == 1 or regex.search("[a-zA-Z0-9]$", word) else ""
        patterns.append(before + regex.escape(word) + after)
    anywhere = regex.compile("|".join(patterns), regex.IGNORECASE)
    rows = pq.read_table(shared_data / "corpora" / "mixed_100k.parquet")["response"].slice(0, 10_000).to_pylist()
    rows += [
        "他妈的",
        "性",
        "可能性",
        "一性_",
        "SB",
        "cum",
        "document",
        "卖B卖b",
        "卖BB",
        "奶奶的熊奶奶",
        "妈 的",
        "xxx。XXX",
    ]
    found, _ = flagged_characters(build_trie(tuple(words), bounded=True), *column(*rows).utf8)
    expected = [sum(len(m.group()) for m in anywhere.finditer(row)) for row in rows]
    assert found.tolist() == expected
    assert sum(count > 0 for count in expected) > 100


def test_language_equals_fasttext_on_real_text(shared_data: Path, assets: dict[str, str]) -> None:
    fasttext = pytest.importorskip("fasttext")
    model = fasttext.load_model(assets["lid.176.ftz"])
    rows = pq.read_table(shared_data / "corpora" / "mixed_100k.parquet")["response"].slice(50_000, 3_000).to_pylist()
    rows += ["", "\x00a\x0bb", "</s> abc", "abc </s> def", "__label__zh 中文", "ΟΔΟΣ ΣΟΦΟΣ", "DİLDO İ", "ǅ", "x" * 5000]
    verdict = ask("language_id_score_filter", column(*rows), "data_juicer", assets=assets)
    expected = [model.predict(row.lower().replace("\n", " ")) for row in rows]
    assert verdict.stats["lang"].tolist() == [labels[0].removeprefix("__label__") for labels, _ in expected]
    assert verdict.stats["lang_score"].tolist() == [float(scores[0]) for _, scores in expected]


def test_the_script_decides_before_the_model(shared_data: Path, assets: dict[str, str]) -> None:
    source = json.loads((shared_data / "tianji-wishes-chinese-v0.1.json").read_text(encoding="utf-8"))
    wishes = [turn["output"] for row in source for turn in row["conversation"]][:1500]
    verdict = ask("language_id_score_filter", column(*wishes), assets=assets, lang="zh", min_score=0.9)
    assert verdict.keep.all()
    others = ["今日は天気がいいですね", "東京特許許可局へ行きました", "대한민국 漢字", "hello world", "", "。。", "😂"]
    assert not ask("language_id_score_filter", column(*others), assets=assets, lang="zh", min_score=0.1).keep.any()


def test_variants_say_which_chinese_stays(assets: dict[str, str]) -> None:
    texts = column("今天天气很好。", "這本書我找了很久。", "佢哋琴晚食完飯先至返嚟", "侬饭吃过伐？阿拉屋里向烧了肉。")
    kept = {
        variant: ask(
            "language_id_score_filter", texts, assets=assets, lang="zh", min_score=0.5, variants=[variant]
        ).keep.tolist()
        for variant in ("simplified", "traditional", "yue", "wuu")
    }
    assert [keep.index(True) for keep in kept.values()] == [0, 1, 2, 3]
    assert all(sum(keep) == 1 for keep in kept.values())


def test_simhash_of_long_shingles_and_other_tokens() -> None:
    """Against a plain implementation of the definition, where shingles fill several MD5 blocks."""
    import hashlib

    def plain(shingles: list[str]) -> int:
        hashes = [int.from_bytes(hashlib.md5(s.encode()).digest()[:8], "big") for s in shingles]
        return sum(1 << bit for bit in range(64) if 2 * sum(h >> bit & 1 for h in hashes) > len(hashes))

    text = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜金生丽水玉出昆冈" * 2
    for window in (1, 5, 18, 19, 21, 40, 64):
        keys = mapped("document_simhash_deduplicator", text, tokenization="character", window_size=window)
        assert keys == [plain([text[i : i + window] for i in range(len(text) - window + 1)])]
    words = "a bb  ccc dd e ff"
    (key,) = mapped("document_simhash_deduplicator", words, tokenization="space", window_size=3)
    assert key == plain(["a bb ccc", "bb ccc dd", "ccc dd e", "dd e ff"])
    (key,) = mapped("document_simhash_deduplicator", "a,b c,,d", tokenization="punctuation", window_size=2)
    assert key == plain(["a b c", "b c ", " d"])
