"""New versions of an adapter, and old ones removed, while 200 requests are in flight at two engines.

No request fails, none mixes two versions, and every engine serves every version.
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

pytest.importorskip("vllm")

from pipelines.models.served import ServedModel
from pipelines.recipe.serve import Engine, Serve
from serve import discovery
from serve.adapter_registry import publish, remove
from serve.app import endpoint
from tests.serve.conftest import running_app

pytestmark = pytest.mark.slow

CLIENTS = 200
SECONDS = 60
REPLICAS = 2
MARKERS = {"swap@1": "R", "swap@2": "B", "swap@3": "R", "swap@4": "B"}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, marker_adapters: dict[str, Path]) -> Path:
    folder = tmp_path_factory.mktemp("registry")
    publish(marker_adapters["red"], folder, "swap", base=tiny_model)
    return folder


@pytest.fixture(scope="module")
def url(ray_cluster: None, tiny_model: Path, registry: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    # With room for one adapter an engine drops those of requests that it has, and loads them again from the registry.
    engine = Engine(max_model_len=512, max_num_seqs=64, kv_cache_memory_bytes=64 << 20, max_lora_rank=8, max_loras=1)
    models = [ServedModel("base", str(tiny_model), registry=str(registry))]
    with endpoint(models, Serve(engine=engine, num_replicas=REPLICAS), log_dir=tmp_path_factory.mktemp("logs")) as url:
        yield url


def engines_with(version: str) -> int:
    """How many engines have loaded a version, by their own lists."""
    app = running_app()
    headers = {"authorization": f"Bearer {discovery.shared_key(app)}"}
    records, _ = discovery.find_engines(app)
    lists = (requests.get(f"{record.url}/v1/models", headers=headers, timeout=30).json() for record in records)
    return sum(version in [card["id"] for card in listed["data"]] for listed in lists)


def ask(url: str, model: str, tokens: int, stream: bool = False) -> requests.Response:
    body = {"model": model, "prompt": "x", "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": stream}
    return requests.post(f"{url}/completions", json=body, timeout=120, stream=stream)


def test_a_version_that_an_engine_dropped_and_that_was_removed_is_served_to_its_end(
    url: str, registry: Path, tiny_model: Path, marker_adapters: dict[str, Path]
) -> None:
    old, new = (publish(marker_adapters[color], registry, "gone", base=tiny_model) for color in ("red", "blue"))
    with ask(url, old, 450, stream=True) as answer:
        frames = answer.iter_lines()
        assert next(frames).startswith(b"data: ")
        remove(registry, old)
        with ThreadPoolExecutor(8) as pool:  # some of them reach the stream's engine, which drops the stream's adapter
            others = list(pool.map(lambda _: ask(url, new, 2), range(8)))
        received = [json.loads(line.removeprefix(b"data: ")) for line in frames if line and b"[DONE]" not in line]
    assert [other.json()["choices"][0]["text"] for other in others] == ["BB"] * 8
    assert received[-1]["usage"]["completion_tokens"] == 450
    assert {frame["choices"][0]["text"].strip("R") for frame in received if frame["choices"]} == {""}
    assert engines_with(new) == REPLICAS
    assert ask(url, old, 1).status_code == 404
    assert ask(url, "base", 1).status_code == 200


def test_versions_published_under_load_lose_no_request(
    url: str, registry: Path, tiny_model: Path, marker_adapters: dict[str, Path]
) -> None:
    answers: list[tuple[int, str, str]] = []
    stop = threading.Event()

    def ask_again_and_again(_: int) -> None:
        while not stop.is_set():
            answer = ask(url, "swap", 40)
            content = answer.json()
            text = content["choices"][0]["text"] if answer.status_code == 200 else str(content)
            answers.append((answer.status_code, content.get("model", ""), text))

    with ThreadPoolExecutor(CLIENTS) as pool:
        running = [pool.submit(ask_again_and_again, number) for number in range(CLIENTS)]
        for number, adapter in enumerate(("blue", "red", "blue"), 1):
            time.sleep(SECONDS / 4)
            version = publish(marker_adapters[adapter], registry, "swap", base=tiny_model)
            remove(registry, f"swap@{number}")
            published = time.monotonic()
            while engines_with(version) < REPLICAS:
                assert time.monotonic() < published + 20
            print(f"{version}: at every engine after {time.monotonic() - published:.1f} s")
        time.sleep(SECONDS / 4)
        stop.set()
    assert [future.exception() for future in running] == [None] * CLIENTS
    assert Counter(status for status, _, _ in answers) == {200: len(answers)}
    for _, version, text in answers:
        assert text == MARKERS[version] * 40
    assert {version for _, version, _ in answers} == set(MARKERS)
