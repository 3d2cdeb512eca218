"""API keys from the environment and from a file of hashes."""

import hashlib
from pathlib import Path

import pytest

from pipelines.errors import RecipeError
from pipelines.recipe.serve import Serve
from serve.auth import ApiKeys, environment_keys, key_hashes


def test_keys_come_from_the_environment_and_from_a_file_of_hashes(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    digest = hashlib.sha256(b"third").hexdigest()
    file.write_text(f"# the team's\n\n{digest}  # Li\n")
    hashes = key_hashes({"DANLU_API_KEYS": "first, second", "DANLU_API_KEYS_FILE": str(file)})
    assert hashes == tuple(hashlib.sha256(key).digest() for key in (b"first", b"second", b"third"))
    assert ApiKeys(hashes).check([(b"authorization", b"bearer third")]) == digest
    assert key_hashes({}) == ()


def test_a_file_that_sha256sum_wrote_is_read(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"key").hexdigest()
    (tmp_path / "keys").write_text(f"{digest}  -\n{digest} *key file.txt\n", encoding="utf-8")
    assert key_hashes({"DANLU_API_KEYS_FILE": str(tmp_path / "keys")}) == (bytes.fromhex(digest),) * 2


def test_a_line_that_is_no_hash_is_named_without_being_shown(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{'0' * 64}\na-plain-key\n{'0' * 63}\n")
    with pytest.raises(RecipeError) as raised:
        key_hashes({"DANLU_API_KEYS_FILE": str(file)})
    assert [problem.key for problem in raised.value.problems] == ["line 2", "line 3"]
    assert "a-plain-key" not in str(raised.value)


@pytest.mark.parametrize("value", ["", ",", " , "])
def test_a_variable_that_yields_no_key_is_an_error(value: str) -> None:
    with pytest.raises(RecipeError, match="DANLU_API_KEYS: set, but it yields no key"):
        key_hashes({"DANLU_API_KEYS": value})


@pytest.mark.parametrize("content", ["", "# all gone\n\n  # these too\n"])
def test_a_file_that_yields_no_key_is_an_error_even_beside_other_keys(tmp_path: Path, content: str) -> None:
    file = tmp_path / "keys"
    file.write_text(content)
    with pytest.raises(RecipeError, match="DANLU_API_KEYS_FILE: set, but it yields no key"):
        key_hashes({"DANLU_API_KEYS": "k", "DANLU_API_KEYS_FILE": str(file)})


def test_a_file_that_cannot_be_read_is_named_without_a_traceback(tmp_path: Path) -> None:
    for file, reason in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(RecipeError, match=f"DANLU_API_KEYS_FILE: {file}: {reason}"):
            key_hashes({"DANLU_API_KEYS_FILE": str(file)})
    with pytest.raises(RecipeError, match="DANLU_API_KEYS_FILE"):
        key_hashes({"DANLU_API_KEYS_FILE": ""})
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="line 1: not a SHA-256"):
        key_hashes({"DANLU_API_KEYS_FILE": str(tmp_path / "bytes")})


def test_an_address_that_others_reach_needs_keys_or_the_recipe_s_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DANLU_API_KEYS", raising=False)
    monkeypatch.delenv("DANLU_API_KEYS_FILE", raising=False)
    assert environment_keys(Serve()) == environment_keys(Serve(host="0.0.0.0", open=True)) == ()
    with pytest.raises(RecipeError, match=r"serve\.host: others reach 0\.0\.0\.0.*serve\.open: true"):
        environment_keys(Serve(host="0.0.0.0"))
    monkeypatch.setenv("DANLU_API_KEYS", "k")
    assert environment_keys(Serve(host="0.0.0.0")) == (hashlib.sha256(b"k").digest(),)
