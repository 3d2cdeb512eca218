"""Something that goes on in a thread while the work is done."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def beside(meanwhile: Callable[[threading.Event], None]) -> Iterator[None]:
    """While this is open `meanwhile` runs in a thread. It returns soon after its event is set, and is waited for."""
    ended = threading.Event()
    thread = threading.Thread(target=meanwhile, args=(ended,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
