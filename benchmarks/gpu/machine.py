"""What is there, and the tests that need it."""

import importlib.util
import os
import subprocess
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.gpu.setting import Figures, Setting, need

PACKAGES = ("ray", "deepspeed", "transformers", "peft", "bitsandbytes", "liger_kernel", "trl", "vllm", "evalscope")
"""What parts need, by the name under which Python imports it."""


def has_cuda() -> bool:
    """Whether PyTorch sees a CUDA device."""
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def describe(setting: Setting) -> Figures:
    """Card, memory, driver, CUDA, versions; which packages are missing."""
    import torch

    found: Figures = {"torch": torch.__version__, "cuda": torch.version.cuda or "none"}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"card": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
        found |= {"capability": f"{properties.major}.{properties.minor}", "driver": _driver()}
    for name in PACKAGES:
        if importlib.util.find_spec(name):
            found[name] = _version(name)
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    return found | ({"not installed": ", ".join(absent)} if absent else {})


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(name: str) -> str:
    for distribution in (name, name.replace("_", "-"), f"{name}-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "unknown"


class Outcomes:
    """A plugin of pytest that counts how tests end."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called for each of a test's phases: what is skipped never comes to the second."""
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1


def gpu_tests(setting: Setting) -> Figures:
    """The tests marked gpu; in a dry run those of packed attention, which a CPU can run too."""
    need("pytest")
    import pytest  # needed by this part alone

    root = Path(__file__).parents[2]
    chosen = ["tests/pipelines/train/test_attention.py"] if setting.dry else ["-m", "gpu", "tests"]
    outcomes = Outcomes()
    os.chdir(root)
    code = pytest.main(["-q", "--no-header", *chosen], plugins=[outcomes])
    if code:
        raise RuntimeError(f"pytest: {dict(outcomes.counts)}, exit code {int(code)}")
    return {"passed": outcomes.counts["passed"], "skipped": outcomes.counts["skipped"]}
