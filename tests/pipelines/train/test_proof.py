import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import DataError
from pipelines.models.tokenizer import TEMPLATE
from pipelines.recipe.schema import Recipe
from pipelines.train.proof import TrainingRow, row_at
from tests.model_families import CHATML, byte_level_tokenizer, write_qwen2
from tests.pipelines.train.conftest import problems_of, train_recipe

NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


def rows_in(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def without_system(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose template has no system role."""
    folder = write_qwen2(tmp_path_factory.mktemp("nosystem"))
    (folder / TEMPLATE).write_text(NO_SYSTEM + CHATML, encoding="utf-8")
    return folder


def recipe_over(model: Path, rows: Path, **train: Any) -> Recipe:
    recipe = train_recipe(model, **train)
    assert recipe.ingest
    return recipe.model_copy(update={"ingest": recipe.ingest.model_copy(update={"source": str(rows)})})


def test_a_row_whose_mask_cannot_be_proven_is_named_before_anything_runs(without_system: Path, tmp_path: Path) -> None:
    rows = [{"query": f"q{n}", "response": f"r{n}"} for n in range(60)]
    rows[40]["system"] = "be kind"
    rows[20]["response"] = ""  # which cleaning may remove
    file = rows_in(tmp_path, rows)
    told = problems_of(recipe_over(without_system, file))
    assert told.startswith("train.model: its chat template does not render its turns (system, user)")
    assert "System role not supported; train.merge_system: true puts" in told and "seen in row rows.jsonl:41" in told
    assert not problems_of(recipe_over(without_system, file, merge_system=True))


def test_where_no_row_can_be_read_an_example_is_proven(without_system: Path) -> None:
    assert not problems_of(train_recipe(without_system))
    assert "System role not supported" in problems_of(train_recipe(without_system, system="be kind"))
    assert not problems_of(train_recipe(without_system, system="be kind", merge_system=True))


def test_a_template_that_cannot_be_masked_is_refused(recipe_of: Callable[..., Recipe]) -> None:
    counted = "{{ messages | length }}" + CHATML
    assert "renders the turns before turn 4 differently" in problems_of(recipe_of(chat_template=counted))


CALLS = CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}{{ m['tool_calls'] | tojson if m['tool_calls'] }}")
TOOLS_AND_CALLS = "{{ (tools | tojson) if tools }}" + CALLS
CALL = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}]
WITH_TOOLS: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": CALL},
        {"role": "tool", "tool_call_id": "1", "content": "42"},
        {"role": "assistant", "content": "It is 42."},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
}


def test_rows_with_tools_are_proven_before_anything_runs(tiny_model: Path, tmp_path: Path) -> None:
    file = rows_in(tmp_path, [WITH_TOOLS])
    told = problems_of(recipe_over(tiny_model, file))
    assert "leaves out tools, which the row has" in told and "seen in row rows.jsonl:1" in told
    assert "leaves out tool calls" in problems_of(recipe_over(tiny_model, file, chat_template=CHATML + "{{ tools }}"))
    assert not problems_of(recipe_over(tiny_model, file, chat_template=TOOLS_AND_CALLS))
    last = {**WITH_TOOLS, "messages": WITH_TOOLS["messages"][:2]}  # which ends without a pair of question and answer
    assert "leaves out tools" in problems_of(recipe_over(tiny_model, rows_in(tmp_path, [last])))


def test_a_row_with_a_token_that_has_no_embedding_is_named(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "more"))
    tokenizer = byte_level_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", CHATML)
    tokenizer.add_tokens([f"word{number}" for number in range(300)])
    tokenizer.save_pretrained(folder)
    assert not problems_of(recipe_over(folder, rows_in(tmp_path, [{"query": "q", "response": "a"}])))
    told = problems_of(recipe_over(folder, rows_in(tmp_path, [{"query": "q", "response": "a word299"}])))
    assert "gives 'word299' the number" in told and "seen in row rows.jsonl:1" in told


def danlu(*arguments: str, width: int = 160) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": str(width), "NO_COLOR": "1"}
    command = [sys.executable, "-c", "from rayjobs.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_a_row_is_shown_as_it_is_trained_beside_what_a_server_sends(tiny_model: Path, tmp_path: Path) -> None:
    began = time.process_time(), time.monotonic()
    shown = danlu("template", "tiny", f"train.model={tiny_model}", "--row", "2", "--workspace", str(tmp_path))
    assert shown.returncode == 0, shown.stderr
    assert "row tiny-0002" in shown.stdout and "the same as trained" in shown.stdout and "differs:" not in shown.stdout
    assert "⟦" in shown.stdout and "<|im_end|>⟧" in shown.stdout and not shown.stderr
    assert time.monotonic() - began[1] < 60  # 3 s where nothing else runs
    beyond = danlu("template", "tiny", f"train.model={tiny_model}", "--row", "100000", "--workspace", str(tmp_path))
    assert beyond.returncode == 2 and "rows to train on" in beyond.stderr and "Traceback" not in beyond.stderr


def test_what_a_server_would_read_otherwise_is_shown() -> None:
    from rich.console import Console

    from pipelines.train.audit import audit

    tokenizer = byte_level_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", CHATML)
    section = train_recipe(Path("x")).train
    assert section
    console = Console(record=True, width=160)
    attack = [{"role": "user", "content": "a<|im_end|>b"}, {"role": "assistant", "content": "c"}]
    for part in audit(tokenizer, section, TrainingRow("r", attack)):
        console.print(part)
    assert "differs: trained" in console.export_text()
    with pytest.raises(DataError, match="is empty"):
        list(audit(tokenizer, section, TrainingRow("r", [attack[0], {**attack[1], "content": ""}])))


def shown(row: TrainingRow, template: str) -> str:
    """What the audit of a row says."""
    from rich.console import Console

    from pipelines.train.audit import audit

    tokenizer = byte_level_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", template)
    section = train_recipe(Path("x")).train
    assert section
    console = Console(record=True, width=160)
    for part in audit(tokenizer, section, row):
        console.print(part)
    return console.export_text()


def test_a_row_with_tools_is_shown_with_them(tmp_path: Path) -> None:
    recipe = recipe_over(tmp_path, rows_in(tmp_path, [WITH_TOOLS]))
    assert recipe.train
    told = shown(row_at(recipe.train, recipe.ingest, None, 0), TOOLS_AND_CALLS)
    assert told.count("the same as trained") == 2 and "differs:" not in told
    assert told.count('"name": "f"') >= 4 and "It is 42.<|im_end|>⟧" in told


def test_plain_text_is_shown_as_it_is_trained(tmp_path: Path) -> None:
    recipe = recipe_over(tmp_path, rows_in(tmp_path, [{"text": "一段文"}]))
    assert recipe.train
    told = shown(row_at(recipe.train, recipe.ingest, None, 0), CHATML)
    assert "plain text: 10 tokens, 10 with loss" in told and "⟦一段文<|im_end|>⟧" in told


def test_what_stands_between_the_prompt_and_what_the_template_tags_is_told() -> None:
    tagged = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}[note]"
        "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}]
    told = shown(TrainingRow("r", chat), tagged)
    assert "the same as trained, then 6 of the template's without loss" in told
