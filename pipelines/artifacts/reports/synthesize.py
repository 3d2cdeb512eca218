"""Reports of the stages `synthesize` and `refine`."""

from pipelines.artifacts.reports.rows import RowsReport
from pipelines.artifacts.stage import Record


class CompatibilityMap(Record):
    """For each pair of values of two dimensions the share of their cells that are asked."""

    dimensions: list[str]
    """The one whose values are the map's rows, then the one whose values are its columns."""
    rows: list[str]
    columns: list[str]
    shares: list[list[float]]
    """By row and column, from 0 to 1."""


class SynthesizeReport(RowsReport):
    """What was asked, what it cost, and how many conversations came of it."""

    failed: dict[str, int]
    """Requests without an answer, by the class of their failure."""
    input_tokens: int
    """Of all requests, those included that were answered in earlier runs."""
    output_tokens: int
    cost: str | None
    """A decimal number; None where the recipe has no price."""
    currency: str | None
    estimated: int = 0
    """Answers whose tokens are estimated from their characters, since the endpoint reports none."""
    cached_tokens: int = 0
    """Of the input tokens of answers, those that endpoints had in their caches."""
    reasoning_tokens: int = 0
    """Of the output tokens of answers, those of reasoning."""
    map: CompatibilityMap | None = None
    """None where fewer than two dimensions can be drawn."""


class RefineOperator(Record):
    """What one operator of refine did: a rule, `near_duplicate`, `judge` or `by_hand`."""

    operator: str
    rows_in: int
    rows_out: int
    changed: int
    """Rows that it mended."""


class RefineExample(Record):
    """One answer that an operator dropped or mended."""

    row_id: str
    before: str
    after: str | None
    """None where the row was dropped."""
    why: str
    """What the operator says beyond its name; may be empty."""


class Coverage(Record):
    """Of two dimensions, for each pair of values: the rows that came, those that stay, and why the others went."""

    dimensions: list[str]
    """The one whose values are the rows, then the one whose values are the columns."""
    rows: list[str]
    columns: list[str]
    came: list[list[int]]
    kept: list[list[int]]
    dropped: list[list[dict[str, int]]]
    """Rows by the operator that dropped them."""


class RefineReport(RowsReport):
    """What each operator dropped and mended."""

    operators: list[RefineOperator]
    """In the order in which they were applied."""
    unjudged: dict[str, int]
    """Rows that were kept without a judgement, by the class of the judge's failure."""
    examples: dict[str, list[RefineExample]]
    """A few by operator."""
    coverage: Coverage | None = None
    """None where fewer than two dimensions can be drawn."""
    seconds_for_verdicts: float
    """What decisions over all rows took: near-duplicates, the judge and the edited file."""
