"""Whatever bytes a recipe is: it is read, or one short message says what is wrong, soon and in little memory."""

import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pipelines.errors import RecipeError
from pipelines.recipe.load import shipped_recipes
from rayjobs.pipeline import load

SEED = 20261130
SECONDS, BYTES, CHARACTERS = 5.0, 500 << 20, 20_000

VALUES = [
    *("null", "true", "[]", "{}", "''", "0", "-1", "1e309", ".inf", "-.inf", ".nan", "0b_", "0x", "1_", "9" * 5000),
    *("2026-99-99", "12:99:99", "!!int x", "!!python/object/apply:os.system [id]", "*a", "&a [*a]", "<<: {a: 1}"),
    *('"\\ud800"', '"\\0"', "a..b", "base", "x" * 129, "甲" * 300, "{a: {b: {c: [1, {d: 2}]}}}", "[[1], [2]]", "? [a]"),
    *("../../etc/passwd", "/dev/zero", "s3://", "hf://", "{{", "{x!r:>9}", "(", "[", "a: b: c", "- - - 1", "|", ">"),
]
"""What is put in the place of values and lines."""

Mutation = Callable[[random.Random, bytes], bytes]


def _lines(draw: random.Random, text: bytes) -> bytes:
    """Lines removed, repeated, exchanged or indented otherwise."""
    lines = text.split(b"\n")
    at, other = draw.randrange(len(lines)), draw.randrange(len(lines))
    kind = draw.randrange(4)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(other, lines[at])
    elif kind == 2:
        lines[at], lines[other] = lines[other], lines[at]
    else:
        lines[at] = b" " * draw.randrange(9) + lines[at].lstrip()
    return b"\n".join(lines)


def _value(draw: random.Random, text: bytes) -> bytes:
    """Another value behind a key."""
    lines = text.split(b"\n")
    keys = [number for number, line in enumerate(lines) if b":" in line]
    if keys:
        at = draw.choice(keys)
        lines[at] = lines[at].partition(b":")[0] + b": " + draw.choice(VALUES).encode("utf-8", "surrogatepass")
    return b"\n".join(lines)


def _bytes(draw: random.Random, text: bytes) -> bytes:
    """Bytes changed, cut off or put in."""
    data = bytearray(text)
    for _ in range(draw.randrange(1, 9)):
        at = draw.randrange(len(data) + 1)
        data[at : at + draw.randrange(3)] = draw.randbytes(draw.randrange(3))
    return bytes(data[: draw.randrange(len(data) + 1)] if draw.random() < 0.1 else data)


def _key(draw: random.Random, text: bytes) -> bytes:
    """A letter of a key taken away."""
    at = draw.randrange(len(text) + 1)
    return text[:at] + text[at + 1 :]


MUTATIONS: list[Mutation] = [_lines, _value, _value, _value, _bytes, _key]


def read(path: Path) -> str | None:
    """What is said of a recipe that is refused; None of one that is read."""
    try:
        load(str(path))
    except RecipeError as error:
        return str(error)
    return None


def peak_memory() -> int:
    """The most bytes that this process has held."""
    said = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert said
    return int(said[1]) * 1024


def fuzz(tmp_path: Path, count: int) -> dict[str, int]:
    draw, path = random.Random(SEED), tmp_path / "mutated.yaml"
    texts = [recipe.read_bytes() for recipe in shipped_recipes().values()]
    counts = {"read": 0, "refused": 0}
    for path_out in texts:  # loads what operators and schemas need, which is no mutation's doing
        path.write_bytes(path_out)
        read(path)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here, not from other tests
    before = peak_memory()
    slowest = 0.0
    for number in range(count):
        data = draw.choice(texts)
        for _ in range(draw.randrange(1, 4)):
            data = draw.choice(MUTATIONS)(draw, data)
        path.write_bytes(data)
        began = time.process_time()  # other processes may keep this one waiting
        said = read(path)
        slowest = max(slowest, time.process_time() - began)
        assert slowest < SECONDS, (number, data)
        if said is None:
            counts["read"] += 1
            continue
        counts["refused"] += 1
        assert said.startswith(f"{path}: ") and len(said) < CHARACTERS, (number, said[:500])
        assert said.encode(), number  # whole characters, so that it can be printed
    assert peak_memory() - before < BYTES
    print(f"{count} recipes: {counts}, slowest {slowest:.2f} s")
    return counts


def test_mutated_recipes(tmp_path: Path) -> None:
    counts = fuzz(tmp_path, 300)
    assert min(counts.values()) > 10


@pytest.mark.slow
def test_ten_thousand_mutated_recipes(tmp_path: Path) -> None:
    assert sum(fuzz(tmp_path, 10_000).values()) == 10_000


NINE = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10))
CHAIN = b"\n".join(b"a%d: &a%d [*a%d]" % (number, number, number - 1) for number in range(1, 60))
INFINITE = b"name: r\ningest: {source: x}\nsplit: {test_ratio: .inf}\n"
HOSTILE = {
    "aliases": (f"name: r\na0: &a0 [x, x]\n{NINE}\n".encode(), "more than 100,000 values"),
    "itself": (b"name: &a [*a]\n", "nested deeper than 30 levels"),
    "chain": (
        b"a0: &a0 [x]\n" + b"\n".join(b"a%d: &a%d [*a%d]" % (n, n, n - 1) for n in range(1, 60)),
        "nested deeper",
    ),
    "deep flow": (b"name: " + b"[" * 400_000, "nested deeper than 30 levels"),
    "deep block": (b"\n".join(b" " * n + b"a:" for n in range(900)), "nested deeper than 30 levels"),
    "large value": (b"name: " + b"x" * (10 << 20), "more than 524,288 bytes"),
    "large enough": (b"name: " + b"x" * (500 << 10), "use at most 100"),
    "many keys": (b"\n".join(b"k%d: 1" % n for n in range(40_000)), "the first 50"),
    "date": (b"name: 2026-99-99\n", "missing"),
    "number": (b"seed: 0b_\n", "is no number"),
    "digits": (b"seed: " + b"9" * 5000, "is no number"),
    "tag": (b"name: !!python/object/apply:os.system [id]\n", "the tag"),
    "tag of a number": (b"seed: !!int x\n", "the tag"),
    "half a character": (b'name: "\\ud800"\n', "not valid YAML"),
    "key": (b"? [a, b]\n: 1\n", "a key is a word"),
    "zero": (b"name: a\0b\n", "not valid YAML"),
    "zero in a path": (b'export: {path: "\\0.jsonl"}\n', "NUL"),
    "utf-16": ("name: 甲\n".encode("utf-16"), "not UTF-8"),
    "number for a key": (b"1: 2\n", "the key 1 is no section"),
    "infinite": (
        b"name: r\ningest: {source: x}\nclean: {process: [text_length_filter]}\nsplit: {test_ratio: .inf}\n",
        "finite",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_hostile_is_refused_soon_with_a_short_reason(tmp_path: Path, name: str) -> None:
    data, reason = HOSTILE[name]
    path = tmp_path / "mine.yaml"
    path.write_bytes(data)
    began = time.process_time()
    said = read(path)
    assert time.process_time() - began < SECONDS
    assert said is not None and reason in said and len(said) < CHARACTERS, said and said[:500]


def test_an_override_is_bounded_too(tmp_path: Path) -> None:
    for override in (
        ".".join("a" * 5000) + "=1",
        "name=" + "x" * (1 << 20),
        "name=" + "[" * 100_000,
        "seed=" + "9" * 5000,
        "train.system=\udcff",
    ):
        with pytest.raises(RecipeError) as caught:
            load("tiny", [override])
        assert len(str(caught.value)) < CHARACTERS


def test_anchors_within_bounds_and_dates_as_text_are_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\ningest: {source: &rows rows.jsonl, system: 2026-11-30}\nsplit: {test_source: *rows}\n",
        encoding="utf-8",
    )
    recipe = load(str(path))
    assert recipe.ingest and recipe.ingest.system == "2026-11-30"
    assert recipe.split and recipe.split.test_source == "rows.jsonl"
    assert yaml.safe_load("a: 1") == {"a": 1}  # other YAML in this process is read as before
