"""What a sweep recommends and how it is accepted; ROUGE-L as evalscope has it."""

import json
from pathlib import Path

import pytest

from pipelines.errors import DataError
from pipelines.evaluate.rouge import rouge_l_f
from pipelines.evaluate.sweep import accept, recommended


def row(f1: float, loop: float) -> dict[str, float]:
    return {"rouge-l-f": f1, "loop": loop}


def test_the_best_that_hardly_loops_is_recommended() -> None:
    rows = [row(0.5, 0.3), row(0.4, 0.02), row(0.3, 0.0)]
    assert recommended(rows, 0.02) == row(0.4, 0.02)


def test_where_everything_loops_the_fewest_loops_are_recommended() -> None:
    rows = [row(0.5, 0.3), row(0.3, 0.2), row(0.4, 0.2)]
    assert recommended(rows, 0.02) == row(0.4, 0.2)


def test_accepting_changes_the_models_own_defaults(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "temperature": 1.0}))
    accept(tmp_path, {"temperature": 0.7, "repetition_penalty": 1.1, "loop": 0.0})
    config = json.loads((tmp_path / "generation_config.json").read_text())
    assert config == {"eos_token_id": 2, "temperature": 0.7, "repetition_penalty": 1.1, "do_sample": True}
    with pytest.raises(DataError, match="not a model folder"):
        accept(tmp_path / "nothing", {"temperature": 0.0, "repetition_penalty": 1.0})


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
