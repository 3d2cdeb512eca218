"""Reports of evaluating and comparing: how the models that are asked answer."""

from pydantic import ConfigDict, Field

from pipelines.artifacts.reports.interval import Interval
from pipelines.artifacts.stage import Record, Report
from pipelines.recipe.base import Generation

Deltas = dict[str, dict[str, Interval]]
"""By model and metric: the model's mean minus the base's."""


class ModelScores(Record):
    """One model's means over the rows of a data set, by metric."""

    scores: dict[str, float]
    style: dict[str, float]
    empty: int
    """Answers without text; they score zero."""
    truncated: int
    """Answers that ended at the most tokens they might have."""


class ChangedAnswer(Record):
    """An answer before and after training, and by how much its headline score changed."""

    query: str
    base: str
    tuned: str
    difference: float


class ChangedAnswers(Record):
    """The answers that training improved and harmed most, the most first."""

    improved: list[ChangedAnswer]
    harmed: list[ChangedAnswer]


class DatasetResult(Record):
    """How every model answers a data set of questions that a person has answered too."""

    rows: int
    models: dict[str, ModelScores]
    deltas: Deltas
    changed: ChangedAnswers


class ModelBenchmark(Record):
    """One model's result in a benchmark, by evalscope's names of its metrics."""

    scores: dict[str, float]
    unread: int
    """Answers in which evalscope found no choice or result."""


class BenchmarkResult(Record):
    """How every model does in a benchmark that evalscope scores by itself."""

    rows: int
    models: dict[str, ModelBenchmark]
    deltas: Deltas


class EvaluateReport(Report):
    """The scores of every model."""

    headline: str
    """The metric that is shown first."""
    models: list[str]
    """The base first, then what was trained."""
    results: dict[str, DatasetResult]
    """By data set; the held-out rows are `test`."""
    benchmarks: dict[str, BenchmarkResult]
    how: dict[str, str]
    """How each metric is computed."""
    generation: Generation
    files: dict[str, str]
    """What people open, relative to the stage's folder."""


class ComparedRow(Record):
    """One question with the answer of every model; the reference of a probe is empty."""

    row_id: str
    query: str
    reference: str
    answers: dict[str, str]
    reasoning: dict[str, str] = Field(default_factory=dict)
    """What those models thought before that did."""


class ProbeScores(Record):
    """How one model answers a group of probes, as means over the group."""

    length: float
    """Characters."""
    loop: float
    """Share of answers that loop."""
    base: float
    """ROUGE-L F1 between its answers and the base's: how much training left as it was."""


class Quality(Record):
    """Means over answers to questions with references."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    rouge_l_f: float = Field(alias="rouge-l-f")
    loop: float
    """Share of answers that loop."""
    rep_4: float = Field(alias="rep-4")
    length: float
    """Characters."""


class SettingQuality(Quality):
    """How the tuned model answers at one sampling setting."""

    temperature: float
    repetition_penalty: float


class SweepResult(Record):
    """The tuned model at every setting of the grid."""

    rows: list[SettingQuality]
    questions: int
    """Asked at each setting."""
    recommended: SettingQuality


class CheckpointQuality(Quality):
    """How one checkpoint answers."""

    step: int
    model: str
    """The name under which it is served."""


class CheckpointsResult(Record):
    """Every checkpoint that training kept, by optimizer step."""

    rows: list[CheckpointQuality]
    questions: int
    """Asked of each checkpoint."""
    recommended: CheckpointQuality


class JudgeResult(Record):
    """What the judge says of the tuned model's answers beside the base's."""

    model: str
    """The judge."""
    tuned: str
    base: str
    wins: int
    ties: int
    losses: int
    failed: int
    """Questions without two usable judgements; they count nowhere else."""
    win_rate: Interval | None
    """A tie counts half; None without a usable judgement."""
    outcomes: dict[str, float | None]
    """By row: 1 for a win, 0.5 for a tie, 0 for a loss, None where a judgement failed."""


class CompareReport(Report):
    """The same questions to every model."""

    models: list[str]
    """The base first, then what was trained."""
    rows: list[ComparedRow]
    """The probes, then the test questions."""
    empty: dict[str, int]
    """Answers without text, by model."""
    generation: Generation
    files: dict[str, str]
    """What people open, relative to the stage's folder."""
    groups: dict[str, dict[str, ProbeScores]]
    """By group of probes and model."""
    sweep: SweepResult | None
    checkpoints: CheckpointsResult | None
    judge: JudgeResult | None
