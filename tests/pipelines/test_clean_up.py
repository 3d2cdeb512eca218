"""Clean-up neither hangs nor hides why it was needed."""

import time

import pytest

from pipelines.clean_up import clean_up


def test_the_first_error_is_the_one_that_is_raised(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise TimeoutError("applications weren't deleted")

    def work() -> None:
        try:
            raise ValueError("the real cause")
        finally:
            clean_up("stopping engines", fail, 5)

    with pytest.raises(ValueError, match="the real cause") as caught:
        work()
    assert caught.value.__context__ is None
    assert "stopping engines: TimeoutError: applications weren't deleted" in capsys.readouterr().err


def test_what_hangs_is_left_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    clean_up("stopping Ray", lambda: time.sleep(30), 0.2)
    assert time.monotonic() - began < 5
    assert "stopping Ray: not done after 0.2 s; going on without it" in capsys.readouterr().err


def test_an_exit_in_a_clean_up_does_not_end_the_process(capsys: pytest.CaptureFixture[str]) -> None:
    def leave() -> None:
        raise SystemExit(15)

    clean_up("stopping Ray", leave, 5)
    assert "stopping Ray: SystemExit: 15" in capsys.readouterr().err
