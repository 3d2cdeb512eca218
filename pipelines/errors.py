"""What can go wrong, as one small family.

    DanluError                 exit 1
    ├── InputError             exit 2   what was given is wrong
    │   ├── RecipeError        exit 2   the recipe or the arguments: every problem at once
    │   └── DataError          exit 2   a file or a row: names file and row
    ├── HardwareError          exit 3   hardware that was asked for is missing
    └── StageError             exit 1   a stage began and could not finish

A message says what is wrong, where (file, key, row), and what to do. The command line prints these without
a traceback; any other exception is a bug and shows its traceback.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

TERMINATED = 143
"""Exit code of a process that SIGTERM ended, as shells have it."""
INTERRUPTED = 130
"""Exit code of a process that Ctrl-C ended."""


class DanluError(Exception):
    """Root of the family; the command line turns it into its exit code."""

    exit_code = 1


class InputError(DanluError):
    """The person's input is wrong; nothing was changed."""

    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a recipe: the dotted key it stands at, and what to do about it."""

    key: str
    message: str
    on_every_machine: bool = False
    """Whether nothing that another machine has would help, such as a package or a key; `danlu check` refuses then."""


class RecipeError(InputError):
    """All problems of one recipe or command line, reported together."""

    def __init__(self, where: str, problems: Sequence[Problem]) -> None:
        self.where = where
        self.problems = list(problems)
        count = len(self.problems)
        lines = [f"{where}: {count} problem{'' if count == 1 else 's'}"]
        lines += [f"  {p.key}: {p.message}" if p.key else f"  {p.message}" for p in self.problems]
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[type["RecipeError"], tuple[str, list[Problem]]]:
        return type(self), (self.where, self.problems)


class DataError(InputError):
    """A file or a row of the input cannot be used; the message names it."""


class HardwareError(DanluError):
    """Resources the recipe asks for are not there."""

    exit_code = 3


class StageError(DanluError):
    """A stage began and could not finish; what it finished is kept."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint naming the valid name closest to `name`, or listing the valid ones when none is close."""
    names = sorted(valid)
    close = get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(names)}"
