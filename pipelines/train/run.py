"""What the driver and the workers of one training run agree on."""

from dataclasses import dataclass, field
from pathlib import Path

from pipelines.recipe.train import Train
from pipelines.train.spread import Spread
from pipelines.train.tokenize import Tokenized


@dataclass(frozen=True)
class Run:
    """Everything a worker has to know; paths are absolute, because workers are started in other folders."""

    section: Train
    seed: int
    steps: int
    model: Path
    folder: Path
    training: Tokenized
    held_out: Tokenized | None
    copies_key: bytes = field(default=b"", repr=False)
    """What copies of checkpoints are signed with; see checkpoint_upload.py. Empty where there are none."""
    spread: Spread | None = None
    """Set where the nodes share no folder; see nodes.py."""

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage; where the recipe says `auto`, the driver has put the chosen one into the section."""
        if self.section.zero_stage == "auto":
            raise RuntimeError("zero_stage auto has to be decided before the workers begin")
        return self.section.zero_stage

    @property
    def journal(self) -> Path:
        """See journal.py."""
        return self.folder / "metrics.jsonl"

    @property
    def curves(self) -> Path:
        """See curves.py."""
        return self.folder / "tensorboard"

    @property
    def picture(self) -> Path:
        """The losses as PNG; see curves.py."""
        return self.folder / "loss.png"

    @property
    def samples(self) -> Path:
        """See sampling.py."""
        return self.folder / "samples.jsonl"

    @property
    def leave(self) -> Path:
        """Is there when the workers are to save and end; see preemption.py."""
        return self.folder / "leave"

    @property
    def checkpoints(self) -> Path:
        """See checkpoint.py."""
        return self.folder / "checkpoints"

    @property
    def universal(self) -> Path:
        """The checkpoint that is resumed from, where another number of workers wrote it."""
        return self.folder / "universal"

    @property
    def trained(self) -> Path:
        """What training leaves: `adapter`, or the model's own weights as `trained` where all of them were trained."""
        return self.folder / ("trained" if self.section.method == "full" else "adapter")


@dataclass(frozen=True)
class WorkerFacts:
    """What rank 0 returns once the weights are left; the fields are those of TrainReport."""

    resumed_at: int
    workers: int
    parameters: int | None
    trainable_parameters: int | None
    peak_memory_bytes: int
    peak_device_memory_bytes: int | None
    dtype: str


@dataclass(frozen=True)
class Preempted:
    """What rank 0 returns where the workers were told to leave: the step they saved, and nodes that will be gone."""

    step: int
    nodes: list[str]
