"""What the gateway counts, in Prometheus' form: requests, tokens, times and queues, per model."""

import re
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

TTFT_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
LAST_FRAME_BYTES = 4096
"""How much of an answer's end is kept; its token counts stand there."""

USAGE = re.compile(rb'"usage"\s*:\s*\{(?:[^{}]+|\{[^{}]*\})*')
COUNT = re.compile(rb'"(prompt|completion|input|output)_tokens"\s*:\s*(\d+)')
"""`/v1/responses` counts tokens of input and output."""


@dataclass(frozen=True)
class TokenUsage:
    """Tokens of one request."""

    prompt: int = 0
    completion: int = 0


def usage_in(last_bytes: bytes) -> TokenUsage:
    """The token counts in the end of an answer, plain or streamed; zeros where there are none, as in errors."""
    found, at = None, len(last_bytes)
    while found is None and (at := last_bytes.rfind(b'"usage"', 0, at)) >= 0:
        found = USAGE.match(last_bytes, at)
    counts: dict[bytes, bytes] = dict(COUNT.findall(found[0])) if found else {}
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
    """The gateway's counters, which it keeps as plain numbers: prometheus_client's take a lock for each change.

    `requests` are answers by model and status, `tokens` by model and kind; `in_flight` and `queued` requests at the
    engines and those that wait for a place, and `engines` the replicas alive, by model.
    """

    def __init__(self) -> None:
        self.requests: defaultdict[tuple[str, str], int] = defaultdict(int)
        self.tokens: defaultdict[tuple[str, str], int] = defaultdict(int)
        self.in_flight: defaultdict[str, int] = defaultdict(int)
        self.queued: defaultdict[str, int] = defaultdict(int)
        self.engines: dict[str, int] = {}
        self._registry = CollectorRegistry()
        self._registry.register(self)
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

    def answered(self, model: str, status: int) -> None:
        """Count an answer; `model` is empty where none was named, or one that does not exist."""
        self.requests[model, str(status)] += 1

    def finished(self, model: str, streamed: bool, timing: Timing) -> TokenUsage:
        """Count a finished answer's tokens and times; returns its tokens."""
        usage = usage_in(timing.last_bytes)
        self.tokens[model, "prompt"] += usage.prompt
        self.tokens[model, "completion"] += usage.completion
        if streamed and timing.first is not None:
            self._ttft.labels(model).observe(timing.first - timing.began)
            if usage.completion > 1:
                self._per_token.labels(model).observe((timing.ended - timing.first) / (usage.completion - 1))
        return usage

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client asks for."""
        requests = CounterMetricFamily(
            "danlu_requests", "Requests answered, by HTTP status", labels=("model", "status")
        )
        tokens = CounterMetricFamily("danlu_tokens", "Tokens, by kind", labels=("model", "kind"))
        for family, counts in ((requests, self.requests), (tokens, self.tokens)):
            for labels, count in counts.items():
                family.add_metric(labels, count)
            yield family
        for name, what, by_model in (
            ("danlu_requests_in_flight", "Requests at the engines", self.in_flight),
            ("danlu_requests_queued", "Requests that wait for a place", self.queued),
            ("danlu_engines", "Engine replicas alive", self.engines),
        ):
            gauge = GaugeMetricFamily(name, what, labels=("model",))
            for model, number in by_model.items():
                gauge.add_metric((model,), number)
            yield gauge

    def text(self, engines: dict[str, int]) -> bytes:
        """Everything, in Prometheus' text form; `engines` are the replicas alive of each model."""
        self.engines = engines
        return generate_latest(self._registry)
