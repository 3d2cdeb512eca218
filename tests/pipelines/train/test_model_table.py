"""What is proven of each family with a small model of random weights; a table of docs/train.md is what is found here.

python -m tests.pipelines.train.test_model_table      prints the table, in several minutes
"""

import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from pipelines.artifacts.workspace import Workspace
from pipelines.recipe.train import Merge
from pipelines.train.attention import NAME, register
from pipelines.train.journal import read_journal
from pipelines.train.merge import write_merged
from pipelines.train.run import Run
from tests.pipelines.train.conftest import chats, finished_split, problems_of, train_recipe
from tests.pipelines.train.laboratory import Laboratory
from tests.small_families import FAMILIES, write_small

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[3] / "docs" / "train.md"
COLUMNS = ("family", "`model_type`", "trained", "packed", "merged", "served")
HEAD = f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}\n"
REQUIRED = ("Llama 3", "Qwen3", "Qwen3 MoE", "Qwen3.5", "GLM-4", "GLM-4.5, GLM-4.7", "gpt-oss", "Gemma 3", "Mistral")
REQUIRED += ("Phi-4", "InternLM3", "DeepSeek-V3")
"""Families that have to train."""
STEPS = 2
LENGTHS = (11, 1, 23)
PROMPT, ANSWER = list(range(5, 25)), 8
"""What vLLM is given, and how many tokens it answers."""
SAID = 144
"""Characters of vLLM's errors that the table has."""


def refusal(folder: Path, **section: Any) -> str:
    """What `danlu check` says against training a model; empty where it may train."""
    told = problems_of(train_recipe(folder, num_workers=1, per_device_train_batch_size=1, **section))
    return re.sub(r"^train\.\w+: ", "", told.replace(f"{folder}: ", ""), flags=re.MULTILINE).replace("\n", "; ")


def write_models(root: Path) -> dict[str, Path]:
    return {family: write_small(root / FAMILIES[family][0], family) for family in FAMILIES}


def train_all(root: Path, models: dict[str, Path]) -> dict[str, Run]:
    """The families that are not refused, trained with LoRA by what a training worker runs; packed where that goes."""
    rows = chats(16)
    split = finished_split(Workspace(str(root)), rows[:12], rows[12:])
    runs: dict[str, Run] = {}
    for family, folder in models.items():
        if not refusal(folder, packing=False):
            laboratory = Laboratory(root / "runs" / folder.name, folder, partial(train_recipe, folder), split)
            packing = not refusal(folder, packing=True)
            run = laboratory.run("lora", num_workers=1, max_steps=STEPS, warmup_ratio=0, packing=packing)
            runs[family] = replace(run, steps=STEPS)
    laboratory.train(list(runs.values()))
    return runs


def trained_cell(folder: Path, run: Run | None) -> str:
    if run is None:
        told = refusal(folder, packing=False)
        return f"refused: {re.sub(r'; [A-Za-z]+Error: .*?[)];', ');', told)}"  # without transformers' own words
    entries = read_journal(run.journal)
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    held_out = [entry["eval_loss"] for entry in entries if "eval_loss" in entry]
    assert len(losses) == STEPS and all(map(math.isfinite, [*losses, *held_out])), (losses, held_out)
    assert held_out[-1] < held_out[0] - 0.1, held_out
    return "yes"


def packed_cell(folder: Path) -> str:
    """Whether samples that share a row have the logits that each has alone; without bounds they have others."""
    import torch
    from transformers import AutoModelForCausalLM

    if refusal(folder, packing=True):
        return "one sample a row"
    register()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    torch.manual_seed(0)
    ids = torch.randint(3, 300, (1, sum(LENGTHS)))
    places = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    bounds = torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32)
    told = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 23, "max_length_k": 23}
    with torch.no_grad():
        parts = ids.split(LENGTHS, dim=1)
        alone = torch.cat([model(input_ids=part, use_cache=False).logits for part in parts], dim=1)
        joined = model(input_ids=ids, use_cache=False).logits
        model.set_attn_implementation(NAME)
        packed = model(input_ids=ids, position_ids=places, **told, use_cache=False).logits
    scale = float(alone.abs().max())
    assert float((packed - alone).abs().max()) / scale < 1e-5 < 1e-3 < float((joined - alone).abs().max()) / scale
    return "yes"


def merged_cell(run: Run) -> str:
    """Merges, in float32, into a folder beside the run."""
    written = write_merged(run.model, run.trained, merged_folder(run), Merge(dtype="float32"))
    assert written.merge_difference < 1e-4 * max(1, written.largest_logit) and written.reload_difference == 0, written
    return "yes"


def merged_folder(run: Run) -> Path:
    return run.folder / "model"


def served_cells(root: Path, folders: Iterable[Path]) -> list[str]:
    """Whether vLLM answers with merged models as transformers does, on a CPU; else the errors with which none loads."""
    given = list(folders)
    result, script = root / "answers.json", str(Path(__file__).with_name("vllm_answers.py"))
    subprocess.run([sys.executable, script, str(result), json.dumps(PROMPT), str(ANSWER), *map(str, given)], check=True)
    cells = []
    for folder, (dtype, told) in zip(given, json.loads(result.read_text()), strict=True):
        if dtype is None:
            text = told.replace(str(folder), "MODEL").translate(str.maketrans("|`", "/'"))
            cells.append(f"no: {text}"[:SAID])
        elif dtype == "float32":
            cells.append("yes" if told == greedy(folder) else "other tokens")
        else:
            cells.append(dtype)
    return cells


def greedy(folder: Path) -> list[int]:
    """What transformers answers, each token from the whole text before it."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = list(PROMPT)
    with torch.no_grad():
        for _ in range(ANSWER):
            tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(PROMPT) :]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("table")


@pytest.fixture(scope="module")
def models(root: Path) -> dict[str, Path]:
    return write_models(root / "models")


@pytest.fixture(scope="module")
def runs(root: Path, models: dict[str, Path]) -> dict[str, Run]:
    return train_all(root, models)


@pytest.fixture(scope="module")
def table() -> dict[str, dict[str, str]]:
    """What the page says: cells by family and column."""
    page = PAGE.read_text(encoding="utf-8")
    assert HEAD in page
    lines = page.split(HEAD)[1].split("\n\n")[0].splitlines()
    rows = [dict(zip(COLUMNS, line[2:-2].split(" | "), strict=True)) for line in lines]
    return {row["family"]: row for row in rows}


def test_the_page_has_the_families_that_are_tried(table: dict[str, dict[str, str]]) -> None:
    assert {family: row["`model_type`"].strip("`") for family, row in table.items()} == {
        family: kind for family, (kind, _) in FAMILIES.items()
    }
    assert all(table[family]["trained"] == "yes" for family in REQUIRED)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_learns_or_is_refused_as_the_page_says(
    family: str, models: dict[str, Path], runs: dict[str, Run], table: dict[str, dict[str, str]]
) -> None:
    assert trained_cell(models[family], runs.get(family)) == table[family]["trained"]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_samples_are_kept_apart_and_what_is_merged_is_what_was_trained(
    family: str, models: dict[str, Path], runs: dict[str, Run], table: dict[str, dict[str, str]]
) -> None:
    found = [packed_cell(models[family]), merged_cell(runs[family])] if family in runs else ["", ""]
    assert found == [table[family]["packed"], table[family]["merged"]]


def test_vllm_serves_what_was_merged_as_the_page_says(
    root: Path, runs: dict[str, Run], table: dict[str, dict[str, str]]
) -> None:
    pytest.importorskip("vllm")
    for run in runs.values():
        if not merged_folder(run).exists():
            merged_cell(run)
    found = dict(zip(runs, served_cells(root, map(merged_folder, runs.values())), strict=True))
    assert found == {family: table[family]["served"] for family in runs}


def print_table(root: Path) -> None:
    models = write_models(root / "models")
    runs = train_all(root, models)
    cells = {family: [trained_cell(models[family], runs.get(family)), "", "", ""] for family in FAMILIES}
    for family, run in runs.items():
        cells[family][1:3] = [packed_cell(models[family]), merged_cell(run)]
    if find_spec("vllm"):
        for family, cell in zip(runs, served_cells(root, map(merged_folder, runs.values())), strict=True):
            cells[family][3] = cell
    print(HEAD, end="")
    for family, found in cells.items():
        print(f"| {family} | `{FAMILIES[family][0]}` | {' | '.join(found)} |")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print_table(Path(folder))
