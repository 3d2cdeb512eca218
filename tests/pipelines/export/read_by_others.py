"""What another program reads of an exported file, as JSON: python read_by_others.py READER FILE

READER is swift, llamafactory, alpaca (the same program by its other format) or xtuner.
It runs in an environment that has those programs, without what they need on GPUs alone. A conversation is a list of
[role, text], in the program's own words.
"""

import importlib.util
import json
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

Chats = list[list[list[str]]]


def swift(path: str) -> Chats:
    """By ms-swift, whose AutoPreprocessor recognises the format and leaves out what it cannot read."""
    from swift.dataset import load_dataset

    rows, _ = load_dataset([path], split_dataset_ratio=0, num_proc=1)
    return [[[turn["role"], turn["content"]] for turn in row["messages"]] for row in rows]


def llamafactory(path: str, formatting: str = "sharegpt") -> Chats:
    """By LLaMA-Factory, as an entry of its dataset_info.json with that formatting says."""
    import transformers

    assert transformers.AutoModel and transformers.BloomPreTrainedModel  # looked up before the next line hides nothing
    sys.modules["torchaudio"] = types.ModuleType("torchaudio")  # for sound alone
    sys.modules["torchaudio"].__spec__ = ModuleSpec("torchaudio", None)
    from datasets import load_dataset
    from llamafactory.data.converter import align_dataset
    from llamafactory.data.parser import DatasetAttr
    from llamafactory.hparams import DataArguments

    attributes = DatasetAttr(load_from="file", dataset_name=path, formatting=formatting)
    rows = load_dataset("json", data_files=path, split="train")
    attributes.system = "system" if "system" in rows.column_names else None
    attributes.tools = "tools" if "tools" in rows.column_names else None
    attributes.history = "history" if "history" in rows.column_names else None
    arguments = DataArguments(dataset_dir=".", overwrite_cache=True, preprocessing_num_workers=1)
    trained = transformers.Seq2SeqTrainingArguments(output_dir=f"{path}.out", use_cpu=True, report_to=[])
    aligned = align_dataset(rows, attributes, arguments, trained)
    heads = [[["system", row["_system"]]] if row["_system"] else [] for row in aligned]
    talks = [[[turn["role"], turn["content"]] for turn in row["_prompt"] + row["_response"]] for row in aligned]
    return [head + talk for head, talk in zip(heads, talks, strict=True)]


class _Template(dict[str, str]):
    """Marks of a chat template, as xtuner's configuration holds them."""

    SYSTEM = "<system>{system}"
    INSTRUCTION = "<user>{input}"


def xtuner(path: str) -> Chats:
    """By the function with which xtuner puts a conversation into a chat template."""
    (root,) = importlib.util.find_spec("xtuner").submodule_search_locations  # type: ignore[union-attr, misc]
    file = Path(root) / "dataset" / "map_fns" / "template_map_fn.py"
    spec = importlib.util.spec_from_file_location("template_map_fn", file)
    module: Any = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    chats: Chats = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        chat: list[list[str]] = []
        for turn in module.template_map_fn(json.loads(line), _Template())["conversation"]:
            head, _, said = turn["input"].partition("<user>")
            chat += [["system", head.removeprefix("<system>")]] if head else []
            chat += [["user", said], ["assistant", turn["output"]]]
        chats.append(chat)
    return chats


if __name__ == "__main__":
    reader, given = sys.argv[1:]
    read = llamafactory(given, "alpaca") if reader == "alpaca" else globals()[reader](given)
    print("\n" + json.dumps(read))
