"""Clean-up that takes a bounded time and never hides why it was needed."""

import threading
from collections.abc import Callable

from pipelines.progress import say

QUIET_SECONDS = 2.0
"""After which it is said what is waited for."""


def clean_up(what: str, end: Callable[[], object], seconds: float) -> None:
    """Call `end`, and wait for it so many seconds at most.

    What goes wrong is said, as `what`, and not raised: an error that is on its way is the one that counts.
    """
    wrong: list[BaseException] = []

    def attempt() -> None:
        try:
            end()
        except BaseException as error:
            wrong.append(error)

    thread = threading.Thread(target=attempt, name=what, daemon=True)  # one that hangs does not keep the process
    thread.start()
    thread.join(min(QUIET_SECONDS, seconds))
    if thread.is_alive():
        say(f"{what} …")
        thread.join(seconds - min(QUIET_SECONDS, seconds))
    if thread.is_alive():
        say(f"{what}: not done after {seconds:g} s; going on without it")
    elif wrong:
        say(f"{what}: {type(wrong[0]).__name__}: {wrong[0]}")
