"""Files in another encoding than UTF-8: read once, and kept as UTF-8 in the stage's folder until they are read."""

import codecs
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from pipelines.artifacts.workspace import Place
from pipelines.errors import DataError, InputError
from pipelines.owned_folder import owned_folder
from pipelines.sources.documents import BINARY
from pipelines.sources.files import COMPRESSIONS, format_of, is_compressed, open_bytes

FOLDER = "utf-8"
BEGINNING = 8 << 20
"""Characters of a file in another encoding that are looked at before all of it is read."""


MARKS = {
    **dict.fromkeys((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "utf-32"),
    **dict.fromkeys((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "utf-16"),
    codecs.BOM_UTF8: "utf-8",
}
"""What Unicode text may begin with, the longer ones first; other encodings would read it as characters."""


def is_utf8(encoding: str) -> bool:
    """Whether files in that encoding are read as they are."""
    return codecs.lookup(encoding).name in ("utf-8", "utf-8-sig")


def as_utf8(files: list[str], encoding: str, place: Place) -> list[str]:
    """The files, or copies of them in UTF-8 under the same names; what is no text needs none.

    DataError naming the line that is not in that encoding.
    """
    if is_utf8(encoding):
        return files
    return [
        path if _is_binary(path) else _copied(path, encoding, place.path(FOLDER, f"{number:05d}"), place)
        for number, path in enumerate(files)
    ]


@contextmanager
def beginnings(files: list[str], encoding: str) -> Iterator[dict[str, str]]:
    """Files to look into, each with the one that it stands for: beginnings in UTF-8, or those files themselves.

    Errors name those files. DataError naming the line that is not in that encoding.
    """
    if is_utf8(encoding):
        yield {path: path for path in files}
        return
    with owned_folder(tempfile.gettempdir(), "danlu-beginnings-") as folder:
        looked = {
            path if _is_binary(path) else _beginning(path, encoding, Path(folder, str(number))): path
            for number, path in enumerate(files)
        }
        with named_as(looked):
            yield looked


def _beginning(path: str, encoding: str, folder: Path) -> str:
    target = folder / _plain_name(path)
    folder.mkdir()
    length = quotes = 0
    with target.open("wb") as sink:
        for text in _decoded(path, encoding):
            sink.write(text.encode())
            length, quotes = length + len(text), quotes + text.count('"')
            if length >= BEGINNING and quotes % 2 == 0:  # else a field of a CSV file may go on in the next line
                break
    return str(target)


@contextmanager
def named_as(files: Mapping[str, str]) -> Iterator[None]:
    """While in here errors about copies name the files for which they stand, by the copies' paths."""
    try:
        yield
    except (DataError, InputError) as error:
        said = str(error)
        for copy, file in files.items():
            said = said.replace(copy, file)
        if said == str(error):
            raise
        raise type(error)(said) from error


def remove_copies(files: list[str], place: Place) -> None:
    """Delete those of the files that are copies."""
    for path in files:
        if path.startswith(place.path(FOLDER)):
            place.workspace.remove(path)


def _is_binary(path: str) -> bool:
    """Whether a file says itself how its text is encoded."""
    return format_of(path) in (".parquet", *BINARY)


def _copied(path: str, encoding: str, folder: str, place: Place) -> str:
    target = f"{folder}/{_plain_name(path)}"
    with place.workspace.create(target) as sink:
        for text in _decoded(path, encoding):
            sink.write(text.encode())
    return target


def _plain_name(path: str) -> str:
    """A file's name once it is decompressed."""
    name = PurePosixPath(path).name
    return name.removesuffix(COMPRESSIONS[0]).removesuffix(COMPRESSIONS[1]) if is_compressed(name) else name


def _decoded(path: str, encoding: str) -> Iterator[str]:
    decoder, name = codecs.getincrementaldecoder(encoding)(), codecs.lookup(encoding).name
    with open_bytes(path) as stream:
        lines = 0
        try:
            for line in stream:
                lines += 1
                if lines == 1 and not name.startswith(marked := _marked(line) or name):
                    raise DataError(f"{path}: begins as {marked} does, and not as {encoding}; mend ingest.encoding")
                yield decoder.decode(line)
            yield decoder.decode(b"", final=True)
        except UnicodeError as error:
            raise DataError(f"{path}:{lines}: not {encoding} text ({error}); mend ingest.encoding") from None


def _marked(line: bytes) -> str | None:
    """The encoding whose mark a file's first line begins with."""
    return next((encoding for mark, encoding in MARKS.items() if line.startswith(mark)), None)
