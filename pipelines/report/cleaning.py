"""What the report shows of an analysis: tables, plots, and a word on where thresholds cut."""

from collections.abc import Iterator
from dataclasses import dataclass

from markupsafe import Markup

from pipelines.artifacts.reports.clean import AnalyzeReport, NumberStatistic, StringStatistic, Threshold
from pipelines.report.charts import distribution_chart

LABELS = ("count", "mean", "std", "min", "25%", "50%", "75%", "max", "mean − 3σ", "mean + 3σ", "beyond 3σ")


@dataclass(frozen=True)
class NumberRow:
    """A line of the table of numbers."""

    name: str
    side: str
    cells: list[str]
    """One for each of `LABELS`."""


@dataclass(frozen=True)
class StringRow:
    """A line of the table of texts."""

    name: str
    side: str
    count: int
    unique: int
    top: str
    freq: int | None
    values: str


@dataclass(frozen=True)
class Analysis:
    """What the template shows."""

    labels: tuple[str, ...]
    numbers: list[NumberRow]
    strings: list[StringRow]
    charts: list[Markup]
    cuts: list[str]
    percentiles: list[str]
    sketched: bool
    thresholds: list[Threshold]


def analysis(before: AnalyzeReport | None, after: AnalyzeReport | None) -> Analysis | None:
    """The analysis before clean and, where it is done, after it; None where there is none."""
    if before is None:
        return None
    sides = {"before": before}
    if after is not None:
        sides["after"] = after
    numbers = [entry for entry in before.statistics if isinstance(entry, NumberStatistic)]
    return Analysis(
        labels=LABELS,
        numbers=[
            NumberRow(entry.name, side, _cells(found))
            for entry in numbers
            for side, found in _numbers_named(entry.name, sides)
        ],
        strings=list(_string_rows(sides)),
        charts=[Markup(_chart(entry, sides)) for entry in numbers],
        cuts=[_cut(number, sides) for number in range(len(before.filters))],
        percentiles=[
            f"{entry.name}: the lowest 1 % of rows lie below {entry.p1:.6g}, the highest 1 % above {entry.p99:.6g}."
            for entry in numbers
        ],
        sketched=not all(entry.exact for entry in numbers),
        thresholds=[entry for entry in before.thresholds if entry.kept and entry.dropped],
    )


def _numbers_named(name: str, sides: dict[str, AnalyzeReport]) -> Iterator[tuple[str, NumberStatistic]]:
    """The statistic of that name on each side that has numbers of it."""
    for side, report in sides.items():
        for entry in report.statistics:
            if entry.name == name and isinstance(entry, NumberStatistic):
                yield side, entry


def _string_rows(sides: dict[str, AnalyzeReport]) -> Iterator[StringRow]:
    for name in [entry.name for entry in sides["before"].statistics]:
        for side, report in sides.items():
            for entry in report.statistics:
                if entry.name == name and isinstance(entry, StringStatistic) and entry.top is not None:
                    values = ", ".join(f"{value} {count}" for value, count in entry.values)
                    yield StringRow(name, side, entry.count, entry.unique, entry.top, entry.freq, values)


def _cells(entry: NumberStatistic) -> list[str]:
    described = (entry.mean, entry.std, entry.min, entry.p25, entry.p50, entry.p75, entry.max)
    values = (*described, entry.sigma.low, entry.sigma.high)
    return [f"{entry.count:,}", *(f"{value:.6g}" for value in values), f"{entry.sigma.beyond:,}"]


def _chart(before: NumberStatistic, sides: dict[str, AnalyzeReport]) -> str:
    series = {
        side: (found.histogram.counts, (found.p1, found.p25, found.p50, found.p75, found.p99))
        for side, found in _numbers_named(before.name, sides)
    }
    return distribution_chart(before.name, before.histogram.edges, series, list(before.bounds.values()))


def _cut(number: int, sides: dict[str, AnalyzeReport]) -> str:
    """What one filter alone would drop, in words."""
    first = sides["before"].filters[number]
    bounds = ", ".join(f"{name} {value:g}" for name, value in sorted(first.bounds.items(), reverse=True))
    shares = [
        f"{report.filters[number].cuts:,} of {report.rows:,} rows {side} cleaning"
        f" ({report.filters[number].cuts / max(report.rows, 1):.1%})"
        for side, report in sides.items()
    ]
    return f"{first.operator} ({bounds}) alone would drop {', '.join(shares)}."
