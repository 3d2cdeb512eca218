"""Refine at scale: seconds and memory for a million answers, a third of which repeat another one.

    python -m benchmarks.refine [--answers 1000000]

The answers are made of phrases, 60 to 140 characters long; every third is an earlier one with other marks and another
character. `danlu ingest` reads them, then `danlu refine` is measured, Ray included. The last line is one JSON object.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml

from benchmarks.measure import measure
from pipelines.report.page import environment

PROJECT = Path(__file__).parents[1]
LIMIT_GIB = 4.0
CHARACTERS = (
    "春江潮水连海平月共生滟随波千万里何处无明流宛转绕芳甸照花林皆似霰空飞霜不觉汀上白沙看见人初今古代穷已年望相只待长送"
)


def answers(count: int) -> Iterator[str]:
    """Answers that share hardly a character pair, but for those that repeat an earlier one."""
    draw = random.Random(1)
    recent: list[str] = []
    for number in range(count):
        if number % 3 == 2:
            earlier = draw.choice(recent).replace("，", " ") + "～"
            at = draw.randrange(len(earlier))
            yield f"{earlier[:at]}{draw.choice(CHARACTERS)}{earlier[at + 1 :]}"
            continue
        phrases = ("".join(draw.choices(CHARACTERS, k=draw.randint(5, 9))) for _ in range(draw.randint(9, 15)))
        text = f"{'，'.join(phrases)}。"
        recent = [*recent[-200:], text]
        yield text


def main() -> int:
    """Make the answers, refine them, and print one line for people and one for programs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=1_000_000)
    count = parser.parse_args().answers
    with tempfile.TemporaryDirectory(prefix="danlu-bench-") as folder:
        source = Path(folder) / "answers.jsonl"
        with source.open("w", encoding="utf-8") as file:
            for text in answers(count):
                file.write(json.dumps({"query": "祝姐姐", "response": text}, ensure_ascii=False) + "\n")
        refine = {"dimensions": {"name": ["姐姐"]}, "styles": {"正常": {}}, "near_duplicates": 0.8}
        tree = {"name": "bench", "ingest": {"source": str(source)}, "refine": refine}
        path = Path(folder) / "bench.yaml"
        path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
        danlu = [str(Path(sys.executable).parent / "danlu")]
        runs = []
        for stage in ("ingest", "refine"):
            runs.append(measure([*danlu, "run", str(path), "--to", stage, "--workspace", f"{folder}/w"], cwd=PROJECT))
            if runs[-1].returncode:
                raise SystemExit(runs[-1].output)
        (report,) = Path(folder).glob("w/refine/*/manifest.json")
        operators = json.loads(report.read_text(encoding="utf-8"))["report"]["operators"]
    dropped = {one["operator"]: one["rows_in"] - one["rows_out"] for one in operators}
    done = runs[-1]
    summary = {
        "name": "refine",
        "answers": count,
        "seconds": round(done.seconds, 1),
        "cpu_seconds": round(done.cpu_seconds, 1),
        "peak_gib": round(done.peak_bytes / 2**30, 2),
        "limit_gib": LIMIT_GIB,
        "near_duplicates": dropped["near_duplicate"],
        "planted": count // 3,
        "environment": environment().model_dump(),
    }
    print(f"{count} answers refined in {done.seconds:.0f} s, peak {summary['peak_gib']} of {LIMIT_GIB} GiB")
    print(json.dumps(summary, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
