"""How a file lays JSON out: an object a line, one array, objects over many lines, or a list under a key.

What a file is called does not decide it; its beginning does. Values are decoded one at a time, whatever the size of the
file, as Python's `json` reads them: with NaN, and with halves of surrogates, for which a row is set aside later.
"""

import codecs
import json
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO, Any

from pipelines.errors import DataError
from pipelines.sources.adapters import recognise
from pipelines.sources.json_text import STRICT, RepeatedKey
from pipelines.sources.row_keys import refusal

WRAPPERS = {
    *("data", "dataset", "rows", "items", "records", "examples", "instances", "samples", "list", "result", "results"),
    *("train", "test", "validation"),
}
"""Keys under which whole data sets stand as one list."""
HEAD = 1 << 20
"""Bytes at the beginning of a file by which its layout is told."""
MAX_VALUE = 1 << 28
"""Characters that one row may have: more, and the file is refused rather than held in memory."""


def is_lines(head: bytes) -> bool:
    """Whether a file that begins so has one row a line; what cannot be told is taken for lines."""
    text = head.decode("utf-8", "replace").lstrip("\ufeff \t\r\n")
    lines = [line for line in text.split("\n") if line.strip()]
    if (
        "\r" in text and "\n" not in text
    ):  # as lines of old Macs end, which are none elsewhere: values one after another
        return False
    if text.startswith("["):
        return len(lines) > 1 and _is_whole(lines[0])
    if not text.startswith("{"):
        return True
    if len(lines) == 1 or not _is_whole(lines[0]):
        return not _wraps(lines[0]) and (
            len(lines) == 1 or any(line[0] == "{" and _is_whole(line, dict) for line in lines[:20])
        )
    return True


def _is_whole(line: str, kind: type = object) -> bool:
    try:
        return isinstance(json.loads(line), kind)
    except (ValueError, RecursionError):
        return False


def _wraps(line: str) -> bool:
    """Whether a line begins with the object around a data set."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        key, _, value = line.lstrip("{ \t").partition(":")
        return key.strip(' "\t') in WRAPPERS and value.lstrip()[:1] in ("[", "")
    return isinstance(found, dict) and any(_is_wrapper(found, key) for key in found)


def _is_wrapper(found: dict[str, Any], key: str) -> bool:
    return key in WRAPPERS and isinstance(found[key], list) and not recognise(found)


def values_of(path: str, stream: IO[bytes], unread: dict[str, None]) -> Iterator[Any]:
    """The rows of a file that has not one a line, in order; what stands beside them is added to `unread`.

    DataError where its JSON is broken, or what stands beside the rows would change what they say.
    """
    text = _Text(path, stream)
    while (first := text.peek()) not in ("", "]"):
        text.forget()
        if first == "[":
            text.take("[")
            yield from _elements(text)
        elif first == "{" and (inner := text.wrapped(unread)):
            yield from inner
        else:
            yield text.value()
        if text.peek() == ",":
            text.take(",")
    if text.peek():
        raise text.broken("nothing may follow the rows")


def _elements(text: "_Text") -> Iterator[Any]:
    """What stands in an array whose bracket was taken."""
    while text.peek() != "]":
        text.forget()
        yield text.value()
        text.take_comma("]")
    text.take("]")


def messages_of(path: str, stream: IO[bytes], chat: str) -> Iterator[tuple[Any, str]]:
    """The messages of an exported chat, or of several, each with its chat's name; `chat` is that of one without.

    A chat is an object with a list `messages`, and before them a `name`, or a `chatInfo` that has one; it may stand
    anywhere in others. DataError where the JSON is broken.
    """
    text = _Text(path, stream)
    text.peek()
    yield from _messages(text, chat)
    if text.peek():
        raise text.broken("nothing may follow the chats")


def _messages(text: "_Text", chat: str) -> Iterator[tuple[Any, str]]:
    """Those in the value that comes next."""
    first = text.peek()
    if first == "[":
        text.take("[")
        while text.peek() not in ("]", ""):
            yield from _messages(text, chat)
            text.take_comma("]")
        text.take("]")
    elif first == "{":
        text.take("{")
        keys = set()
        while text.peek() == '"':
            key = text.value()
            if key in keys:
                raise text.broken(f"key {key!r:.80} is there twice; delete one")
            keys.add(key)
            text.take_colon()
            if key == "messages" and text.peek() == "[":
                text.take("[")
                yield from ((message, chat) for message in _elements(text))
            elif key in ("name", "chatInfo"):
                value = text.value()
                chat = str((value.get("name") if isinstance(value, dict) else value) or chat)
            else:
                yield from _messages(text, chat)
            text.take_comma("}")
        text.take("}")
    else:
        text.value()


class _Text:
    """A file's text, as far as it is read and not taken."""

    def __init__(self, path: str, stream: IO[bytes]) -> None:
        self._path = path
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""
        self._at = 0
        self._is_read = False
        self._values = 0

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            while self._at < len(self._text):
                if not self._text[self._at].isspace():
                    return self._text[self._at]
                self._at += 1
            if not self._more():
                return ""

    def take(self, character: str) -> None:
        """Go past a character that was peeked."""
        assert self.peek() == character
        self._at += 1

    def take_colon(self) -> None:
        """Go past the colon behind a key; DataError where there is none."""
        if self.peek() != ":":
            raise self.broken("':' is missing")
        self.take(":")

    def take_comma(self, end: str) -> None:
        """Go past the comma behind an element, if this is not the last; DataError where neither comes."""
        if self.peek() == ",":
            self.take(",")
        elif self.peek() != end:
            raise self.broken(f"',' or '{end}' is missing")

    def value(self) -> Any:
        """The next value, or RepeatedKey in place of one in which an object has a key twice."""
        self.peek()
        decoder = STRICT
        repeated: RepeatedKey | None = None
        while True:
            try:
                found, end = decoder.raw_decode(self._text, self._at)
            except RepeatedKey as error:  # the value is read for its end, which may come with the next block
                decoder, repeated = json.JSONDecoder(), error
                continue
            except RecursionError:
                raise self.broken("it is nested too deep") from None
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos > len(self._text) - 16
                if not is_cut or not self._more():
                    raise self.broken(error.msg) from None
                continue
            except ValueError as error:  # an integer of more digits than Python reads
                raise self.broken(str(error)) from None
            if end == len(self._text) and not self._is_read and self._more():
                continue  # a number may go on
            self._at = end
            self._values += 1
            return repeated or found

    def wrapped(self, unread: dict[str, None]) -> Iterator[Any] | None:
        """The rows under a key, where the next object is the one around a data set; else nothing is taken."""
        begin = self._at
        while len(self._text) - begin < HEAD and self._more():
            pass
        beside: dict[str, Any] = {}
        try:
            self.take("{")
            while self.peek() == '"':
                key = self.value()
                self._values -= 1
                self.take_colon()
                if key in WRAPPERS and self.peek() == "[":
                    self.take("[")
                    if self.peek() in ("{", "]"):
                        return self._under(beside, unread)
                    break
                if key not in WRAPPERS and self.peek() in "[{":
                    break
                beside[key] = self.value()
                self._values -= 1
                if self.peek() == ",":
                    self.take(",")
        except DataError:
            pass  # not an object around a data set: it is read as a row, which says what is wrong with it
        self._at = begin
        return None

    def _under(self, beside: dict[str, Any], unread: dict[str, None]) -> Iterator[Any]:
        """The rows of the list that is begun; `beside`, what stands before it."""
        for key, value in beside.items():
            self._pass_over(key, value, unread)
        yield from _elements(self)
        while self.peek() == ",":
            self.take(",")
            key = self.value()
            self.take_colon()
            if key in WRAPPERS and self.peek() == "[":
                raise self.broken(f"a second list stands under {key}; make a file of each")
            self._pass_over(key, self.value(), unread)
        if self.peek() != "}":
            raise self.broken("'}' is missing")
        self.take("}")

    def _pass_over(self, key: str, value: Any, unread: dict[str, None]) -> None:
        """Name what stands beside the list; DataError where it would change what every row says."""
        if refusal(key, value, "") is not None:
            raise self.broken(f"{key} stands beside the rows and would hold for all of them; write it into each row")
        unread[f"{key} beside the rows of {PurePosixPath(self._path).name}"] = None

    def broken(self, why: str) -> DataError:
        """The error that the file is broken here."""
        return DataError(f"{self._path}: broken after element {self._values} ({why})")

    def _more(self) -> bool:
        """Read on; whether there was anything."""
        if self._is_read:
            return False
        kept = self._text[self._at :]
        if len(kept) > MAX_VALUE:
            raise DataError(f"{self._path}: element {self._values + 1} is longer than {MAX_VALUE} characters")
        block = self._stream.read(max(1 << 16, len(kept)))
        self._is_read = not block
        # wrapped() goes back to where it began, so nothing before that may be forgotten meanwhile
        self._text += self._decoder.decode(block, final=self._is_read)
        return bool(block)

    def forget(self) -> None:
        """Forget what was taken, once it is much."""
        if self._at > HEAD:
            self._text, self._at = self._text[self._at :], 0
