"""Plots as inline SVG: sharp on paper, in the page's own font, and in its colours by day and by night."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 30, 40

Points = Sequence[tuple[float, float]]


def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Mapping[str, Points],
    dots: frozenset[str],
    marked: tuple[str, float, float] | None = None,
) -> str:
    """Curves over a common x axis as one `<svg>`. Empty without points.

    The series named in `dots` mark every point; `marked`: the name, x and y of one that is ringed.
    """
    points = [point for line in series.values() for point in line]
    if not points:
        return ""
    x_ticks = ticks(min(x for x, _ in points), max(x for x, _ in points))
    y_ticks = ticks(min(y for _, y in points), max(y for _, y in points))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}"><title>{escape(title)}</title>'
    ]
    for tick in y_ticks:
        y = place(x_ticks[0], tick)[1]
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        x = place(tick, y_ticks[0])[0]
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text x="4" y="14">{escape(y_label)}</text>')
    parts += _lines({name: [place(x, y) for x, y in line] for name, line in series.items()}, dots)
    if marked:
        x, y = place(*marked[1:])
        parts.append(f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="8"/>')
        anchor = "end" if x > WIDTH / 2 else "start"
        parts.append(f'<text x="{x:.1f}" y="{y - 14:.1f}" text-anchor="{anchor}">{escape(marked[0])}</text>')
    return "".join([*parts, "</svg>"])


def _lines(series: dict[str, list[tuple[float, float]]], dots: frozenset[str]) -> list[str]:
    """The curves and their legend, in coordinates of the drawing."""
    parts = []
    for number, (name, line) in enumerate(series.items()):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in line)
        parts.append(f'<polyline class="line c{number}" points="{path}"/>')
        if name in dots:
            parts += [f'<circle class="dot c{number}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in line]
        x = LEFT + 90 + number * 150
        parts.append(f'<path class="line c{number}" d="M{x} 10h18"/><text x="{x + 24}" y="14">{escape(name)}</text>')
    return parts


Box = tuple[float, float, float, float, float]
"""Whisker, quartile, median, quartile, whisker."""


def distribution_chart(
    title: str, edges: Sequence[float], series: Mapping[str, tuple[Sequence[int], Box]], limits: Sequence[float]
) -> str:
    """Histograms as shares of their rows over common bins, a box plot of each below them, and limits as vertical lines.

    The n-th of the series is drawn in the n-th colour, the first as steps behind the others.
    """
    low, high = edges[0], edges[-1]
    bottom = HEIGHT - BOTTOM - 18 * len(series)
    most = max(max(counts) / max(sum(counts), 1) for counts, _ in series.values()) or 1.0

    def across(x: float) -> float:
        return LEFT + (min(max(x, low), high) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}"><title>{escape(title)}</title>',
        f'<text x="4" y="14">{100 * most:.3g} %</text><path class="grid" d="M{LEFT} {bottom}H{WIDTH - RIGHT}"/>',
        f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(title)}</text>',
    ]
    for tick in (tick for tick in ticks(low, high) if low <= tick <= high):
        parts.append(f'<text x="{across(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    for number, (name, (counts, box)) in enumerate(series.items()):
        heights = [bottom - count / max(sum(counts), 1) / most * (bottom - TOP) for count in counts]
        steps = [(across(x), y) for pair, y in zip(pairwise(edges), heights, strict=True) for x in pair]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in steps)
        x = LEFT + 90 + number * 150
        parts.append(f'<polyline class="line c{number}" points="{path}"/>')
        parts.append(f'<path class="line c{number}" d="M{x} 10h18"/><text x="{x + 24}" y="14">{escape(name)}</text>')
        parts.append(_box([across(value) for value in box], bottom + 11 + 18 * number, number))
    for limit in limits:
        if low <= limit <= high:
            parts.append(f'<path class="limit" d="M{across(limit):.1f} {TOP - 6}V{HEIGHT - BOTTOM}"/>')
    return "".join([*parts, "</svg>"])


def _box(at: list[float], y: float, number: int) -> str:
    """A box plot lying on its side at height `y`."""
    first, left, middle, right, last = at
    return (
        f'<path class="line c{number}" d="M{first:.1f} {y}H{left:.1f}V{y - 6}H{right:.1f}V{y + 6}H{left:.1f}V{y}'
        f'M{middle:.1f} {y - 6}v12M{right:.1f} {y}H{last:.1f}"/>'
    )


def heat_map(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    shares: Sequence[Sequence[float]],
    notes: Sequence[Sequence[str]] = (),
) -> str:
    """A grid of squares, the fuller the larger the share, crossed out where it is 0.

    Tooltips tell the values and the share, or what `notes` has for it.
    """
    left, top = (20 + 13 * max(map(len, values)) for values in (rows, columns))
    width, height = max(WIDTH, left + 24 * len(columns) + 50), top + 20 * len(rows) + 6
    step = (width - left - 50) / len(columns)
    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}"><title>{escape(title)}</title>'
    ]
    for number, column in enumerate(columns):
        x = left + (number + 0.5) * step
        parts.append(f'<text transform="translate({x + 4:.1f} {top - 8}) rotate(-60)">{escape(column)}</text>')
    for down, (row, line) in enumerate(zip(rows, shares, strict=True)):
        y = top + 20 * down
        parts.append(f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{escape(row)}</text>')
        for number, share in enumerate(line):
            x = left + number * step
            note = notes[down][number] if notes else f"{100 * share:.0f} %"
            tip = f"<title>{escape(row)}, {escape(columns[number])}: {escape(note)}</title>"
            if share:
                box = f'x="{x:.1f}" y="{y}" width="{step - 2:.1f}" height="18"'
                parts.append(f'<rect class="dot c2" {box} fill-opacity="{0.15 + 0.85 * share:.2f}">{tip}</rect>')
            else:
                cross = f"M{x + step / 2 - 5:.1f} {y + 4}l10 10m0 -10l-10 10"
                parts.append(f'<path class="line c0" d="{cross}">{tip}</path>')
    return "".join([*parts, "</svg>"])


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, about `count` steps apart by 1, 2 or 5 times 10^n."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= raw * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]
