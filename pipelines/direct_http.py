"""HTTP to servers of our own, on this machine or in this cluster: never through a proxy.

`http_proxy`, `https_proxy` and `all_proxy` are meant for the internet. A proxy on the way to 127.0.0.1 answers that it
knows no such host, or asks its own machine.
"""

import ipaddress
import urllib.request
from collections.abc import Mapping
from urllib.parse import urlsplit

_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def fetch(url: str, timeout: float, headers: Mapping[str, str] | None = None) -> bytes:
    """The body of an answer to GET, past every proxy; raises OSError where there is none, or an error status."""
    request = urllib.request.Request(url, headers=dict(headers or {}))
    with _opener.open(request, timeout=timeout) as answer:
        body: bytes = answer.read()
    return body


def is_loopback(url: str) -> bool:
    """Whether an address is this machine's own: `localhost`, 127.0.0.0/8, `::1`, or 0.0.0.0, which means it too."""
    host = urlsplit(url).hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def without_proxy(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for a child process whose libraries ask this machine's own servers past every proxy."""
    before = [environment[name] for name in ("no_proxy", "NO_PROXY") if environment.get(name)]
    hosts = ",".join([*before[:1], "127.0.0.1", "localhost", "::1"])
    return {**environment, "no_proxy": hosts, "NO_PROXY": hosts}
