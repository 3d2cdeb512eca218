"""The limiter on a clock of our own: whole minutes in a moment."""

import heapq
import random
from typing import Any

import pytest

from pipelines.synthesize.limiter import Limiter, Usage
from pipelines.synthesize.section import Endpoint


def limiter(input_tokens: float = 100, output_tokens: float = 50, **limits: Any) -> Limiter:
    return Limiter(Endpoint(base_url="http://x/v1", **limits), input_tokens, output_tokens)


class Worker:
    """A worker that starts all it may, at random moments of its lease, and whose requests take a random time."""

    def __init__(self, name: str, seed: int, seconds: float) -> None:
        self.name, self.seconds, self.draw = name, seconds, random.Random(seed)
        self.starts: list[float] = []
        self.ends: list[float] = []
        self.unused = self.most = 0

    def renew(self, shared: Limiter, now: float, tokens: tuple[int, int]) -> float:
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
    shared: Limiter, workers: int, minutes: float, seconds: float, tokens: tuple[int, int] = (1, 1)
) -> list[float]:
    """The moments at which requests were started."""
    pool = [Worker(f"w{number}", number, seconds) for number in range(workers)]
    turns = [(0.01 * number, number) for number in range(workers)]
    while turns[0][0] < minutes * 60:
        now, number = heapq.heappop(turns)
        heapq.heappush(turns, (pool[number].renew(shared, now, tokens), number))
    return sorted(start for worker in pool for start in worker.starts)


def most_in_a_minute(starts: list[float]) -> int:
    first = most = 0
    for last, at in enumerate(starts):
        while starts[first] < at - 60:
            first += 1
        most = max(most, last - first + 1)
    return most


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
    shared.forget("a")
    assert shared.lease("b", Usage(waiting=99), 0.2).max_in_flight == 10


def test_the_window_doubles_halves_once_and_grows_slowly() -> None:
    shared = limiter(max_in_flight=64, initial_in_flight=8)
    lease = shared.lease("a", Usage(waiting=99), 0.0)
    assert lease.max_in_flight == 8
    lease = shared.lease("a", Usage(waiting=99, answered=8), 1.0)
    assert lease.max_in_flight == 16
    lease = shared.lease("a", Usage(waiting=99, answered=60), 2.0)
    assert lease.max_in_flight == 64  # not above the setting
    lease = shared.lease("a", Usage(waiting=99, refusals=(0.5, 0.4, 0.3)), 3.0)
    assert lease.max_in_flight == 32
    lease = shared.lease("a", Usage(waiting=99, refusals=(0.9,)), 3.2)
    assert lease.max_in_flight == 32  # sent before the decrease
    lease = shared.lease("a", Usage(waiting=99, refusals=(0.1,)), 3.6)
    assert lease.max_in_flight == 16
    lease = shared.lease("a", Usage(waiting=99, answered=32), 5.0)
    assert lease.max_in_flight == 18


def test_retry_after_is_waited_for() -> None:
    shared = limiter(max_in_flight=64)
    shared.lease("a", Usage(waiting=99), 0.0)
    assert shared.lease("a", Usage(waiting=99, refusals=(0.1,), pause=5.0), 1.0).max_in_flight == 0
    assert shared.lease("b", Usage(waiting=99), 5.9).max_in_flight == 0
    assert shared.lease("b", Usage(waiting=99), 6.0).max_in_flight > 0


def test_stray_refusals_hardly_count() -> None:
    shared = limiter(max_in_flight=64)
    draw = random.Random(3)
    smallest = 64
    for turn in range(2000):
        refusals = tuple(0.1 for _ in range(5) if draw.random() < 0.05)
        finished = 5 - len(refusals)
        usage = Usage(20, 99, 0, finished, finished, refusals, 1.0 if refusals else 0.0)
        smallest = min(smallest, shared.lease("a", usage, 0.2 * turn).max_in_flight)
    assert smallest >= 8
    for turn in range(2000, 2010):  # and when it refuses everything
        lease = shared.lease("a", Usage(20, 99, 0, 0, 0, (0.1,) * 5, 1.0), 0.2 * turn)
    assert lease.max_in_flight == 0
