import os
import signal

import pytest

from pipelines.errors import DataError, StageError
from pipelines.models.subprocess_task import run_in_subprocess


def twice(number: int) -> int:
    return 2 * number


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wrong() -> None:
    raise DataError("row 3: broken")


@pytest.mark.usefixtures("ray_cluster")
def test_a_process_that_is_killed_and_one_that_refuses_say_so() -> None:
    assert run_in_subprocess(twice, 2) == 4
    with pytest.raises(StageError, match="killed: its process was killed, most likely for want of memory"):
        run_in_subprocess(killed)
    with pytest.raises(DataError, match="row 3: broken"):
        run_in_subprocess(wrong)
