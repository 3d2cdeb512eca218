"""Adapters that running engines pick up: published as `<name>@<version>`, never changed, called by alias.

    registry/
      wishes@1/ wishes@2/      one immutable version each
      .aliases/wishes          a file that holds `wishes@2`
      .removed/wishes@1        versions that are gone; their numbers are not given again, since engines remember them
      .engine.json             what the engines take: base model, largest rank, and names that are taken

vLLM's filesystem resolver loads `registry/<name>@<version>` when it is first asked for, on every replica. An engine
that has no room for all adapters drops one and loads it again when a request needs it, and dies where it is not there:
the folder of a version outlives its removal by `KEEP_SECONDS`.
"""

import filecmp
import json
import os
import re
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from pipelines.artifacts.workspace import sync_folder
from pipelines.errors import DataError, InputError
from pipelines.models.adapter import CONFIG, WEIGHTS, check_adapter
from pipelines.models.served import BASE, folder_of_base, is_valid_name
from pipelines.recipe.serve import MAX_LORA_RANK

FILES = (CONFIG, WEIGHTS)
ENGINE = ".engine.json"
ALIASES = ".aliases"
REMOVED = ".removed"
KEEP_SECONDS = 3600.0
"""How long requests may still be at work with a version that was removed."""

VERSION = re.compile(r"([^@]+)@([1-9][0-9]*)")


@dataclass(frozen=True)
class AdapterEngine:
    """What the engines of a registry take: adapters of the model in the folder `base`, up to a rank.

    `names` are those of models that are served beside the adapters, which no adapter may have.
    """

    base: str
    max_lora_rank: int = MAX_LORA_RANK
    names: tuple[str, ...] = (BASE,)


def describe_engine(registry_dir: str | Path, engine: AdapterEngine) -> None:
    """Write what a registry's engines take, for those who publish; the endpoint does so before it starts."""
    registry = Path(registry_dir)
    registry.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=".", dir=registry)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(asdict(engine), file)
    os.replace(temporary, registry / ENGINE)
    for version in versions(registry):
        _follow(registry / version, Path(engine.base))


def _follow(version: Path, base: Path) -> None:
    """Name the engines' folder in a version whose base model was moved with the workspace, since vLLM compares them."""
    file = version / CONFIG
    config = json.loads(file.read_text(encoding="utf-8"))
    named = Path(str(config.get("base_model_name_or_path")))
    if named != base and named.name == base.name and named.parent.name == base.parent.name:
        config["base_model_name_or_path"] = str(base)
        descriptor, temporary = tempfile.mkstemp(prefix=".", dir=version)
        os.close(descriptor)
        _write(Path(temporary), json.dumps(config, indent=2).encode())
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)


def engine_of(registry_dir: str | Path) -> AdapterEngine | None:
    """What a registry's engines take; None where no endpoint has said so. Raises DataError for a damaged file."""
    file = Path(registry_dir) / ENGINE
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
        return AdapterEngine(str(described["base"]), int(described["max_lora_rank"]), tuple(described["names"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: cannot be read ({error}); danlu serve writes it anew") from None


def publish(adapter_dir: str | Path, registry_dir: str | Path, name: str, base: str | Path | None = None) -> str:
    """Copy an adapter into the registry as `name`'s next version and point the alias `name` at it.

    `base`: the served base model's folder; where it is not given, the one the registry's engines serve, or else the
    folder that the adapter's configuration names. Whether the adapter was trained on it is told by its matrices.
    Returns `<name>@<version>`. Readers see the whole version or nothing: it appears by one rename.
    Raises DataError when the adapter's files are not there or vLLM could not serve them, InputError for a name that
    cannot be served; the alias then stays where it points.
    """
    source, registry = Path(adapter_dir), Path(registry_dir)
    engine = engine_of(registry)
    _refuse_name(name, engine)
    _refuse_missing(source)
    folder = _base_folder(source, base, engine)
    check_adapter(source, folder, engine.max_lora_rank if engine else MAX_LORA_RANK)
    registry.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=".publishing-", dir=registry))
    try:
        _stage(source, staged, folder)
        version = _appear(staged, registry, name)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    _sweep(registry)
    set_alias(registry, name, version)
    return version


def publish_if_new(adapter_dir: str | Path, registry_dir: str | Path, name: str, base: str | Path | None = None) -> str:
    """Publish an adapter unless a version of `name` holds the same weights; returns the version.

    Where one does, the alias stays where it points, perhaps on purpose, to another version.
    """
    registry, weights = Path(registry_dir), Path(adapter_dir) / FILES[1]
    for version in reversed(versions(registry)):
        published, is_of_name = registry / version / FILES[1], version.startswith(f"{name}@")
        if is_of_name and weights.is_file() and published.is_file() and filecmp.cmp(weights, published, shallow=False):
            return version
    return publish(adapter_dir, registry_dir, name, base)


def _refuse_name(name: str, engine: AdapterEngine | None) -> None:
    if not is_valid_name(name) or "@" in name:
        raise InputError(f"{name!r}: not a name for an adapter; letters, digits, '.', '_' and '-' only")
    if name in (engine.names if engine else (BASE,)):
        raise InputError(f"{name!r}: a model that is served has this name; requests would never reach the adapter")


def _refuse_missing(source: Path) -> None:
    missing = [file for file in FILES if not (source / file).is_file()]
    if missing:
        raise DataError(f"{source}: no {', '.join(missing)}; an adapter folder holds {' and '.join(FILES)}")


def _base_folder(source: Path, base: str | Path | None, engine: AdapterEngine | None) -> Path:
    """The folder of the model that an adapter is published for; DataError where none is known."""
    if base is not None:
        return Path(base).resolve()
    if engine is not None:
        return Path(engine.base)
    config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    named = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if isinstance(named, str):
        for above in source.resolve().parents:  # the workspace that it lies in may have been moved
            if found := folder_of_base(Path(named), above):
                return found.resolve()
    raise DataError(f"{source}: trained on {named!r}, which is no folder here; name the served one: publish(…, base=…)")


def _stage(source: Path, staged: Path, base: Path) -> None:
    config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    # vLLM loads an adapter only where this equals the engine's model path
    config["base_model_name_or_path"] = str(base)
    _write(staged / CONFIG, json.dumps(config, indent=2).encode())
    _write(staged / WEIGHTS, (source / WEIGHTS).read_bytes())
    staged.chmod(0o755)
    sync_folder(str(staged))


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _appear(staged: Path, registry: Path, name: str) -> str:
    number = max(_numbers(registry, name) + _numbers(registry / REMOVED, name), default=0)
    while True:
        number += 1
        try:
            staged.rename(registry / f"{name}@{number}")
            sync_folder(str(registry))
        except OSError:
            if not (registry / f"{name}@{number}").exists():
                raise
            continue  # another publisher took the number; a rename never replaces a folder with files
        return f"{name}@{number}"


def _numbers(folder: Path, name: str) -> list[int]:
    found = (VERSION.fullmatch(path.name) for path in folder.glob(f"{name}@*"))
    return [int(match[2]) for match in found if match and match[1] == name]


def set_alias(registry_dir: str | Path, alias: str, version: str) -> None:
    """Let requests for `alias` go to `version` from now on.

    Raises InputError when that is not in the registry, or the alias is a name that something else has.
    """
    registry = Path(registry_dir)
    _refuse_name(alias, engine_of(registry))
    if version not in versions(registry):
        raise InputError(
            f"{registry}: cannot point {alias!r} at {version!r}; published: {', '.join(versions(registry))}"
        )
    folder = registry / ALIASES
    folder.mkdir(exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=".", dir=folder)
    with os.fdopen(descriptor, "w") as file:
        file.write(version)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / alias)
    sync_folder(str(folder))


def versions(registry_dir: str | Path) -> list[str]:
    """The versions in a registry, by name and number."""
    registry = Path(registry_dir)
    names = {path.parent.name for path in registry.glob(f"*@*/{CONFIG}")}
    names -= {path.name for path in registry.glob(f"{REMOVED}/*")}
    found = map(VERSION.fullmatch, names)
    ordered = sorted((match[1], int(match[2])) for match in found if match and is_valid_name(match[0]))
    return [f"{name}@{number}" for name, number in ordered]


def aliases(registry_dir: str | Path) -> dict[str, str]:
    """Each alias with the version it stands for; aliases of removed versions are left out."""
    folder = Path(registry_dir) / ALIASES
    names = [path for path in folder.glob("*") if is_valid_name(path.name)] if folder.is_dir() else []
    pointed = {path.name: path.read_bytes().decode(errors="replace") for path in names}
    present = set(versions(registry_dir))
    return {alias: version for alias, version in sorted(pointed.items()) if version in present}


def remove(registry_dir: str | Path, version: str) -> None:
    """Take a version out of the registry; requests that are being answered with it are not disturbed.

    Its folder is deleted by the first publishing or removal that comes `KEEP_SECONDS` later or after that.
    Raises InputError when it is not there, or an alias still points at it.
    """
    registry = Path(registry_dir)
    if version not in versions(registry):
        raise InputError(f"{registry}: no version {version!r}; published: {', '.join(versions(registry))}")
    pointing = [alias for alias, target in aliases(registry).items() if target == version]
    if pointing:
        raise InputError(f"{version}: the alias {pointing[0]!r} points at it; point it at another version first")
    (registry / REMOVED).mkdir(exist_ok=True)
    (registry / REMOVED / version).touch()
    _sweep(registry)


def _sweep(registry: Path) -> None:
    """Delete the folders of versions that were removed `KEEP_SECONDS` ago."""
    for tombstone in registry.glob(f"{REMOVED}/*"):
        if time.time() - tombstone.stat().st_mtime > KEEP_SECONDS:
            shutil.rmtree(registry / tombstone.name, ignore_errors=True)
