"""Which engines are alive and where: small records in Ray's key-value store, renewed by each engine.

Engines write, the gateway reads. Neither holds a handle to the other, so each may be restarted alone. A record that
is not renewed is forgotten by its readers: they note when it last changed, on their own clock.
"""

import json
import time
from dataclasses import asdict, dataclass

from ray.experimental import internal_kv

NAMESPACE = "danlu-serve"
BEAT_SECONDS = 0.5
STALE_SECONDS = 10.0


@dataclass(frozen=True)
class EngineRecord:
    """One engine replica that accepts requests: its model, its address, and how often the record was renewed."""

    replica: str
    model: str
    url: str
    beat: int = 0


def announce(app: str, record: EngineRecord) -> None:
    """Write or renew an engine's record."""
    internal_kv._internal_kv_put(f"{app}/engine/{record.replica}", json.dumps(asdict(record)), namespace=NAMESPACE)


def withdraw(app: str, replica: str) -> None:
    """Remove an engine's record."""
    internal_kv._internal_kv_del(f"{app}/engine/{replica}", namespace=NAMESPACE)


def records(app: str) -> list[EngineRecord]:
    """All records of an application's engines, stale ones included."""
    keys = internal_kv._internal_kv_list(f"{app}/engine/", namespace=NAMESPACE)
    values = (internal_kv._internal_kv_get(key, namespace=NAMESPACE) for key in keys)
    return [EngineRecord(**json.loads(value)) for value in values if value is not None]


def report_failure(app: str, message: str) -> None:
    """Keep why an engine did not start, for the process that waits for it."""
    internal_kv._internal_kv_put(f"{app}/failure", message, namespace=NAMESPACE)


def failure(app: str) -> str | None:
    """Why an engine of the application did not start, if one did not."""
    value = internal_kv._internal_kv_get(f"{app}/failure", namespace=NAMESPACE)
    return value.decode() if value is not None else None


def forget(app: str) -> None:
    """Remove everything an application has written."""
    internal_kv._internal_kv_del(f"{app}/", del_by_prefix=True, namespace=NAMESPACE)


class Liveness:
    """Tells live records from those that stopped being renewed."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, float]] = {}

    def live(self, found: list[EngineRecord]) -> list[EngineRecord]:
        """The records that changed within the last `STALE_SECONDS`."""
        now = time.monotonic()
        for record in found:
            if self._seen.get(record.replica, (-1, 0.0))[0] != record.beat:
                self._seen[record.replica] = (record.beat, now)
        self._seen = {r.replica: self._seen[r.replica] for r in found}
        return [r for r in found if now - self._seen[r.replica][1] < STALE_SECONDS]
