"""Rows in Zhihu-KOL's schema, with its lengths and votes, made of real text: for measuring at a million rows.

Sentences of real answers, or clauses for a short row, are joined in random order until the row is as long as it
shall be; one row in fifty is a near copy of the one before. The same corpus, count and seed give the same file.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

ZHIHU_KOL = 1_006_218
LENGTHS = (
    (0.0, 4), (0.25, 61), (0.5, 236), (0.75, 764), (0.95, 2410), (0.99, 5650), (0.999, 12_500), (1.0, 139_406),
)  # fmt: skip
"""Characters at shares of the rows. The quartiles and the largest are the data set's; what lies between gives its
mean of 718. Logarithms are linear in between."""
COPIES = 0.02
SHORT = 236
"""Characters below which a row is made of clauses."""
ANSWERS = 8
"""Answers to one question."""
CHUNK = 20_000

Integers = npt.NDArray[np.int64]


def write_rows(corpus: Path, path: Path, rows: int, seed: int = 7) -> Path:
    """Write `rows` rows to a JSONL file, unless one of that many is there."""
    done = path.with_suffix(".done")
    if done.exists() and done.read_text() == str(rows):
        return path
    print(f"making {rows} rows …", file=sys.stderr, flush=True)
    with open(path, "w", encoding="utf-8") as stream:
        for row in made_rows(corpus, rows, seed):
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    done.write_text(str(rows))
    return path


def made_rows(corpus: Path, rows: int, seed: int) -> Iterator[dict[str, str]]:
    """The rows, one after the other; the first ones of many have the lengths of all."""
    random = np.random.default_rng(seed)
    table = pq.read_table(corpus, columns=["query", "response"])
    answers, questions = table["response"].to_pylist(), table["query"].to_pylist()
    sentences = _Pieces(answers, r"(?<=[。！？!?\n])")
    clauses = _Pieces(answers, r"(?<=[。！？!?\n，；,;])")
    sizes, votes = lengths(rows, random), _votes(rows, random)
    for begin in range(0, rows, CHUNK):
        wanted = sizes[begin : begin + CHUNK]
        short = wanted < SHORT
        texts = np.empty(len(wanted), dtype=object)
        texts[short], texts[~short] = clauses.joined(wanted[short], random), sentences.joined(wanted[~short], random)
        for i in np.flatnonzero(random.random(len(wanted)) < COPIES):
            texts[i] = f"{texts[i - 1]}！"
        asked = random.integers(len(questions), size=1 + len(wanted) // ANSWERS)
        for i, text in enumerate(texts):
            yield _row(begin + i, questions[asked[i // ANSWERS]], text, int(votes[begin + i]))


class _Pieces:
    """The parts that real texts are cut into, to be drawn from at random."""

    def __init__(self, texts: list[str], cut: str) -> None:
        parts = [part for text in texts for part in re.split(cut, text) if len(part) > 1]
        self.parts = np.array(parts, dtype=object)
        self.sizes = np.array([len(part) for part in parts])

    def joined(self, wanted: Integers, random: np.random.Generator) -> list[str]:
        """One text of each wanted length, in characters."""
        needed = int(wanted.sum()) + len(wanted) * int(self.sizes.max())
        drawn = random.integers(len(self.parts), size=int(1.1 * needed / self.sizes.mean()) + 1000)
        ends = np.cumsum(self.sizes[drawn])
        texts, begin = [], 0
        for size in wanted.tolist():
            end = int(np.searchsorted(ends, (ends[begin - 1] if begin else 0) + size)) + 1
            texts.append("".join(self.parts[drawn[begin:end]])[:size])
            begin = end
        return texts


def lengths(rows: int, random: np.random.Generator) -> Integers:
    """Characters of each row: the quantiles of `LENGTHS`, in random order."""
    shares, sizes = np.array(LENGTHS).T
    given = np.exp(np.interp((np.arange(rows) + 0.5) / rows, shares, np.log(sizes))).astype(np.int64)
    given[-1] = int(sizes[-1])
    return random.permutation(given)


def _votes(rows: int, random: np.random.Generator) -> Integers:
    """Votes of which about a tenth are 500 or more."""
    votes: Integers = np.minimum(np.exp(random.normal(2.5, 2.9, rows)) - 1, 250_000).clip(0).astype(np.int64)
    return votes


def _row(number: int, question: str, answer: str, votes: int) -> dict[str, str]:
    told = f"赞同 {votes / 10_000:.1f} 万" if votes >= 10_000 else f"赞同 {votes}" if votes else "赞同"
    metadata = {"question_id": number // ANSWERS, "answer_id": number, "upvotes": told}
    return {
        "INSTRUCTION": question,
        "RESPONSE": answer,
        "SOURCE": "Zhihu",
        "METADATA": json.dumps(metadata, ensure_ascii=False),
    }
