"""What a sweep recommends and how it is accepted; ROUGE-L as evalscope has it."""

import pytest
import yaml

from pipelines.evaluate.sweep import recommendation, recommended
from pipelines.metrics.rouge import rouge_l_f
from pipelines.recipe.train import Merge, OwnSampling


def row(f1: float, loop: float) -> dict[str, float]:
    return {"rouge-l-f": f1, "loop": loop}


def test_the_best_that_hardly_loops_is_recommended() -> None:
    rows = [row(0.5, 0.3), row(0.4, 0.02), row(0.3, 0.0)]
    assert recommended(rows, 0.02) == row(0.4, 0.02)


def test_where_everything_loops_the_fewest_loops_are_recommended() -> None:
    rows = [row(0.5, 0.3), row(0.3, 0.2), row(0.4, 0.2)]
    assert recommended(rows, 0.02) == row(0.4, 0.2)


def test_a_recommendation_is_what_the_recipe_takes() -> None:
    key, value = recommendation({"temperature": 0.7, "repetition_penalty": 1.1, "loop": 0.0}).strip("'").split("=", 1)
    assert key == "merge.generation"
    assert Merge.model_validate({"generation": yaml.safe_load(value)}).generation == OwnSampling(
        temperature=0.7, repetition_penalty=1.1
    )


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("谢邀。先关手机，再看书。以上。", "谢邀。先关手机，再看几页书，很快就困了。以上。"),
        ("Rain is water.", "Rain is water that falls from clouds."),
        ("我用 Python 写代码", "他用Python写了很多代码"),
        ("完全不同", "no overlap at all"),
        ("", "谢邀。"),
    ],
)
def test_rouge_l_equals_evalscopes(answer: str, reference: str) -> None:
    from evalscope.metrics.utils.rouge import compute_rouge_score_one_sample_zh

    assert rouge_l_f(answer, reference) == compute_rouge_score_one_sample_zh([answer], [reference])["Rouge-L-F"]
