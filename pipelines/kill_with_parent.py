"""Child processes: they import the danlu that runs here, and end with their parent, even when it is killed with -9."""

import ctypes
import os
import signal
from pathlib import Path

PARENT = "DANLU_PARENT_PID"
"""Environment variable in which a parent tells its child who it is."""

_PR_SET_PDEATHSIG = 1


def child_environment() -> dict[str, str]:
    """This process's environment for a Python child, which then imports the danlu that runs here.

    Commands say `-P` besides: the current folder is not on the child's path, since it may hold packages of other people
    that are called `pipelines` or `serve`. The variable does the same for what the child itself starts.
    """
    path = [*import_path(), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = {"PYTHONPATH": os.pathsep.join(path)} if path else {}
    return {**os.environ, **found, "PYTHONSAFEPATH": "1"}


def import_path() -> list[str]:
    """The folder of a checkout that this danlu is imported from; nothing where it is installed as packages are."""
    folder = Path(__file__).resolve().parents[1]
    return [] if folder.name in ("site-packages", "dist-packages") else [str(folder)]


def arm() -> None:
    """Ask the kernel to kill this process when its parent ends (Linux, prctl(2)).

    The signal follows the parent's *thread*: the starter must be a thread that lives as long as the child.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def die_with_parent() -> None:
    """Arm this process, and every process it forks; end at once where the parent is gone already."""
    arm()
    os.register_at_fork(after_in_child=arm)
    expected = os.environ.pop(PARENT, None)
    if expected is not None and os.getppid() != int(expected):
        os._exit(1)  # the parent was gone before the signal was armed
