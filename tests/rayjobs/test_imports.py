"""Cleaning alone needs no torch, vLLM, evalscope or client of an API: they are extras."""

import subprocess
import sys

BLOCKED = "torch transformers peft deepspeed accelerate vllm openai evalscope modelscope streamlit aiohttp gguf"

PROGRAM = f"""
import importlib, sys
for name in {BLOCKED.split()!r}:
    sys.modules[name] = None  # importing it now raises ImportError
import rayjobs.cli
from pipelines.recipe.load import load_recipe
recipe = load_recipe("tiny")
for module in ("ingest.stage", "clean.stage", "split", "why", "report"):
    importlib.import_module("pipelines." + module)
print(recipe.name)
"""


def test_cleaning_imports_no_extra() -> None:
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert result.stdout == "tiny\n", result.stderr[-2000:]
