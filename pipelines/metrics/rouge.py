"""ROUGE-L of single answers, by the libraries and the segmentation that evalscope uses, without evalscope around it."""

import re
from functools import cache

from pipelines.metrics.segmenter import segmenter

_segmenter = cache(segmenter)
_CHINESE = re.compile("[\u4e00-\u9fa5]")


def words(text: str) -> list[str]:
    """The words of a text as evalscope cuts them: jieba's where there is Chinese, else what spaces separate."""
    return (" ".join(_segmenter().cut(text)) if _CHINESE.search(text) else text).split()


def rouge_l_f(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004); 0 for an answer without text."""
    from rouge_chinese import Rouge

    ours, theirs = " ".join(words(answer)), " ".join(words(reference))
    if not ours or not theirs:
        return 0.0
    return float(Rouge(metrics=["rouge-l"], stats=["f"]).get_scores(ours, theirs)[0]["rouge-l"]["f"])
