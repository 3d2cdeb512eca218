"""Base models: from a folder, a hub, or a Python package that carries a GGUF file, to a Hugging Face folder."""

import base64
import hashlib
import importlib.metadata
import json
import os
import re
from pathlib import Path
from typing import Any

from pipelines.errors import InputError, Problem, RecipeError, StageError
from pipelines.models import convert
from pipelines.models.cache import made_once
from pipelines.models.quiet import quiet_transformers
from pipelines.models.save_tokenizer import save_tokenizer
from pipelines.models.skeleton import config_of, rewriting_of, text_config, write_plain
from pipelines.models.subprocess_task import run_in_subprocess
from pipelines.progress import waiting

PYPI, HUGGINGFACE, MODELSCOPE = "pypi://", "hf://", "modelscope://"
SAMPLED_BLOCKS, BLOCK_BYTES = 16, 1 << 16
"""How much of a weight file its digest reads: evenly spaced blocks, so that a 15 GB folder costs milliseconds."""

LENGTHS = ("max_position_embeddings", "seq_length", "n_positions")
"""What configurations call the longest sequence; the last is GPT-2's."""


def resolve(model: str, cache: Path) -> Path:
    """The Hugging Face folder of a model, fetched or converted into `cache` the first time.

    `model` is a folder, `hf://NAME`, `modelscope://NAME` or `pypi://PACKAGE`; see convert.py for the families that are
    converted. InputError where it cannot be had.
    """
    if model.startswith(PYPI):
        return _from_package(model.removeprefix(PYPI), cache)
    if model.startswith((HUGGINGFACE, MODELSCOPE)):
        return _converted(_from_hub(model, cache), cache)
    folder = Path(model).expanduser().resolve()
    check_folder(folder)
    return _converted(folder, cache)


def model_digest(model: str) -> str:
    """What identifies a model's content, cheaply: by name for hubs, by checksum for packages and folders."""
    if model.startswith(PYPI):
        name = model.removeprefix(PYPI)
        return f"{name} {_gguf_in(name)[1]}"
    if model.startswith((HUGGINGFACE, MODELSCOPE)):
        return model
    folder = Path(model).expanduser().resolve()
    check_folder(folder)
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in (".json", ".jinja", ".model", ".safetensors", ".bin", ".txt"):
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            digest.update(_sample(path))
    return digest.hexdigest()


def max_positions(folder: Path) -> int | None:
    """The longest sequence the model was made for, tokens; None where its configuration does not say.

    A model of text and pictures says it of its text part.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for part in (text_config(config), config):
        for name in LENGTHS:
            if isinstance(part.get(name), int):
                return int(part[name])
    return None


def _sample(path: Path) -> bytes:
    """Evenly spaced blocks of a file, its first and last among them; all of a small file."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        if size <= SAMPLED_BLOCKS * BLOCK_BYTES:
            return stream.read()
        blocks = []
        for number in range(SAMPLED_BLOCKS):
            stream.seek((size - BLOCK_BYTES) * number // (SAMPLED_BLOCKS - 1))
            blocks.append(stream.read(BLOCK_BYTES))
        return b"".join(blocks)


def check_folder(folder: Path) -> None:
    """RecipeError unless `folder` holds a model with weights and tokenizer."""
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    missing = []
    if not found:
        missing.append(
            f"{folder} is not a folder with a model; give a folder, hf://NAME, modelscope://NAME or pypi://PACKAGE"
        )
    else:
        if "adapter_config.json" in found:
            missing.append(
                f"{folder} holds an adapter, which transformers would put on the weights; merge it, or give the base "
                "model without adapter_config.json"
            )
        elif "config.json" in found:
            config_of(folder)
        else:
            missing.append(f"{folder} has no config.json, so it is not a Hugging Face model folder")
        if not any(name.endswith((".safetensors", ".bin")) for name in found):
            missing.append(f"{folder} has no weights (*.safetensors)")
        if not any(name in found for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            missing.append(
                f"{folder} has no tokenizer (tokenizer.json or tokenizer.model); copy it from the base model"
            )
    if missing:
        problems = [Problem("train.model", message, on_every_machine=bool(found)) for message in missing]
        raise RecipeError("the recipe", problems)


def _from_hub(model: str, cache: Path) -> Path:
    name = model.partition("://")[2]
    with waiting(f"fetching {name}"):
        try:
            folder = _snapshot(model.startswith(HUGGINGFACE), name, cache)
        except Exception as error:  # each client has its own family, and requests' and httpx's besides
            raise InputError(
                f"train.model {model}: could not be fetched ({type(error).__name__}: {error}); "
                "check the name and the network, or give a folder"
            ) from error
    check_folder(folder)
    return folder


def _snapshot(huggingface: bool, name: str, cache: Path) -> Path:
    if huggingface:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, cache_dir=cache / "huggingface"))
    from modelscope import snapshot_download as modelscope_download

    return Path(modelscope_download(name, cache_dir=str(cache / "modelscope")))


def _gguf_in(package: str) -> tuple[Path, str]:
    """The GGUF file of an installed distribution, and the SHA-256 its RECORD states, hexadecimal."""
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        message = f"the package {package} is not installed; pip install {package}"
        raise RecipeError("the recipe", [Problem("train.model", message)]) from None
    found = [file for file in distribution.files or [] if file.name.endswith(".gguf")]
    if len(found) != 1 or found[0].hash is None:
        message = f"the package {package} carries {len(found)} GGUF files; one with a checksum is needed"
        raise RecipeError("the recipe", [Problem("train.model", message)])
    padded = found[0].hash.value + "=" * (-len(found[0].hash.value) % 4)
    return Path(str(found[0].locate())), base64.urlsafe_b64decode(padded).hex()


def _from_package(package: str, cache: Path) -> Path:
    gguf, sha256 = _gguf_in(package)
    folder = cache / f"{re.sub(r'[^A-Za-z0-9._-]', '-', gguf.stem)}-{sha256[:8]}"

    def write(target: Path) -> None:
        actual = _sha256(gguf)
        if actual != sha256:
            raise StageError(f"{gguf}: SHA-256 {actual} is not the package's {sha256}; install the package again")
        run_in_subprocess(convert_gguf, gguf, target)
        source = json.dumps({"file": gguf.name, "sha256": sha256})
        (target / "source.json").write_text(source + "\n", encoding="utf-8")

    return made_once(folder, f"converting {gguf.name} into {folder}", write)


def _converted(folder: Path, cache: Path) -> Path:
    """The folder itself, or, where its code no longer runs or its weights are not plain, what it is converted to."""
    digest = hashlib.sha256(f"{convert.VERSION} {model_digest(str(folder))}".encode()).hexdigest()
    if convert.family_of(folder) is not None:
        target = cache / f"{folder.name}-native-{digest[:8]}"
        title = f"converting {folder.name} to a class of transformers, into {target}"
        return made_once(target, title, lambda scratch: run_in_subprocess(convert.convert, folder, scratch))
    if rewriting := rewriting_of(folder):
        target = cache / f"{folder.name}-plain-{digest[:8]}"
        title = f"{rewriting} {folder.name}, into {target}"
        return made_once(target, title, lambda scratch: run_in_subprocess(write_plain, folder, scratch))
    return folder


def convert_gguf(gguf: Path, target: Path) -> None:
    """Write a GGUF file as a Hugging Face folder: bfloat16 safetensors, tokenizer, chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quiet_transformers()
    torch.set_num_threads(os.cpu_count() or 1)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    model.hf_quantizer = None  # the weights are plain from here on
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    save_tokenizer(tokenizer, target)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
