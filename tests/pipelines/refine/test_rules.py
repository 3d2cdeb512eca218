"""Rules against real rows judged by hand, with real defects where there are, and planted ones."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import regex

from pipelines.refine.rules import FIXES, RULES, Expected
from tests.pipelines.synthesize import wishes

Case = tuple[str, Expected]


def sound(rows: list[dict[str, str]]) -> list[Case]:
    return [(rows[number]["output"], wishes.expected(rows[number]["input"])) for number in wishes.SOUND]


def real(rows: list[dict[str, str]], numbers: tuple[int, ...]) -> Iterator[Case]:
    return ((rows[number]["output"], wishes.expected(rows[number]["input"])) for number in numbers)


def defects(rule: str, rows: list[dict[str, str]]) -> list[Case]:
    """The positives of one rule."""
    plain = [case for case in sound(rows) if case[1].style.emoji == "forbidden"]
    merry = [case for case in sound(rows) if case[1].style.emoji == "needed"]
    query = wishes.expected("祝姐姐生日")
    if rule == "empty":
        marks = [
            "",
            " ",
            "。",
            "！",
            "……",
            "——",
            "～",
            "、",
            "🎉",
            "🎂🌸",
            "“”",
            "（）",
            "？",
            "~",
            "*",
            "…。",
            "！！！",
        ]
        return [(mark + more, query) for mark in marks for more in ("", "\n")]
    if rule == "non_answer":
        return [(text, query) for text in wishes.NON_ANSWERS]
    if rule == "explanation":
        planted = [(lead + text, expected) for lead, (text, expected) in zip(wishes.LEADS, plain, strict=False)]
        planted += [(text + trail, expected) for trail, (text, expected) in zip(wishes.TRAILS, plain, strict=False)]
        planted += [
            (f"{one}\n{other}", expected) for (one, expected), (other, _) in zip(plain[:5], plain[5:10], strict=True)
        ]
        return [*planted, *real(rows, (372, 878, 1400))]
    if rule == "quotes":
        return [*real(rows, wishes.QUOTED), *((f"「{text}」", expected) for text, expected in plain[:10])]
    if rule == "particle":
        planted = ["！啦~", "。哦！", "，呀！", "～哟", "！呢。", "；哦～", "…呀", "！嘛", "。啦！", "~哦~", "！哟🎉"]
        return [
            *real(rows, wishes.PARTICLE),
            *((text.rstrip("！。") + end, a) for end, (text, a) in zip(planted, plain, strict=False)),
        ]
    if rule == "opening":
        return [*real(rows, wishes.OPENING), *((f"{mark}{text}", a) for mark in "，。、" for text, a in plain[:4])]
    if rule == "length":
        return [
            *((text * 20, expected) for text, expected in merry[:16]),
            *((text[:5], expected) for text, expected in plain[:16]),
        ]
    if rule == "emoji":
        bare = [(regex.sub(r"[\p{So}\p{Sk}\u200d\ufe0f]", "", text), expected) for text, expected in merry]
        return [*bare[:16], *((text + "🎉", expected) for text, expected in plain[:16])]
    return [(text, wishes.expected(asked)) for asked, text in (line.split("|") for line in wishes.MISPLACED)]


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "foreign"])  # real rows hold hardly any
def test_precision_and_recall(rule: str, shared_data: Path) -> None:
    rows = wishes.real(shared_data)
    positives, negatives = defects(rule, rows), sound(rows)
    assert len(positives) >= 30
    missed = [text for text, expected in positives if not RULES[rule](text, expected)]
    wrong = [text for text, expected in negatives if RULES[rule](text, expected)]
    found = len(positives) - len(missed)
    assert found / len(positives) >= 0.95, missed
    assert found / (found + len(wrong)) >= 0.95, wrong


def test_what_is_mended_is_sound_afterwards(shared_data: Path) -> None:
    rows = wishes.real(shared_data)
    for rule in FIXES:
        for text, expected in defects(rule, rows):
            mended = FIXES[rule](text)
            assert not RULES[rule](mended, expected)
            assert len(text) - 4 <= len(mended) < len(text)
    assert FIXES["particle"]("日子满是欢笑！啦～") == "日子满是欢笑啦～"
    assert FIXES["quotes"]("“端午安康！”") == "端午安康！"
