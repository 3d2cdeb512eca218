"""Reports of training and merging."""

from pydantic import ConfigDict

from pipelines.artifacts.reports.interval import Interval
from pipelines.artifacts.stage import Record, Report


class StepEntry(Record):
    """What the journal says of the steps since the entry before."""

    step: int
    loss: float
    """Mean over the tokens that have a loss."""
    grad_norm: float | None
    lr: float
    tokens: int
    """Of all ranks."""
    loss_tokens: int
    seconds: float
    memory_bytes: int
    """The most that rank 0 held so far."""
    mfu: float | None = None
    """Model FLOPs utilization, 0 to 1; None where the devices' peak is not known."""


class EvaluationEntry(Record):
    """The held-out rows at one step: their loss, and scores of the answers to them where those are computed."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float]

    step: int
    eval_loss: float

    def scores(self) -> dict[str, float]:
        """Every metric by its name, the loss first; each begins with `eval_`."""
        return {"eval_loss": self.eval_loss, **self.__pydantic_extra__}


class SampledAnswer(Record):
    """One of the recipe's evaluation inputs, answered at one step."""

    step: int
    input: str
    output: str


class TokenCounts(Record):
    """What became of the rows that were tokenized."""

    rows: int
    samples: int
    truncated: int
    """Rows above a limit, whatever happened to them."""
    left_out: int
    """Rows that gave no sample with an answer."""
    tokens: int
    loss_tokens: int


class TrainReport(Report):
    """What was trained, how the losses went, and where the weights lie, relative to the stage's folder."""

    model: str
    """The base model's folder, as training found it; see `base_model` of pipelines/models/lineup.py."""
    adapter: str | None
    """None where the whole model was trained."""
    trained: str | None
    """The whole model; None where an adapter was trained."""
    checkpoints: list[str]
    zero_stage: int
    steps: int
    """Optimizer steps."""
    losses: list[StepEntry]
    eval_losses: list[EvaluationEntry]
    eval_loss_base: float | None
    """None, as all that is held out, without held-out rows."""
    eval_loss: float | None
    eval_loss_delta: Interval | None
    best_step: int | None
    """That of the lowest held-out loss."""
    trained_step: int
    """That whose weights were left."""
    samples_while_training: list[SampledAnswer]
    files: dict[str, str]
    """For people, by what they are."""
    training_seconds: float
    samples: TokenCounts
    held_out_samples: TokenCounts | None
    tokens_per_second: float
    loss_tokens_per_second: float
    resumed_at: int
    """Step that the last group of workers began at."""
    workers: int
    parameters: int | None = None
    """Not counted where nothing was left to train, when only the export was missing."""
    trainable_parameters: int | None = None
    peak_memory_bytes: int
    """The most that any worker held in main memory."""
    peak_device_memory_bytes: int | None
    """The most that any worker held on its GPU; None on CPUs."""
    dtype: str

    @property
    def weights(self) -> str:
        """The folder of what was trained: the adapter, or the whole model."""
        return self.adapter or self.trained or ""


class MergeReport(Report):
    """The merged model's folder, and how far its logits differ from those of base and adapter together."""

    model: str
    bytes: int
    dtype: str
    merge_difference: float
    """Merged in memory, against the adapter on its base."""
    reload_difference: float
    """Read back from disk, against what was saved."""
    rounding_difference: float
    """Read back, against the adapter on its base: the price of storing in fewer bits."""
    largest_logit: float
