"""Which engines are alive and where: small records in Ray's key-value store, renewed by each engine.

Engines write, the gateway reads. Neither holds a handle to the other, so each may be restarted alone. A record that
is not renewed is forgotten by its readers: they note when it last changed, on their own clock.
"""

import json
import logging
import secrets
import time
from dataclasses import asdict, dataclass

from ray.experimental import internal_kv

NAMESPACE = "danlu-serve"
logger = logging.getLogger("ray.serve")

BEAT_SECONDS = 1.0
STALE_SECONDS = 10.0


@dataclass(frozen=True)
class EngineRecord:
    """One engine replica that accepts requests: its model, its address, and how often the record was renewed.

    `max_model_len`: tokens of prompt and answer, where it is known.
    """

    replica: str
    model: str
    url: str
    beat: int = 0
    max_model_len: int | None = None


def announce(app: str, record: EngineRecord) -> None:
    """Write or renew an engine's record."""
    internal_kv._internal_kv_put(f"{app}/engine/{record.replica}", json.dumps(asdict(record)), namespace=NAMESPACE)


def withdraw(app: str, replica: str) -> None:
    """Remove an engine's record."""
    internal_kv._internal_kv_del(f"{app}/engine/{replica}", namespace=NAMESPACE)


def retire(app: str, replica: str, model: str) -> None:
    """Note that an engine was stopped on purpose: it has not died, and another takes its place."""
    internal_kv._internal_kv_put(f"{app}/retired/{replica}", model, namespace=NAMESPACE)


def shared_key(app: str) -> str:
    """The key by which an application's gateway and engines know each other; made by who asks first."""
    name = f"{app}/key"
    internal_kv._internal_kv_put(name, secrets.token_urlsafe(24), overwrite=False, namespace=NAMESPACE)
    value = internal_kv._internal_kv_get(name, namespace=NAMESPACE)
    assert value is not None
    return value.decode()


def find_engines(app: str) -> tuple[list[EngineRecord], dict[str, str]]:
    """All records of an application's engines, stale ones included, and its replicas that were stopped on purpose,
    with their models.

    Each question is a round through Ray's head, which an idle endpoint asks for ever: one list serves both.
    """
    keys = [key.decode() for key in internal_kv._internal_kv_list(f"{app}/", namespace=NAMESPACE)]
    engines, retired = _values(keys, f"{app}/engine/"), _values(keys, f"{app}/retired/")
    records = (_record(name, value) for name, value in engines.items())
    return [record for record in records if record is not None], retired


def _record(replica: str, value: str) -> EngineRecord | None:
    """A record, or None (and a line in the log) for one that another version wrote: the others must not suffer."""
    try:
        return EngineRecord(**json.loads(value))
    except (ValueError, TypeError):
        logger.exception("the record of engine %s cannot be read", replica)
        return None


def _values(keys: list[str], prefix: str) -> dict[str, str]:
    """What stands under the keys with a prefix, by the rest of the key; one may have gone since they were listed."""
    chosen = [key for key in keys if key.startswith(prefix)]
    found = {key: internal_kv._internal_kv_get(key, namespace=NAMESPACE) for key in chosen}
    return {key.removeprefix(prefix): value.decode() for key, value in found.items() if value is not None}


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
