"""Documents as text, and spreadsheets as rows, each by the reader for its format.

The readers of Word, PDF and Excel files are an extra that other sources do without, so that they are imported when such
a file is read.
"""

import io
import re
import zipfile
from collections.abc import Callable, Iterator
from datetime import date, datetime, time, timedelta
from html.parser import HTMLParser
from pathlib import PurePosixPath
from typing import IO, Any
from urllib.parse import unquote

from pipelines.errors import DataError, InputError

DOCUMENTS = (".txt", ".md", ".docx", ".pdf", ".epub")
SPREADSHEET = ".xlsx"
BINARY = (".docx", ".pdf", ".epub", SPREADSHEET)
"""Those that are no plain text, whatever their encoding."""
MAX_DOCUMENT = 1 << 28
"""Bytes that a document may have, and a share of what the files inside one may unpack to."""
_BLOCKS = {*("p", "div", "br", "li", "tr", "h1", "h2", "h3", "h4", "h5", "h6", "blockquote", "section", "hr", "title")}
_UNSEEN = {"script", "style", "head"}


def text_of_document(path: str, suffix: str, stream: IO[bytes]) -> str:
    """The text of a document, which may be empty.

    DataError where it cannot be read, InputError where its reader is not installed, UnicodeDecodeError as it is.
    """
    data = stream.read(MAX_DOCUMENT + 1)
    if len(data) > MAX_DOCUMENT:
        raise DataError(f"{path}: larger than {MAX_DOCUMENT} bytes; cut it into several files")
    if suffix not in BINARY:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    try:
        return _READERS[suffix](io.BytesIO(data)).strip()
    except ImportError as error:
        raise _not_installed(path, error) from None
    except Exception as error:  # of damaged files these readers raise what they come upon
        raise DataError(f"{path}: cannot be read ({type(error).__name__}: {error})") from None


def rows_of_spreadsheet(path: str, stream: IO[bytes]) -> Iterator[dict[str, Any]]:
    """The rows of a workbook's visible sheets, whose first rows name the columns, the same ones in all of them."""
    try:
        import openpyxl
    except ImportError as error:
        raise _not_installed(path, error) from None
    data = stream.read(MAX_DOCUMENT + 1)
    if len(data) > MAX_DOCUMENT:
        raise DataError(f"{path}: larger than {MAX_DOCUMENT} bytes; save it as CSV UTF-8")
    try:
        _require_bounded(io.BytesIO(data))
        book = openpyxl.load_workbook(io.BytesIO(data), read_only=True, data_only=True)
    except Exception as error:  # of damaged files it raises what it comes upon
        raise DataError(f"{path}: cannot be read ({type(error).__name__}: {error})") from None
    header: list[str] | None = None
    for sheet in book.worksheets:
        if sheet.sheet_state != "visible":
            continue
        sheet.reset_dimensions()  # some programs write wrong ones
        records = (record for record in sheet.iter_rows(values_only=True) if any(cell is not None for cell in record))
        names = _names(f"{path}, sheet {sheet.title}", next(records, ()))
        if not names:
            continue
        if header is not None and set(names) != set(header):
            raise DataError(f"{path}: sheet {sheet.title} has other columns than those before; make a file of each")
        header = names
        for record in records:
            if more := [cell for cell in record[len(names) :] if cell is not None]:
                raise DataError(f"{path}, sheet {sheet.title}: {more[0]!r:.80} stands in a column without a name")
            cells = [*map(_cell, record), *[None] * (len(names) - len(record))]
            yield dict(zip(names, cells, strict=False))


def _names(where: str, record: tuple[Any, ...]) -> list[str]:
    names = ["" if cell is None else str(cell).strip() for cell in record]
    while names and not names[-1]:
        names.pop()
    if twice := [name or "an empty name" for name in names if names.count(name) > 1 or not name]:
        raise DataError(f"{where}: the header has {twice[0]!r} more than once, or between others; rename it")
    return names


def _cell(value: Any) -> Any:
    return str(value) if isinstance(value, date | datetime | time | timedelta) else value


def _not_installed(path: str, error: ImportError) -> InputError:
    return InputError(f"{path}: reading it needs {error.name}: pip install 'danlu[documents]'")


def _require_bounded(stream: IO[bytes]) -> None:
    """ValueError where the files inside an archive are too large together: some unpack to any size."""
    with zipfile.ZipFile(stream) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > max(4 * MAX_DOCUMENT, 200 * stream.seek(0, io.SEEK_END)):
        raise ValueError(f"it unpacks to {size} bytes")
    stream.seek(0)


def _word(stream: IO[bytes]) -> str:
    """Paragraphs, and tables a row a line."""
    import docx

    _require_bounded(stream)
    lines: list[str] = []
    for block in docx.Document(stream).iter_inner_content():
        if hasattr(block, "rows"):
            lines += ["\t".join(cell.text for cell in row.cells) for row in block.rows]
        else:
            lines.append(block.text)
    return "\n".join(lines)


def _pdf(stream: IO[bytes]) -> str:
    import pypdf

    reader = pypdf.PdfReader(stream)
    if reader.is_encrypted and not reader.decrypt(""):
        raise ValueError("it is encrypted; save it without a password")
    return "\n\n".join(page.extract_text() for page in reader.pages)


def _epub(stream: IO[bytes]) -> str:
    """The chapters in the order of the book's spine."""
    _require_bounded(stream)
    with zipfile.ZipFile(stream) as archive:
        container = archive.read("META-INF/container.xml").decode()
        package = _attributes(container, "rootfile")[0]["full-path"]
        content = archive.read(package).decode()
        files = {item["id"]: unquote(item["href"]) for item in _attributes(content, "item")}
        chapters = []
        for reference in _attributes(content, "itemref"):
            path = PurePosixPath(package).parent / files[reference["idref"]]
            page = _Page()
            page.feed(archive.read(str(path)).decode("utf-8", "replace"))
            chapters.append(re.sub(r"[ \t]*\n[ \t]*(\n\s*)?", "\n", page.text()).strip())
    return "\n\n".join(filter(None, chapters))


_READERS: dict[str, Callable[[IO[bytes]], str]] = {".docx": _word, ".pdf": _pdf, ".epub": _epub}


def _attributes(xml: str, element: str) -> list[dict[str, str]]:
    """The attributes of each such element; not by a reader of XML, whose entities unpack to any size."""
    found = re.findall(rf"<(?:\w+:)?{element}\b([^>]*)>", xml)
    attribute = re.compile(r"([\w-]+)\s*=\s*(?:\"([^\"]*)\"|'([^']*)')")
    return [{name: one or two for name, one, two in attribute.findall(text)} for text in found]


class _Page(HTMLParser):
    """The text of a page, a block a line."""

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[str] = []
        self._unseen = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A tag begins."""
        self._unseen += tag in _UNSEEN
        self._parts += ["\n"] * (tag in _BLOCKS)

    def handle_endtag(self, tag: str) -> None:
        """A tag ends."""
        self._unseen -= tag in _UNSEEN and self._unseen > 0
        self._parts += ["\n"] * (tag in _BLOCKS)

    def handle_data(self, data: str) -> None:
        """Text stands between tags; line ends in it are spaces."""
        if not self._unseen:
            self._parts.append(re.sub(r"\s+", " ", data))

    def text(self) -> str:
        """What was found."""
        return "".join(self._parts)
