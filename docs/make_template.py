"""Write docs/template.svg, the picture of `danlu template`: `python docs/make_template.py`."""

import io
import sys
from pathlib import Path

from rich.console import Console

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from pipelines.recipe.train import Train  # noqa: E402
from pipelines.train.audit import audit  # noqa: E402
from pipelines.train.proof import TrainingRow  # noqa: E402
from tests.model_families import CHATML, byte_level_tokenizer  # noqa: E402

CHAT = [
    {"role": "system", "content": "You are kind."},
    {"role": "user", "content": "What is 1 and 2?"},
    {"role": "assistant", "content": "It is 3."},
]


def main() -> None:
    """Draw the audit of a small chat by a tokenizer of single letters."""
    console = Console(record=True, width=100, file=io.StringIO())
    tokenizer = byte_level_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", CHATML)
    for part in audit(tokenizer, Train(model="x"), TrainingRow("1", CHAT)):
        console.print(part)
    console.save_svg(str(HERE / "template.svg"), title="danlu template tiny")


if __name__ == "__main__":
    main()
