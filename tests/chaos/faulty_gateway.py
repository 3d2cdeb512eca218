"""A gateway replica with its followers, whose sight of engines and adapters fails as its parent says.

    python -m tests.chaos.faulty_gateway FOLDER PORT

FOLDER/store stands in Ray's store's place: a file for each key. FOLDER/registry is the registry of adapters.
FOLDER/faults.json says what fails now: {"store": NAME, "registry": NAME}, each the name of an exception, `hang`, or
"". Five times a second one JSON line says what this process holds and what it has answered; it ends with its input.
"""

import asyncio
import hashlib
import json
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import psutil

from pipelines.errors import DataError
from pipelines.models.served import ServedModel
from pipelines.recipe.serve import Limits
from serve import adapter_registry, discovery
from serve.gateway import app, gateway_replica

BEAT, LIVE, STALE, BLIND = 0.2, 2.0, 3.0, 5.0
"""Seconds in the place of the real 1, 10, 15 and 60."""

FAULTS: dict[str, Exception] = {
    "RuntimeError": RuntimeError("the store is away"),
    "OSError": OSError(5, "Input/output error"),
    "TimeoutError": TimeoutError(),
    "ValueError": ValueError("not JSON"),
    "KeyError": KeyError("x"),
    "DataError": DataError("a file of the registry is damaged"),
}


class FaultyFolder:
    """Files in the place of Ray's store and of a sound registry; what is asked first fails or hangs if it is to."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._versions = folder, adapter_registry.versions

    def _meet(self, where: str) -> None:
        while (fault := json.loads((self._folder / "faults.json").read_text())[where]) == "hang":
            time.sleep(0.05)
        if fault:
            raise FAULTS[fault]

    def _internal_kv_list(self, prefix: str, namespace: str) -> list[bytes]:
        self._meet("store")
        return [unquote(path.name).encode() for path in (self._folder / "store").iterdir()]

    def _internal_kv_get(self, key: str, namespace: str) -> bytes | None:
        path = self._folder / "store" / quote(key, safe="")
        return path.read_bytes() if path.exists() else None

    def versions(self, registry: str | Path) -> list[str]:
        self._meet("registry")
        return self._versions(registry)


class Watched:
    """The gateway's application; counts what it answers and which exceptions leave it."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.statuses: Counter[int] = Counter()
        self.raised: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.statuses[message["status"]] += 1
            await send(message)

        try:
            await self._inner(scope, receive, counted)
        except Exception as error:
            self.raised.append(repr(error))
            raise


def main(folder: Path, port: int) -> None:
    """Run the gateway until the input ends."""
    faulty = FaultyFolder(folder)
    discovery.internal_kv = faulty
    adapter_registry.versions = faulty.versions
    discovery.BEAT_SECONDS, discovery.STALE_SECONDS = BEAT, LIVE
    app.STALE_SECONDS, gateway_replica.BLIND_SECONDS = STALE, BLIND
    inner, watched = gateway_replica.application, []

    def application(*arguments: Any) -> Watched:
        watched.append(Watched(inner(*arguments)))
        return watched[0]

    gateway_replica.application = application  # type: ignore[assignment]
    model = ServedModel("base", "/models/base", {"wishes": "/adapters/wishes"}, str(folder / "registry"))
    limits = Limits(max_body_bytes=2000, max_prompt_characters=60, max_tokens=1000)
    keys = (hashlib.sha256(b"k").digest(),)
    replica = gateway_replica.GatewayReplica(
        gateway_replica.GatewayPlan("app", [model], "secret", keys, limits, "127.0.0.1", port)
    )
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    while not ended.wait(0.2):
        began, ill = time.monotonic(), ""
        try:
            asyncio.run(replica.check_health())
        except RuntimeError as error:
            ill = str(error)
        line = {
            "began": began,
            "ill": ill,
            "bytes": psutil.Process().memory_info().rss,
            "statuses": watched[0].statuses,
            "raised": watched[0].raised,
        }
        print(json.dumps(line), flush=True)
    replica.__del__()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
