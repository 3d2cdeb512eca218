"""What a connection may cost before it is understood, and while its answer is not read."""

import asyncio
import gzip
import hashlib
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests

from pipelines.recipe.serve import Limits
from serve import adapter_registry
from serve.asgi import RequestError
from serve.gateway import protocol
from serve.gateway.limits import Admission
from serve.gateway.request_body import UnfinishedBodies
from tests.serve.fake_engine import Running, Start, error_of


def connect(url: str) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout=20)


def everything_from(connection: socket.socket) -> bytes:
    """What a server sends until it closes."""
    received = b""
    try:
        while piece := connection.recv(1 << 16):
            received += piece
    except ConnectionResetError:
        pass
    return received


def stream_request(prompt: str, key: str = "") -> bytes:
    body = json.dumps({"model": "base", "prompt": prompt, "stream": True}).encode()
    authorization = f"Authorization: Bearer {key}\r\n" if key else ""
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n{authorization}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


@pytest.mark.parametrize(
    "begin", [b"GET /health HTTP/1.1\r\nX: ", b"GET /", b"GET /health HTTP/1.1\r\n" + b"A: b\r\n" * 9999]
)
def test_a_head_without_an_end_is_refused_early(start: Start, begin: bytes) -> None:
    running = start()
    with connect(running.url) as connection:
        sent = 0
        try:
            connection.sendall(begin)
            while sent < 40 << 20:
                connection.sendall(b"x" * 65536)
                sent += 65536
        except (ConnectionResetError, BrokenPipeError):
            pass
        assert sent < 8 << 20  # what the sockets' buffers take
    assert running.get("/health").status_code == 200


@pytest.mark.parametrize("begin", [b"", b"POST /v1/completions HTTP/1.1\r\nHo"])
def test_a_head_that_is_late_is_refused(start: Start, begin: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.3)
    with connect(start().url) as connection:
        connection.sendall(begin)
        answer = everything_from(connection)
    assert answer.startswith(b"HTTP/1.1 408 ") is bool(begin)


def test_a_body_that_is_late_is_refused(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "BODY_SECONDS", 0.3)
    running = start()
    with connect(running.url) as connection:
        connection.sendall(stream_request("hi")[:-3])
        answer = everything_from(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"
    assert running.engine.bodies == []


def test_an_answer_longer_than_the_time_for_a_body_is_not_broken_off(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "BODY_SECONDS", 0.2)
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.2)
    running = start()
    with connect(running.url) as connection:
        connection.sendall(stream_request("drip") + stream_request("hi")[:-3])  # the second one is begun behind it
        time.sleep(0.4)
        connection.sendall(stream_request("hi")[-3:])
        answer = b""
        while answer.count(b"[DONE]") < 2:
            piece = connection.recv(1 << 16)
            assert piece
            answer += piece
    assert running.complete("wait 0.6").status_code == 200


def test_unfinished_bodies_are_bounded_together(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = UnfinishedBodies(1000)
    bodies.hold(60 << 20)
    with pytest.raises(RequestError, match="Too many bodies"):
        bodies.hold(5 << 20)
    assert bodies.held == 60 << 20
    bodies.hold(-(60 << 20))
    running = start()
    monkeypatch.setattr(running.gateway._unfinished, "_most", 1 << 20)
    opened = [connect(running.url) for _ in range(6)]
    for connection in opened:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 400000\r\n\r\n"
        connection.sendall(head + b"x" * 300_000)
    time.sleep(0.5)
    assert running.gateway._unfinished.held <= 1 << 20
    assert running.complete().status_code == 200
    for connection in opened:
        connection.close()
    until = time.monotonic() + 5
    while running.gateway._unfinished.held:
        assert time.monotonic() < until
        time.sleep(0.02)


def leave_unread(running: Running, count: int, key: str = "") -> list[socket.socket]:
    """Clients that ask for long streams and read nothing of them."""
    opened = []
    for _ in range(count):
        connection = connect(running.url)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(stream_request("flood 32", key))
        opened.append(connection)
    return opened


def test_streams_that_nobody_reads_end_and_give_their_places_back(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "WRITE_SECONDS", 0.5)
    running = start(max_in_flight=8)
    opened = leave_unread(running, 8)
    running.wait_for_count('danlu_requests_in_flight{model="base"} 8.0')
    assert running.complete().status_code == 200
    running.wait_for_count('danlu_requests_total{model="base",status="499"} 8.0')
    for connection in opened:
        connection.close()


def test_one_key_does_not_take_every_place(start: Start) -> None:
    keys = tuple(hashlib.sha256(key).digest() for key in (b"greedy", b"other"))
    running = start(keys=keys, max_in_flight=8, max_in_flight_per_key=6)
    opened = leave_unread(running, 8, "greedy")
    running.wait_for_count('danlu_requests_in_flight{model="base"} 6.0', authorization="Bearer other")
    assert running.complete(headers={"authorization": "Bearer other"}).status_code == 200
    for connection in opened:
        connection.close()


def test_a_free_place_goes_to_who_has_the_fewest(start: Start) -> None:
    keys = tuple(hashlib.sha256(key).digest() for key in (b"many", b"few"))
    running = start(keys=keys, max_in_flight=2)
    many, few = ({"authorization": f"Bearer {name}"} for name in ("many", "few"))
    with ThreadPoolExecutor(12) as pool:
        waiting = [pool.submit(running.complete, f"wait {0.3 + n / 100}", headers=many) for n in range(8)]
        time.sleep(0.15)
        assert running.complete(headers=few).status_code == 200
        assert sum(asked.done() for asked in waiting) < 6  # behind some of the eight, not behind all
        assert {one.result().status_code for one in waiting} == {200}
    until = time.monotonic() + 10
    while running.gateway.limiter.admission.in_flight and time.monotonic() < until:  # a place is free after its answer
        time.sleep(0.01)
    assert (running.gateway.limiter.admission.in_flight, running.gateway.limiter.admission.queued) == (0, 0)
    assert running.gateway.limiter.admission._of_caller == running.gateway.limiter.admission._waiting == {}


@pytest.mark.parametrize("streamed", [True, False])
def test_a_broken_off_answer_is_charged_with_its_prompt(start: Start, streamed: bool) -> None:
    running = start(tokens_per_minute=1000)
    order = "drip" if streamed else "wait 20"
    body = {"model": "base", "prompt": order, "stream": streamed, "user": "x" * 4000}
    with pytest.raises((requests.Timeout, requests.ConnectionError)):
        requests.post(f"{running.url}/v1/completions", json=body, timeout=0.4)
    running.wait_for_count('danlu_requests_total{model="base",status="499"} 1.0')
    assert running.complete().status_code == 429


def test_a_stream_whose_engine_died_is_charged(start: Start) -> None:
    running = start(tokens_per_minute=1000)
    running.complete("die", stream=True, user="x" * 4000)
    codes = []
    for _ in range(5):  # the gateway charges once it has seen the end, which the client may see before
        codes.append(running.complete().status_code)
        time.sleep(0.2)
    assert codes[-1] == 429, codes


def test_an_engine_that_could_not_be_reached_costs_nothing(start: Start) -> None:
    running = start(tokens_per_minute=1000)
    running.live({"r2": "http://127.0.0.1:9"})
    assert running.complete(user="x" * 4000).status_code == 503
    running.live({"r3": running.engine_url})
    assert running.complete().status_code == 200


def test_unknown_names_do_not_read_the_registry_in_the_event_loop(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, scans = start(registry=str(tmp_path)), 0

    def slow_scan(_: str) -> list[str]:
        nonlocal scans
        scans += 1
        time.sleep(0.3)
        return []

    monkeypatch.setattr(adapter_registry, "versions", slow_scan)
    with ThreadPoolExecutor(20) as pool:
        unknown = [pool.submit(running.complete, model=f"unknown{n}") for n in range(20)]
        time.sleep(0.1)
        began = time.monotonic()
        assert running.complete().status_code == 200
        assert time.monotonic() - began < 2
        assert {one.result().status_code for one in unknown} == {404}
    assert scans <= 8  # two a reading: versions, and those that aliases stand for


def test_a_registry_that_cannot_be_read_is_not_called_an_unknown_model(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = start(registry=str(tmp_path))

    def broken(_: str) -> Any:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(adapter_registry, "versions", broken)
    answer = running.complete(model="persona")
    assert (answer.status_code, error_of(answer)["code"]) == (503, "registry_unavailable")
    assert running.complete().status_code == 200


def test_a_packed_body_is_read_and_one_that_swells_is_not(start: Start) -> None:
    running = start(max_body_bytes=100_000)
    url, packed = f"{running.url}/v1/completions", {"content-encoding": "gzip"}

    def post(content: bytes, **headers: str) -> requests.Response:
        return requests.post(url, data=content, headers=headers, timeout=20)

    body = json.dumps({"model": "base", "prompt": "hi"}).encode()
    assert post(gzip.compress(body), **packed).status_code == 200
    assert post(gzip.compress(b" " * 50_000_000), **packed).status_code == 413
    for content, code in (
        (body, "invalid_gzip"),
        (gzip.compress(body)[:-4], "invalid_gzip"),
        (gzip.compress(body) + b"x", "invalid_gzip"),
        (gzip.compress(b"{"), "invalid_json"),
    ):
        answer = post(content, **packed)
        assert (answer.status_code, error_of(answer)["code"]) == (400, code)
    refused = post(body, **{"content-encoding": "br"})
    assert (refused.status_code, error_of(refused)["code"]) == (415, "unsupported_encoding")


def test_places_are_counted_when_the_limit_of_a_key_holds_others_back() -> None:
    async def main() -> None:
        admission = Admission(Limits(max_in_flight=3, max_in_flight_per_key=1))
        await admission.enter("a")
        second = asyncio.ensure_future(admission.enter("a"))
        await asyncio.sleep(0)
        await admission.enter("b")
        assert (admission.in_flight, admission.queued) == (2, 1)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        assert admission.queued == 0
        admission.leave("a")
        await admission.enter("a")
        admission.leave("a")
        admission.leave("b")
        assert admission.in_flight == 0

    asyncio.run(main())


def test_a_large_body_does_not_count_as_the_next_head(start: Start) -> None:
    with connect(start(max_body_bytes=1 << 20).url) as connection:
        for _ in range(3):
            request = stream_request("x" * 300_000)
            connection.sendall(request[:40])  # the head comes in two pieces
            time.sleep(0.05)
            connection.sendall(request[40:])
            answer = b""
            while not answer.endswith(b"0\r\n\r\n"):  # with the end of the last chunk
                piece = connection.recv(1 << 16)
                assert piece
                answer += piece
            assert answer.startswith(b"HTTP/1.1 200 ")


def test_a_head_begun_behind_an_answer_does_not_break_it_off(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.3)
    with connect(start().url) as connection:
        connection.sendall(stream_request("drip") + b"GET /hea")
        answer = b""
        while b"[DONE]" not in answer:
            piece = connection.recv(1 << 16)
            assert piece
            answer += piece
        connection.sendall(b"lth HTTP/1.1\r\nHost: localhost\r\n\r\n")
        while b'{"status": "ok"}' not in answer:
            piece = connection.recv(1 << 16)
            assert piece
            answer += piece
