"""A server for every test that asks one."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.pipelines.synthesize.serving import Server, running


@pytest.fixture
def start_server() -> Iterator[Callable[..., Server]]:
    """Start servers that are stopped when the test ends."""
    with ExitStack() as stack:
        yield lambda delay=0.02, **faults: stack.enter_context(running(delay, faults))
