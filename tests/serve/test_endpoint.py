"""A running endpoint on a tiny model: real Ray Serve, real vLLM, the real client."""

import hashlib
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import psutil
import pytest
import ray
import requests

pytest.importorskip("vllm")

from pipelines.errors import HardwareError, RecipeError, StageError
from pipelines.models.served import ServedModel
from pipelines.recipe.serve import Engine, Limits, Serve
from serve import discovery
from serve.adapter_registry import publish, set_alias
from serve.app import endpoint
from serve.engine.replica import requests_at
from tests.serve.conftest import running_app

SECTION = Serve(engine=Engine(max_model_len=512, max_num_seqs=32, kv_cache_memory_bytes=64 << 20, max_lora_rank=8))
MARKER_OF = {"red": "R", "blue": "B", "merged": "R"}
LIMITS = Limits(max_body_bytes=20_000, requests_per_minute=300)
SECRET, OTHER = "the-key-of-one-caller", "the-key-of-another"
KEY = {"authorization": f"Bearer {SECRET}"}
USAGE = {"stream_options": {"include_usage": True}}
TEXT = "Once upon a time there was a small town by a river. "


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("registry")


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def url(
    ray_cluster: None,
    tiny_model: Path,
    marker_adapters: dict[str, Path],
    merged_model: Path,
    registry: Path,
    logs: Path,
) -> Iterator[str]:
    adapters = {name: str(path) for name, path in marker_adapters.items()}
    models = [ServedModel("base", str(tiny_model), adapters, str(registry)), ServedModel("merged", str(merged_model))]
    keys = tuple(hashlib.sha256(key.encode()).digest() for key in (SECRET, OTHER))
    with endpoint(models, SECTION, log_dir=logs, keys=keys, limits=LIMITS) as url:
        yield url
        body = {"model": "base", "prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}
        last = requests.post(f"{url}/completions", json=body, headers=KEY, stream=True, timeout=60)
        frames = last.iter_lines()
        assert next(frames).startswith(b"data: ")
        scratch = [Path(process.environ()["TMPDIR"]) for process in engine_processes()]
        assert any(file.is_socket() for folder in scratch for file in folder.iterdir())
    assert list(frames)[-2:] == [b"data: [DONE]", b""]  # what is in flight when the endpoint stops is finished
    assert engine_processes() == []
    assert not any(folder.exists() for folder in scratch)


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key=SECRET, max_retries=0, timeout=60)


def engine_processes() -> list[psutil.Process]:
    """vLLM's processes below this test run."""
    children = psutil.Process().children(recursive=True)
    return [p for p in children if p.is_running() and p.status() != "zombie" and is_engine(p)]


def is_engine(process: psutil.Process) -> bool:
    line = " ".join(process.cmdline())
    return "serve.engine.server" in line or "VLLM" in line


def say(client: openai.OpenAI, model: str, prompt: str = "hello", tokens: int = 8) -> str:
    """What a model says, whatever its end-of-text token."""
    messages = [{"role": "user", "content": prompt}]
    answer = client.chat.completions.create(
        model=model, messages=messages, max_tokens=tokens, temperature=0, extra_body={"ignore_eos": True}
    )
    return answer.choices[0].message.content or ""


def log_probabilities(client: openai.OpenAI, model: str, prompt: str) -> list[float]:
    """The log-probability of each token of the prompt after the first."""
    answer = client.completions.create(model=model, prompt=prompt, max_tokens=1, echo=True, logprobs=0, temperature=0)
    return answer.choices[0].logprobs.token_logprobs[1 : answer.usage.prompt_tokens]


def reference_log_probabilities(base: Path, adapter: Path | None, prompt: str) -> list[float]:
    """The same from transformers and peft."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    tokens = AutoTokenizer.from_pretrained(base)(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        scores = model(tokens).logits.log_softmax(-1)
    return scores[0, :-1].gather(1, tokens[0, 1:, None]).squeeze(1).tolist()


def test_every_model_is_listed_with_its_parent(client: openai.OpenAI) -> None:
    cards = [card.model_dump() for card in client.models.list()]
    parents = {card["id"]: card["parent"] for card in cards if "persona" not in card["id"]}
    assert parents == {"base": None, "red": "base", "blue": "base", "merged": None}
    assert client.models.retrieve("red").model_dump()["parent"] == "base"


def test_64_mixed_requests_at_once_each_carry_their_own_marker(client: openai.OpenAI) -> None:
    models = ["base", "red", "blue", "merged"] * 16
    alone = say(client, "base", "prompt 0")
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda model: say(client, model, "prompt 0"), models))
    for model, answer in zip(models, answers, strict=True):
        assert answer == (alone if model == "base" else MARKER_OF[model] * 8)
    assert not set(alone) & set("RB")


@pytest.mark.slow
def test_log_probabilities_in_a_mixed_batch_are_those_of_each_model_alone(
    client: openai.OpenAI, tiny_model: Path, marker_adapters: dict[str, Path]
) -> None:
    asks = [(model, f"{TEXT}{n} " * 3) for n in range(8) for model in ("base", "red", "blue", "merged")]
    alone = [log_probabilities(client, *ask) for ask in asks]
    with ThreadPoolExecutor(len(asks)) as pool:
        mixed = list(pool.map(lambda ask: log_probabilities(client, *ask), asks))
    for one, other in zip(alone, mixed, strict=True):
        assert one == pytest.approx(other, abs=1e-3)
    for (model, prompt), found in list(zip(asks, mixed, strict=True))[:3]:
        expected = reference_log_probabilities(tiny_model, marker_adapters.get(model), prompt)
        assert found == pytest.approx(expected, abs=2e-3)


def test_a_stream_is_framed_up_to_done_and_carries_usage(url: str, client: openai.OpenAI) -> None:
    body = {
        "model": "red",
        "prompt": "x",
        "max_tokens": 5,
        "temperature": 0,
        "stream": True,
        **USAGE,
        "ignore_eos": True,
    }
    raw = requests.post(f"{url}/completions", json=body, headers=KEY, timeout=60)
    assert raw.headers["content-type"].startswith("text/event-stream")
    frames = raw.content.split(b"\n\n")
    assert (frames[-2], frames[-1]) == (b"data: [DONE]", b"")
    assert all(frame.startswith(b"data: ") for frame in frames[:-1])
    parts = list(client.completions.create(**{k: v for k, v in body.items() if k != "ignore_eos"}))
    assert "".join(part.choices[0].text for part in parts if part.choices) == "RRRRR"
    assert parts[-1].usage.completion_tokens == 5


def test_a_chat_streams_roles_pieces_and_usage(client: openai.OpenAI) -> None:
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "hello"}]
    ask = {"model": "red", "messages": messages, "max_completion_tokens": 6, "temperature": 0}
    whole = client.chat.completions.create(**ask, extra_body={"ignore_eos": True})
    parts = list(client.chat.completions.create(**ask, stream=True, **USAGE, extra_body={"ignore_eos": True}))
    assert {part.id for part in parts} == {parts[0].id}
    assert parts[0].choices[0].delta.role == whole.choices[0].message.role == "assistant"
    pieces = [part.choices[0].delta.content or "" for part in parts if part.choices]
    assert "".join(pieces) == whole.choices[0].message.content == "RRRRRR"
    assert [part.choices[0].finish_reason for part in parts if part.choices][-1] == "length"
    assert (parts[-1].choices, parts[-1].usage) == ([], whole.usage)
    assert whole.usage.completion_tokens == 6


def test_curl_sees_a_stream_to_its_end(url: str) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl on this machine")
    body = {"model": "blue", "prompt": "x", "max_tokens": 3, "temperature": 0, "stream": True, **USAGE}
    command = ["curl", "-sN", f"{url}/completions", "-H", f"Authorization: Bearer {SECRET}", "-d", json.dumps(body)]
    shown = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
    assert shown.endswith(b"\n\ndata: [DONE]\n\n")
    frames = [json.loads(line.removeprefix(b"data: ")) for line in shown.split(b"\n\n")[:-2]]
    assert "".join(frame["choices"][0]["text"] for frame in frames if frame["choices"]) == "BBB"
    assert frames[-1]["usage"]["completion_tokens"] == 3


def test_the_running_endpoint_refuses_in_openai_s_form(url: str) -> None:
    body = {"model": "base", "prompt": "hi", "max_tokens": -1}
    other = {"authorization": f"Bearer {OTHER}"}
    codes = {}
    for status, headers, sent in (
        (401, {"authorization": "Bearer wrong"}, body),
        (413, KEY, {**body, "prompt": "x" * 20_000}),
        (400, other, body),
    ):
        answer = requests.post(f"{url}/completions", json=sent, headers=headers, timeout=60)
        assert answer.status_code == status
        codes[status] = answer.json()["error"]["code"]
    assert (codes[401], codes[413]) == ("invalid_api_key", "body_too_large")
    with requests.Session() as session:
        for _ in range(400):
            answer = session.post(f"{url}/completions", json=body, headers=other, timeout=60)
            if answer.status_code != 400:
                break
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert int(answer.headers["retry-after"]) >= 1


def test_a_client_that_leaves_stops_the_engine(url: str) -> None:
    body = {"model": "base", "prompt": "x", "max_tokens": 480, "ignore_eos": True, "stream": True}
    records, _ = discovery.find_engines(running_app())
    (engine,) = (record.url for record in records if record.model == "base")
    generated = _tokens_generated(engine)
    with requests.post(f"{url}/completions", json=body, headers=KEY, stream=True, timeout=60) as answer:
        lines = answer.iter_lines()  # kept: a generator that is thrown away closes the connection
        next(lines)
        _wait_for(engine, 1)  # its figures follow a moment behind
    _wait_for(engine, 0)
    assert 0 < _tokens_generated(engine) - generated < 480


def _wait_for(engine: str, count: int) -> None:
    until = time.monotonic() + 60
    while requests_at(engine) != count:
        assert time.monotonic() < until
        time.sleep(0.02)


def _tokens_generated(engine: str) -> float:
    metrics = requests.get(f"{engine}/metrics", timeout=60).text.splitlines()
    return sum(float(line.split()[-1]) for line in metrics if line.startswith("vllm:generation_tokens_total{"))


def test_sampling_parameters_reach_the_engine(client: openai.OpenAI) -> None:
    ask = {"model": "base", "prompt": "abc", "max_tokens": 12}
    greedy = {client.completions.create(**ask, temperature=0, seed=seed).choices[0].text for seed in (5, 5, 6)}
    assert len(greedy) == 1
    first, second = (client.completions.create(**ask, temperature=1.5, seed=5).choices[0].text for _ in range(2))
    assert first == second != client.completions.create(**ask, temperature=1.5, seed=6).choices[0].text
    stopped = client.completions.create(model="red", prompt="x", max_tokens=20, temperature=0, stop=["RRR"])
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == ("", "stop")
    assert stopped.usage.total_tokens == stopped.usage.prompt_tokens + stopped.usage.completion_tokens
    penalised = client.completions.create(
        model="red", prompt="x", max_tokens=8, temperature=0, extra_body={"repetition_penalty": 100.0}
    )
    assert penalised.choices[0].text.count("R") <= 1
    forty = {"model": "red", "prompt": "x", "max_tokens": 40, "temperature": 0}
    plain, varied = (client.completions.create(**forty, frequency_penalty=penalty) for penalty in (0.0, 2.0))
    assert plain.choices[0].text == "R" * 40
    assert 1 <= varied.choices[0].text.count("R") < 40


def test_an_answer_follows_a_json_schema(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"x": {"enum": ["a", "b"]}}, "required": ["x"]}
    answer = client.chat.completions.create(
        model="base",
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=60,
        temperature=0,
        frequency_penalty=2.0,  # or a random model fills the answer with the spaces that JSON allows
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}},
    )
    assert json.loads(answer.choices[0].message.content or "")["x"] in ("a", "b")


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"max_tokens": -1}, 400),
        ({"max_tokens": "many"}, 400),
        ({"prompt": "x" * 2000}, 400),
        ({"temperature": -3}, 400),
        ({"model": "nope"}, 404),
        ({"some_field_of_the_future": {"a": 1}}, 200),
    ],
)
def test_what_the_engine_refuses_has_openai_s_form(url: str, change: dict[str, object], status: int) -> None:
    body = {"model": "base", "prompt": "hi", "max_tokens": 2, **change}
    answer = requests.post(f"{url}/completions", json=body, headers=KEY, timeout=60)
    assert answer.status_code == status
    if status != 200:
        assert {"message", "type", "param", "code"} <= set(answer.json()["error"])


def test_a_published_adapter_is_answered_with_at_once(
    client: openai.OpenAI, tiny_model: Path, marker_adapters: dict[str, Path], registry: Path
) -> None:
    publish(marker_adapters["red"], registry, "persona", base=tiny_model)
    assert say(client, "persona") == "RRRRRRRR"
    publish(marker_adapters["blue"], registry, "persona", base=tiny_model)
    until = time.monotonic() + 60
    while say(client, "persona") != "BBBBBBBB":
        assert time.monotonic() < until
    assert say(client, "persona@1") == "RRRRRRRR"
    set_alias(registry, "persona", "persona@1")
    with pytest.raises(openai.NotFoundError):
        say(client, "persona@9")


def test_no_key_is_seen_in_command_lines_logs_or_errors(url: str, logs: Path) -> None:
    answer = requests.get(f"{url}/models", headers={"authorization": f"Bearer {SECRET}x"}, timeout=60)
    seen = {"an error": answer.text + str(answer.headers)}
    seen |= {f"process {p.pid}": " ".join(p.cmdline()) for p in psutil.Process().children(recursive=True)}
    (session,) = Path(tempfile.gettempdir()).glob(f"*/{ray.get_runtime_context().get_session_name()}/logs")
    files = [file for folder in (logs, session) for file in folder.rglob("*") if file.is_file()]
    seen |= {str(file): file.read_text(errors="replace") for file in files}
    assert any("engine-base" in name for name in seen)
    engine_keys = {process.environ()["VLLM_API_KEY"] for process in engine_processes()}
    assert engine_keys
    assert [name for name, text in seen.items() if any(key in text for key in (SECRET, *engine_keys))] == []


@pytest.mark.slow
def test_an_engine_that_cannot_start_says_why(ray_cluster: None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with (
        pytest.raises(StageError, match=r"(?s)engine of broken ended with code 1 while it loaded .*Unrecognized model"),
        endpoint([ServedModel("broken", str(tmp_path))], SECTION, log_dir=tmp_path),
    ):
        pass


def test_what_cannot_be_placed_or_named_fails_before_anything_starts(ray_cluster: None) -> None:
    with pytest.raises(HardwareError, match=r"2 engine\(s\) of 4 CPU .*lacks 8 CPU \(there: 2\)"):
        endpoint([ServedModel("a", "/a"), ServedModel("b", "/b")], Serve(num_cpus=4)).__enter__()
    with pytest.raises(RecipeError, match=r"(?s)a/b: not a servable name.*c: two models have this name"):
        endpoint([ServedModel("a/b", "/a", {"c": "/c"}), ServedModel("c", "/b")], SECTION).__enter__()
