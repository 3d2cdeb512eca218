"""Near-duplicates among answers with their questions, in the dialect `zh`."""

import pyarrow as pa
import pytest

from pipelines.clean.dataset_ops import decide
from pipelines.clean.fused import apply
from pipelines.clean.plan import build_plan
from pipelines.similarity.hamming import find_here

PARAMETERS = {"tokenization": "character", "window_size": 3, "jaccard_threshold": 0.7, "question_key": "query"}
LONG = "家里老人总是不愿意去医院体检，觉得花钱又浪费时间，子女应该怎么劝说才能让他们接受每年一次的体检呢？"
REVIEW = "判断下面评论的情感是正面还是负面，只回答一个词。评论：这家餐厅的菜很{}，服务也很{}。"
ANSWER = "先在社区医院做一次免费的基础检查，结果出来以后让医生跟他讲清楚利害，比子女说一百句都管用。"


def gone(*rows: tuple[str, str]) -> list[int]:
    """The rows, as question and answer, that repeat an earlier one."""
    questions, answers = zip(*rows, strict=True)
    numbers = pa.array(range(len(rows)), pa.int64())
    table = pa.table({"row_id": numbers.cast(pa.string()), "pos": numbers, "query": questions, "response": answers})
    steps = build_plan([{"document_minhash_deduplicator": PARAMETERS}], "zh", "response").phases[0].dataset_ops
    decisions = decide(steps, apply((), table, "response", steps).keys, reorder=False, find=find_here)
    return sorted(decisions.rows["pos"].to_pylist())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("支持", "反对"),
        ("是的", "不是的"),
        ("3次", "5次"),
        ("应该买", "不应该买"),
        ("一年两次就够了", "一年一次就够了"),
        ("😀", "😭"),
        ("……", "！！"),
        (ANSWER, ANSWER.replace("免费的基础", "收费的全身").replace("比子女说一百句都管用", "可老人多半还是不听")),
    ],
)
def test_a_long_question_hides_no_answer(one: str, other: str) -> None:
    assert gone((LONG, one), (LONG, other)) == []


@pytest.mark.parametrize(
    ("one", "other"),
    [("支持", "支持。"), ("😀", "😀"), (ANSWER, f"谢邀。{ANSWER}"), (ANSWER, ANSWER.replace("，", "\n"))],
)
def test_an_answer_given_twice_goes(one: str, other: str) -> None:
    assert gone((LONG, one), (LONG, other)) == [1]


def test_a_short_answer_belongs_to_its_question() -> None:
    assert gone((REVIEW.format("好吃", "好"), "正面"), (REVIEW.format("新鲜", "热情"), "正面")) == []
    assert gone(("地球是圆的吗？", "是的"), ("太阳从东边出来吗？", "是的")) == []
    assert gone(("", "是的"), ("", "是的！")) == [1]


def test_a_long_answer_is_compared_alone() -> None:
    assert gone(("怎么劝老人体检？", ANSWER * 3), (LONG, ANSWER * 3)) == [1]
