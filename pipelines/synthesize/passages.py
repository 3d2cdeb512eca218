"""Passages: documents cut into pieces, each a value of the dimension `passage`."""

import re
from collections.abc import Iterator

import fsspec

from pipelines.errors import DataError
from pipelines.recipe.synthesize import PASSAGE, Passages, Synthesize

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
    """The files' contents, in the order of their names."""
    files = fsspec.open_files(source, mode="rb") if "://" in source or "*" in source else [fsspec.open(source, "rb")]
    for file in sorted(files, key=lambda file: file.path):
        try:
            with file as stream:
                yield stream.read().decode("utf-8-sig").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{file.path}: byte {error.start} is not UTF-8; passages are cut from text files") from None
        except OSError as error:
            raise DataError(f"{file.path}: {error.strerror or error}; see synthesize.passages.source") from None
