"""Exported chats: whose messages become which turns, where sessions end, and why messages are left out."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic import ValidationError

from pipelines.artifacts.rows import messages_of
from pipelines.errors import DataError, InputError
from pipelines.recipe.ingest import ChatLog, Ingest
from pipelines.sources import chat_log
from pipelines.sources.chat_log import plan_chat, read_messages, time_of
from pipelines.sources.read import check_source, describe_source, first_rows
from tests.pipelines.sources.samples import write_lines
from tests.pipelines.sources.test_read import run

pytestmark = pytest.mark.usefixtures("ray_cluster")

ALICE = {"assistant": "爱莉"}


def csv_of(path: Path, rows: list[dict[str, Any]], encoding: str = "utf-8-sig") -> Path:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    path.write_bytes(text.getvalue().encode(encoding))
    return path


def said(sender: str, minute: float, text: str, **more: Any) -> dict[str, Any]:
    return {"sender": sender, "time": 1_700_000_000 + minute * 60, "text": text, **more}


def chats_of(table: pa.Table) -> list[list[tuple[str, str]]]:
    return [[(turn["role"], turn["content"]) for turn in messages_of(row)] for row in table.to_pylist()]


def reasons_of(dropped: pa.Table) -> dict[str, str]:
    return dict(zip(dropped["row_id"].to_pylist(), dropped["reason"].to_pylist(), strict=True))


def test_a_csv_of_a_chat_becomes_sessions_of_turns(tmp_path: Path) -> None:
    rows = [
        {"发送人": "小明", "时间": "2024/1/31 9:05", "内容": "在吗？"},
        {"发送人": "小明", "时间": "2024/1/31 9:06", "内容": "小明想问你件事"},
        {"发送人": "爱莉", "时间": "2024/1/31 9:07", "内容": "在的，小明"},
        {"发送人": "小明", "时间": "2024/1/31 9:08", "内容": "几点开会"},
        {"发送人": "爱莉", "时间": "2024/1/31 9:08", "内容": "十点"},
        {"发送人": "爱莉", "时间": "2024/1/31 9:09", "内容": "别迟到"},
        {"发送人": "小明", "时间": "2024年1月31日 20:00:05", "内容": "晚上吃什么"},
        {"发送人": "爱莉", "时间": "2024-01-31T20:01:00", "内容": "面"},
    ]
    source = csv_of(tmp_path / "chat.csv", rows)
    report, table, dropped = run(tmp_path, source, chat_log={**ALICE, "names": {"小明": "你"}})
    assert chats_of(table) == [
        [
            ("user", "在吗？\n你想问你件事"),
            ("assistant", "在的，你"),
            ("user", "几点开会"),
            ("assistant", "十点\n别迟到"),
        ],
        [("user", "晚上吃什么"), ("assistant", "面")],
    ]
    assert table["row_id"].to_pylist() == ["chat.csv:1", "chat.csv:7"] and table["pos"].to_pylist() == [0, 6]
    assert table["speaker"].to_pylist() == ["你", "你"] and table["chat"].to_pylist() == ["chat.csv"] * 2
    assert table["time"].to_pylist() == ["2024-01-31 09:05:00", "2024-01-31 20:00:05"]
    assert (report.rows, report.broken, dropped.num_rows, report.adapter) == (2, 0, 0, "chat_log")
    (tmp_path / "gbk").mkdir()
    gbk = csv_of(tmp_path / "gbk" / "chat.csv", rows, "gb18030")
    again = run(tmp_path, gbk, encoding="gb18030", chat_log={**ALICE, "names": {"小明": "你"}})[1]
    assert again.equals(table)


def test_an_export_of_telegram_is_read_with_its_entities(tmp_path: Path) -> None:
    def message(number: int, sender: str | None, text: Any, **more: Any) -> dict[str, Any]:
        date = {"date": f"2024-01-31T12:{number:02}:00", "date_unixtime": str(1706702400 + number * 60)}
        who = {"from": sender, "from_id": f"user{sender}"}
        return {"id": number, "type": "message", **date, **who, "text": text, "text_entities": [], **more}

    bold = [{"type": "bold", "text": "看"}, "这个 ", {"type": "text_link", "text": "书", "href": "http://x"}]
    talk = [
        {
            "id": 0,
            "type": "service",
            "date": "2024-01-31T12:00:00",
            "actor": "小明",
            "action": "pin_message",
            "text": "",
        },
        message(1, "小明", bold),
        message(2, "爱莉", "好看吗？"),
        message(3, "小明", "", photo="(File not included)", width=5),
        message(4, "小明", "", file="x.webp", media_type="sticker", sticker_emoji="😀"),
        message(5, "小明", "别人的话", forwarded_from="别人"),
        message(6, "小明", "很好看", edited="2024-01-31T12:09:00"),
        message(7, "爱莉", "那我也看"),
        message(8, None, "已注销的人"),
    ]
    one = {"name": "小明", "type": "personal_chat", "id": 1, "messages": talk}
    for layout in ({"indent": 1}, {}):
        source = tmp_path / "result.json"
        source.write_text(json.dumps(one, ensure_ascii=False, **layout), encoding="utf-8")
        report, table, dropped = run(tmp_path, source, chat_log=ALICE)
        turns = [("user", "看这个 书"), ("assistant", "好看吗？"), ("user", "很好看"), ("assistant", "那我也看")]
        assert chats_of(table) == [turns] and table["chat"][0].as_py() == "小明"
        assert list(reasons_of(dropped).items()) == [
            ("result.json:1", chat_log.NOTICE),
            ("result.json:4", chat_log.MEDIA),
            ("result.json:5", chat_log.MEDIA),
            ("result.json:6", chat_log.FORWARDED),
            ("result.json:9", chat_log.UNANSWERED),
        ]
        assert report.counts[f"messages left out: {chat_log.MEDIA}"] == 2 and report.broken == 0
        assert "not read: action, actor, edited, width" in report.summary
    both = {"about": "x", "chats": {"list": [one, {**one, "name": "群", "id": 2}]}, "left_chats": {"list": []}}
    source.write_text("\ufeff" + json.dumps(both, ensure_ascii=False), encoding="utf-8")
    table = run(tmp_path, source, chat_log=ALICE)[1]
    assert table["chat"].to_pylist() == ["小明", "群"] and chats_of(table) == [turns, turns]
    source.write_text(json.dumps(one)[:-40], encoding="utf-8")
    with pytest.raises(DataError, match=r"result\.json: broken after element \d+ \("):
        run(tmp_path, source, chat_log=ALICE)
    text = json.dumps({"data": [{"name": "小明", "messages": [*talk, 5]}]})
    source.write_text(text.replace('"type": "message"', '"text": "一", "type": "message"', 1), encoding="utf-8")
    report, table, dropped = run(tmp_path, source, max_broken=9, chat_log=ALICE)
    told = reasons_of(dropped)
    assert table["chat"].to_pylist() == ["小明"] and report.broken == 2
    assert any("key 'text' is there twice" in why for why in told.values())
    assert any("not a message but 5" in why for why in told.values())
    halved = {"messages": [message(1, "小明", "半\ud800"), talk[2]]}
    source.write_text(json.dumps({"chats": {"list": [one, halved]}}), encoding="utf-8")
    told = reasons_of(run(tmp_path, source, max_broken=9, chat_log=ALICE)[2])
    assert any("half a character" in why for why in told.values())
    source.write_text('{"name": "a", "name": "b", "messages": []}', encoding="utf-8")
    with pytest.raises(DataError, match="key 'name' is there twice"):
        run(tmp_path, source, chat_log=ALICE)


def test_exports_of_wechat_and_qq_are_read(tmp_path: Path) -> None:
    head = {"localId": 1, "TalkerId": 3, "SubType": 0, "IsSender": 0, "Status": 2}
    wechat = [
        {
            **head,
            "Type": kind,
            "CreateTime": 1_700_000_000 + n,
            "StrContent": text,
            "NickName": name,
            "Sender": "wxid_1",
        }
        for n, (kind, name, text) in enumerate(
            [
                (10000, "", "你已添加了爱莉，现在可以开始聊天了。"),
                (1, "小明", "今天好冷"),
                (3, "小明", "<?xml version='1.0'?><msg/>"),
                (47, "爱莉", ""),
                (1, "爱莉", "多穿点"),
                (10002, "", '"小明" 撤回了一条消息'),
                (77, "小明", "?"),
            ]
        )
    ]
    report, table, dropped = run(tmp_path, csv_of(tmp_path / "w.csv", wechat), chat_log=ALICE)
    assert chats_of(table) == [[("user", "今天好冷"), ("assistant", "多穿点")]]
    wanted = [chat_log.NOTICE, chat_log.MEDIA, chat_log.MEDIA, chat_log.NOTICE, "of type 77, which is not read as text"]
    assert [*reasons_of(dropped).values()] == wanted
    assert report.counts["messages left out: of type 77, which is not read as text"] == 1

    def message(n: int, name: str, text: str, **more: Any) -> dict[str, Any]:
        content = {"text": text, "resources": more.pop("resources", [])}
        return {
            **{"id": str(n), "timestamp": 1_700_000_000_000 + n * 1000, "type": "text", "recalled": False},
            **{"sender": {"uin": "1", "name": name}, "content": content, "system": False, **more},
        }

    qq = [
        message(1, "小明", "吃了吗"),
        message(2, "爱莉", "说错了", recalled=True),
        message(3, "爱莉", "吃了"),
        message(4, "小明", "看图", resources=[{"type": "image"}]),
        message(5, "小明", "小明加入了群", system=True),
    ]
    source = tmp_path / "q.json"
    source.write_text(json.dumps({"chatInfo": {"name": "好友"}, "messages": qq}, ensure_ascii=False), encoding="utf-8")
    _, table, dropped = run(tmp_path, source, chat_log=ALICE)
    assert chats_of(table) == [[("user", "吃了吗"), ("assistant", "吃了")]] and table["chat"][0].as_py() == "好友"
    assert [*reasons_of(dropped).values()] == [chat_log.RECALLED, chat_log.MEDIA, chat_log.NOTICE]


def test_further_exports_are_read_by_their_names(tmp_path: Path) -> None:
    def message(n: int, name: str, kind: str, text: str) -> dict[str, Any]:
        time = {"createTime": 1_700_000_000 + n, "formattedTime": "2024-01-31 12:00:00", "isSend": 0}
        return {"localId": n, **time, "type": kind, "content": text, "senderUsername": "w", "senderDisplayName": name}

    talk = [message(1, "小明", "文本消息", "吃了吗"), message(2, "小明", "图片消息", "[图片]")]
    talk.append(message(3, "爱莉", "引用消息", "吃了"))
    (tmp_path / "w.json").write_text(json.dumps({"session": {"wxid": "a"}, "messages": talk}), encoding="utf-8")
    posts = [
        {
            "type": "Default",
            "timestamp": f"2024-01-31T12:00:0{n}.12+00:00",
            "content": text,
            "author": {"nickname": who},
        }
        for n, (who, text) in enumerate([("小明", "吃了吗"), ("小明", "看"), ("爱莉", "吃了")])
    ]
    posts[1]["attachments"] = [{"url": "a.png"}]
    (tmp_path / "d.json").write_text(json.dumps({"channel": {"id": "1"}, "messages": posts}), encoding="utf-8")
    for name in ("w.json", "d.json"):
        _, table, dropped = run(tmp_path, tmp_path / name, chat_log=ALICE)
        assert chats_of(table) == [[("user", "吃了吗"), ("assistant", "吃了")]]
        assert reasons_of(dropped) == {f"{name}:2": chat_log.MEDIA}


def test_gap_silence_and_length_end_a_session(tmp_path: Path) -> None:
    rows = [
        *(said("小明", 0, "一"), said("爱莉", 50, "二"), said("小明", 100, "三"), said("爱莉", 101, "四")),
        *(said("爱莉", 110, "自言自语"), said("小明", 111, "五"), said("爱莉", 112, "六")),
        *(said("小明", 200, "没人理"), said("小明", 300, "七"), said("爱莉", 301, "八"), said("小明", 302, "九")),
        said("爱莉", 900, "独白"),
    ]
    _, table, dropped = run(tmp_path, write_lines(tmp_path / "a.jsonl", rows), chat_log=ALICE)
    assert [[text for _, text in chat] for chat in chats_of(table)] == [
        ["一", "二", "三", "四"],
        ["自言自语", "五", "六"],
        ["七", "八"],
    ]
    wanted = {"a.jsonl:8": chat_log.UNANSWERED, "a.jsonl:11": chat_log.UNANSWERED, "a.jsonl:12": chat_log.ALONE}
    assert reasons_of(dropped) == wanted
    short = run(tmp_path, tmp_path / "a.jsonl", chat_log={**ALICE, "max_turns": 2})[1]
    assert [[text for _, text in chat] for chat in chats_of(short)][:2] == [["一", "二"], ["三", "四"]]


def test_noise_is_what_the_recipe_says(tmp_path: Path) -> None:
    rows = [said("小明", n, text) for n, text in enumerate(["嗯嗯", "？？？", "👍", "OK~", "６６６", "是吗", ""])]
    rows.append(said("爱莉", 7, "嗯。"))
    rows.append(said("爱莉", 8, "当然"))
    source = write_lines(tmp_path / "a.jsonl", rows)
    _, table, dropped = run(tmp_path, source, chat_log=ALICE)
    assert chats_of(table) == [[("user", "是吗"), ("assistant", "当然")]]
    assert [*reasons_of(dropped).values()] == [*[chat_log.NOISE] * 5, chat_log.EMPTY, chat_log.NOISE]
    kept = run(tmp_path, source, chat_log={**ALICE, "noise": []})[1]
    assert chats_of(kept) == [[("user", "嗯嗯\n？？？\n👍\nOK~\n６６６\n是吗"), ("assistant", "嗯。\n当然")]]


def test_words_about_notices_are_no_notices(tmp_path: Path) -> None:
    rows = [
        *(
            said("小明", 0, "我刚拍了拍他"),
            said("小明", 1, "他撤回了一条消息吗"),
            said("爱莉", 2, "看 [微笑] 书里写的"),
        ),
        *(
            said("小明", 3, '"爱莉" 撤回了一条消息'),
            said("小明", 4, '我拍了拍"爱莉"'),
            said("小明", 5, "https://x.cn/a"),
        ),
        *(said("小明", 6, "[图片]"), said("小明", 7, "[文件: 表.xlsx]"), said("系统消息", 8, "群名改了")),
    ]
    _, table, dropped = run(tmp_path, write_lines(tmp_path / "a.jsonl", rows), chat_log=ALICE)
    assert chats_of(table) == [[("user", "我刚拍了拍他\n他撤回了一条消息吗"), ("assistant", "看 [微笑] 书里写的")]]
    wanted = [chat_log.NOTICE] * 2 + [chat_log.MEDIA] * 3 + [chat_log.NOTICE]
    assert [*reasons_of(dropped).values()] == wanted


def test_messages_are_sorted_over_files_whatever_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [said(["小明", "爱莉"][n % 2], n * 40 if n % 2 == 0 else n * 40 - 39, f"第{n}句") for n in range(400)]
    (tmp_path / "s").mkdir()
    write_lines(tmp_path / "s" / "b.jsonl", [{**row, "chat": "群"} for row in rows[250:]])
    write_lines(tmp_path / "s" / "a.jsonl", [{**row, "chat": "群"} for row in reversed(rows[:250])])
    whole = run(tmp_path, tmp_path / "s", chat_log=ALICE)
    monkeypatch.setattr(chat_log, "RUN", 60)
    in_runs = run(tmp_path, tmp_path / "s", chat_log=ALICE, shard_bytes=2000)
    assert len(in_runs[0].outputs.rows) > 5 and in_runs[0].digest == whole[0].digest
    assert [chat[0][1] for chat in chats_of(in_runs[1])] == [f"第{n}句" for n in range(0, 400, 2)]
    limited = run(tmp_path, tmp_path / "s", chat_log=ALICE, limit=101)
    assert limited[0].rows == 50 and [*reasons_of(limited[2]).values()] == [chat_log.UNANSWERED]


def test_marks_of_a_file_of_texts_and_a_second_text_are_not_passed_over(tmp_path: Path) -> None:
    rows = [
        {**said("小明", 0, "说错了"), "recalled": "TRUE", "system": "false", "content": ""},
        {**said("小明", 1, "加入了"), "recalled": "false", "system": "1", "content": ""},
        {**said("小明", 2, "译文"), "recalled": "0", "system": "", "content": "原文"},
        {**said("爱莉", 3, "在的"), "recalled": "", "system": "False", "content": "在的"},
    ]
    report, table, dropped = run(tmp_path, csv_of(tmp_path / "a.csv", rows), chat_log=ALICE)
    assert chats_of(table) == [[("user", "译文"), ("assistant", "在的")]]
    assert [*reasons_of(dropped).values()] == [chat_log.RECALLED, chat_log.NOTICE]
    assert "not read: content" in report.summary


def test_what_is_no_message_is_broken_and_named(tmp_path: Path) -> None:
    rows = [
        *(said("小明", 0, "问"), said("爱莉", 1, "答"), {**said("小明", 2, "x"), "time": "昨天"}),
        *({**said("", 3, "谁？")}, {**said("小明", 4, ""), "text": {"text": [1]}}, {"a": 1}),
    ]
    source = write_lines(tmp_path / "a.jsonl", rows)
    report, _, dropped = run(tmp_path, source, chat_log=ALICE, max_broken=4)
    assert (report.rows, report.broken, dropped["operator"].to_pylist()) == (1, 4, ["chat_log"] * 4)
    reasons = reasons_of(dropped)
    assert "its time is '昨天'" in reasons["a.jsonl:3"] and "has no sender" in reasons["a.jsonl:4"]
    with pytest.raises(DataError, match=r"4 broken rows, read as chat_log.*\n  a\.jsonl:3: its time"):
        run(tmp_path, source, chat_log=ALICE)


def test_the_assistant_must_be_there_and_speakers_are_named(tmp_path: Path) -> None:
    rows = [said("小明", 0, "问"), said("爱莉", 1, "答"), said("爱莉2", 2, "再答")]
    source = write_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"艾莉, ingest\.chat_log\.assistant, sends none; .*小明 \(1\), 爱莉 \(1\)"):
        run(tmp_path, source, chat_log={"assistant": "艾莉"})
    section = Ingest(source=str(source), chat_log=ALICE)
    check_source(section)
    assert describe_source(section).startswith("as chat_log; first speakers and their messages: 小明 (1)")
    assert [row["response"] for row in first_rows(section, 5)] == ["答"]
    both = run(tmp_path, source, chat_log={"assistant": ["爱莉", "爱莉2"]})[1]
    assert chats_of(both) == [[("user", "问"), ("assistant", "答\n再答")]]
    with pytest.raises(InputError, match="has no sender; name its column"):
        check_source(
            Ingest(source=str(write_lines(tmp_path / "b.jsonl", [{"query": "a", "text": "b"}])), chat_log=ALICE)
        )
    with pytest.raises(ValidationError, match="remove it, or adapter text"):
        Ingest(source="a", adapter="text", chat_log=ALICE)
    with pytest.raises(ValidationError, match=r"columns\.query: a message has sender, time, text, type, chat"):
        Ingest(source="a", columns={"query": "q"}, chat_log=ALICE)


def test_columns_of_other_names_are_named_and_speakers_are_told_apart(tmp_path: Path) -> None:
    rows = [
        {"who": {"n": name}, "when": f"2024013112{n:02}00", "what": text, "room": "a"}
        for n, (name, text) in enumerate(
            [("小明", "问"), ("小红", "也问"), ("爱莉", "答"), ("小红", "再问"), ("爱莉", "再答")]
        )
    ]
    columns = {"sender": "who.n", "time": "when", "text": "what", "chat": "room"}
    source = write_lines(tmp_path / "a.jsonl", rows)
    chat = {**ALICE, "max_turns": 2}
    _, table, _ = run(tmp_path, source, columns=columns, chat_log=chat, system="你是爱莉", replace={"答": "回答"})
    assert table["speaker"].to_pylist() == ["小明、小红", "小红"] and table["chat"].to_pylist() == ["a", "a"]
    assert table["query"].to_pylist() == ["小明：问\n小红：也问", "再问"]
    assert table["system"].to_pylist() == ["你是爱莉"] * 2 and table["response"].to_pylist() == ["回答", "再回答"]


GROUP = [
    *(said("小明", 0, "在吗"), said("小明", 1, "问个事"), said("小红", 2, "小明，我也问"), said("爱莉", 3, "小红先说")),
    *(said("小红", 4, "几点"), said("爱莉", 5, "十点"), said("小刚", 200, "散了？"), said("爱莉", 201, "散了")),
]


@pytest.mark.parametrize(
    ("chat", "asked", "speakers"),
    [
        ({}, ["小明：在吗\n小明：问个事\n小红：小明，我也问", "小红：几点", "散了？"], ["小明、小红", "小刚"]),
        ({"name_speakers": "never"}, ["在吗\n问个事\n小明，我也问", "几点", "散了？"], ["小明、小红", "小刚"]),
        (
            {"name_speakers": "always", "names": {"小明": "甲", "小红": "乙"}},
            ["甲：在吗\n甲：问个事\n乙：甲，我也问", "乙：几点", "小刚：散了？"],
            ["乙、甲", "小刚"],
        ),
        ({"names": {"小明": "你", "小红": "你"}}, ["在吗\n问个事\n你，我也问", "几点", "散了？"], ["你", "小刚"]),
    ],
    ids=["auto", "never", "always", "one name"],
)
def test_where_several_others_speak_each_message_says_whose_it_is(
    tmp_path: Path, chat: dict[str, Any], asked: list[str], speakers: list[str]
) -> None:
    _, table, _ = run(tmp_path, write_lines(tmp_path / "a.jsonl", GROUP), chat_log={**ALICE, **chat})
    turns = [turn for talk in chats_of(table) for turn in talk]
    assert [text for role, text in turns if role == "user"] == asked
    assert [text for role, text in turns if role == "assistant"][1:] == ["十点", "散了"]
    assert table["speaker"].to_pylist() == speakers


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        (1706702400, 1706702400.0),
        ("1706702400123", 1706702400.123),
        ("2024-01-31 12:00:00", 1706702400.0),
        ("2024/1/31 12:00", 1706702400.0),
        ("2024.01.31 12:00:00.5", 1706702400.5),
        ("2024-01-31T20:00:00+08:00", 1706702400.0),
        ("20240131120000", 1706702400.0),
    ],
)
def test_times_are_read(given: Any, seconds: float) -> None:
    assert time_of(given) == seconds


@pytest.mark.parametrize(
    "given", [None, "", "昨天", 12, "12:00", "2024-13-01 12:00", "9" * 30, float("inf"), True, "下午3:00"]
)
def test_times_that_are_none_are_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="its time is"):
        time_of(given)


def marked(*messages: tuple[str, Any, str]) -> list[dict[str, Any]]:
    """Messages with WeChat's mark of who sends them."""
    return [
        {"NickName": name, "IsSender": own, "StrContent": text, "CreateTime": 1_700_000_000 + n, "Type": 1}
        for n, (name, own, text) in enumerate(messages)
    ]


@pytest.mark.parametrize(
    ("messages", "assistant", "said"),
    [
        (
            marked(("小明", 0, "在吗"), ("小明", 1, "在的")),
            "小明",
            "小明 are marked as sent by oneself and as received",
        ),
        (
            marked(("小明", 0, "在吗"), ("爱莉", 1, "在的"), ("爱莉酱", 1, "换了名字")),
            "爱莉",
            "爱莉酱 is marked as the same sender as 爱莉; add the name",
        ),
    ],
)
def test_marks_of_who_sends_must_agree_with_the_names(
    tmp_path: Path, messages: list[dict[str, Any]], assistant: str, said: str
) -> None:
    path = str(csv_of(tmp_path / "w.csv", messages))

    def plan(name: str | list[str], **columns: str) -> list[Any]:
        section = Ingest(source=path, chat_log={"assistant": name}, columns=columns)
        assert section.chat_log
        return plan_chat([path], {path: "w.csv"}, section, section.chat_log, lambda part: "stored")

    with pytest.raises(DataError, match=said):
        plan(assistant)
    assert plan(
        ["爱莉", "爱莉酱"] if len(messages) > 2 else "1", **({} if len(messages) > 2 else {"sender": "IsSender"})
    )
    broken = [*read_messages(path, "w.csv", {}, ChatLog(assistant="x"), {})]
    assert [message.is_own for message in broken] == [row["IsSender"] == 1 for row in messages]
    (odd,) = read_messages(
        str(csv_of(tmp_path / "o.csv", marked(("甲", "是", "x")))), "o.csv", {}, ChatLog(assistant="x"), {}
    )
    assert odd.is_broken and odd.left_out == "its mark of who sends it is '是', not 1 or 0"
