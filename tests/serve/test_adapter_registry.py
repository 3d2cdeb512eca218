"""Publishing adapters: versions, aliases, and what is refused."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from pipelines.errors import DataError, InputError
from serve.adapter_registry import (
    AdapterEngine,
    aliases,
    describe_engine,
    engine_of,
    publish,
    publish_if_new,
    remove,
    set_alias,
    versions,
)
from tests.small_adapter import matrices, write_adapter, write_model


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    for name in ("b", "base", "x"):
        write_model(tmp_path / name)
    folder = write_adapter(tmp_path / "adapter", tmp_path / "x/../b")
    (folder / "optimizer.pt").write_bytes(b"not served")
    return folder


def train_on(adapter: Path, seed: int = 1) -> None:
    """Give an adapter other weights."""
    save_file(matrices(seed=seed), adapter / "adapter_model.safetensors")


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
    train_on(adapter)
    assert publish_if_new(adapter, registry, "a") == "a@2"
    set_alias(registry, "a", "a@1")
    assert publish_if_new(adapter, registry, "a") == "a@2"
    assert aliases(registry) == {"a": "a@1"}  # it was set back on purpose


def test_the_folder_of_a_removed_version_stays_for_the_requests_that_need_it(adapter: Path, tmp_path: Path) -> None:
    registry = tmp_path / "r"
    publish(adapter, registry, "a")
    publish(adapter, registry, "b")
    train_on(adapter)
    publish(adapter, registry, "a")
    remove(registry, "a@1")
    assert (registry / "a@1" / "adapter_model.safetensors").is_file()
    os.utime(registry / ".removed" / "a@1", (0, 0))
    assert publish(adapter, registry, "a") == "a@3"
    assert sorted(path.name for path in registry.glob("*@*")) == ["a@2", "a@3", "b@1"]


def test_weights_that_were_removed_are_published_anew(adapter: Path, tmp_path: Path) -> None:
    registry = tmp_path / "r"
    assert [publish_if_new(adapter, registry, name) for name in ("a", "ab", "a")] == ["a@1", "ab@1", "a@1"]
    train_on(adapter)
    assert publish_if_new(adapter, registry, "a") == "a@2"
    remove(registry, "a@1")
    train_on(adapter, 0)
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
    assert not (tmp_path / "r").exists()
    with pytest.raises(InputError, match="cannot point 'a' at 'a@1'"):
        set_alias(tmp_path / "r", "a", "a@1")


def test_an_adapter_trained_elsewhere_is_published_for_the_model_that_is_served(adapter: Path, tmp_path: Path) -> None:
    registry = tmp_path / "r"
    foreign = write_adapter(tmp_path / "foreign", "HuggingFaceTB/SmolLM2-135M", seed=3)
    with pytest.raises(DataError, match="'HuggingFaceTB/SmolLM2-135M', which is no folder here; name the served one"):
        publish(foreign, registry, "mine")
    describe_engine(registry, AdapterEngine(str(tmp_path / "base"), 64, ("base", "merged")))
    assert publish(foreign, registry, "mine") == "mine@1"
    config = json.loads((registry / "mine@1" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    moved = write_adapter(tmp_path / "moved", "/old/place/of/the/workspace/models/base")
    assert publish(moved, registry, "mine") == "mine@2"


def test_what_could_not_be_served_is_refused_and_the_alias_stays(adapter: Path, tmp_path: Path) -> None:
    registry = tmp_path / "r"
    describe_engine(registry, AdapterEngine(str(tmp_path / "base"), 8))
    publish(adapter, registry, "a")
    for config, reason in (
        ({"use_dora": True}, "use_dora"),
        ({"rank": 16}, "the engine has room for 8"),
        ({"r": 2}, "matrices of rank 4 and 4, and r is 2"),
    ):
        with pytest.raises(DataError, match=reason):
            publish(write_adapter(tmp_path / "bad", tmp_path / "base", **config), registry, "a")
    assert (versions(registry), aliases(registry)) == (["a@1"], {"a": "a@1"})
    assert not list(registry.glob(".publishing-*"))


@pytest.mark.parametrize("name", ["base", "merged", "sft"])
def test_names_of_served_models_are_not_given_to_adapters(adapter: Path, tmp_path: Path, name: str) -> None:
    registry = tmp_path / "r"
    describe_engine(registry, AdapterEngine(str(tmp_path / "base"), 64, ("base", "merged", "sft")))
    publish(adapter, registry, "a")
    with pytest.raises(InputError, match="a model that is served has this name"):
        publish(adapter, registry, name)
    with pytest.raises(InputError, match="a model that is served has this name"):
        set_alias(registry, name, "a@1")
    assert (versions(registry), aliases(registry)) == (["a@1"], {"a": "a@1"})


def test_the_models_own_name_is_taken_where_no_endpoint_has_said_so(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a model that is served has this name"):
        publish(adapter, tmp_path / "r", "base")


@pytest.mark.parametrize("alias", ["a@2", "a/b", ".a", ""])
def test_an_alias_is_no_version_and_no_path(adapter: Path, tmp_path: Path, alias: str) -> None:
    publish(adapter, tmp_path / "r", "a")
    with pytest.raises(InputError, match="not a name for an adapter"):
        set_alias(tmp_path / "r", alias, "a@1")


@pytest.mark.parametrize("content", ["", "{}", '{"base": "x", "max_lora_rank": "many", "names": []}'])
def test_a_damaged_description_of_the_engines_is_told(adapter: Path, tmp_path: Path, content: str) -> None:
    registry = tmp_path / "r"
    describe_engine(registry, AdapterEngine("x"))
    assert engine_of(registry) == AdapterEngine("x")
    (registry / ".engine.json").write_text(content)
    with pytest.raises(DataError, match="cannot be read"):
        publish(adapter, registry, "a")


def test_a_version_whose_alias_is_damaged_is_still_listed(adapter: Path, tmp_path: Path) -> None:
    registry = tmp_path / "r"
    publish(adapter, registry, "a")
    (registry / ".aliases" / "b").write_bytes(b"\xff\xfe")
    assert (versions(registry), aliases(registry)) == (["a@1"], {"a": "a@1"})
