"""The dialect `zh` on texts that are not among the labelled rows."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines.artifacts.workspace import Place, Workspace
from pipelines.clean.fused import Outcome, apply
from pipelines.clean.kernels.han_pairs import pair_counts, stray_shares
from pipelines.clean.operators.perplexity import words_in_pairs
from pipelines.clean.plan import build_plan
from pipelines.clean.stage import CleanInputs, CleanStage
from pipelines.recipe.load import load_recipe
from pipelines.similarity.utf8 import utf8
from tests.outputs import finished, finished_rows, rows_of


def cleaned(process: list[Any], *texts: str, assets: dict[str, str] | None = None) -> Outcome:
    table = pa.table(
        {
            "row_id": [str(n) for n in range(len(texts))],
            "pos": pa.array(range(len(texts)), pa.int64()),
            "query": [""] * len(texts),
            "response": pa.array(texts, pa.string()),
        }
    )
    plan = build_plan(process, "zh", "response", assets)
    return apply(plan.phases[0].row_ops, table, "response")


def mapped(operator: str, text: str) -> str:
    return str(cleaned([operator], text).kept["response"][0].as_py())


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("#include <stdio.h>\nvector<int> v;\nfor(int i=0;i<n;i++) if (v[i]>0) sum++;", None),
        ("<think>先想</think>答案", None),
        ("见 <https://example.com/a>", None),
        ("Map<String, List<b>> 用法", None),
        ("用 `<br>` 换行", None),
        ("<h1>标签是标题，<br>标签换行，<a> 元素是链接。", None),
        ("<p>标签贵</p><br>标签：无", "标签贵\n\n标签：无"),
        (
            "<p>第一段</p><p>第二段</p><table><tr><td>甲</td><td>乙</td></tr></table><script>1</script>",
            "第一段\n第二段\n甲\t乙",
        ),
        ("<UL><LI>早</LI><LI>晚</LI></UL>完", "* 早\n* 晚\n完"),
        ("<dl><dt>词</dt><dd>义</dd></dl>", "词\n义"),
        ("甲&amp;lt;乙", "甲&lt;乙"),
        ("从<h1>到<h6>是六级标题，用<div>包一层，按<i>进入插入模式。", None),
        ('<p>即 <img src="https://a.example.com/equation?tex=a" alt="a&lt;b^2" eeimg="1"/>。</p>', "即 a<b^2。"),
        ('<p>图<img src="https://a.example.com/1.jpg" alt="猫"/></p>', "图"),
    ],
)
def test_html(html: str, text: str | None) -> None:
    assert mapped("clean_html_mapper", html) == (html if text is None else text)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("后端用 Express.js/Koa，见 setup.py/install。", None),
        ("he/she and/or，比例 3/4", None),
        ("ASP.NET/C# 老了，Socket.IO/WebSocket 还行。", None),
        ("资料在此：https://a.example.com/x 提取码: 9xyz。", "资料在此。"),
        ("详见（https://a.example.com/b）第三节", "详见第三节"),
        ("连接串是 jdbc:mysql://127.0.0.1:3306/test，缓存用 redis://cache:6379/0", None),
        ("返回 {data:res.list}，javascript:void(0) 不跳转", None),
        ("[展开](javascript:void(0))全文，邮件见 mailto:info@a.example.com。", "展开全文，邮件见。"),
        ("图是 data:image/png;base64,iVBORw0KGgo= 这张", "图是这张"),
        ("正文\n\n来源：https://a.example.com/c", "正文\n"),
        ("[官网](https://a.example.com) 上有", "官网 上有"),
        ("官网：www.example.com.cn，欢迎访问", "欢迎访问"),
    ],
)
def test_links(text: str, right: str | None) -> None:
    assert mapped("clean_links_mapper", text) == (text if right is None else right)


def test_mail_addresses_have_domains_in_any_case() -> None:
    assert mapped("clean_email_mapper", "写信给Li.Ming@Example.COM。") == "写信给。"
    assert mapped("clean_email_mapper", "用 @Override 注解") == "用 @Override 注解"
    clone = "git clone git@git.example.com:li/app.git"
    assert mapped("clean_email_mapper", f"{clone}，问 a@b.example.com：在吗") == f"{clone}，问 ：在吗"


def test_whitespace_leaves_joined_emoji_and_indentation() -> None:
    assert mapped("whitespace_normalization_mapper", "👨\u200d👩\u200d👧 全家　好") == "👨\u200d👩\u200d👧 全家 好"
    code = "    if a:\n\t\tb()\n    c()"
    assert mapped("whitespace_normalization_mapper", code) == code


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("排骨要先焯水再小火慢炖一小时。关注公众号“小灶”，回复“汤”领取菜谱。", "排骨要先焯水再小火慢炖一小时。"),
        ("练口语最要紧的是每天开口说。需要资料的加我微信 abc_2024。", "练口语最要紧的是每天开口说。"),
        ("先热锅再倒油就不会粘，蛋也更嫩。觉得有用请点赞收藏", "先热锅再倒油就不会粘，蛋也更嫩。"),
        ("公众号的标题越来越长，读者却越来越少。", None),
        ("请关注天气变化，及时添衣。", None),
        ("很多人关注我，是因为那篇讲考研的文章。", None),
        ("请大家不要关注我的私生活。", None),
        ("请关注我国西部的教育。关注我们身边的老人，是每个人的责任。", None),
        ("可以关注一下国家的就业平台，上面有很多岗位。", None),
        ("医生让我扫码关注医院公众号，结果查了半天。", None),
        ("他让我加他微信：我没理。", None),
        (
            "猫咪软便要先断食一天，再少量多餐地喂。想看更多，欢迎关注@猫叔讲猫。",
            "猫咪软便要先断食一天，再少量多餐地喂。",
        ),
        ("选专业先看自己的兴趣，再看学校和城市。加我徽信 zy6688", "选专业先看自己的兴趣，再看学校和城市。"),
        ("买车砍价要狠，先问三家店再回来谈。+V❤ car12345", "买车砍价要狠，先问三家店再回来谈。"),
        ("扫码点餐方便，但老人不会用。", None),
        ("请关注一下这个比例：去年是三成，今年过半。", None),
        ("结节小于五毫米，可以一年一查，不用太关注。", None),
        ("运营公众号：第一要定位，第二要坚持。", None),
        ("求关注是人的天性。私信我的人多，就在这里统一答。", None),
        ("微信搜索框里输入名字，结果按时间排。", None),
        ("怎么加微信群？点右上角的加号。", None),
        ("客户加我微信就为了砍价。双十一领了券也没便宜。有事打电话，不要私信我。我在京东搜索了半天。", None),
        (
            "先焯水再小火慢炖一小时，出锅前放盐。\n\n往期推荐：\n《春笋》\n《醉蟹》\n\n欢迎关注我的公众号：小灶",
            "先焯水再小火慢炖一小时，出锅前放盐。",
        ),
    ],
)
def test_promotion(text: str, right: str | None) -> None:
    assert mapped("promotion_mapper", text) == (text if right is None else right)
    assert cleaned(["promotion_filter"], text).kept.num_rows == 1


@pytest.mark.parametrize(
    "text", ["兼职日结，加微信 job_8899 详聊。", "点赞关注不迷路！", "扫码进群领取资料，名额有限。"]
)
def test_nothing_but_promotion_goes(text: str) -> None:
    (gone,) = cleaned(["promotion_filter"], text).dropped.to_pylist()
    assert gone["reason"] == "nothing but promotion"


def test_personal_data_are_replaced_and_counted() -> None:
    text = "姓名：郑晓明，电话 139-1234-5678，住在南湖市东区梅花路8号2单元301室。郑晓明的车是京N8Z0Z0。"
    done = cleaned(["personal_data_mapper"], text, "客服 400-800-1234，订单编号 202311051822334565。")
    assert done.kept["response"].to_pylist() == [
        "姓名：[name1]，电话 [mobile]，住在[address]。[name1]的车是[plate]。",
        "客服 400-800-1234，订单编号 202311051822334565。",
    ]
    counts = {name: done.stats[name].to_pylist() for name in done.stats.column_names if name.startswith("personal_")}
    assert counts["personal_name"] == [2, 0]
    assert counts["personal_mobile"] == counts["personal_address"] == counts["personal_plate"] == [1, 0]
    assert counts["personal_id_card"] == counts["personal_bank_card"] == [0, 0]


def test_numbers_of_groups_and_sums_are_nobodys_and_homes_may_have_letters() -> None:
    for text in ("QQ群号：13912345678，满员了。", "去年进口 13912345678 美元。"):
        assert mapped("personal_data_mapper", text) == text
    assert mapped("personal_data_mapper", "我家住在南湖市梅花路15号A座502室。") == "我家住在[address]。"
    assert mapped("personal_data_mapper", "我家在南湖市人民路四段11号附5号") == "我家在[address]"
    assert mapped("personal_data_mapper", "打给138-12345678找我") == "打给[mobile]找我"


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("版本 1.2.3.4 发布，v1.2.3.4 也是", None),
        ("见第1.1.1.2节，或 10.5.2.1 小节", None),
        ("服务器是192.168.1.1，网关也是", "服务器是，网关也是"),
        ("ping 10.0.0.1:80", "ping :80"),
    ],
)
def test_numbers_of_versions_and_sections_are_no_addresses(text: str, right: str | None) -> None:
    assert mapped("clean_ip_mapper", text) == (text if right is None else right)


def test_flagged_words_are_words_and_their_drop_names_them(assets: dict[str, str]) -> None:
    process = [{"flagged_words_filter": {"lang": "zh", "max_ratio": 0.015}}]
    innocent = ["这条路变成人行道了。", "老大妈的菜摊", "增长 13.62 万亿", "屁股疼要看骨科", "白色情书"]
    done = cleaned(process, *innocent, "你这傻逼滚开", assets=assets)
    (gone,) = done.dropped.to_pylist()
    assert gone["row_id"] == "5"
    assert "(傻逼)" in gone["reason"]


PLAIN = """
感冒要多喝水，注意休息。|早上空腹喝一杯温水就好。|米饭要焖十分钟再开盖。|他每天骑车上班，风雨无阻。|周末我们去爬山，你来吗？|这本书借给我看几天行不行？|
洗衣机响得厉害，大概是没放平。|孩子发烧先量体温，再决定去不去医院。|明天降温，记得加衣服。|西红柿炒鸡蛋要先炒蛋。|我小时候住在河边，夏天常去游泳。|电脑卡的时候先重启试试。|
买菜要早，晚了就不新鲜了。|老师说作业周五交。|请把窗户关上，外面太吵了。|这条街晚上很热闹，到处是小吃。|跑步之前要热身，不然容易拉伤。|他们结婚三十年，很少吵架。|
说话算数，才有人信你。|书读得慢一点，记得牢一点。|修水管要先关总阀。|公交车十五分钟一趟，别着急。|种花最怕浇水太勤。|我爷爷喜欢下棋，一下就是半天。|
面试的时候别紧张，慢慢说。|写字要坐直，眼睛离纸远一点。|外婆包的饺子皮薄馅大。|春天风大，放风筝正好。|这道题可以用方程来解。|合同要看清楚再签字。|
地铁口有一家修鞋铺，手艺很好。|下雨天路滑，骑车慢点。|他讲故事很有意思，孩子们都爱听。|冰箱里的剩菜热透了再吃。|养猫之前先想好谁来照顾。|演出七点开始，六点半入场。|
医生让他少吃盐，多走路。|钥匙忘带了，只好等室友回来。|我们厂今年招了二十个学徒。|把照片按日期分好，找起来方便。|听力要天天练，不能断。|旧衣服洗干净可以捐出去。|
火车晚点了四十分钟。|他把信读了三遍，没有回。|花生要小火慢炒，不然外面糊里面生。|奶奶说，过日子要细水长流。|你问的这件事，我也不太清楚。|博物馆周一不开门，别白跑一趟。|
学开车先学停车。|灯泡坏了，换一个十五瓦的就够。|树上的鸟窝空了很久。|我们商量了一晚上，还是决定搬家。|牛奶放久了会分层，摇一摇就好。|窗台上的薄荷长得很快。|
他不爱说话，做事却很稳当。|汤太咸了，加点豆腐煮一煮。|村里的路修好了，进城只要半小时。|她第一次上台，手一直在抖。|体检报告要一个星期才出来。|先把大件搬走，再收拾小的。|
讲价要笑着讲，别伤和气。|鱼要趁热吃，凉了就腥。|他的普通话带着一点口音。|打印机没纸了，柜子里还有一包。|暑假我在图书馆做志愿者。|冬天早上开车，先热一分钟。|
这件毛衣手洗，别放洗衣机。|楼下新开了一家面馆，汤头不错。|小狗怕打雷，总往床底下钻。|看地图比问路可靠。|饭后别马上躺下。|毕业那天，全班拍了合影。|
他家三代人都做木工。|衣柜里放两块樟木，不生虫。|夜里两点，楼上还在放音乐。|这种药饭后吃，一天两次。|水开了再下面条，煮三分钟。|我想换一份离家近的工作。|
她把旧报纸攒起来卖钱。|雨停了，孩子们跑出去踩水。|绳子打个活结，拆的时候省事。|山里信号不好，到了给你打电话。|做人要厚道，做事要认真。|那年冬天特别冷，河都冻住了。|
鞋子买大半码，走路不挤脚。|豆浆要煮开，不能喝生的。|先写提纲，再动笔写正文。|老房子冬暖夏凉，就是潮。|他在邮局工作了一辈子。|门铃响了半天，没人应。|
晒被子要拍一拍，睡着暖和。|小店不大，老主顾却很多。|等绿灯亮了再过马路。|菜刀钝了，拿到巷口磨一磨。|退休以后，他开始学画画。|别把鸡蛋放在一个篮子里。|
月底结账，多退少补。|听说隔壁的桂花开了，香得很。|秋天的柿子挂在树上，像小灯笼。|这座桥有一百多年了，还能走人。
"""
OTHERS = """
Please restart the server after the update.|The weather is lovely today, isn't it?|
I grew up in a small town near the sea.|How much is a ticket to London?|
She finished the report before lunch.|Wash the rice twice before cooking.|
All trains are delayed because of snow.|Do not lean on the doors, please.|
He has been learning the violin for years.|Can you send me the file again?|
We met at the station on Friday evening.|The library closes at six o'clock today.|
My grandmother bakes bread every Sunday.|This road leads to the old harbour.|
Thank you for your kind letter of May.|The results were better than expected.|
Turn left at the second traffic light.|There is nothing new under the sun.|
A journey of a thousand miles begins here.|Nobody knows what will happen tomorrow.|
今日は天気がいいので散歩に行きましょう。|駅前の喫茶店で友達を待っています。|昨日の夜は遅くまで仕事をしていました。|この本はとても面白いですから読んでください。|
電車が遅れているので少し遅刻します。|母は毎朝六時に起きてお弁当を作ります。|夏休みに家族で海へ行きたいです。|日本語の勉強は難しいけれど楽しいです。|
すみません、もう一度言ってください。|雨が降りそうだから傘を持って行きなさい。|部屋の掃除が終わったら買い物に行きます。|猫が窓の外をじっと見ています。|
来週の会議は水曜日の午後に変更されました。|この薬は食後に飲んでください。|新しい靴を買ったのに雨で汚れてしまった。|
。。。。。。。。。。。。。。。。。。。。。。|！！！！？？？？！！！！？？？？！！！！？？？？|
asdkjh qwoeiu zmxnbv lkjasd qpwoei ruty ghfj|😂😂😂👍👍🎉🎉❤️❤️😂😂😂👍👍🎉🎉❤️❤️😂😂|
---------------------------------------------|~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~|????????????????????????????????|=+=+=+=+=+=+=+=+=+=+=+=+=+=+=+|
★☆★☆★☆★☆★☆★☆★☆★☆★☆★☆★☆★☆|xkcdj wqpzx bvnmt rtyuf ghjkd lzxcv qwert|
(╯°□°)╯︵ ┻━┻ (╯°□°)╯︵ ┻━┻ (╯°□°)╯|→→→→→→↑↑↑↑↑↑←←←←←←↓↓↓↓↓↓|
zzzz zzzz zzzz zzzz zzzz zzzz zzzz zzzz|.-.-.-..--..-.-.-..--.-.-..--.-.-.-|ÄãºÃ£¬»¶ÓÊ¹ÓÃ±¾Èí¼þ£¬Çë°´ÈÎÒâ¼ü
"""


def _texts(block: str) -> list[str]:
    return [text for text in block.replace("\n", "").split("|") if text]


def test_tiny_keeps_plain_sentences_and_drops_other_languages_and_noise() -> None:
    """With its operators over single rows, but for its limit on length, which these sentences are too short for."""
    recipe = load_recipe("tiny")
    assert recipe.clean
    content = [step for step in recipe.clean.process if not _is_named(step, "text_length_filter")]
    single = [step for step in content if not _is_named(step, "topk") and not _is_named(step, "document_")]
    plain, others = _texts(PLAIN), _texts(OTHERS)
    assert (len(plain), len(others)) == (100, 50)
    done = cleaned(single, *plain, *others)
    assert [text for text in plain if text not in done.kept["response"].to_pylist()] == []
    assert done.kept.num_rows == 100


def test_the_whole_of_tiny_keeps_rows_of_plain_sentences_and_drops_the_others(
    tmp_path: Path, ray_cluster: None
) -> None:
    """Each row has three sentences, which is long enough, and shares one with another row at most."""
    recipe = load_recipe("tiny")
    assert recipe.clean
    plain, others = _texts(PLAIN), _texts(OTHERS)
    answers = [plain[n] + plain[(n + 37) % 100] + plain[(n + 61) % 100] for n in range(100)] + others
    table = pa.table(
        {
            "row_id": [str(n) for n in range(150)],
            "pos": pa.array(range(150), pa.int64()),
            "query": [f"第{n}个问题" for n in range(150)],
            "response": answers,
            "upvotes": [20] * 150,
        }
    )
    workspace = Workspace(str(tmp_path))
    source, place = Place(workspace, "ingest", "in"), Place(workspace, "clean", "out")
    with workspace.parquet_writer(source.path("rows.parquet"), table.schema) as writer:
        writer.write_table(table)
    report = CleanStage(recipe.clean).run(place, CleanInputs(finished_rows(source, 150, ["rows.parquet"])))
    kept = rows_of(finished(place, report), report.outputs.rows)
    assert [row["response"] for row in kept] == answers[:100]


def _is_named(step: Any, begin: str) -> bool:
    return (step if isinstance(step, str) else next(iter(step))).startswith(begin)


@pytest.mark.parametrize(
    "text",
    [
        "疫情期间，COVID-19 患者要在家隔离。",
        "网页常用 JavaScript 和 TypeScript 来写。",
        "def remove_values(rows):\n    return rows",
        "这家公司长期关注我国的养老问题，也重点关注青年就业。",
        "事情传开以后，引发广泛关注。",
        "我参加 ABC2024 年会时，微信 Linux 版还没有出来。",
        "不要点击链接，也不要扫描来历不明的二维码。",
    ],
)
def test_what_only_looks_like_promotion_stays(text: str) -> None:
    assert mapped("promotion_mapper", text) == text
    assert cleaned(["promotion_filter"], text).kept.num_rows == 1


CODE = [
    "def area(width, height):\n    return width * height",
    "for i in range(1, 6):\n    print(i, end=' ')",
    "SELECT name, age FROM students WHERE age > 12;",
    "const total = items.reduce((sum, item) => sum + item.price, 0);",
    "y = 3x + 7",
    "2H₂ + O₂ → 2H₂O",
    "[4, 8, 15, 16, 23, 42]",
    "1, 1, 2, 3, 5, 8, 13",
    "{“name”: “小李”, “age”: 30}",
    r"\frac{a+b}{2} \ge \sqrt{ab}",
    "| year | 2021 | 2022 |\n|---|---|---|\n| rate | 0.31 | 0.42 |",
]
"""Answers in no language."""


def test_code_formulas_and_numbers_are_answers_in_any_language(assets: dict[str, str]) -> None:
    process = [{"language_id_score_filter": {"lang": "zh", "min_score": 0.9}}]
    noise = [
        "The price = the sum of all the parts that we bought.",
        "qwe rty uio asd fgh jkl",
        "(>_<) (>_<) (>_<)",
        "{}[]()<>;;::",
        "Ein Satz mit (Klammern) und einem Punkt.",
        "----====++++",
    ]
    done = cleaned(process, *CODE, *noise, assets=assets)
    assert done.kept["response"].to_pylist() == CODE
    assert set(done.stats["lang"].to_pylist()[: len(CODE)]) <= {"code", "zh"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("上一页 下一页 首页 尾页 登录 注册 关于我们 版权所有", "the frame of a page without its text"),
        ("请输入标题请输入内容副标题正文正文点击此处添加", "the frame of a page without its text"),
        ("阿萨德发生大风阿斯顿发生地方阿萨大撒旦法师打发", "keys hit at random"),
        ("忄青 讠吾 本 氵每 亻门 的 钅失 路 纟田", "characters taken apart, as by a scanner"),
        ("因为所以然后就是说其实我们就是在这个那个的话而且就是不过也就是说的了吧", "words without a content"),
        ("加强管理就是管理好管理的管理，管理管理者的管理要靠管理来管理。", "words without a content"),
        ("😀去了🏠和🚲在🌧里👟的🎁是🍎吗", "words without a content"),
    ],
)
def test_garbled_texts_go_by_what_can_be_seen(text: str, reason: str) -> None:
    (gone,) = cleaned(["garbled_text_filter"], text).dropped.to_pylist()
    assert gone["reason"] == reason


@pytest.mark.parametrize(
    "text",
    [
        "首页改版之后，登录和注册都放到了右上角，返回顶部的按钮没有了。",
        "他的爸爸是大夫，妈妈是教师，他自己倒是什么都不是，天天在家打打杀杀地打游戏。",
        "“氵”读作三点水，“冫”读作两点水，写的时候要分清楚，别把偏旁弄混了。",
        "管理是一门学问：时间管理要看轻重，情绪管理要看修养，团队管理要看人心。",
        "今天终于放假了🎉🎉🎉 明天去爬山⛰️ 后天去看海🌊 开心😄",
        "1. 日本队 2. 韩国队 3. 法国队 4. 德国队 5. 巴西队 6. 中国队",
        "········\n前面是导语。\n········\n后面是正文。",
        "清华大学、北京大学、复旦大学、浙江大学、南京大学、武汉大学、中山大学、四川大学",
    ],
)
def test_readable_texts_are_not_garbled(text: str) -> None:
    assert cleaned(["garbled_text_filter"], text).kept.num_rows == 1


def test_pairs_are_counted_as_python_counts_them() -> None:
    text = "哈哈哈哈，好好学习，学习 ABC 天天向上"
    (counts,) = pair_counts(*utf8(pa.array([text], pa.large_string()))).tolist()
    pairs = ["哈好", "好好", "好学", "学习", "习学", "学习", "习天", "天天", "天向", "向上"]
    assert counts == [11, len([c for c in text if c.isalnum()]), len(pairs), len(set(pairs)), 2, 1]


def test_stray_characters_tell_broken_sentences_from_rare_ones(assets: dict[str, str]) -> None:
    sentence = "医生建议老年人每天坚持散步，保持心情愉快。"
    broken = "医建生老议年每天人坚步散持，保心持情快愉。"
    texts = pa.array([sentence, broken, "no Han at all", "", "的 和 a 吗"], pa.large_string())
    whole, astray, *others = stray_shares(*utf8(texts), words_in_pairs())
    assert whole < 0.1 < 0.4 < astray
    assert others == [0, 0, 1]
    pytest.importorskip("kenlm")
    process = [{"perplexity_filter": {"lang": "zh", "max_ppl": 1500}}]
    terse = ["山不在高，有仙则名。水不在深，有龙则灵。", "床前明月光，疑是地上霜。", "E = mc²"]
    done = cleaned(process, sentence, broken, *terse, assets=assets)
    assert [row["row_id"] for row in done.dropped.to_pylist()] == ["1"]


@pytest.mark.parametrize(
    "text",
    [
        "别提了，排了俩小时队，轮到我就卖光了，气得我一宿没睡。",
        "我妈非说洗碗机费水，我跟她掰扯了半天也没用，随她去吧。",
        "就说我们楼下那垃圾桶吧，天天满得往外掉，也没见谁来收。",
        "阿拉伯数字其实是印度人发明的，阿拉伯人只是把它传到了欧洲。",
    ],
)
def test_talk_is_no_noise_and_noise_as_short_is(text: str, assets: dict[str, str]) -> None:
    pytest.importorskip("kenlm")
    process = [{"perplexity_filter": {"lang": "zh", "max_ppl": 1500}}]
    han = [at for at, character in enumerate(text) if character.isalpha()]
    characters = list(text)
    for at, other in zip(han, han[7:] + han[:7], strict=True):
        characters[at] = text[other] if at % 2 else text[at]
    done = cleaned(process, text, "".join(characters), assets=assets)
    assert done.kept["row_id"].to_pylist() == ["0"]


def test_letters_without_a_syllable_are_keys_hit_at_random() -> None:
    done = cleaned(
        ["garbled_text_filter"], "KKVGLQCPVCPFQ*VJGRRTQG:PVCPFJR", "SELECT name FROM students WHERE age > 12"
    )
    assert [row["row_id"] for row in done.dropped.to_pylist()] == ["0"]


@pytest.mark.parametrize(
    "text",
    [
        "> 学而不思则罔，思而不学则殆。\n> 温故而知新，可以为师矣。",
        "“世上本没有路，走的人多了，也便成了路。”——鲁迅",
        "鲁迅说过：“世上本没有路，走的人多了，也便成了路。”",
        "「山重水复疑无路，柳暗花明又一村。」\n出自陆游《游山西村》",
        "送上鲁迅的一句话：“世上本没有路，走的人多了，也便成了路。”",
    ],
)
def test_answers_that_only_quote_go(text: str) -> None:
    (gone,) = cleaned(["quotation_filter"], text).dropped.to_pylist()
    assert gone["reason"] == "nothing but a quotation"


@pytest.mark.parametrize(
    "text",
    [
        "“让每一口都新鲜，让每一天都不同。”",
        "“你吃了吗？”\n“还没有，等你呢。”",
        "鲁迅说过：“世上本没有路。”我的看法是，路要自己走出来，也要有人愿意走第一步。",
        "> 你能做到吗？\n能，我每天都这样做，已经坚持了十年。",
        "我推荐《活着》《围城》《边城》《骆驼祥子》。",
    ],
)
def test_answers_that_also_quote_stay(text: str) -> None:
    assert cleaned(["quotation_filter"], text).kept.num_rows == 1


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("垃圾要先分类再投放到桶里。这样做省事。垃圾要先分类再投放到桶里！", "垃圾要先分类再投放到桶里。这样做省事。"),
        (
            "先说清楚这件事的原因和结果，再谈应该怎么办。\n具体有三种办法。\n先说清楚这件事的原因和结果，再谈应该怎么办。\n完。",
            "先说清楚这件事的原因和结果，再谈应该怎么办。\n具体有三种办法。\n完。",
        ),
        ("牛肉重 4.5 公斤，鸡肉重 4.5 公斤。", None),
        ("当 a>b 时不等式成立的条件是什么？当 a<b 时不等式成立的条件是什么？", None),
        ("好的。好的。那就这样说定了，明天早上见。好的。", None),
        ("轻轻的我走了\n正如我轻轻的来\n轻轻的我走了\n正如我轻轻的来", None),
        ("if a:\n    return False\nif b:\n    return False", None),
    ],
)
def test_a_sentence_that_comes_again_goes(text: str, right: str | None) -> None:
    assert mapped("remove_repeat_sentences_mapper", text) == (text if right is None else right)
