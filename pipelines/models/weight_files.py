"""The weight files of a model or adapter folder: which are loaded, and what their headers say."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from pipelines.errors import Problem, RecipeError

STEMS = ("model.safetensors", "adapter_model.safetensors", "pytorch_model.bin")
"""One file that holds all weights, in the order that transformers looks for them; each may be an index instead."""

SAID = 300
"""How many characters of another program's message are passed on."""


@dataclass(frozen=True)
class WeightHeader:
    """What a safetensors file says of one weight."""

    shape: list[int]
    dtype: str
    """As safetensors writes it, such as BF16."""


def weight_files(folder: Path) -> list[Path]:
    """The files that are loaded: the one that has all weights, or those of an index; not copies beside them.

    Several files without an index are those of a family that is converted; see convert.py. RecipeError where a file
    that the index names is not there.
    """
    for stem in STEMS:
        if (folder / stem).is_file():
            return [folder / stem]
        index = folder / f"{stem}.index.json"
        if index.is_file():
            names = _names_in(index)
            lacking = [name for name in names if not (folder / name).is_file()]
            if lacking:
                more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
                raise broken_model(f"{folder} lacks {lacking[0]}{more}, which {index.name} names; fetch it again")
            return [folder / name for name in names]
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def _names_in(index: Path) -> list[str]:
    """The files that an index names, which lie beside it."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if all(Path(name).name == name for name in names):
            return sorted(names)
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    raise broken_model(f"{index} is no index of weight files; fetch it again")


def has_main_file(folder: Path) -> bool:
    """Whether a folder has the file, or the index of files, that loading begins at."""
    return any((folder / name).is_file() for stem in STEMS for name in (stem, f"{stem}.index.json"))


def weight_headers(folder: Path) -> dict[str, WeightHeader]:
    """Each weight by its name, from the headers of the files; nothing is loaded.

    RecipeError where a file is not of its kind, or ends before its last weight, or two files hold one weight.
    """
    headers: dict[str, WeightHeader] = {}
    files: dict[str, Path] = {}
    for path in weight_files(folder):
        found = _header(path) if path.suffix == ".safetensors" else _pickled_header(path)
        if twice := sorted(found.keys() & headers.keys()):
            raise broken_model(
                f"{folder}: {files[twice[0]].name} and {path.name} both hold {twice[0]}; which is loaded is chance; "
                "fetch the model again"
            )
        headers |= found
        files |= dict.fromkeys(found, path)
    return headers


def weight_shapes(folder: Path) -> dict[str, list[int]]:
    """The shape of each weight by its name in the files; nothing is loaded."""
    return {name: header.shape for name, header in weight_headers(folder).items()}


def broken_model(message: str) -> RecipeError:
    """The refusal of a model that no other machine could train either."""
    return RecipeError("the recipe", [Problem("train.model", message, on_every_machine=True)])


def read_weights(folder: Path) -> dict[str, Any]:
    """Each weight by its name; files are mapped into memory, so that what is not used is not read."""
    import torch
    from safetensors import safe_open

    weights: dict[str, Any] = {}
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                weights |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
        else:
            weights |= torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    return weights


@cache
def torch_dtypes() -> dict[str, Any]:
    """Torch's dtypes by safetensors' names."""
    import torch

    return {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E8M0": torch.float8_e8m0fnu,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }


def _header(path: Path) -> dict[str, WeightHeader]:
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            if length > size:
                raise ValueError
            entries: dict[str, Any] = json.loads(stream.read(length))
            entries.pop("__metadata__", None)
            headers = {name: WeightHeader(entry["shape"], entry["dtype"]) for name, entry in entries.items()}
            end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        except (ValueError, TypeError, AttributeError, LookupError):
            raise broken_model(f"{path} is no safetensors file; fetch it again, with Git LFS if by git") from None
    if size < end:
        raise broken_model(f"{path} ends after {size} of {end} bytes; fetch it again")
    if size > end:
        raise broken_model(f"{path} has {size} bytes, and its header speaks of {end}; fetch it again")
    return headers


def _pickled_header(path: Path) -> dict[str, WeightHeader]:
    """The same of a file of PyTorch's own; code in it is not run."""
    import torch

    try:
        weights = torch.load(path, map_location="meta", weights_only=True, mmap=is_zipfile(path))
        names = {dtype: name for name, dtype in torch_dtypes().items()}
        return {name: WeightHeader(list(w.shape), names.get(w.dtype, str(w.dtype))) for name, w in weights.items()}
    except Exception as error:  # what PyTorch raises over a file depends on the file
        raise broken_model(
            f"{path} is no file of weights alone ({type(error).__name__}); fetch it again, or give safetensors"
        ) from None
