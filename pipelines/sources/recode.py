"""Files in another encoding than UTF-8: read once, and kept as UTF-8 in the stage's folder until they are read."""

import codecs
from collections.abc import Iterator
from pathlib import PurePosixPath

from pipelines.artifacts.workspace import Place
from pipelines.errors import DataError
from pipelines.sources.documents import BINARY
from pipelines.sources.files import COMPRESSIONS, format_of, is_compressed, open_bytes

FOLDER = "utf-8"


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
        path
        if format_of(path) in (".parquet", *BINARY)
        else _copied(path, encoding, place.path(FOLDER, f"{number:05d}"), place)
        for number, path in enumerate(files)
    ]


def remove_copies(files: list[str], place: Place) -> None:
    """Delete those of the files that are copies."""
    for path in files:
        if path.startswith(place.path(FOLDER)):
            place.workspace.remove(path)


def _copied(path: str, encoding: str, folder: str, place: Place) -> str:
    name = PurePosixPath(path).name
    if is_compressed(name):
        name = name.removesuffix(COMPRESSIONS[0]).removesuffix(COMPRESSIONS[1])
    target = f"{folder}/{name}"
    with place.workspace.create(target) as sink:
        for text in _decoded(path, encoding):
            sink.write(text.encode())
    return target


def _decoded(path: str, encoding: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder(encoding)()
    with open_bytes(path) as stream:
        lines = 0
        try:
            for line in stream:
                lines += 1
                yield decoder.decode(line)
            yield decoder.decode(b"", final=True)
        except UnicodeError as error:
            raise DataError(f"{path}:{lines}: not {encoding} text ({error}); mend ingest.encoding") from None
