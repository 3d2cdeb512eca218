"""The trial run and the command's options, as a person uses them."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pipelines.errors import InputError
from pipelines.synthesize.trial import try_cells
from tests.pipelines.synthesize.serving import Server, place, recipe, run


@pytest.mark.usefixtures("ray_cluster")
def test_a_trial_projects_and_its_answers_count(tmp_path: Path, start_server: Callable[..., Server]) -> None:
    server = start_server(0.1)
    price = {"input": "0", "output": "1000000"}
    what = recipe(server.url, cells=30, price=price, endpoint={"requests_per_minute": 600, "max_in_flight": 8})
    workspace = place(tmp_path).workspace
    assert what.synthesize
    *answers, tried, left, money = try_cells(what.synthesize, what.serve, what.seed, workspace, 10)
    assert len(answers) == 5
    assert answers[0].startswith("人0/正常#0: 愿你平安喜乐")
    length = len(answers[0].split(": ")[1])
    assert tried.startswith("10 cells tried, 0 failed; 0.")
    assert f"{length} output tokens each" in tried
    assert left.startswith("50 are left: about ")
    assert f"{50 * length} output tokens, 5 s" in left  # at 600 a minute
    assert money == f"spent {10 * length:.4f} CNY, about {50 * length:.4f} more, {60 * length:.4f} CNY in all"
    assert len(server.outcomes()) == 10
    run(what, place(tmp_path))
    assert len(server.outcomes()) == 60
    with pytest.raises(InputError, match="every cell has its answer"):
        try_cells(what.synthesize, what.serve, what.seed, workspace, 10)


@pytest.mark.slow
def test_the_options_of_the_command(tmp_path: Path, start_server: Callable[..., Server]) -> None:
    broken, sound = start_server(**{"500": 1.0}), start_server()
    what = recipe(sound.url, cells=5, max_attempts=1)
    tree = what.model_dump(mode="json", exclude_defaults=True)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")

    def danlu(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).parent / "danlu"), "synthesize", "mine.yaml", *arguments]
        return subprocess.run(command, cwd=tmp_path, env={**os.environ}, capture_output=True, text=True, timeout=120)

    tried = danlu("--dry-run", "4", f"synthesize.endpoints=[{{base_url: '{broken.url}'}}]")
    assert tried.returncode == 0, tried.stderr
    assert "4 cells tried, 4 failed" in tried.stdout
    assert not sound.outcomes()
    again = danlu("--retry-failed")
    assert again.returncode == 0, again.stderr
    assert "4 failed requests are asked again" in again.stderr
    assert "10 conversations" in again.stderr
    assert len(sound.outcomes()) == 10
    proposed = danlu("--suggest-map")
    assert (proposed.returncode, proposed.stdout) == (0, "compatibility: []\n"), proposed.stderr
    assert "no usable answer about 人0 (malformed), 人1 (malformed)" in proposed.stderr  # the server knows wishes only
    other = danlu("synthesize.generation.temperature=3")
    assert other.returncode == 2
    assert "synthesize.generation.temperature" in other.stderr
