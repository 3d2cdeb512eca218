"""What the gateway counts, in Prometheus' form: requests, tokens, times and queues, per model."""

import re
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

TTFT_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
LAST_FRAME_BYTES = 4096
"""How much of an answer's end is kept; its token counts stand there."""

USAGE = re.compile(rb'"usage"\s*:\s*\{(?:[^{}]|\{[^{}]*\})*')
COUNT = re.compile(rb'"(prompt|completion|input|output)_tokens"\s*:\s*(\d+)')
"""`/v1/responses` counts tokens of input and output."""


@dataclass(frozen=True)
class TokenUsage:
    """Tokens of one request."""

    prompt: int = 0
    completion: int = 0


def usage_in(last_bytes: bytes) -> TokenUsage:
    """The token counts in the end of an answer, plain or streamed; zeros where there are none, as in errors."""
    found = USAGE.findall(last_bytes)
    counts = dict(COUNT.findall(found[-1])) if found else {}
    prompt, completion = (
        counts.get(b"prompt", counts.get(b"input", 0)),
        counts.get(b"completion", counts.get(b"output", 0)),
    )
    return TokenUsage(int(prompt), int(completion))


@dataclass
class Timing:
    """One request's times and the end of its answer; `sent` when an engine was given it."""

    began: float = field(default_factory=time.monotonic)
    sent: bool = False
    first: float | None = None
    ended: float = 0.0
    frames: int = 0
    last_bytes: bytes = b""

    def see(self, chunk: bytes) -> None:
        """Note a piece of the answer."""
        self.ended = time.monotonic()
        self.frames += chunk.count(b"data: ")
        if self.first is None:
            self.first = self.ended
        self.last_bytes = chunk if len(chunk) >= LAST_FRAME_BYTES else self.last_bytes[-LAST_FRAME_BYTES:] + chunk


class Metrics:
    """The gateway's counters.

    `in_flight` and `queued` are requests at the engines and those that wait for a place, by model; the gateway keeps
    them, since a lock for each change would cost more than the change.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.in_flight: defaultdict[str, int] = defaultdict(int)
        self.queued: defaultdict[str, int] = defaultdict(int)
        self._children: dict[tuple[Any, tuple[str, ...]], Any] = {}
        self._requests = Counter(
            "danlu_requests", "Requests answered, by HTTP status", ("model", "status"), registry=self._registry
        )
        self._tokens = Counter("danlu_tokens", "Tokens, by kind", ("model", "kind"), registry=self._registry)
        self._ttft = Histogram(
            "danlu_time_to_first_token_seconds",
            "From the request to the first byte of a streamed answer",
            ("model",),
            buckets=TTFT_SECONDS,
            registry=self._registry,
        )
        self._per_token = Histogram(
            "danlu_time_per_output_token_seconds",
            "Between the tokens of a streamed answer, on average",
            ("model",),
            buckets=TOKEN_SECONDS,
            registry=self._registry,
        )
        self._in_flight = Gauge(
            "danlu_requests_in_flight", "Requests at the engines", ("model",), registry=self._registry
        )
        self._queued = Gauge(
            "danlu_requests_queued", "Requests that wait for a place", ("model",), registry=self._registry
        )
        self._engines = Gauge("danlu_engines", "Engine replicas alive", ("model",), registry=self._registry)

    def answered(self, model: str, status: int) -> None:
        """Count an answer; `model` is empty where none was named, or one that does not exist."""
        self._of(self._requests, model, str(status)).inc()

    def finished(self, model: str, streamed: bool, timing: Timing) -> TokenUsage:
        """Count a finished answer's tokens and times; returns its tokens."""
        usage = usage_in(timing.last_bytes)
        self._of(self._tokens, model, "prompt").inc(usage.prompt)
        self._of(self._tokens, model, "completion").inc(usage.completion)
        if streamed and timing.first is not None:
            self._of(self._ttft, model).observe(timing.first - timing.began)
            if usage.completion > 1:
                self._of(self._per_token, model).observe((timing.ended - timing.first) / (usage.completion - 1))
        return usage

    def _of(self, metric: Any, *labels: str) -> Any:
        """A metric's child; prometheus_client looks it up under a lock, which costs more than counting."""
        found = self._children.get((metric, labels))
        if found is None:
            found = self._children[metric, labels] = metric.labels(*labels)
        return found

    def text(self, engines: dict[str, int]) -> bytes:
        """Everything, in Prometheus' text form; `engines` are the replicas alive of each model."""
        for gauge, counts in ((self._in_flight, self.in_flight), (self._queued, self.queued)):
            for model, count in counts.items():
                gauge.labels(model).set(count)
        for model, count in engines.items():
            self._engines.labels(model).set(count)
        return generate_latest(self._registry)
