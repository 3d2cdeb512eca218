"""When a silent engine is forgotten."""

import pytest

from serve import discovery
from serve.discovery import EngineRecord, Liveness


def test_an_engine_whose_record_stops_changing_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(discovery.time, "monotonic", lambda: now)
    liveness = Liveness()
    silent, lively = (
        EngineRecord("a", "m", "http://a", 5),
        [EngineRecord("b", "m", "http://b", beat) for beat in (1, 2)],
    )
    assert liveness.live([silent, lively[0]]) == [silent, lively[0]]
    now += discovery.STALE_SECONDS
    assert liveness.live([silent, lively[1]]) == [lively[1]]
