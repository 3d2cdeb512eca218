"""What a sweep recommends and how it is accepted."""

import yaml

from pipelines.artifacts.reports.evaluate import Quality, SettingQuality
from pipelines.evaluate.sweep import recommendation, recommended
from pipelines.recipe.train import Merge, OwnSampling


def row(f1: float, loop: float) -> Quality:
    return Quality(rouge_l_f=f1, loop=loop, rep_4=0, length=9)


def test_the_best_that_hardly_loops_is_recommended() -> None:
    rows = [row(0.5, 0.3), row(0.4, 0.02), row(0.3, 0.0)]
    assert recommended(rows, 0.02) == row(0.4, 0.02)


def test_where_everything_loops_the_fewest_loops_are_recommended() -> None:
    rows = [row(0.5, 0.3), row(0.3, 0.2), row(0.4, 0.2)]
    assert recommended(rows, 0.02) == row(0.4, 0.2)


def test_a_recommendation_is_what_the_recipe_takes() -> None:
    quality = row(0.5, 0.0).model_dump()
    best = SettingQuality.model_validate({**quality, "temperature": 0.7, "repetition_penalty": 1.1})
    key, value = recommendation(best).strip("'").split("=", 1)
    assert key == "merge.generation"
    assert Merge.model_validate({"generation": yaml.safe_load(value)}).generation == OwnSampling(
        temperature=0.7, repetition_penalty=1.1
    )
