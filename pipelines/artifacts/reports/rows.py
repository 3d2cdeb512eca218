"""Reports of the stages that leave rows."""

from pydantic import Field

from pipelines.artifacts.stage import Record, Report


class RowFiles(Record):
    """Parquet files in `pos` order, relative to the stage's folder."""

    rows: list[str]
    dropped: list[str] = Field([])
    """Schema `rows.DROPPED`."""


class RowsReport(Report):
    """What every stage reports that hands on rows."""

    rows: int
    outputs: RowFiles

    def row_files(self) -> list[str]:
        """Those of `outputs`."""
        return [*self.outputs.rows, *self.outputs.dropped]


class IngestReport(RowsReport):
    """What was read."""

    broken: int
    """Rows that could not be read and were set aside."""
    adapter: str
    source: str
    columns: list[str]
    """Columns of the rows, in order."""
    carried: list[str] = Field([])
    """Those that came with the rows and are not trained."""
    widened: dict[str, str] = Field({})
    """Columns whose values had several types, and the type that holds them all."""
    counts: dict[str, int] = Field({})
    """What was decided while reading, such as turns that were joined."""


class ExportReport(Report):
    """The file that was written."""

    rows: int
    written: dict[str, int | None]
    """Size in bytes by path."""


class Sides(Record):
    """Rows on each side of the split."""

    train: int
    test: int


class SideFiles(Record):
    """Parquet files of each side in `pos` order, relative to the stage's folder."""

    train: list[str]
    test: list[str]


class SplitReport(Report):
    """What is trained on, and what is held out."""

    rows: Sides
    outputs: SideFiles

    def row_files(self) -> list[str]:
        """Those of `outputs`."""
        return [*self.outputs.train, *self.outputs.test]
