"""ROUGE-L as evalscope has it."""

import pytest

from pipelines.metrics.rouge import rouge_l_f


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
