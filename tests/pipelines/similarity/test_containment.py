"""Known texts found in others."""

import pyarrow as pa
import pytest

from pipelines.similarity.containment import KnownTexts

QUESTION = "为什么海水是咸的，而湖水大多是淡的？"
OTHER = "Why is the sea salty, while most lakes are fresh?"


def test_a_text_is_found_whole_in_part_and_in_other_clothes() -> None:
    known = KnownTexts([QUESTION, OTHER])
    found = known.found_in(
        pa.array(
            [
                f"有人问：{QUESTION}我来答。",
                "为什么海水是咸的、而湖水大多 是淡的",
                "ＷＨＹ ＩＳ the sea SALTY while most lakes are fresh",
                "为什么海水是咸的而湖水",
                "湖水和海水都是水。",
                "",
            ]
        )
    )
    assert {row: number for row, (number, _) in found.items()} == {0: 0, 1: 0, 2: 1, 3: 0}
    assert [found[row][1] for row in (0, 1, 2)] == [1, 1, 1]
    assert found[3][1] == pytest.approx(2 / 7)


def test_what_is_too_short_is_not_looked_for() -> None:
    known = KnownTexts(["你是谁？", "一二三四五六七八九十", QUESTION])
    assert known.too_short == 2
    assert known.found_in(pa.array(["你是谁？一二三四五六七八九十"])) == {}
    assert KnownTexts([]).found_in(pa.array([QUESTION])) == {}


def test_of_several_the_one_with_most_of_it_is_named() -> None:
    longer = QUESTION + "请从地质和水循环的角度详细说明，并各举一个例子。"
    (found,) = KnownTexts([longer, QUESTION]).found_in(pa.array([QUESTION])).values()
    assert found == (1, 1.0)
