"""Processes that end with the process that started them, even when that one is killed with -9."""

import ctypes
import os
import signal

PARENT = "DANLU_PARENT_PID"
"""Environment variable in which a parent tells its child who it is."""

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel to kill this process, and every process it forks, when its parent ends (Linux, prctl(2)).

    The signal follows the parent's *thread*: the starter must be a thread that lives as long as the child.
    """
    _arm()
    os.register_at_fork(after_in_child=_arm)
    expected = os.environ.pop(PARENT, None)
    if expected is not None and os.getppid() != int(expected):
        os._exit(1)  # the parent was gone before the signal was armed


def _arm() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
