"""What the rules drop of the real wishes, each drop read by a person, and of these wishes as verse and as letters."""

import hashlib
from collections import Counter
from pathlib import Path

import pytest
import regex

from pipelines.recipe.synthesize import Style
from pipelines.refine.rules import RULES, Expected
from tests.pipelines.synthesize import wishes

READ = Path(__file__).with_name("read_drops.txt")


def read_drops() -> dict[int, tuple[str, str, str]]:
    """Digest, rule and verdict of each row that was read, by its number."""
    lines = [line.split(maxsplit=4) for line in READ.read_text(encoding="utf-8").splitlines() if line[0] != "#"]
    return {int(number): (digest, rule, verdict) for number, digest, rule, verdict, _ in lines}


def first_defect(text: str, expected: Expected) -> str | None:
    return next((name for name, rule in RULES.items() if rule(text.strip(), expected)), None)


def test_every_drop_of_the_real_wishes_was_read_and_none_is_wrong(shared_data: Path) -> None:
    found = {}
    for number, row in enumerate(wishes.real(shared_data)):
        if (name := first_defect(row["output"], wishes.expected(row["input"]))) is not None:
            found[number] = hashlib.sha256(row["output"].encode()).hexdigest()[:12], name
    known = read_drops()
    assert len(known) >= 100
    assert found == {number: (digest, name) for number, (digest, name, _) in known.items()}
    assert Counter(verdict for _, _, verdict in known.values()) == {"right": len(known)}


def verse(text: str) -> str:
    """Each clause on a line of its own."""
    return regex.sub(r"(?<=[，。！；])(?=\S)", "\n", text)


def letter(text: str) -> str:
    """The wish as a long letter: an address, paragraphs, and a signature."""
    return (
        f"见字如面。\n\n{text}\n\n{'提笔时窗外正下着雪，' * 8}想起许多旧事。\n\n{text}\n\n纸短情长，余言后叙。\n\n谨上"
    )


@pytest.mark.parametrize("form", [verse, letter])
def test_verse_and_letters_are_dropped_for_nothing_but_what_was_read(shared_data: Path, form: object) -> None:
    assert callable(form)
    known, free = read_drops(), Style(template="", lines=True)
    dropped = {}
    for number, row in enumerate(wishes.real(shared_data)):
        expected = wishes.expected(row["input"])
        expected = Expected(expected.cell, free, expected.dimensions, expected.aliases)
        for name in ("explanation", "non_answer"):
            if RULES[name](form(row["output"]), expected):
                dropped[number] = name
    assert len(wishes.real(shared_data)) == 2976
    assert {number: known[number][1] for number in dropped} == dropped
