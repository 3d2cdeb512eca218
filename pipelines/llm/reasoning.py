"""Reasoning that a model writes into its answer, between tags: split off, so that it is never taken for the answer."""

import regex

_NAMES = r"think|thinking|thought|reasoning|seed:think"
_BLOCK = regex.compile(
    rf"\s*(?:<(?P<tag>{_NAMES})>|◁think▷|\[THINK\])(?P<said>.*?)(?:(?:</(?P=tag)>|◁/think▷|\[/THINK\])\s*|$)",
    regex.S | regex.I,
)
"""One block at the beginning; without an end it goes to the end of the text."""
_CLOSE = regex.compile(
    rf"(?P<said>.*?)(?<![`\w])(?:</(?:{_NAMES})>|◁/think▷|\[/THINK\])(?![`\w])(?=\s*\n|\s*$)\s*", regex.S | regex.I
)
"""An end without a beginning: chat templates of some models put the beginning into the prompt."""


def split_reasoning(text: str) -> tuple[str, str]:
    """The reasoning and the answer in what a model wrote; the text itself, unchanged, where it holds no reasoning.

    Reasoning stands first: in tags that are closed, in tags that are never closed (then there is no answer), or before
    an end tag, at the end of a line, whose beginning is missing. Tags inside the answer are part of the answer.
    """
    said: list[str] = []
    rest = text
    while found := _BLOCK.match(rest):
        said.append(found["said"].strip())
        rest = rest[found.end() :]
    if not said and "<" not in text and "◁" not in text and "[" not in text:
        return "", text
    if not said and (found := _CLOSE.match(rest)):
        said.append(found["said"].strip())
        rest = rest[found.end() :]
    return ("\n\n".join(said), rest) if said else ("", text)
