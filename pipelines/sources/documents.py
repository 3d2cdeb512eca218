"""Documents as text, and spreadsheets as rows, each by the reader for its format.

The readers of Word, PDF and Excel files are an extra that other sources do without, so that they are imported when such
a file is read.
"""

import html
import io
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
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
_HIDDEN_ROW = re.compile(rb"<(?:\w+:)?row\b[^>]*\bhidden=[\"'](?:1|true)[\"']")
_MERGED_CELLS = re.compile(rb"<(?:\w+:)?mergeCell\b")
_CARRIAGE_RETURN = re.compile(r"_x000[dD]_\n?")
"""How Excel writes what ends lines together with a line feed, which its reader leaves in the text."""
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


def rows_of_spreadsheet(
    path: str, stream: IO[bytes], unread: dict[str, None]
) -> Iterator[tuple[dict[str, Any] | None, str]]:
    """The rows of a workbook's visible sheets, whose first rows name the columns, the same ones in all of them.

    In place of a row with a cell that has no value to read None and the cell's name. Hidden sheets are added to
    `unread`. DataError for a sheet that hides rows, for whoever filtered it may want either, or has merged cells.
    """
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
        formulas = openpyxl.load_workbook(io.BytesIO(data), read_only=True)
        hiding, merging = (_sheets_with(io.BytesIO(data), what) for what in (_HIDDEN_ROW, _MERGED_CELLS))
    except Exception as error:  # of damaged files it raises what it comes upon
        raise DataError(f"{path}: cannot be read ({type(error).__name__}: {error})") from None
    header: list[str] | None = None
    for sheet, same in zip(book.worksheets, formulas.worksheets, strict=True):
        if sheet.sheet_state != "visible":
            unread[f"hidden sheet {sheet.title} of {PurePosixPath(path).name}"] = None
            continue
        where = f"{path}, sheet {sheet.title}"
        if sheet.title in hiding:
            raise DataError(f"{where}: hides rows, as filters do; show them, or delete those that are not meant")
        if sheet.title in merging:
            raise DataError(f"{where}: has merged cells, of which only the first holds the value; split and fill them")
        for each in (sheet, same):
            each.reset_dimensions()  # some programs write wrong ones
        pairs = _undamaged(where, zip(sheet.iter_rows(), same.iter_rows(values_only=True), strict=True))
        records = (
            (cells, why)
            for cells, typed in pairs
            if (why := _unreadable(cells, typed)) or any(cell.value is not None for cell in cells)
        )
        first, why = next(records, ((), None))
        if why:
            raise DataError(f"{where}: {why}")
        names = _names(where, tuple(cell.value for cell in first))
        if not names:
            continue
        if header is not None and set(names) != set(header):
            raise DataError(f"{path}: sheet {sheet.title} has other columns than those before; make a file of each")
        header = names
        for record, why in records:
            values = [cell.value for cell in record]
            if more := [value for value in values[len(names) :] if value is not None]:
                raise DataError(f"{where}: {more[0]!r:.80} stands in a column without a name")
            if why:
                yield None, f"sheet {sheet.title}: {why}"
                continue
            cells = [*map(_cell, values), *[None] * (len(names) - len(values))]
            yield dict(zip(names, cells, strict=False)), ""


def _undamaged(where: str, rows: Iterable[Any]) -> Iterator[Any]:
    """The rows; DataError where the sheet's XML breaks off."""
    try:
        yield from rows
    except Exception as error:  # of damaged files it raises what it comes upon
        raise DataError(f"{where}: cannot be read ({type(error).__name__}: {error})") from None


def _unreadable(cells: Iterable[Any], typed: Iterable[Any]) -> str | None:
    """Which cell of a row has no value to read; `typed` is what was typed into the cells, which may be formulas."""
    for cell, given in zip(cells, typed, strict=True):
        if cell.data_type == "e":
            return f"cell {cell.coordinate} holds the error {cell.value}"
        if cell.value is None and given is not None and cell.data_type != "str":  # str: its result is an empty text
            return f"cell {cell.coordinate} holds a formula without its result; open the file in Excel and save it"
    return None


def _sheets_with(stream: IO[bytes], what: re.Pattern[bytes]) -> set[str]:
    """The names of sheets whose XML has `what`, such as a hidden row, which the reader does not say of large files."""
    found = set()
    with zipfile.ZipFile(stream) as archive:
        relations = _attributes(archive.read("xl/_rels/workbook.xml.rels").decode(), "Relationship")
        targets = {relation["Id"]: relation["Target"] for relation in relations}
        for sheet in _attributes(archive.read("xl/workbook.xml").decode(), "sheet"):
            target = targets[sheet["id"]]
            part = target.removeprefix("/") if target.startswith("/") else f"xl/{target}"
            with archive.open(part) as xml:
                before = b""
                while block := xml.read(1 << 20):
                    if what.search(before + block):
                        found.add(html.unescape(sheet["name"]))
                        break
                    before = block[-1000:]
    return found


def _names(where: str, record: tuple[Any, ...]) -> list[str]:
    names = ["" if cell is None else str(cell).strip() for cell in record]
    while names and not names[-1]:
        names.pop()
    if twice := [name or "an empty name" for name in names if names.count(name) > 1 or not name]:
        raise DataError(f"{where}: the header has {twice[0]!r} more than once, or between others; rename it")
    return names


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        return _CARRIAGE_RETURN.sub("\n", value)
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


_WORD = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
_OF_WORD = {f"{_WORD}tab": "\t", f"{_WORD}ptab": "\t", f"{_WORD}br": "\n", f"{_WORD}cr": "\n"}
_OF_WORD[f"{_WORD}noBreakHyphen"] = "-"
_UNSEEN_IN_WORD = {f"{_WORD}{name}" for name in ("del", "moveFrom", "pPr", "rPr", "tblPr", "trPr", "tcPr", "sectPr")}
_UNSEEN_IN_WORD.add("{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback")  # the same once more


def _word(stream: IO[bytes]) -> str:
    """Paragraphs, and tables a row a line, as they are with all changes accepted; text boxes after their paragraph."""
    import docx

    _require_bounded(stream)
    return "\n".join(_word_lines(docx.Document(stream).element.body))


def _word_lines(element: Any) -> list[str]:
    """The lines of what stands in an element: in controls, fields and insertions too."""
    lines: list[str] = []
    for child in element:
        if child.tag == f"{_WORD}p":
            lines += _word_paragraph(child)
        elif child.tag == f"{_WORD}tr":
            cells = [cell for cell in child.iter(f"{_WORD}tc") if next(cell.iterancestors(f"{_WORD}tr")) is child]
            lines.append("\t".join("\n".join(_word_lines(cell)) for cell in cells))
        elif child.tag not in _UNSEEN_IN_WORD:
            lines += _word_lines(child)
    return lines


def _word_paragraph(paragraph: Any) -> list[str]:
    """A paragraph's text, and the lines of what stands in boxes at it."""
    text: list[str] = []
    boxes: list[str] = []

    def walk(element: Any) -> None:
        for child in element:
            if child.tag == f"{_WORD}t":
                text.append(child.text or "")
            elif child.tag == f"{_WORD}txbxContent":
                boxes.extend(_word_lines(child))
            elif child.tag in _OF_WORD:
                text.append(_OF_WORD[child.tag])
            elif child.tag not in _UNSEEN_IN_WORD:
                walk(child)

    walk(paragraph)
    return ["".join(text), *boxes]


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
