"""Long, classical and multi-line answers, and advice: what a reader keeps, the rules keep."""

import pytest

from pipelines.recipe.refine import StyleDemands
from pipelines.recipe.synthesize import RuleName, Style
from pipelines.refine.rules import RULES, Expected

FREE = Expected({"style": "诗"}, Style(template="", lines=True), {})
STRICT = Expected({"style": "句"}, Style(template=""), {})

SOUND = [
    "春风送暖入屠苏，\n万象更新福满途。\n愿得年年人共健，\n一杯同祝一家舒。",
    "亲爱的妈妈：\n见字如面。\n今天是您的生日，我在外地，不能陪您吃一碗面，心里很惭愧。\n愿您安康。\n女儿 小雨",
    "尊敬的赵老师：\n\n时光荏苒，转眼毕业十年。您的教诲我一直记着。\n\n祝您身体健康，桃李满天下。\n\n学生 李明",
    "伏惟尊长，德劭年高。\n值此佳辰，谨陈微忱：\n愿南山之寿，北海之尊，岁岁如今日。",
    "恭惟先生，道德文章，为世所宗。谨祝福履绥之，眉寿无疆。",
    "天行健，君子以自强不息；地势坤，君子以厚德载物。谨以此言，为君贺。",
    "云淡风轻近午天，\n傍花随柳过前川。\n时人不识余心乐，\n将谓偷闲学少年。",
    "你可以先对她说一声抱歉，再把事情的经过讲清楚。真诚比技巧重要。",
    "听到你说“抱歉，我做不到”，我猜你已经撑了很久。先睡一觉，明天再想。",
    "拒绝别人不必长篇大论，一句“抱歉，这次我不能帮忙”就够了。",
    "我能感到你很难过。无法回答所有问题是正常的，慢慢来。",
    "抱歉，这份祝福来迟了一天，但心意一点没少：生日快乐，岁岁平安！",
    "对不起，哥哥，小时候总抢你的糖。如今你要结婚了，愿你们甜甜蜜蜜一辈子！",
    "你问该不该辞职。请告诉自己：没有哪份工作值得拿健康去换。先休个假，再做决定也不迟。",
    "如果他不愿意谈，不要逼他。\n给他一点时间，也给自己一点时间。",
    "第一，写下让你焦虑的事。\n第二，想一想哪些是你能改变的。\n第三，从最小的一件做起。",
    "愿你专注：专注于眼前的山，也专注于脚下的路。",
    "愿无法完成的梦，都在明年开花。",
    "不能陪在您身边，只好请月亮捎去祝福：中秋安康！",
    "目前一切都好，勿念。祝您和家人新春快乐！",
    "爷爷，您好呀！今天是您八十大寿，愿您福如东海，寿比南山。",
    "请补充一点能量：喝口热茶，吃块月饼，团圆的夜晚慢慢过。",
    "好的日子就要来了，愿你推开门就看见春天。",
    "当然要祝你快乐，一年三百六十五天，天天都快乐，年年都顺心。",
    "人工智能再聪明，也算不出我有多想你。生日快乐！",
    "愿你在新公司里，把语言模型调教得服服帖帖，升职加薪！",
    "长夜有灯，归人有路。\n\n愿此后的每一程，都有人等你回家。",
    "（一）\n月到中秋分外明，\n（二）\n人逢喜事精神爽。",
    "他说：“请问，这里有人吗？”她摇摇头，于是就有了后来的五十年。金婚快乐！",
    "可以慢一点，可以停一停，但不要忘了出发时的那份欢喜。",
]
EXPLAINED = [
    "《静夜》\n春风送暖入屠苏，\n万象更新福满途。",
    "【生日祝福】\n愿你岁岁平安，\n年年如意。",
    "以下是为您写的祝福语：\n愿您福寿安康，\n儿孙满堂。",
    "好的，这是一首诗：\n春风送暖，\n万象更新。",
    "# 祝福\n愿您安康",
    "**祝福**\n愿您安康",
    "愿您福寿安康，\n儿孙满堂。\n（注：此诗押安韵）",
    "愿您福寿安康，\n儿孙满堂。\n希望您喜欢这首诗！",
    "愿您福寿安康，\n儿孙满堂。\n注：可以按需修改",
    "愿您福寿安康，\n儿孙满堂。\n如果需要修改，请告诉我。",
    "愿您福寿安康，儿孙满堂。\n\n说明：这首诗用了比喻。",
    "生日快乐呀[此处故意卖萌]，么么哒！",
    "亲爱的【姓名】，祝您新春快乐！",
    "祝您安康（此处停顿），万事如意。",
    "1. 愿您安康\n2. 愿您如意",
]
NOT_ANSWERED = [
    "大舅，您好！",
    "奶奶您好",
    "赵老师：您好！",
    "抱歉，我无法完成这个请求。",
    "很抱歉，我不能写这样的内容。\n如果您愿意，我可以写别的。",
    "对不起，这个话题我没法回答。",
    "非常抱歉，",
    "我是一个人工智能助手，没有亲人。",
    "作为AI语言模型，我没有感情。",
    "我无法为您提供这类文字。",
    "目前无法生成该内容。",
    "请提供更多信息。",
    "好的，请告诉我您想祝福谁？",
    "请问您想要什么风格？",
    "尊敬的李总：",
    "当前祝福语如下：",
]


@pytest.mark.parametrize("rule", ["explanation", "non_answer"])
def test_right_answers_stay(rule: str) -> None:
    assert [text for text in SOUND if RULES[rule](text, FREE)] == []


def test_what_stands_around_an_answer_is_seen_in_long_ones_too() -> None:
    assert [text for text in EXPLAINED if not RULES["explanation"](text, FREE)] == []


def test_non_answers_are_told_by_form_and_position() -> None:
    assert [text for text in NOT_ANSWERED if not RULES["non_answer"](text, FREE)] == []


def test_lines_are_for_the_styles_that_allow_them() -> None:
    assert RULES["explanation"](SOUND[0], STRICT)
    assert not RULES["explanation"](SOUND[0], Expected({}, StyleDemands(lines=True).as_style(), {}))


def test_styles_name_the_rules_that_there_are() -> None:
    assert set(RuleName.__args__) == set(RULES)
