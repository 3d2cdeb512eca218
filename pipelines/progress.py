"""Progress of anything that takes longer than two seconds: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

console = Console(stderr=True, highlight=False)

LOG_INTERVAL = 10.0
"""Seconds between progress lines where there is no terminal."""
STEADY_INTERVAL = 30.0
"""The same for work that takes hours."""


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
        yield
    say(f"  {title}: {time.monotonic() - began:.1f} s")


def say(text: str) -> None:
    """One line for the person, on standard error, so that standard output stays for results."""
    console.print(text, markup=False, soft_wrap=True)
    sys.stderr.flush()


@contextmanager
def steady_line() -> Iterator[Callable[[str], None]]:
    """Show one line that changes; yields a function that takes its text. Without a terminal, a line every 30 s."""
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
