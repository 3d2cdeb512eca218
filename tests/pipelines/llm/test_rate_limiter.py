"""The limiter on a clock of our own: whole minutes in a moment."""

import heapq
import random
from typing import Any

import pytest

from pipelines.llm.rate_limiter import RateLimiter, Usage
from pipelines.recipe.llm import Endpoint
from tests.pipelines.synthesize.serving import most_in_a_minute


def limiter(input_tokens: float = 100, output_tokens: float = 50, **limits: Any) -> RateLimiter:
    return RateLimiter(Endpoint(base_url="http://x/v1", **limits), input_tokens, output_tokens)


class Worker:
    """A worker that starts all it may, at random moments of its lease, and whose requests take a random time."""

    def __init__(self, name: str, seed: int, seconds: float) -> None:
        self.name, self.seconds, self.draw = name, seconds, random.Random(seed)
        self.starts: list[float] = []
        self.ends: list[float] = []
        self.unused = self.most = 0

    def renew(self, shared: RateLimiter, now: float, tokens: tuple[int, int]) -> float:
        finished = sum(end <= now for end in self.ends)
        self.ends = [end for end in self.ends if end > now]
        lease = shared.lease(
            self.name,
            Usage(
                len(self.ends),
                10_000,
                self.unused,
                finished,
                finished,
                (),
                0.0,
                finished * tokens[0],
                finished * tokens[1],
            ),
            now,
        )
        room = lease.max_in_flight - len(self.ends)
        allowed = room if lease.starts is None else lease.starts
        started = max(0, min(room, allowed))
        self.unused = 0 if lease.starts is None else allowed - started
        until = self.draw.uniform(0.2, 0.5)
        for _ in range(started):
            at = now + self.draw.uniform(0, until)
            self.starts.append(at)
            self.ends.append(at + self.draw.uniform(0.2, 1.8) * self.seconds)
        self.most = max(self.most, len(self.ends))
        return now + until


def simulate(
    shared: RateLimiter, workers: int, minutes: float, seconds: float, tokens: tuple[int, int] = (1, 1)
) -> list[float]:
    """The moments at which requests were started."""
    pool = [Worker(f"w{number}", number, seconds) for number in range(workers)]
    turns = [(0.01 * number, number) for number in range(workers)]
    while turns[0][0] < minutes * 60:
        now, number = heapq.heappop(turns)
        heapq.heappush(turns, (pool[number].renew(shared, now, tokens), number))
    return sorted(start for worker in pool for start in worker.starts)


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("per_minute", [7, 600, 12_000])
def test_no_sliding_minute_has_more_and_little_is_left_unused(workers: int, per_minute: int) -> None:
    shared = limiter(requests_per_minute=per_minute, max_in_flight=10_000)
    starts = simulate(shared, workers, minutes=4, seconds=1.0)
    assert most_in_a_minute(starts) <= per_minute
    assert len(starts) >= 0.97 * 4 * per_minute - 1


@pytest.mark.parametrize("workers", [1, 3])
def test_tokens_are_paced_by_what_requests_really_take(workers: int) -> None:
    shared = limiter(input_tokens=10, output_tokens=4000, output_tokens_per_minute=60_000, max_in_flight=1000)
    starts = simulate(shared, workers, minutes=6, seconds=1.0, tokens=(100, 200))
    later = [start for start in starts if start > 120]
    assert most_in_a_minute(later) * 200 <= 1.03 * 60_000
    assert len(later) / 4 * 200 >= 0.9 * 60_000


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_requests_in_flight_are_shared_and_bounded(workers: int) -> None:
    shared = limiter(max_in_flight=64)
    pool = [Worker(f"w{number}", number, 2.0) for number in range(workers)]
    most = 0
    for turn in range(400):
        for worker in pool:
            worker.renew(shared, turn * 0.3, (1, 1))
        most = max(most, sum(len(worker.ends) for worker in pool))
    assert most <= 64
    assert all(len(worker.ends) >= 0.5 * 64 / workers for worker in pool)


def test_a_worker_that_is_gone_frees_what_it_held() -> None:
    shared = limiter(max_in_flight=10)
    assert shared.lease("a", Usage(waiting=99), 0.0).max_in_flight == 10
    assert shared.lease("b", Usage(waiting=99), 0.1).max_in_flight == 0
    shared.release("a")
    assert shared.lease("b", Usage(waiting=99), 0.2).max_in_flight == 10


def test_the_window_doubles_shrinks_once_and_climbs_back() -> None:
    shared = limiter(max_in_flight=64, initial_in_flight=8)

    def window(now: float, answered: int = 0, refusals: tuple[float, ...] = ()) -> int:
        return shared.lease("a", Usage(0, 99, 0, answered, answered, refusals), now).max_in_flight

    assert window(0.0) == 8
    assert window(1.0, answered=8) == 16
    assert window(2.0, answered=60) == 64  # not above the setting
    assert window(3.0, refusals=(0.5, 0.4, 0.3)) == 64  # three of seventy are stray
    assert window(4.0, refusals=(0.5,) * 1000) == 32
    assert window(4.2, refusals=(0.9,) * 8) == 32  # sent before it shrank
    assert window(5.0, refusals=(0.1,) * 8) == 16
    assert [window(6.0 + turn, answered=1000) for turn in range(2)] == [64, 64]  # no more than the setting


def test_it_climbs_half_way_back_in_each_round() -> None:
    shared = limiter(max_in_flight=100)
    shared.lease("a", Usage(0, 99, 0, 0, 0, (0.1,) * 1000), 0.0)
    seen = [50.0]
    for turn in range(1, 9):
        shared.lease("a", Usage(0, 99, 0, round(shared.window), round(shared.window)), float(turn))
        seen.append(shared.window)
    assert seen == pytest.approx([50, 75, 87.5, 94.0, 97.0, 98.5, 99.5, 100, 100], abs=0.6)


def test_retry_after_is_waited_for() -> None:
    shared = limiter(max_in_flight=64)
    shared.lease("a", Usage(waiting=99), 0.0)
    assert shared.lease("a", Usage(waiting=99, refusals=(0.1,), pause=5.0), 1.0).max_in_flight == 0
    assert shared.lease("b", Usage(waiting=99), 5.9).max_in_flight == 0
    assert shared.lease("b", Usage(waiting=99), 6.0).max_in_flight > 0


class Endpoints:
    """Workers on a limiter before a server that refuses a share of what it is sent, and all above `most` at once."""

    def __init__(self, shared: RateLimiter, workers: int, stray: float = 0.0, most: int = 1 << 30) -> None:
        self.shared, self.stray, self.most, self.draw = shared, stray, most, random.Random(5)
        self.events: list[tuple[float, int, str, int, float]] = []
        self.allowed, self.in_flight, self.answered = [0] * workers, [0] * workers, [0] * workers
        self.refused: list[list[float]] = [[] for _ in range(workers)]
        self.held = self.answers = self.refusals = 0
        for worker in range(workers):
            self.later(0.01 * worker, "renew", worker)

    def later(self, at: float, kind: str, worker: int, sent: float = 0.0) -> None:
        heapq.heappush(self.events, (at, self.draw.getrandbits(60), kind, worker, sent))

    def start(self, worker: int, now: float) -> None:
        for _ in range(self.allowed[worker] - self.in_flight[worker] - len(self.refused[worker])):
            self.in_flight[worker] += 1
            if self.held >= self.most or self.draw.random() < self.stray:
                self.later(now + 0.01, "refused", worker, now)
            else:
                self.held += 1
                self.later(now + self.draw.uniform(0.6, 1.4), "answered", worker, now)

    def run(self, seconds: float) -> None:
        while self.events[0][0] < seconds:
            now, _, kind, worker, sent = heapq.heappop(self.events)
            if kind == "renew":
                done, refused = self.answered[worker], self.refused[worker]
                usage = Usage(self.in_flight[worker], 9999, 0, done, done, tuple(now - at for at in refused), 1.0)
                self.allowed[worker] = self.shared.lease(f"w{worker}", usage, now).max_in_flight
                self.answered[worker], self.refused[worker] = 0, []
                self.later(now + 0.05, "renew", worker)
            else:
                self.in_flight[worker] -= 1
                self.held -= kind == "answered"
                self.answered[worker] += kind == "answered"
                self.answers += kind == "answered"
                self.refusals += kind == "refused"
                self.refused[worker] += [sent] if kind == "refused" else []
            self.start(worker, now)


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("in_flight", [16, 256])
def test_stray_refusals_slow_nothing_down(workers: int, in_flight: int) -> None:
    endpoint = Endpoints(limiter(max_in_flight=in_flight), workers, stray=0.05)
    endpoint.run(120)
    assert endpoint.answers >= 0.9 * in_flight * 120  # each takes a second
    assert endpoint.refusals / (endpoint.refusals + endpoint.answers) == pytest.approx(0.05, abs=0.02)


@pytest.mark.parametrize("workers", [1, 4])
def test_a_real_limit_is_found_and_used(workers: int) -> None:
    endpoint = Endpoints(limiter(max_in_flight=256), workers, most=32)
    endpoint.run(240)
    assert endpoint.answers >= 0.75 * 32 * 240
    assert endpoint.refusals <= 0.4 * endpoint.answers


def test_an_endpoint_that_refuses_all_is_left_alone() -> None:
    endpoint = Endpoints(limiter(max_in_flight=64), 1, stray=1.0)
    endpoint.run(60)
    assert endpoint.shared.window == 1
    assert endpoint.refusals <= 64 + 2 * 60  # all places once, then one a second
