"""The compatibility map as numbers: how much of the grid is asked, by its two widest dimensions."""

from collections import Counter
from typing import Any

from pipelines.synthesize.grid import Grid

MOST_VALUES = 60
"""Values of a dimension that are drawn; a dimension of more, such as passages, is left out."""


def heat_map(grid: Grid) -> dict[str, Any] | None:
    """For each pair of values of two dimensions, the share of their cells that fit; None where there are not two."""
    axes = {name: values for name, values in grid.axes.items() if 1 < len(values) <= MOST_VALUES}
    if len(axes) < 2:
        return None
    down, across = sorted(sorted(axes, key=lambda name: -len(axes[name]))[:2], key=list(axes).index)
    asked = Counter((cell[down], cell[across]) for cell in grid.cells())
    each = grid.size // grid.section.samples_per_cell // (len(axes[down]) * len(axes[across]))
    return {
        "dimensions": [down, across],
        "rows": axes[down],
        "columns": axes[across],
        "shares": [[asked[row, column] / each for column in axes[across]] for row in axes[down]],
    }
