"""Publishing adapters: versions, aliases, and what is refused."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipelines.errors import DataError, InputError
from serve.adapter_registry import aliases, publish, publish_if_new, remove, set_alias, versions


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({"r": 8, "base_model_name_or_path": str(tmp_path / "a/../b")})
    )
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "optimizer.pt").write_bytes(b"not served")
    return folder


def test_a_version_holds_the_adapter_with_the_base_path_that_engines_use(adapter: Path, tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    assert publish(adapter, registry, "wishes", base=tmp_path / "x" / ".." / "base") == "wishes@1"
    assert publish(adapter, registry, "wishes") == "wishes@2"
    assert sorted(path.name for path in (registry / "wishes@1").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    configs = [json.loads((registry / v / "adapter_config.json").read_text()) for v in ("wishes@1", "wishes@2")]
    assert [c["base_model_name_or_path"] for c in configs] == [str(tmp_path / "base"), str(tmp_path / "b")]
    assert versions(registry) == ["wishes@1", "wishes@2"]
    assert aliases(registry) == {"wishes": "wishes@2"}
    assert not list(registry.glob(".publishing-*"))


def test_publishers_at_the_same_time_get_numbers_of_their_own(adapter: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        published = list(pool.map(lambda _: publish(adapter, tmp_path / "r", "a"), range(16)))
    assert sorted(published) == sorted(f"a@{n}" for n in range(1, 17))
    assert versions(tmp_path / "r")[-1] == "a@16"


def test_a_removed_version_is_gone_and_its_number_is_not_given_again(adapter: Path, tmp_path: Path) -> None:
    registry = tmp_path / "r"
    publish(adapter, registry, "a")
    publish(adapter, registry, "a")
    with pytest.raises(InputError, match="the alias 'a' points at it"):
        remove(registry, "a@2")
    set_alias(registry, "a", "a@1")
    remove(registry, "a@2")
    assert (versions(registry), aliases(registry)) == (["a@1"], {"a": "a@1"})
    with pytest.raises(InputError, match="cannot point 'a' at 'a@2'; published: a@1"):
        set_alias(registry, "a", "a@2")
    assert publish(adapter, registry, "a") == "a@3"
    with pytest.raises(InputError, match="no version 'a@2'; published: a@1, a@3"):
        remove(registry, "a@2")


def test_the_same_weights_are_not_published_twice(adapter: Path, tmp_path: Path) -> None:
    registry = tmp_path / "r"
    assert [publish_if_new(adapter, registry, "a") for _ in range(2)] == ["a@1", "a@1"]
    (adapter / "adapter_model.safetensors").write_bytes(b"trained on")
    assert publish_if_new(adapter, registry, "a") == "a@2"
    set_alias(registry, "a", "a@1")
    assert publish_if_new(adapter, registry, "a") == "a@2"
    assert aliases(registry) == {"a": "a@1"}  # it was set back on purpose


def test_the_folder_of_a_removed_version_stays_for_the_requests_that_need_it(adapter: Path, tmp_path: Path) -> None:
    registry = tmp_path / "r"
    publish(adapter, registry, "a")
    publish(adapter, registry, "b")
    (adapter / "adapter_model.safetensors").write_bytes(b"trained on")
    publish(adapter, registry, "a")
    remove(registry, "a@1")
    assert (registry / "a@1" / "adapter_model.safetensors").read_bytes() == b"weights"
    os.utime(registry / ".removed" / "a@1", (0, 0))
    assert publish(adapter, registry, "a") == "a@3"
    assert sorted(path.name for path in registry.glob("*@*")) == ["a@2", "a@3", "b@1"]


def test_weights_that_were_removed_are_published_anew(adapter: Path, tmp_path: Path) -> None:
    registry = tmp_path / "r"
    assert [publish_if_new(adapter, registry, name) for name in ("a", "ab", "a")] == ["a@1", "ab@1", "a@1"]
    (adapter / "adapter_model.safetensors").write_bytes(b"trained on")
    assert publish_if_new(adapter, registry, "a") == "a@2"
    remove(registry, "a@1")
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    assert publish_if_new(adapter, registry, "a") == "a@3"


@pytest.mark.parametrize("name", ["", "a/b", "..", "a..b", ".hidden", "a@1", "a:b", "ä"])
def test_names_that_would_leave_the_registry_are_refused(adapter: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="not a name for an adapter"):
        publish(adapter, tmp_path / "r", name)
    assert not (tmp_path / "r").exists()


def test_a_folder_without_weights_is_refused_and_leaves_nothing(adapter: Path, tmp_path: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(DataError, match=r"no adapter_model\.safetensors"):
        publish(adapter, tmp_path / "r", "a")
    assert list((tmp_path / "r").iterdir()) == []
    with pytest.raises(InputError, match="cannot point 'a' at 'a@1'"):
        set_alias(tmp_path / "r", "a", "a@1")
