"""Reports of cleaning and of the analyses before and after it."""

from pydantic import ConfigDict, Field

from pipelines.artifacts.reports.rows import RowsReport
from pipelines.artifacts.stage import Record, Report


class OperatorStats(Record):
    """What one operator did."""

    index: int
    """Its place in the recipe's list."""
    operator: str
    kind: str
    rows_in: int
    rows_out: int
    changed: int = 0
    missing: int = 0
    """Rows without its column that stay for `if_missing: keep`."""
    seconds: float = 0.0
    """Of one core."""

    def __add__(self, other: "OperatorStats") -> "OperatorStats":
        """The same operator over the rows of both."""
        return OperatorStats(
            index=self.index,
            operator=self.operator,
            kind=self.kind,
            rows_in=self.rows_in + other.rows_in,
            rows_out=self.rows_out + other.rows_out,
            changed=self.changed + other.changed,
            missing=self.missing + other.missing,
            seconds=self.seconds + other.seconds,
        )


class ChangedRow(Record):
    """The text of a row before and after a mapper, cut to a length that people read."""

    index: int
    """The mapper's place in the recipe's list."""
    operator: str
    row_id: str
    before: str
    after: str


class EditCounts(Record):
    """What became of the rows that a person's file lists."""

    changed: int = 0
    dropped: int = 0
    restored: int = 0
    untouched: int = 0

    def __add__(self, other: "EditCounts") -> "EditCounts":
        """The counts of both."""
        return EditCounts(
            changed=self.changed + other.changed,
            dropped=self.dropped + other.dropped,
            restored=self.restored + other.restored,
            untouched=self.untouched + other.untouched,
        )


class ComparedSet(Record):
    """An evaluation set that the rows were compared with."""

    name: str
    texts: int
    """Different texts in it, questions and answers."""
    too_short: int
    """Of these, how many were too short to look for."""
    rows_dropped: int


class CleanReport(RowsReport):
    """What every operator and a person's own edits left."""

    model_config = ConfigDict(validate_by_name=True, serialize_by_alias=True)

    rows_in: int
    dialect: str
    manual_edits: EditCounts = Field(validation_alias="by_hand", serialization_alias="by_hand")
    """All zero where nobody edited."""
    operators: list[OperatorStats]
    samples: list[ChangedRow]
    """The first few changed rows of each mapper."""
    statistics: list[str]
    """Parquet files: `row_id`, `pos` and a column for each statistic, relative to the stage's folder."""
    evaluation_sets: list[ComparedSet] = Field(default_factory=list)
    """Those that rows were compared with."""
    not_compared: list[str] = Field(default_factory=list)
    """Evaluation sets of the recipe that only evalscope fetches."""
    clusters: list[str]
    """Parquet files of the schema `dataset_ops.CLUSTER`, relative to the stage's folder."""


class SigmaBounds(Record):
    """Mean − 3σ and mean + 3σ, and how many values lie beyond them."""

    low: float
    high: float
    beyond: int


class Histogram(Record):
    """Counts of values between edges; the outermost bins hold what lies beyond too."""

    edges: list[float]
    counts: list[int]


class Numbers(Record):
    """The values of a statistic as data-juicer's analyzer describes them, with 3σ bounds and a histogram."""

    model_config = ConfigDict(validate_by_name=True, serialize_by_alias=True)

    count: int
    mean: float
    std: float
    min: float
    p1: float = Field(validation_alias="1%", serialization_alias="1%")
    p25: float = Field(validation_alias="25%", serialization_alias="25%")
    p50: float = Field(validation_alias="50%", serialization_alias="50%")
    p75: float = Field(validation_alias="75%", serialization_alias="75%")
    p99: float = Field(validation_alias="99%", serialization_alias="99%")
    max: float
    exact: bool
    """False where the percentiles come from a sketch."""
    sigma: SigmaBounds
    histogram: Histogram


class Strings(Record):
    """The values of a statistic that is text."""

    count: int
    unique: int
    top: str | None = None
    """The most frequent value; None, as `freq`, where there is no value."""
    freq: int | None = None
    values: list[tuple[str, int]]
    """The most frequent values and how often each occurs."""


class Statistic(Record):
    """One column of statistics."""

    name: str
    operator: str
    bounds: dict[str, int | float]
    """The limits that the recipe sets, by parameter; those that no value can pass are left out."""


class NumberStatistic(Statistic, Numbers):
    """A statistic that is a number."""


class StringStatistic(Statistic, Strings):
    """A statistic that is text."""


class EmptyStatistic(Statistic):
    """A number that no row has."""

    count: int = 0


class FilterCut(Record):
    """How many rows a filter would drop if it were alone."""

    operator: str
    bounds: dict[str, int | float]
    cuts: int
    names: list[str] = Field(default_factory=list)
    """Its statistics."""


class NearRow(Record):
    """A row near a limit."""

    row_id: str
    value: float
    text: str
    """Its beginning."""


class Move(Record):
    """How many rows change sides where a limit is moved by so many standard deviations."""

    sigmas: int
    value: float
    rows: int


class Threshold(Record):
    """One limit of a filter, and what lies near it."""

    operator: str
    statistic: str
    bound: str
    value: float
    kept: list[NearRow]
    dropped: list[NearRow]
    moves: list[Move] = Field(default_factory=list)


class AnalyzeReport(Report):
    """The statistics of clean's filters over all rows."""

    rows: int
    statistics: list[NumberStatistic | StringStatistic | EmptyStatistic]
    filters: list[FilterCut]
    thresholds: list[Threshold] = Field(default_factory=list)
    files: list[str] = Field(default_factory=list)
    """Parquet files with a row for each row of the data: its statistics, and which filters alone would keep it."""


class AnalyzeCleanReport(AnalyzeReport):
    """The same of the rows that clean kept."""
