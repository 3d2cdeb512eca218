"""Processes that end with the process that started them, even when that one is killed with -9."""

import ctypes
import os
import signal

PARENT = "DANLU_PARENT_PID"
"""Environment variable in which a parent tells its child who it is."""

_PR_SET_PDEATHSIG = 1


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
