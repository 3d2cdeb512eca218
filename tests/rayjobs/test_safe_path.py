"""What is run does not depend on the folder a person stands in, even where it holds packages with our names."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.kill_with_parent import child_environment
from tests.foreign_packages import OURS, PACKAGES, PROJECT, foreign_folder, run_task
from tests.test_chain import SLICE


def test_ray_s_workers_import_our_packages(tmp_path: Path) -> None:
    assert run_task(foreign_folder(tmp_path)) == f"{OURS} False"


def test_an_engine_s_server_imports_our_packages(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    command = [sys.executable, "-P", "-m", "serve.engine.server", "--help"]  # it ends after its imports
    folder = foreign_folder(tmp_path)
    result = subprocess.run(command, cwd=folder, env=child_environment(), capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "vLLM's own arguments" in result.stdout


def test_every_python_that_we_start_is_told_to_leave_the_current_folder_out() -> None:
    sources = [path.read_text(encoding="utf-8") for package in PACKAGES for path in (PROJECT / package).rglob("*.py")]
    commands = [found for text in sources for found in re.findall(r"sys\.executable\b(?!\))(.{6})", text)]
    assert len(commands) >= 3
    assert set(commands) == {', "-P"'}


@pytest.mark.slow
def test_the_whole_chain_runs_beside_foreign_packages(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    danlu = str(Path(sys.executable).parent / "danlu")
    result = subprocess.run(
        [danlu, "run", "tiny", "--workspace", str(tmp_path / "w"), *SLICE],
        cwd=foreign_folder(tmp_path),
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert "base against tiny" in result.stdout
