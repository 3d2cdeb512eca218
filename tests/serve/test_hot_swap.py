"""New versions of an adapter while 200 requests are in flight: no request fails, none mixes two versions."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

pytest.importorskip("vllm")

from serve.adapters import publish
from serve.app import ServedModel, endpoint
from serve.section import Engine, Serve

pytestmark = pytest.mark.slow

CLIENTS = 200
SECONDS = 60
MARKERS = {"swap@1": "R", "swap@2": "B", "swap@3": "R", "swap@4": "B"}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, marker_adapters: dict[str, Path]) -> Path:
    folder = tmp_path_factory.mktemp("registry")
    publish(marker_adapters["red"], folder, "swap", base=tiny_model)
    return folder


@pytest.fixture(scope="module")
def url(ray_cluster: None, tiny_model: Path, registry: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    engine = Engine(max_model_len=256, max_num_seqs=64, kv_cache_memory_bytes=64 << 20, max_lora_rank=8)
    models = [ServedModel("base", str(tiny_model), registry=str(registry))]
    with endpoint(models, Serve(engine=engine), log_dir=tmp_path_factory.mktemp("logs")) as url:
        yield url


def test_versions_published_under_load_lose_no_request(
    url: str, registry: Path, tiny_model: Path, marker_adapters: dict[str, Path]
) -> None:
    answers: list[tuple[int, str, str]] = []
    stop = threading.Event()

    def ask(number: int) -> None:
        body = {"model": "swap", "prompt": f"ask {number}", "max_tokens": 40, "temperature": 0, "ignore_eos": True}
        while not stop.is_set():
            answer = requests.post(f"{url}/completions", json=body, timeout=120)
            content = answer.json()
            text = content["choices"][0]["text"] if answer.status_code == 200 else str(content)
            answers.append((answer.status_code, content.get("model", ""), text))

    with ThreadPoolExecutor(CLIENTS) as pool:
        running = [pool.submit(ask, number) for number in range(CLIENTS)]
        for adapter in ("blue", "red", "blue"):
            time.sleep(SECONDS / 4)
            publish(marker_adapters[adapter], registry, "swap", base=tiny_model)
        time.sleep(SECONDS / 4)
        stop.set()
    assert [future.exception() for future in running] == [None] * CLIENTS
    assert Counter(status for status, _, _ in answers) == {200: len(answers)}
    for _, version, text in answers:
        assert text == MARKERS[version] * 40
    assert {version for _, version, _ in answers} == set(MARKERS)
