"""Exported chats as conversations: messages in order of time, cut into sessions in which one speaker is the assistant.

A chat cannot be cut where it lies, since files need not be in order of time. Its messages are read once, sorted in runs
that are merged from disk, and stored in parts that end at a silence: in memory are one run and one part, whatever the
size of the chat. Each part is a shard, of which workers make rows. Every message is in a row, or it is left out or
broken, with its reason.
"""

import heapq
import json
import re
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from itertools import islice
from typing import Any, NamedTuple

from pipelines.artifacts.rows import ROW, Turn
from pipelines.artifacts.shards import Attempt, Shard, Work
from pipelines.errors import DataError, InputError
from pipelines.recipe.ingest import ChatLog, Source
from pipelines.sources.adapters import replaced, with_system
from pipelines.sources.column_types import flat_column
from pipelines.sources.columns import BATCH_ROWS, LEFT_OUT, Rows, batches, broken_row
from pipelines.sources.cut import Store, stored
from pipelines.sources.files import block_of, format_of, open_bytes, rows_of_file
from pipelines.sources.json_layout import messages_of
from pipelines.sources.json_text import RepeatedKey
from pipelines.sources.row_keys import renamed
from pipelines.sources.turns import MARKS, conversation_of, says_nothing

RUN = 100_000
"""Messages that are sorted in memory at a time."""
FORCED = 4
"""A part ends without a silence after so many times `shard_bytes`."""
SHOWN = 8
"""Speakers that a message names."""
LOOKED_INTO = 2000
"""Messages of a file that a recipe's check looks into."""
COLUMNS = ("chat", "speaker", "time")
"""Columns of a session beside the canonical ones: its chat, who speaks with the assistant, and when it began."""

SENDER = (
    *("sender", "from", "senderDisplayName", "author", "NickName", "nickname", "Remark", "sender_name", "senderName"),
    *("Sender", "talker", "username", "发送人", "发送者", "昵称", "用户", "from_id", "user", "name"),
)
TIME = (
    *("time", "date_unixtime", "date", "timestamp", "datetime", "CreateTime", "createTime", "create_time", "StrTime"),
    *("时间", "发送时间", "日期"),
)
TEXT = ("text", "content", "message", "msg", "StrContent", "body", "内容", "消息", "消息内容", "聊天内容")
TYPE = ("type", "type_name", "Type", "msg_type", "message_type", "消息类型", "类型")
CHAT = ("chat", "room_name", "TalkerId", "chat_name", "会话", "群名")
OWN = ("IsSender", "isSender", "is_sender", "isSend", "is_send")
"""Columns that say with 1 or 0 whether the one whose export it is sent a message, as WeChat's have."""
_MEDIA_KEYS = (
    *("photo", "file", "media_type", "sticker_emoji", "poll", "contact_information", "location_information"),
    *("resources", "attachments", "game_title", "invoice_information"),
)
_FORWARDED_KEYS = ("forwarded_from", "forwarded_from_id", "saved_from")
_RECALLED_KEYS = ("recalled", "isRecalled", "is_recalled")
_SYSTEM_KEYS = ("system", "isSystemMessage", "is_system")
_READ = {*SENDER, *TIME, *TEXT, *TYPE, *CHAT, *OWN, *_MEDIA_KEYS, *_FORWARDED_KEYS, *_RECALLED_KEYS, *_SYSTEM_KEYS}
_READ |= {"id", "text_entities"}

NOTICE = "a notice of the program"
MEDIA = "a picture, sound, file or link"
FORWARDED = "forwarded from elsewhere"
RECALLED = "recalled by its sender"
NOISE = "one word that says little"
EMPTY = "empty"
UNANSWERED = "no answer of the assistant follows"
ALONE = "nobody but the assistant speaks"

_TEXT_TYPES = {*("message", "text", "txt", "1", "type_1", "文本", "文字", "引用", "reply", "quote")}
_TEXT_TYPES |= {"文本消息", "引用消息", "default"}
_NOTICE_TYPES = {*("service", "system", "10000", "10002", "系统", "系统消息", "系统通知", "notice", "撤回", "拍一拍")}
_MEDIA_TYPES = {
    *("image", "photo", "picture", "voice", "audio", "video", "sticker", "emoji", "location", "card", "file", "link"),
    *("3", "34", "42", "43", "47", "48", "49", "50", "图片", "语音", "视频", "表情", "动画表情", "表情包", "位置"),
    *("名片", "文件", "链接", "分享", "转账", "红包", "音视频通话"),
    *("图片消息", "语音消息", "视频消息", "表情消息", "动画表情消息", "位置消息", "名片消息", "文件消息", "链接消息"),
}
_NOTICE_SENDERS = {"system", "系统", "系统消息", "系统通知", "10000"}
_NOTICE = re.compile(
    r"(你|[\"“「].{1,60}[\"”」]) ?(撤回了一条消息|加入了群聊|通过扫描.*加入群聊|邀请.*加入了群聊|拍了拍.*)"
    r"|我?拍了拍 ?[\"“「].*|你已添加了.*|以上是打招呼的内容|.{0,60}开启了朋友验证.*|This message was deleted"
    r"|Messages and calls are end-to-end encrypted.*",
    re.DOTALL,
)
_MEDIA = re.compile(
    r"\[(图片|语音|视频|表情|动画表情|表情包|位置|名片|文件|链接|分享|转账|红包|语音通话|视频通话|音乐|小程序|聊天记录"
    r"|Photo|Image|Video|Voice|Audio|File|Sticker|Location)([:：][^\]]*)?\]|^<(msg|img|\?xml)\b|^<Media omitted>$"
    r"|^\u200e?(image|video|audio|sticker|GIF|document) omitted$|^https?://\S+$"
)
_TIME = re.compile(
    r"(\d{4})[-/.年](\d{1,2})[-/.月](\d{1,2})日?[T ]+(\d{1,2}):(\d{2})(?::(\d{2})(\.\d{1,6})?)? *(Z|[+-]\d{2}:?\d{2})?"
)
_FIRST, _LAST = 315532800, 4102444800  # 1980 and 2100: a number outside is no time of a chat


class Message(NamedTuple):
    """A message as it was sent; sorted by its chat, its time, and its number in the source."""

    chat: str
    time: float
    """Seconds since 1970; where the source has no time zone, of its own clock."""
    number: int
    row_id: str
    sender: str
    text: str
    left_out: str | None = None
    """Why it is in no row."""
    is_broken: bool = False
    is_own: bool | None = None
    """Whether it was sent by the one whose export it is, where that is said."""


def plan_chat(files: list[str], names: Mapping[str, str], section: Source, chat: ChatLog, store: Store) -> list[Shard]:
    """Shards of an exported chat, in order of chats and time; each holds a part of its messages.

    DataError where the one who is to be the assistant sends none of them, or names do not tell who sends which.
    """
    speakers: Counter[str] = Counter()
    sides: dict[bool, dict[str, None]] = {True: {}, False: {}}
    unread: dict[str, None] = {}
    shards: list[Shard] = []
    lines: list[bytes] = []
    size = pos = 0
    before: Message | None = None

    def flush() -> None:
        part = {**stored(b"".join(lines), store), "path": files[0], "name": "", "first": 0, "rows": len(lines)}
        shards.append({**part, "index": len(shards), "pos": pos - len(lines)})
        lines.clear()

    given = (m for path in files for m in read_messages(path, names[path], section.columns, chat, unread))
    for message in islice(_in_order(given), section.limit):
        is_after_silence = before is not None and (
            message.chat != before.chat or message.time - before.time > chat.silence
        )
        if size >= section.shard_bytes and (is_after_silence or size >= FORCED * section.shard_bytes):
            flush()
            size = 0
        lines.append(json.dumps(message).encode() + b"\n")
        size += len(lines[-1])
        pos += 1
        before = message
        if not message.is_broken:
            speakers[message.sender] += 1
        if message.is_own is not None and message.left_out is None:
            sides[message.is_own][message.sender] = None
    if lines:
        flush()
    missing = [name for name in chat.assistants if not speakers[name]]
    if speakers and missing:
        raise DataError(f"{section.source}: {missing[0]}, ingest.chat_log.assistant, sends none; {_named(speakers)}")
    _require_names_tell(section.source, chat.assistants, own=sides[True], others=sides[False])
    return [{**shard, "unread": sorted(unread)} for shard in shards]


def _require_names_tell(source: str, assistants: list[str], own: Collection[str], others: Collection[str]) -> None:
    """DataError where the export's own marks of who sends a message contradict the names of the speakers."""
    if both := [name for name in own if name in others]:
        raise DataError(
            f"{source}: messages of {both[0]} are marked as sent by oneself and as received, so that the name does not "
            f"tell who speaks; say ingest.columns={{sender: {OWN[0]}}} and, as the assistant, '1' for oneself or '0'"
        )
    missing = [name for name in own if name not in assistants]
    if missing and any(name in assistants for name in own):
        raise DataError(
            f"{source}: {missing[0]} is marked as the same sender as {', '.join(assistants)}; add the name to "
            "ingest.chat_log.assistant"
        )


def _in_order(messages: Iterable[Message]) -> Iterator[Message]:
    """The messages sorted: in memory where one run holds them all, else in runs on disk that are merged."""
    messages = iter(messages)
    runs: list[Iterator[Message]] = []
    with ExitStack() as held:
        while run := sorted(islice(messages, RUN)):
            if not runs and len(run) < RUN:
                yield from run
                return
            file = held.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8"))
            file.writelines(json.dumps(message) + "\n" for message in run)
            file.seek(0)
            runs.append(Message(*json.loads(line)) for line in file)
        yield from heapq.merge(*runs)


def read_messages(
    path: str, name: str, columns: dict[str, str | None], section: ChatLog, unread: dict[str, None]
) -> Iterator[Message]:
    """The messages of one file as it has them; what of them is not read is added to `unread`."""
    time, chat = 0.0, name
    for number, row, raw, own_chat in _rows(path, name, unread):
        row_id = f"{name}:{number + 1}"
        try:
            if row is None:
                raise ValueError(raw)
            row = renamed(row, columns)
            if odd := [key for key in row if key in _READ and isinstance(row[key], bytes)]:
                raise ValueError(f"column {odd[0]} holds bytes, which are no text")
            unread.update(dict.fromkeys(str(key) for key in row if key not in _READ))
            texts = [key for key in TEXT if not says_nothing(row.get(key))]
            unread.update(dict.fromkeys(key for key in texts[1:] if row[key] != row[texts[0]]))
            chat = str(_first(row, CHAT) or own_chat)
            sender, said, left_out = _said(row, section)
            time, is_own = time_of(_first(row, TIME)), _is_own(row)
        except (ValueError, RecursionError) as error:
            text = json.dumps(row, ensure_ascii=False, default=str) if row and isinstance(error, ValueError) else ""
            yield Message(chat, time, number, row_id, "", text[:1000], str(error)[:1000], True)
            continue
        yield Message(chat, time, number, row_id, sender, said, left_out, is_own=is_own)


def _rows(path: str, name: str, unread: dict[str, None]) -> Iterator[tuple[int, dict[str, Any] | None, str, str]]:
    """The rows of a file as `Numbered`, each with the name of its chat."""
    if format_of(path) in (".json", ".jsonl", ".ndjson"):
        with open_bytes(path) as stream:
            head = stream.read(1 << 16).decode("utf-8", "replace").lstrip("\ufeff \t\r\n")
        if head.startswith("{") and re.search(r'"(messages|chats)"\s*:\s*[\[{]', head):
            with open_bytes(path) as stream:
                for number, (message, chat) in enumerate(messages_of(path, stream, name)):
                    if isinstance(message, dict):
                        yield number, message, "", chat
                        continue
                    is_repeated = isinstance(message, RepeatedKey)
                    yield number, None, str(message) if is_repeated else f"not a message but {message!r:.200}", chat
            return
    for number, row, raw in rows_of_file(path, unread):
        yield number, row, raw, name


def _said(row: Mapping[str, Any], section: ChatLog) -> tuple[str, str, str | None]:
    """Who says what in a message, and why it is left out, if it is; ValueError where that cannot be told."""
    sender, text = _first(row, SENDER), _first(row, TEXT)
    kind = str(_first(row, TYPE) or "")
    if isinstance(sender, Mapping):
        sender = _first(sender, ("name", "nickname", "card", "uin", "uid", "id"))
    is_media = any(not says_nothing(row.get(key)) for key in _MEDIA_KEYS)
    if isinstance(text, Mapping):
        is_media = is_media or any(not says_nothing(text.get(key)) for key in _MEDIA_KEYS)
        if "text" not in text and not is_media:
            raise ValueError(f"its text is an object without text: {text!r:.80}")
        text = text.get("text")
    text = _joined(text)
    who = "" if sender is None else str(sender).strip()
    return who, text, _why_left_out(row, who, kind.strip(), text, is_media, section)


def _why_left_out(
    row: Mapping[str, Any], sender: str, kind: str, text: str, is_media: bool, section: ChatLog
) -> str | None:
    if kind in _NOTICE_TYPES or sender in _NOTICE_SENDERS or _NOTICE.fullmatch(text):
        return NOTICE
    if any(_is_true(row.get(key)) for key in _SYSTEM_KEYS):
        return NOTICE
    if any(_is_true(row.get(key)) for key in _RECALLED_KEYS):
        return RECALLED
    if any(not says_nothing(row.get(key)) for key in _FORWARDED_KEYS):
        return FORWARDED
    if is_media or kind.lower() in _MEDIA_TYPES or _MEDIA.search(text):
        return MEDIA
    if kind and kind.lower() not in _TEXT_TYPES:
        return f"of type {kind}, which is not read as text"
    if not text:
        return EMPTY
    if not sender:
        raise ValueError("has no sender; name its column as ingest.columns.sender")
    return NOISE if section.noise and _core(text) in {"", *map(_core, section.noise)} else None


def _is_own(row: Mapping[str, Any]) -> bool | None:
    """What the export says of whether a message was sent by oneself; ValueError for what is no such mark."""
    mark = _first(row, OWN)
    if mark is None:
        return None
    if (text := str(mark).strip().lower()) not in MARKS:
        raise ValueError(f"its mark of who sends it is {mark!r:.80}, not 1 or 0")
    return MARKS[text]


def _is_true(value: Any) -> bool:
    """Whether a mark is set, as JSON has it or a file of texts."""
    return value is True or (not isinstance(value, bool) and str(value).strip().lower() in ("true", "1"))


def _core(text: str) -> str:
    """A text's letters and digits, those that repeat once."""
    letters = [c for c in unicodedata.normalize("NFKC", text).lower() if unicodedata.category(c)[0] in "LN"]
    return re.sub(r"(.)\1+", r"\1", "".join(letters))


def _joined(text: Any) -> str:
    """A message's text, which may be a list of texts and of {type, text}."""
    if text is None:
        return ""
    if isinstance(text, int | float):
        return str(text)
    if isinstance(text, list):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in text]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(parts):
            return "".join(texts).strip()
    if not isinstance(text, str):
        raise ValueError(f"its text is {type(text).__name__}")
    return text.strip()


def _first(row: Mapping[str, Any], names: Iterable[str]) -> Any:
    """What stands in the first of the columns that says something."""
    return next((row[name] for name in names if name in row and not says_nothing(row[name])), None)


def time_of(given: Any) -> float:
    """A time in seconds: of numbers that count seconds or milliseconds, or of a date and a time of day."""
    text = "" if given is None else str(given).strip()
    if re.fullmatch(r"(19|20)\d{12}", text):
        text = f"{text[:4]}-{text[4:6]}-{text[6:8]} {text[8:10]}:{text[10:12]}:{text[12:]}"
    try:
        if re.fullmatch(r"\d{9,17}(\.\d+)?", text):
            seconds = float(text)
            while seconds > _LAST:
                seconds /= 1000
            if seconds >= _FIRST:
                return seconds
        elif match := _TIME.fullmatch(text):
            year, month, day, hour, minute, second, part, zone = match.groups()
            date = f"{year}-{month:>02}-{day:>02}T{hour:>02}:{minute}:{second or '00'}{(part or '.0'):0<7}"
            moment = datetime.fromisoformat(date + (zone or "+00:00"))
            return moment.timestamp()
    except (ValueError, OverflowError):
        pass
    raise ValueError(f"its time is {text!r:.80}, not like 2024-01-31 12:00:00; name its column as ingest.columns.time")


def _named(speakers: Counter[str]) -> str:
    shown = ", ".join(f"{name} ({count})" for name, count in speakers.most_common(SHOWN))
    more = f" and {len(speakers) - SHOWN} more" if len(speakers) > SHOWN else ""
    return f"speakers and their messages: {shown}{more}"


def check_chat(files: list[str], names: Mapping[str, str], section: Source, chat: ChatLog) -> str:
    """Who speaks in the first messages of the first file; DataError where none of them can be read."""
    first = [*islice(read_messages(files[0], names[files[0]], section.columns, chat, {}), LOOKED_INTO)]
    speakers = Counter(message.sender for message in first if not message.is_broken)
    if not first:
        raise DataError(f"{files[0]}: no messages")
    if not speakers:
        raise InputError(f"{files[0]}: {first[0].row_id} {first[0].left_out}")
    return _named(speakers)


def first_sessions(
    files: list[str], names: Mapping[str, str], section: Source, chat: ChatLog, count: int
) -> list[dict[str, Any]]:
    """Rows of the first messages of the first file, to look at before the chat is read."""
    first = sorted(islice(read_messages(files[0], names[files[0]], section.columns, chat, {}), LOOKED_INTO))
    found = islice(sessions(first, 0, chat, lambda message, pos, reason: None), count)
    return [replaced(with_system(row, section.system), section.replace) for row in found]


def chat_reader(section: Source, chat: ChatLog) -> Work:
    """The work on one part of a chat: sessions as rows."""
    system, replace = section.system, section.replace

    def work(shard: Shard, attempt: Attempt) -> dict[str, Any]:
        rows = Rows(ROW, flat_column, "chat_log")
        left_out: Counter[str] = Counter()

        def leave_out(message: Message, pos: int, reason: str) -> None:
            if not message.is_broken:
                left_out[reason] += 1
            reader = "chat_log" if message.is_broken else LEFT_OUT
            said = {"sender": message.sender, "text": message.text}
            rows.broken.append(broken_row(reader, {"row_id": message.row_id, "pos": pos}, reason, said))

        messages = (Message(*json.loads(line)) for line in block_of(shard).splitlines())
        for batch in batches(sessions(messages, shard["pos"], chat, leave_out), BATCH_ROWS):
            rows.add([replaced(with_system(row, system), replace) for row in batch], (*ROW.names, *COLUMNS))
        written = rows.write(attempt)
        return {
            **written,
            "broken": written["broken"] - left_out.total(),
            "own_keys": False,
            "adapters": {"chat_log": written["rows"]},
            "counts": {f"messages left out: {reason}": count for reason, count in left_out.items()},
            "unread": shard["unread"],
        }

    return work


def sessions(
    messages: Iterable[Message], pos: int, section: ChatLog, leave_out: Callable[[Message, int, str], None]
) -> Iterator[dict[str, Any]]:
    """The rows of messages in order, the first of which is number `pos` of the data set.

    A session ends with the chat, at a silence, where one side speaks again after more than `gap` without an answer, and
    with an answer where it has `max_turns`. Each message that is in no row is handed to `leave_out`, with its reason.
    """
    session: list[tuple[int, Message]] = []
    turns = 0
    for number, message in enumerate(messages, start=pos):
        if message.left_out is not None:
            leave_out(message, number, message.left_out)
            continue
        if session:
            before = session[-1][1]
            is_same = _is_assistant(message, section) == _is_assistant(before, section)
            waited = message.time - before.time
            if (
                message.chat != before.chat
                or waited > (section.gap if is_same else section.silence)
                or (not is_same and turns >= section.max_turns and _is_assistant(before, section))
            ):
                yield from _row(session, section, leave_out)
                session, turns = [], 0
            elif not is_same:
                turns += 1
        session.append((number, message))
        turns = turns or 1
    yield from _row(session, section, leave_out)


def _is_assistant(message: Message, section: ChatLog) -> bool:
    return message.sender in section.assistants


def _row(
    session: list[tuple[int, Message]], section: ChatLog, leave_out: Callable[[Message, int, str], None]
) -> Iterator[dict[str, Any]]:
    """The row of a session, if it has one: up to the last answer of the assistant."""
    sides = [_is_assistant(message, section) for _, message in session]
    end = len(sides) - sides[::-1].index(True) if True in sides else 0
    others = {_renamed(m.sender, section) for _, m in session[:end] if not _is_assistant(m, section)}
    if not others:
        for pos, message in session[:end]:
            leave_out(message, pos, ALONE)
    for pos, message in session[end:]:
        leave_out(message, pos, UNANSWERED)
    if not others:
        return
    is_named = section.name_speakers == "always" or (section.name_speakers == "auto" and len(others) > 1)
    turns: list[Turn] = [
        {"role": "assistant", "content": _renamed(message.text, section)}
        if is_assistant
        else {"role": "user", "content": _asked(message, section, is_named)}
        for (_, message), is_assistant in zip(session[:end], sides, strict=False)
    ]
    pos, first = session[0]
    row, _ = conversation_of(turns, None)
    yield {
        **row,
        "row_id": first.row_id,
        "pos": pos,
        "chat": _renamed(first.chat, section),
        "speaker": "、".join(sorted(others)),
        "time": datetime.fromtimestamp(first.time, UTC).isoformat(" ", "seconds").removesuffix("+00:00"),
    }


def _asked(message: Message, section: ChatLog, is_named: bool) -> str:
    """A message of one of the others, with who says it where that could not be told otherwise."""
    text = _renamed(message.text, section)
    return f"{_renamed(message.sender, section)}：{text}" if is_named else text


def _renamed(text: str, section: ChatLog) -> str:
    """A text with `names` replaced, the longest first, so that no name is replaced twice or in part."""
    if not section.names:
        return text
    longest = sorted(section.names, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, longest)), lambda found: section.names[found[0]], text)
