"""API keys from the environment and from a file of hashes."""

import hashlib
from pathlib import Path

import pytest

from pipelines.errors import RecipeError
from serve.guard import Allowance, Keys, key_hashes


def test_keys_come_from_the_environment_and_from_a_file_of_hashes(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    digest = hashlib.sha256(b"third").hexdigest()
    file.write_text(f"# the team's\n\n{digest}  # Li\n")
    hashes = key_hashes({"DANLU_API_KEYS": "first, second", "DANLU_API_KEYS_FILE": str(file)})
    assert hashes == tuple(hashlib.sha256(key).digest() for key in (b"first", b"second", b"third"))
    assert Keys(hashes).check([(b"authorization", b"bearer third")]) == digest
    assert key_hashes({}) == ()


def test_a_line_that_is_no_hash_is_named_without_being_shown(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{'0' * 64}\na-plain-key\n{'0' * 63}\n")
    with pytest.raises(RecipeError) as raised:
        key_hashes({"DANLU_API_KEYS_FILE": str(file)})
    assert [problem.key for problem in raised.value.problems] == ["line 2", "line 3"]
    assert "a-plain-key" not in str(raised.value)


def test_an_allowance_refills_evenly_and_pays_debts_later() -> None:
    bucket = Allowance(per_minute=60)
    bucket.take(90)
    assert bucket.wait(1) == pytest.approx(31, abs=0.5)
    bucket.at -= 31
    assert bucket.wait(1) == 0
