"""Training runs in groups of plain processes that import once: cheaper than a Ray worker group for each."""

import pickle
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipelines.artifacts.reports.rows import SplitReport
from pipelines.artifacts.rows import messages_of
from pipelines.artifacts.shards import Attempt
from pipelines.artifacts.stage import Output
from pipelines.models.tokenizer import load_tokenizer
from pipelines.recipe.schema import Recipe
from pipelines.train import tokenize as tokenizing
from pipelines.train.checkpoint import complete_checkpoints, step_of
from pipelines.train.journal import read_journal
from pipelines.train.loss_mask import encode
from pipelines.train.run import Run
from pipelines.train.tokenize import Tokenized
from tests.outputs import rows_of

STEPS = 6
KEY = b"the key of these runs"


class Laboratory:
    """Runs by name, trained in groups that share one start-up."""

    def __init__(self, root: Path, model: Path, recipe_of: Callable[..., Recipe], split: Output[SplitReport]) -> None:
        self.root = root
        self.model = model
        self.recipe_of = recipe_of
        files = split.report.outputs
        self.held_out_rows = rows_of(split, files.test)
        self.training = self._tokens(split, "train", rows_of(split, files.train))
        self.held_out = self._tokens(split, "test", self.held_out_rows)

    def _tokens(self, split: Output[SplitReport], side: str, rows: list[dict[str, Any]]) -> Tokenized:
        tokenizer, control = load_tokenizer(self.model)
        workspace = split.folder.workspace
        attempt = Attempt(workspace, str(self.root / "tokens"), side, {})
        encoded = [encode(tokenizer, control, messages_of(row)) for row in rows]
        tokenizing._write_shard(workspace, attempt, [[sample] for sample in encoded])
        index = self.root / "tokens" / f"{side}.npy"
        index.write_bytes(tokenizing._npy(tokenizing.np.arange(len(rows))))
        return Tokenized([{**attempt.files, "samples": len(rows)}], str(index), len(rows), {})

    def run(self, name: str, **section: Any) -> Run:
        """A run of six steps that saves and evaluates every two."""
        defaults = {"max_steps": STEPS, "num_train_epochs": 100, "save_steps": 2, "eval_rows": 4, "eval_steps": 2}
        train = self.recipe_of(**{**defaults, **section}).train
        assert train
        folder = self.root / name.replace(", ", "-").replace(" ", "-")
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        return Run(train, 42, STEPS, self.model, folder, self.training, self.held_out, copies_key=KEY)

    def continued(self, source: Run, name: str, after: int, **section: Any) -> Run:
        """A copy of a run as it was after some steps, to be gone on with."""
        run = self.run(name, **section)
        shutil.copytree(source.folder, run.folder, dirs_exist_ok=True)
        for folder in complete_checkpoints(run.checkpoints):
            if step_of(folder) > after:
                shutil.rmtree(folder)
        return run

    def train(self, runs: Sequence[Run]) -> None:
        """Train runs of equal size in one group of processes."""
        (world,) = {run.section.num_workers for run in runs}
        todo = self.root / "todo.pickle"
        todo.write_bytes(pickle.dumps(list(runs)))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        script = str(Path(__file__).with_name("worker.py"))
        ranks = [
            subprocess.Popen([sys.executable, script, str(rank), str(world), str(port), str(todo)])
            for rank in range(world)
        ]
        try:
            assert [rank.wait(timeout=800) for rank in ranks] == [0] * world
        finally:
            for rank in ranks:
                rank.kill()


def losses(run: Run) -> list[float]:
    return [entry[key] for entry in read_journal(run.journal) for key in ("loss", "eval_loss") if key in entry]
