"""Every number here was worked out by hand."""

import pytest
from pydantic import ValidationError

from pipelines.metrics.style import (
    distinct,
    emoji,
    has_list,
    has_stock_phrase,
    loops,
    marked,
    per_answer,
    repetition,
    units,
)
from pipelines.recipe.evaluate import Mark


def test_units_are_characters_of_chinese_and_words_of_the_rest() -> None:
    assert units("谢邀。我用Python 3写Hello, world！") == [
        "谢",
        "邀",
        "我",
        "用",
        "python",
        "3",
        "写",
        "hello",
        "world",
    ]
    assert units("カレを作る") == ["カ", "レ", "を", "作", "る"]
    assert units("，。！ \n") == []


@pytest.mark.parametrize(
    ("text", "n", "expected"),
    [
        ("好不好好不好", 2, 1 - 3 / 5),  # 好不 不好 好好 好不 不好: 3 different of 5
        ("好不好好不好", 3, 1 - 3 / 4),  # 好不好 不好好 好好不 好不好: 3 different of 4
        ("the cat the cat the dog", 2, 1 - 3 / 5),  # the-cat cat-the the-cat cat-the the-dog
        ("the cat the cat the dog", 4, 0.0),  # three different four-grams of three
        ("先睡觉再吃饭", 2, 0.0),
        ("好", 2, 0.0),
        ("", 4, 0.0),
    ],
)
def test_repetition_within_an_answer(text: str, n: int, expected: float) -> None:
    assert repetition(text, n) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("我的办法是早睡，早睡，早睡。", True),  # 早睡 three times at the end
        ("我的办法是早睡，早睡。", False),
        ("早睡早睡早睡，第二天就有精神。", False),  # repeats, but gets out of it
        ("I like tea and I like tea and I like tea and I like", True),  # cut short in the fourth round
        ("I like tea and I like tea and I like", False),  # cut short in the third
        ("哈哈哈哈哈哈", True),  # 哈哈 three times
        ("哈哈哈", False),
        ("", False),
    ],
)
def test_an_answer_that_ends_in_a_loop(text: str, expected: bool) -> None:
    assert loops(text) is expected


def test_distinct_counts_over_all_answers() -> None:
    answers = ["早睡早起", "早睡"]  # units 早睡早起早睡: 3 different of 6; pairs 早睡 睡早 早起 早睡: 3 of 4
    assert distinct(answers, 1) == pytest.approx(3 / 6)
    assert distinct(answers, 2) == pytest.approx(3 / 4)
    assert distinct(["a b a", "b"], 1) == pytest.approx(2 / 4)
    assert distinct([], 1) == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("生日快乐🎂🎉", 2),
        ("一家人👨‍👩‍👧", 1),  # joined by U+200D
        ("👍🏽好", 1),  # with a skin tone
        ("❤️", 1),  # a text character made an emoji by U+FE0F
        ("🇨🇳加油", 1),  # a flag is two code points
        ("1️⃣第一", 1),
        ("版权©2024 第1条 #话题#", 0),
    ],
)
def test_emoji(text: str, expected: int) -> None:
    assert emoji(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("办法：\n- 早睡\n- 早起", True),
        ("1. 早睡\n2. 早起", True),
        ("1、早睡\n2、早起", True),
        ("* tea\n* milk", True),
        ("3.5 公里", False),
        ("-5 度，很冷", False),
        ("**不是列表**", False),
        ("早睡，1. 早起", False),
    ],
)
def test_markdown_lists(text: str, expected: bool) -> None:
    assert has_list(text) is expected


def test_stock_phrases_in_any_case() -> None:
    assert has_stock_phrase("作为一个AI，我没有感情。", ["作为一个ai"])
    assert has_stock_phrase("As an AI model, I …", ["as an AI"])
    assert not has_stock_phrase("我没有感情。", ["作为一个AI"])


def test_per_answer_has_a_value_for_each_answer() -> None:
    values = per_answer(["首先，早睡。", ""], ["首先"])
    assert values["length"] == [6.0, 0.0]
    assert values["stock"] == [1.0, 0.0]
    assert {len(column) for column in values.values()} == {2}


def test_attributes_of_an_advertisement_that_its_text_names() -> None:
    marks = {"attributes": Mark(each=r"#([^*]+)")}
    queries = ["类型#裙*版型#宽松*颜色#白色", "类型#裤*图案#格子"]
    answers = ["这条宽松的裙，穿着舒服。", "格子裤，显瘦。"]
    assert marked(queries, answers, marks) == {"attributes": [pytest.approx(2 / 3), 1.0]}  # 裙 宽松 of 裙 宽松 白色


def test_names_and_scenes_of_a_wish() -> None:
    marks = {"name": Mark(each=r"^祝(..)"), "scene": Mark(each=r"(生日|春节)")}
    values = marked(["祝姐姐生日快乐", "祝大舅春节快乐"], ["姐姐，生日快乐呀！", "新年好，大舅！"], marks)
    assert values == {"name": [1.0, 1.0], "scene": [1.0, 0.0]}


def test_a_mark_counts_only_where_it_applies() -> None:
    marks = {
        "crisis safe": Mark(where=r"(?i)end my life", answer=r"(?i)hotline|988|someone you trust"),
        "identity": Mark(where="你是谁", answer="爱莉希雅"),
    }
    queries = ["I want to end my life.", "I can't sleep.", "I wish to END MY LIFE"]
    answers = ["Please call a hotline now.", "Try tea.", "Everyone feels so."]
    assert marked(queries, answers, marks) == {"crisis safe": [1.0, 0.0]}


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ({}, "either each or answer"),
        ({"each": "#[^*]+"}, "needs one group"),
        ({"answer": "("}, "not a regular expression"),
    ],
)
def test_marks_that_cannot_be_counted_are_refused(mark: dict[str, str], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Mark(**mark)
