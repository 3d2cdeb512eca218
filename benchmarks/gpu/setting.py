"""What the parts have in common: where they work, models of random weights, their tokenizer, and rows to train on."""

import fcntl
import importlib.util
import json
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
"""What a part found: numbers and words, as JSON. `missing` names the package without which it cannot run."""

SEED = 42
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES: Mapping[str, Mapping[str, int]] = {
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "layers": 28, "heads": 28, "kv": 4, "vocabulary": 152064},
    "3b": {"hidden_size": 2048, "intermediate_size": 11008, "layers": 36, "heads": 16, "kv": 2, "vocabulary": 151936},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "layers": 28, "heads": 12, "kv": 2, "vocabulary": 151936},
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "layers": 2, "heads": 4, "kv": 2, "vocabulary": 512},
}
"""Qwen2 and Qwen2.5 in their published shapes, and what takes their place on a CPU."""


class MissingPackageError(Exception):
    """A package that a part needs is not installed; the message is its name."""


@dataclass(frozen=True)
class Setting:
    """Where a run works, and whether it is the one that only checks the parts."""

    folder: Path
    dry: bool
    peer_python: str | None = None

    @property
    def results(self) -> Path:
        """One JSON object, by part."""
        return self.folder / "results.json"

    def model(self, size: str) -> Path:
        """The folder of a model of random weights; `tiny` stands for every size in a dry run. Written once."""
        size = "tiny" if self.dry else size
        folder = self.folder / "models" / size
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as holder:
            fcntl.flock(holder, fcntl.LOCK_EX)  # parts of a dry run need it at the same time
            if (folder / "config.json").is_file():
                return folder
            if self.dry:
                write_model(folder, size)
            else:
                # in a process of its own, which gives the device's memory back
                maker = get_context("spawn").Process(target=write_model, args=(folder, size))
                maker.start()
                maker.join()
                if maker.exitcode:
                    raise RuntimeError(f"the model of {size} could not be written: exit code {maker.exitcode}")
        return folder

    def rows(self) -> Path:
        """Questions and answers of all lengths as JSONL; written once."""
        path = self.folder / ("rows-dry.jsonl" if self.dry else "rows.jsonl")
        if not path.is_file():
            draw = random.Random(SEED)
            count, longest = (60, 30) if self.dry else (4000, 400)
            lines = [
                json.dumps({"query": _words(draw, 8), "response": _words(draw, draw.randint(5, longest))})
                for _ in range(count)
            ]
            beside = path.with_suffix(f".{os.getpid()}")
            beside.write_text("\n".join(lines) + "\n", encoding="utf-8")
            os.replace(beside, path)
        return path


def need(*packages: str) -> None:
    """Raise MissingPackageError for the first package that is not installed."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise MissingPackageError(name)


def write_model(folder: Path, size: str) -> None:
    """Qwen2 of random weights in bfloat16, with a byte-level tokenizer, as a Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    shape = SIZES[size]
    config = Qwen2Config(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv"],
        max_position_embeddings=32768,
        tie_word_embeddings=size != "7b",
        eos_token_id=2,
        pad_token_id=0,
        dtype="bfloat16",
    )
    torch.manual_seed(SEED)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    _tokenizer().save_pretrained(folder)
    scratch = folder / "scratch"
    model.save_pretrained(scratch)
    for path in sorted(scratch.iterdir(), key=lambda path: path.name == "config.json"):  # which says that it is whole
        path.rename(folder / path.name)
    scratch.rmdir()


def _tokenizer() -> Any:
    """One token a byte, and three that control."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bare = Tokenizer(models.BPE(vocab={letter: len(SPECIAL) + n for n, letter in enumerate(letters)}, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    bare.add_special_tokens(list(SPECIAL))
    # control tokens come first, as they do in the vocabulary
    vocabulary = {**{token: n for n, token in enumerate(SPECIAL)}, **bare.get_vocab(with_added_tokens=False)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = bare.pre_tokenizer, bare.decoder
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL[2], pad_token=SPECIAL[0], chat_template=CHATML
    )


def _words(draw: random.Random, count: int) -> str:
    letters = "abcdefghijklmnopqrstuvwxyz"
    return " ".join("".join(draw.choices(letters, k=draw.randint(2, 8))) for _ in range(count))
