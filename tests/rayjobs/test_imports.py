"""Cleaning alone needs no torch, vLLM, evalscope or client of an API: they are extras."""

import subprocess
import sys

BLOCKED = (
    "torch transformers peft deepspeed accelerate vllm openai evalscope modelscope streamlit aiohttp gguf json_repair "
    "jsonschema uvicorn starlette prometheus_client"
)

PROGRAM = f"""
import sys
for name in {BLOCKED.split()!r}:
    sys.modules[name] = None  # importing it now raises ImportError
import rayjobs.cli
from rayjobs import pipeline
recipe = pipeline.load("tiny")
print(recipe.name, *(stage.name for stage in pipeline.stages_of(recipe)))
"""


def test_the_command_line_and_every_stage_import_no_extra() -> None:
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert result.stdout.startswith("tiny ingest "), result.stderr[-2000:]
