"""Progress of anything that takes longer than two seconds: a bar on a terminal, a line now and then elsewhere."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class _Console(Console):
    def on_broken_pipe(self) -> None:
        self.quiet = True  # nobody reads any more, which is no reason to end the work, or a clean-up, here


console = _Console(stderr=True, highlight=False)

LOG_INTERVAL = 10.0
"""Seconds between progress lines where there is no terminal."""
STEADY_INTERVAL = 15.0
"""Seconds after which a line is said at the latest where there is no terminal, whatever is waited for."""

_going_on: list[object] = []
_last_said = 0.0


@contextmanager
def progress(title: str, total: int | None, unit: str, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show how far a piece of work is; yields a function that is called with the amount just done."""
    if console.is_terminal:
        with _bar(title, total, unit, done) as advance:
            yield advance
        return
    state = {"done": done, "said": time.monotonic()}

    def log(amount: int) -> None:
        state["done"] += amount
        if time.monotonic() - state["said"] >= LOG_INTERVAL:
            state["said"] = time.monotonic()
            say(f"  {title}: {state['done']}{f'/{total}' if total else ''} {unit}")

    yield log


@contextmanager
def _bar(title: str, total: int | None, unit: str, done: int) -> Iterator[Callable[[int], None]]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=total, completed=done)
        yield lambda amount: bar.advance(task, amount)


@contextmanager
def waiting(title: str) -> Iterator[None]:
    """Show that something of unknown length goes on, and how long it has taken."""
    began = time.monotonic()
    if console.is_terminal:
        with console.status(title):
            yield
    else:
        say(f"  {title} …")
        with never_silent(title):
            yield
    say(f"  {title}: {time.monotonic() - began:.1f} s")


@contextmanager
def never_silent(title: str) -> Iterator[None]:
    """Where there is no terminal, say how long something has taken each time nothing was said for STEADY_INTERVAL.

    Of several that are open, the innermost speaks.
    """
    if console.is_terminal:
        yield
        return
    began, ended, this = time.monotonic(), threading.Event(), object()

    def watch() -> None:
        while not ended.wait(STEADY_INTERVAL / 15):
            now = time.monotonic()
            if _going_on[-1] is this and now - max(began, _last_said) >= STEADY_INTERVAL:
                say(f"  {title}: {now - began:.0f} s so far")

    thread = threading.Thread(target=watch, name=f"say {title}", daemon=True)
    _going_on.append(this)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        _going_on.remove(this)


def say(text: str) -> None:
    """One line for the person, on standard error, so that standard output stays for results.

    Where it cannot be written (a full disk, a terminal that is gone), it is not: what is at work here counts for more.
    """
    global _last_said
    _last_said = time.monotonic()
    with suppress(OSError, ValueError, AttributeError):  # the last two: it was closed, or from the beginning
        console.print(text, markup=False, soft_wrap=True)
        sys.stderr.flush()


@contextmanager
def steady_line() -> Iterator[Callable[[str], None]]:
    """Show one line that changes; yields a function that takes its text. Without a terminal, a line now and then."""
    if console.is_terminal:
        with console.status("") as status:
            yield status.update
        return
    said = time.monotonic()

    def log(text: str) -> None:
        nonlocal said
        if time.monotonic() - said >= STEADY_INTERVAL:
            said = time.monotonic()
            say(text)

    yield log
