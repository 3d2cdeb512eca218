"""Analyze what is left after clean, to stand beside what was there before."""

from typing import Any

from pipelines.artifacts.workspace import Place
from pipelines.clean.analyze import VERSION as VERSION
from pipelines.clean.analyze import describe
from pipelines.clean.analyze import determinants as determinants
from pipelines.recipe.schema import Recipe


def analyze_clean(recipe: Recipe, place: Place) -> dict[str, Any]:
    """Describe the statistics of the rows that clean kept, with the histograms of `analyze`."""
    before = place.inputs["analyze"].report()["statistics"]
    edges = {told["name"]: told["histogram"]["edges"] for told in before if "histogram" in told}
    return describe(recipe, place, place.inputs["clean"], edges)
