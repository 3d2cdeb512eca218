"""Passages: documents cut into pieces, each a value of the dimension `passage`."""

import re
from collections.abc import Iterator
from pathlib import PurePath

import fsspec
from fsspec.core import OpenFile

from pipelines.errors import DataError
from pipelines.recipe.synthesize import PASSAGE, Passages, Synthesize
from pipelines.sources.documents import text_of_document
from pipelines.sources.files import is_document

_END = re.compile(r"\n\s*\n|(?<=[。！？!?])[”’」』]?\s*|(?<=\.)\s+|\n")
"""Where a passage may end: after a paragraph, a sentence or a line."""


def with_passages(section: Synthesize) -> Synthesize:
    """The section with its documents read, as one more dimension before the others; what they hold is what counts.

    DataError where there are none, or one is not UTF-8 text.
    """
    if section.passages is None:
        return section
    found = [passage for text in _texts(section.passages.source) for passage in cut(text, section.passages)]
    if not found:
        raise DataError(f"{section.passages.source}: no text in it; synthesize.passages.source names text files")
    dimensions = {PASSAGE: list(dict.fromkeys(found)), **section.dimensions}
    return section.model_copy(update={"dimensions": dimensions, "passages": None})


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


def _texts(source: str) -> Iterator[str]:
    """The contents of a file, of a glob's files or of the documents in a folder, in the order of their names."""
    fs, folder = fsspec.core.url_to_fs(source)
    if fs.isdir(folder):
        files = [OpenFile(fs, path, "rb") for path in fs.find(folder) if is_document(path)]
    else:
        is_glob = "://" in source or "*" in source
        files = fsspec.open_files(source, mode="rb") if is_glob else [fsspec.open(source, "rb")]
    for file in sorted(files, key=lambda file: file.path):
        try:
            with file as stream:
                yield text_of_document(file.path, PurePath(file.path).suffix.lower(), stream)
        except UnicodeDecodeError as error:
            raise DataError(f"{file.path}: byte {error.start} is not UTF-8; passages are cut from text files") from None
        except OSError as error:
            raise DataError(f"{file.path}: {error.strerror or error}; see synthesize.passages.source") from None
