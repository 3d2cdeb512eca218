"""kill -9 at random moments of every stage: running again finishes, with what an uninterrupted run leaves.

    make chaos                                        100 kills, spread evenly over the stages
    CHAOS_KILLS=12 CHAOS_STAGES=clean,train make chaos

Each kill ends the whole process group at a moment drawn from the time that the stage takes; the next attempt goes on
from what it left. A stage that was finished before its kill is begun again.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.model_families import write_qwen2
from tests.pipelines.evaluate.fake_endpoint import chat_server_running

KILLS = int(os.environ.get("CHAOS_KILLS", "100"))
SEED = int(os.environ.get("CHAOS_SEED", "1"))

WRITTEN = """
name: written
synthesize:
  model: base
  endpoints: [{base_url: URL, max_in_flight: 2}]
  dimensions: {person: [妈妈, 爸爸, 老师, 同事, 朋友, 邻居], occasion: [生日, 新年, 乔迁, 毕业, 康复]}
  styles: {严肃: {template: "{person}{occasion}"}, 热情: {template: "给{person}：{occasion}！"}}
  queries: ["祝{person}{occasion}"]
refine: {rules: [empty, quotes], near_duplicates: 0.99}
"""

TRAINED = """
name: tiny
ingest: {source: "recipes://data/tiny.jsonl", limit: 400, shard_bytes: 6000}
analyze: {}
clean: {process: [text_length_filter: {min_len: 20, max_len: 300}, document_simhash_deduplicator: {}]}
export: {path: ROWS}
split: {test_ratio: 0.1}
train:
  model: MODEL
  num_workers: 2
  dtype: float32
  lora: {r: 4}
  max_length: 128
  global_batch_size: 4
  max_steps: 12
  save_steps: 3
  save_total_limit: 2
merge: {}
evaluate: {endpoint: URL, limit: 12, eval_batch_size: 2}
compare: {endpoint: URL, queries: 6, concurrency: 1}
publish: {}
"""

STAGES = {
    "synthesize": "written",
    "refine": "written",
    **dict.fromkeys(
        ("ingest", "analyze", "clean", "export", "split", "train", "merge", "evaluate", "compare", "publish"), "trained"
    ),
}
"""The stages, each with the recipe in which it is killed."""
CHOSEN = os.environ.get("CHAOS_STAGES", ",".join(STAGES)).split(",")


class Runs:
    """Runs of one recipe in one folder, which is their TMPDIR too, by which their processes are found."""

    def __init__(self, folder: Path, text: str) -> None:
        self.folder = folder
        self.temporary = folder / "t"
        self.temporary.mkdir(parents=True)
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(text.replace("ROWS", str(folder / "rows.jsonl")), encoding="utf-8")
        self.said = folder / "said.log"
        self.longest = 0.0

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        command = [str(Path(sys.executable).parent / "danlu"), "run", str(self.recipe), *arguments]
        with self.said.open("wb") as log:
            return subprocess.Popen(
                [*command, "--workspace", str(self.folder / "w")],
                env={**os.environ, "TMPDIR": str(self.temporary)},
                start_new_session=True,
                stdout=log,
                stderr=log,
            )

    def finish(self) -> dict[str, float]:
        """Run to the end; seconds by stage."""
        code = self.start().wait(timeout=1800)
        said = self.said.read_text(encoding="utf-8")
        assert code == 0, said[-4000:]
        self.nothing_lives()
        assert self.left_behind() == []
        return {name: float(seconds) for name, seconds in re.findall(r"^(\w+): done in ([\d.]+) s", said, re.M)}

    def kill(self, stage: str, after: float) -> bool:
        """Run to the end of a stage, and kill it so many seconds after it began; whether it was at work then."""
        done = [*self.folder.glob(f"w/{stage}/*/manifest.json")]
        process = self.start(*(["--from", stage] if done else []), "--to", stage)
        deadline = time.monotonic() + 900
        try:
            while f"\n{stage} …" not in "\n" + self.said.read_text(encoding="utf-8", errors="replace"):
                assert process.poll() is None, self.said.read_text(encoding="utf-8")[-4000:]
                assert time.monotonic() < deadline, self.said.read_text(encoding="utf-8")[-4000:]
                time.sleep(0.01)
            time.sleep(after)
        finally:
            was_at_work = process.poll() is None
            if was_at_work:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.nothing_lives()
        return was_at_work

    def nothing_lives(self) -> None:
        """No process of the run is left, and with them no port and no socket that is listened on."""
        start = time.monotonic()  # those that were about to start look for their parent only once they have
        while (alive := [*self._alive()]) and time.monotonic() < start + 300:
            time.sleep(0.2)
        assert alive == []
        self.longest = max(self.longest, time.monotonic() - start)

    def _alive(self) -> Iterator[str]:
        for process in psutil.process_iter():
            try:
                if process.environ().get("TMPDIR") == str(self.temporary) and process.status() != psutil.STATUS_ZOMBIE:
                    yield " ".join(process.cmdline())[:200]
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue

    def digests(self) -> dict[str, Any]:
        """The digest of what each stage left, and the bytes of what was exported."""
        found = {}
        for path in sorted(self.folder.glob("w/*/*/manifest.json")):
            found[path.parts[-3]] = json.loads(path.read_text(encoding="utf-8"))["report"]["digest"]
        rows = self.folder / "rows.jsonl"
        return {**found, "rows": rows.read_bytes() if rows.exists() else None}

    def left_behind(self) -> list[str]:
        """Scratch files and folders that nobody needs any more."""
        names = [str(path) for path in self.temporary.iterdir()]
        patterns = ("w/models/.converting-*", "w/adapters/.publishing-*", ".rows.jsonl.*")
        return names + [str(path) for pattern in patterns for path in self.folder.glob(pattern)]


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="dc-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.chaos
@pytest.mark.timeout(6 * 3600)
def test_kills_at_random_moments_change_nothing(short_tmp: Path) -> None:
    draw = random.Random(SEED)
    with chat_server_running() as server:
        model = write_qwen2(short_tmp / "model")
        texts = {"written": WRITTEN, "trained": TRAINED}
        texts = {name: text.replace("URL", server.url).replace("MODEL", str(model)) for name, text in texts.items()}
        names = {STAGES[stage] for stage in CHOSEN}
        straight = {name: Runs(short_tmp / f"{name[0]}s", texts[name]) for name in names}
        seconds = {name: runs.finish() for name, runs in straight.items()}
        killed = {name: Runs(short_tmp / f"{name[0]}k", texts[name]) for name in names}
        counts: Counter[str] = Counter()
        for number in range(KILLS):
            stage = CHOSEN[number % len(CHOSEN)] if len(CHOSEN) > KILLS else CHOSEN[number * len(CHOSEN) // KILLS]
            runs, takes = killed[STAGES[stage]], seconds[STAGES[stage]][stage]
            for _ in range(20):
                if runs.kill(stage, draw.uniform(0, takes)):
                    counts[stage] += 1
                    print(f"kill {number + 1} of {KILLS}: {stage}", flush=True)
                    break
                takes *= 0.5  # it was faster this time
        for name, runs in killed.items():
            runs.finish()
            assert runs.digests() == straight[name].digests()
    longest = max(runs.longest for runs in killed.values())
    print(f"{sum(counts.values())} kills: {dict(counts)}; the last process was gone after {longest:.0f} s at most")
    assert sum(counts.values()) == KILLS
