"""Messages of a chat as they are read, before they are sorted: none is passed over in silence."""

import json
from pathlib import Path
from typing import Any

from pipelines.recipe.ingest import ChatLog
from pipelines.sources.chat_log import FORWARDED, Message, read_messages
from pipelines.sources.files import rows_of_file


def messages(path: Path, rows: Any) -> tuple[list[Message], dict[str, None]]:
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    unread: dict[str, None] = {}
    return [*read_messages(str(path), path.name, {}, ChatLog(assistant="爱莉"), unread)], unread


def said(text: Any, **more: Any) -> dict[str, Any]:
    return {"sender": "小明", "time": 1_700_000_000, "text": text, **more}


def test_a_text_that_is_another_object_is_broken_and_not_empty(tmp_path: Path) -> None:
    (one, other), _ = messages(tmp_path / "a.json", [said({"raw": "你好"}), said({"text": "你好"})])
    assert one.is_broken and one.left_out == "its text is an object without text: {'raw': '你好'}"
    assert (other.text, other.left_out) == ("你好", None)


def test_what_a_deleted_account_wrote_is_forwarded_too(tmp_path: Path) -> None:
    row = said("别人的话", forwarded_from=None, forwarded_from_id="user5")
    assert messages(tmp_path / "a.json", [row])[0][0].left_out == FORWARDED


def test_what_stands_beside_messages_is_named(tmp_path: Path) -> None:
    (one,), unread = messages(tmp_path / "a.json", {"title": "群", "data": [said("你好")]})
    assert one.text == "你好" and [*unread] == ["title beside the rows of a.json"]


def test_rows_that_a_quotation_mark_swallows_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('query\tresponse\n一\t"二\n三\t四\n五\t六\n', encoding="utf-8")
    ((_, row, why),) = rows_of_file(str(tmp_path / "a.tsv"))
    assert row is None and "3 lines are read as one row" in why
