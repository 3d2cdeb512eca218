import os
import signal

import pytest

from pipelines.errors import DataError, StageError
from pipelines.models.subprocess_task import in_own_process


def twice(number: int) -> int:
    return 2 * number


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wrong() -> None:
    raise DataError("row 3: broken")


@pytest.mark.usefixtures("ray_cluster")
def test_a_process_that_is_killed_and_one_that_refuses_say_so() -> None:
    assert in_own_process(twice, 2) == 4
    with pytest.raises(StageError, match="killed: its process was killed, most likely for want of memory"):
        in_own_process(killed)
    with pytest.raises(DataError, match="row 3: broken"):
        in_own_process(wrong)
