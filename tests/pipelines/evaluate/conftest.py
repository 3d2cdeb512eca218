"""A chat server for every test that asks one."""

from collections.abc import Iterator

import pytest

from tests.pipelines.evaluate.fake_endpoint import ChatServer, chat_server_running


@pytest.fixture
def chat_server() -> Iterator[ChatServer]:
    """A server of base, tiny and tiny-merged."""
    with chat_server_running() as server:
        yield server
