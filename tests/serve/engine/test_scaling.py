"""Autoscaling by the requests at the engines, on a real endpoint."""

import re
import threading
import time
from pathlib import Path

import pytest
import requests

pytest.importorskip("vllm")

from pipelines.models.served import ServedModel
from pipelines.recipe.serve import Autoscaling, Engine, Serve
from serve.app import endpoint

pytestmark = pytest.mark.slow

SECTION = Serve(
    engine=Engine(max_model_len=512, kv_cache_memory_bytes=64 << 20),
    autoscaling=Autoscaling(max_replicas=2, target_ongoing_requests=2, upscale_delay_s=1, downscale_delay_s=5),
)


def engines(url: str) -> float:
    text = requests.get(url.replace("/v1", "/metrics"), timeout=10).text
    found = re.search(r'^danlu_engines\{model="base"\} ([0-9.]+)$', text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def wait_for(url: str, count: int) -> None:
    until = time.monotonic() + 180
    while engines(url) != count:
        assert time.monotonic() < until, f"{engines(url)} engines, not {count}"
        time.sleep(0.5)


def test_an_engine_is_added_under_load_and_taken_away_after_it(
    ray_cluster: None, tiny_model: Path, tmp_path: Path
) -> None:
    stop, statuses = threading.Event(), []

    def ask(url: str) -> None:
        body = {"model": "base", "prompt": "hi", "max_tokens": 100, "ignore_eos": True}
        while not stop.is_set():
            statuses.append(requests.post(f"{url}/completions", json=body, timeout=120).status_code)

    with endpoint([ServedModel("base", str(tiny_model))], SECTION, log_dir=tmp_path) as url:
        assert engines(url) == 1
        threads = [threading.Thread(target=ask, args=(url,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        try:
            wait_for(url, 2)
            time.sleep(2)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        wait_for(url, 1)
    assert set(statuses) == {200}
