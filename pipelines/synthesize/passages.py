"""Documents and examples that lie in files: passages, each a value of the dimension `passage`, and few-shot pools."""

import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any, overload

import fsspec
import pyarrow as pa
import regex
from fsspec.core import OpenFile

from pipelines.artifacts.rows import is_text
from pipelines.errors import DataError
from pipelines.recipe.synthesize import Examples, Passages, Style, Synthesize
from pipelines.sources.documents import text_of_document
from pipelines.sources.files import format_of, is_document, rows_of_file

_END = re.compile(r"\n\s*\n|(?<=[。！？!?])[”’」』]?\s*|(?<=\.)\s+|\n")
"""Where a passage may end: after a paragraph, a sentence or a line."""
_WORD = regex.compile(r"[\p{L}\p{N}]")
"""What a passage holds at least: of marks and rules alone nobody asks anything."""
MAX_EXAMPLES = 10_000
"""Examples of a pool at most, the first ones."""
BATCH = 10_000


class StoredTexts(Sequence[str]):
    """Texts in Arrow's memory; where Ray runs, workers read them from its store, which holds them once a machine."""

    def __init__(self, texts: pa.ChunkedArray) -> None:
        self._texts = texts
        self._shared: Any = None

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[str]: ...
    def __getitem__(self, number: int | slice) -> str | Sequence[str]:
        if isinstance(number, slice):
            return StoredTexts(self._texts[number])
        text: str = self._texts[number].as_py()
        return text

    def __len__(self) -> int:
        return len(self._texts)

    def __reduce__(self) -> tuple[Any, ...]:
        import ray

        if not ray.is_initialized():
            return StoredTexts, (self._texts,)
        if self._shared is None:
            self._shared = ray.put(self._texts)
        return _from_store, (self._shared,)

    def digest(self) -> str:
        """A digest of the texts in their order."""
        found = hashlib.sha256()
        for text in self:
            data = text.encode()
            found.update(len(data).to_bytes(8, "little") + data)
        return found.hexdigest()


def _from_store(shared: Any) -> StoredTexts:
    import ray

    return StoredTexts(ray.get(shared))


def read_passages(section: Passages) -> StoredTexts:
    """The pieces of all documents, each once, read one document after the other.

    DataError where there are none, or one is not UTF-8 text.
    """
    seen: set[bytes] = set()

    def distinct() -> Iterator[str]:
        for text in _texts("synthesize.passages", section.source, section.text_key):
            for passage in filter(_WORD.search, cut(text, section)):
                name = hashlib.sha256(passage.encode("utf-8", "surrogatepass")).digest()[:16]
                if name not in seen:
                    seen.add(name)
                    yield passage

    pieces = distinct()
    chunks = []
    while batch := list(itertools.islice(pieces, BATCH)):
        chunks.append(pa.array(batch, pa.large_string()))
    if not chunks:
        raise DataError(f"{section.source}: no text in it; synthesize.passages.source names documents")
    return StoredTexts(pa.chunked_array(chunks).combine_chunks())


def check_passages(section: Passages) -> None:
    """DataError where there is no document, or where the first cannot be read."""
    texts = _texts("synthesize.passages", section.source, section.text_key)
    if not any(piece for text in texts for piece in cut(text, section)):
        raise DataError(f"{section.source}: no text in it; synthesize.passages.source names documents")


def with_examples(section: Synthesize) -> Synthesize:
    """The section with the pools read that lie in files; what they hold is what counts.

    DataError where a pool is smaller than what is drawn of it, or cannot be read.
    """
    styles = {name: _with_pool(name, style) for name, style in section.styles.items()}
    return section.model_copy(update={"styles": styles})


def _with_pool(name: str, style: Style) -> Style:
    if not isinstance(style.examples, Examples):
        return style
    where, source = f"synthesize.styles.{name}.examples", style.examples.source
    texts = _texts(where, source, style.examples.text_key, each_line=True)
    bare = (text.strip() for text in texts)
    pool = list(itertools.islice(dict.fromkeys(text for text in bare if text), MAX_EXAMPLES))
    if len(pool) < style.picked:
        raise DataError(f"{where}: {source} holds {len(pool)} different texts, and {style.picked} are drawn")
    return style.model_copy(update={"examples": pool, "num_examples": style.picked})


def cut(text: str, section: Passages) -> Iterator[str]:
    """Pieces of a text, as long as `size` allows, each cut at the last paragraph or sentence that ends within it.

    The next one begins `overlap` characters before that end. Only a sentence longer than `size` is cut within.
    """
    start, end = 0, len(text.rstrip())
    while start < end:
        stop = start + section.size
        if stop < end:
            ends = [found.end() for found in _END.finditer(text, start + section.overlap + 1, stop)]
            stop = ends[-1] if ends else stop
        if piece := text[start:stop].strip():
            yield piece
        if stop >= end:
            return
        start = stop - section.overlap


def _texts(where: str, source: str, text_key: str, each_line: bool = False) -> Iterator[str]:
    """The texts of a file, of a glob's files or of the documents in a folder, in the order of their names.

    Of rows their column, of documents all, or each line. DataError, naming the file and the row, where something
    cannot be read.
    """
    fs, folder = fsspec.core.url_to_fs(source)
    if fs.isdir(folder):
        files = [OpenFile(fs, path, "rb") for path in fs.find(folder) if is_document(path)]
    else:
        is_glob = "://" in source or "*" in source
        files = fsspec.open_files(source, mode="rb") if is_glob else [fsspec.open(source, "rb")]
    for file in sorted(files, key=lambda file: file.path):
        try:
            if format_of(file.path) and not is_document(file.path):
                yield from _column(where, file.fs.unstrip_protocol(file.path), text_key)
                continue
            with file as stream:
                text = text_of_document(file.path, PurePath(file.path).suffix.lower(), stream)
        except UnicodeDecodeError as error:
            raise DataError(f"{file.path}: byte {error.start} is not UTF-8; {where}.source names text files") from None
        except OSError as error:
            raise DataError(f"{file.path}: {error.strerror or error}; see {where}.source") from None
        yield from text.splitlines() if each_line else [text]


def _column(where: str, path: str, text_key: str) -> Iterator[str]:
    for number, row, why in rows_of_file(path):
        if row is None:
            raise DataError(f"{path}: row {number + 1} cannot be read: {why}")
        if not isinstance(text := row.get(text_key), str):
            raise DataError(f"{path}: row {number + 1} has no text in {text_key!r}; see {where}.text_key")
        if not is_text(text):
            raise DataError(f"{path}: row {number + 1} holds half a character, a lone surrogate, in {text_key!r}")
        yield text
