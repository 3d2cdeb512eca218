"""`danlu serve` from its start to SIGTERM."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import requests

pytest.importorskip("vllm")

from serve.adapter_registry import publish
from serve.app import claim_port

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).parents[2]

# `danlu serve` with models that need no training: everything after it is the command's own.
DRIVER = """
import sys
from rayjobs import cli, deploy
from pipelines.models.served import ServedModel
model, registry = sys.argv[1:3]
deploy.finished_models = lambda *_: [ServedModel("base", model, registry=registry)]
sys.argv = ["danlu", "serve", "tiny", *sys.argv[3:], "serve.engine.kv_cache_memory_bytes=67108864",
            "serve.engine.max_lora_rank=8", "serve.limits.max_tokens=16"]
cli.main()
"""


DEAD_PROXY = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY")}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_while_its_engines_start(tiny_model: Path, tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-c", DRIVER, str(tiny_model), str(tmp_path), "--workspace", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as served:
        assert served.stderr is not None
        next(line for line in served.stderr if "starting 1 engine(s)" in line)
        time.sleep(1)
        family = psutil.Process(served.pid).children(recursive=True)
        began = time.monotonic()
        served.send_signal(number)
        said = served.stderr.read()
        assert served.wait(60) != 0
        assert time.monotonic() - began < 30
        assert "Traceback" not in said
    _, alive = psutil.wait_procs(family, timeout=20)
    assert [" ".join(process.cmdline())[:80] for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def test_danlu_serve_answers_takes_new_adapters_and_leaves_nothing(
    tiny_model: Path, marker_adapters: dict[str, Path], tmp_path: Path
) -> None:
    registry, port = tmp_path / "adapters", claim_port("127.0.0.1", None)
    publish(marker_adapters["red"], registry, "tiny", base=tiny_model)
    command = [sys.executable, "-c", DRIVER, str(tiny_model), str(registry), "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    with subprocess.Popen(
        [*command, "--workspace", str(tmp_path)], env={**environment, **DEAD_PROXY}, stderr=subprocess.PIPE, text=True
    ) as served:
        assert served.stderr is not None
        line = next(line for line in served.stderr if "Ctrl-C stops" in line)
        assert f"http://127.0.0.1:{port}/v1: base, tiny" in line
        assert ask(port, "tiny") == "R" * 8
        publish(marker_adapters["blue"], registry, "tiny", base=tiny_model)
        until = time.monotonic() + 60
        while ask(port, "tiny") != "B" * 8:
            assert time.monotonic() < until
        assert (
            requests.post(
                f"http://127.0.0.1:{port}/v1/completions",
                json={"model": "base", "prompt": "x", "max_tokens": 17},
                timeout=60,
            ).status_code
            == 400
        )  # the recipe's limit
        family = psutil.Process(served.pid).children(recursive=True)
        served.send_signal(signal.SIGTERM)
        served.stderr.read()
        assert served.wait(90) == 0
    _, alive = psutil.wait_procs(family, timeout=20)
    assert [" ".join(process.cmdline())[:80] for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def ask(port: int, model: str) -> str:
    body = {"model": model, "prompt": "x", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    answer = requests.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60)
    return str(answer.json()["choices"][0]["text"])
