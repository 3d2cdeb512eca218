"""Each rule against a list judged by hand: `labelled/RULE.txt`.

A line begins with `+` where the answer has the defect, and with `-` where a reader keeps it though it looks like one.
`⏎` is a line break. Lines are allowed, so that the forms of answers decide and not their layout.
"""

from pathlib import Path

import pytest

from pipelines.recipe.synthesize import Style
from pipelines.refine.rules import RULES, Expected
from tests.pipelines.synthesize import wishes

FOLDER = Path(__file__).parent / "labelled"
FREE = Style(template="", lines=True, emoji="forbidden", foreign="forbidden")

Case = tuple[str, Expected]


def labelled(rule: str) -> tuple[list[Case], list[Case]]:
    """The positives and the hard negatives of a rule."""
    found: dict[str, list[Case]] = {"+": [], "-": []}
    for line in (FOLDER / f"{rule}.txt").read_text(encoding="utf-8").splitlines():
        sign, text = line[0], line[2:].replace("⏎", "\n")
        expected = Expected({"style": "s"}, FREE, {})
        if rule == "mismatch":
            asked, text = text.split("|")
            expected = wishes.expected(asked)
        found[sign].append((text, expected))
    return found["+"], found["-"]


def lengths() -> tuple[list[Case], list[Case]]:
    """Texts that are one character too long, or too short, and the same where they just fit."""
    texts = [text for text, _ in labelled("explanation")[1]]
    positives, negatives = [], []
    for number, text in enumerate(texts):
        size = len(text)
        wrong = {"max_length": size - 1} if number % 2 else {"min_length": size + 1}
        positives.append((text, Expected({}, Style(template="", **wrong), {})))
        negatives.append((text, Expected({}, Style(template="", min_length=size, max_length=size), {})))
    return positives, negatives


@pytest.mark.parametrize("rule", RULES)
def test_precision_and_recall(rule: str) -> None:
    positives, negatives = lengths() if rule == "length" else labelled(rule)
    assert len(positives) >= 60 and len(negatives) >= 60
    missed = [text for text, expected in positives if not RULES[rule](text, expected)]
    wrong = [text for text, expected in negatives if RULES[rule](text, expected)]
    found = len(positives) - len(missed)
    precision, recall = found / max(1, found + len(wrong)), found / len(positives)
    print(f"{rule}: precision {precision:.3f}, recall {recall:.3f} of {len(positives)} and {len(negatives)}")
    assert precision >= 0.98, wrong
    assert recall >= 0.9, missed


def test_long_classical_and_verse_are_among_the_negatives_of_every_rule() -> None:
    for rule in RULES:
        texts = [text for text, _ in (lengths() if rule == "length" else labelled(rule))[1]]
        assert sum(text.count("\n") > 2 for text in texts) >= 2
        assert max(map(len, texts)) > 90
