"""Which pages in browsers may ask, and by which names a gateway of this machine alone."""

import pytest
import requests

from pipelines.recipe.serve import Limits
from serve.gateway.gateway_replica import GatewayPlan, application
from serve.gateway.origins import hostname, with_origins
from tests.serve.fake_engine import Running, Serving, Start, error_of

STAINLESS = "authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-retry-count,x-stainless-timeout"
PAGE = "https://chat.example.org"


def plan(keys: tuple[bytes, ...] = (), host: str = "127.0.0.1", is_open: bool = False) -> GatewayPlan:
    return GatewayPlan("app", [], "secret", keys, Limits(), host, 8000, (PAGE,), is_open)


def ask(url: str, **headers: str) -> requests.Response:
    return requests.post(f"{url}/v1/completions", json={"model": "base", "prompt": "hi"}, headers=headers, timeout=20)


@pytest.fixture(scope="module")
def running(start: Start) -> Running:
    return start()


def test_a_page_with_openais_client_may_send_its_headers(running: Running, serving: Serving) -> None:
    with serving(with_origins(running.gateway, (PAGE,))) as url:
        asked = {"access-control-request-method": "POST", "access-control-request-headers": STAINLESS}
        preflight = requests.options(
            f"{url}/v1/chat/completions",
            headers={"origin": PAGE, **asked, "access-control-request-private-network": "true"},
            timeout=20,
        )
        foreign = requests.options(
            f"{url}/v1/models", headers={"origin": "https://evil.example.org", **asked}, timeout=20
        )
    assert preflight.status_code == 200
    allowed = {name.strip().lower() for name in preflight.headers["access-control-allow-headers"].split(",")}
    assert set(STAINLESS.split(",")) <= allowed
    assert preflight.headers["access-control-allow-private-network"] == "true"
    assert "access-control-allow-origin" not in foreign.headers


def test_a_page_may_read_the_names_of_its_requests(running: Running, serving: Serving) -> None:
    with serving(with_origins(running.gateway, (PAGE,))) as url:
        refused = requests.get(f"{url}/v1/models/nope", headers={"origin": PAGE}, timeout=20)
    assert refused.headers["access-control-allow-origin"] == PAGE
    assert "x-request-id" in refused.headers["access-control-expose-headers"].lower()


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"host": "evil.example.org"}, "host_not_allowed"),  # its name points at 127.0.0.1 now: DNS rebinding
        ({"host": "127.0.0.1.evil.example.org:8000"}, "host_not_allowed"),
        ({"host": "localhost@evil.example.org"}, "host_not_allowed"),
        ({"host": "192.168.1.7:8000"}, "host_not_allowed"),
        ({"host": "[::2]"}, "host_not_allowed"),
        ({"host": "[oops"}, "host_not_allowed"),
        ({"origin": "https://evil.example.org"}, "origin_not_allowed"),
        ({"origin": "null"}, "origin_not_allowed"),  # a sandboxed frame
        ({"origin": "http://localhost:3000"}, "origin_not_allowed"),  # another server of this machine
        ({"origin": "http://evil.localhost"}, "origin_not_allowed"),
    ],
)
def test_pages_of_other_sites_do_not_reach_a_local_gateway(
    running: Running, serving: Serving, headers: dict[str, str], code: str
) -> None:
    asked = len(running.engine.bodies)
    with serving(application(running.gateway, plan()), running.session) as url:
        answer = ask(url, **headers)
    assert (answer.status_code, error_of(answer)["code"]) == (403, code)
    assert len(running.engine.bodies) == asked


def test_programs_of_this_machine_and_allowed_pages_do(running: Running, serving: Serving) -> None:
    with serving(application(running.gateway, plan()), running.session) as url:
        port = url.rpartition(":")[2]
        for headers in (
            {},
            {"host": f"localhost:{port}"},
            {"host": "LOCALHOST"},
            {"host": f"[::1]:{port}"},
            {"origin": PAGE},
            {"origin": f"http://localhost:{port}", "host": f"localhost:{port}"},
        ):
            assert ask(url, **headers).status_code == 200, headers


@pytest.mark.parametrize(
    "other", [plan(keys=(b"x" * 32,)), plan(host="0.0.0.0", is_open=True), plan(is_open=True), plan(host="10.0.0.7")]
)
def test_with_keys_or_open_it_is_asked_by_any_name(running: Running, serving: Serving, other: GatewayPlan) -> None:
    with serving(application(running.gateway, other), running.session) as url:
        assert ask(url, host="gateway.example.org").status_code == 200


def test_names_of_hosts() -> None:
    assert [hostname(host) for host in ("a:1", "[::1]:80", "[", "", "A.b", "1.2.3.4:x")] == [
        "a",
        "::1",
        "",
        "",
        "a.b",
        "1.2.3.4",
    ]
