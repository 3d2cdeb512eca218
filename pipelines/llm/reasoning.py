"""Reasoning that a model writes into its answer, between tags: split off, so that it is never taken for the answer."""

import regex

_NAMES = r"think|thinking|thought|reasoning|seed:think"
_BLOCK = regex.compile(
    rf"\s*(?:<(?P<tag>{_NAMES})(?:\s\w+=[^<>\n]*)?>|◁think▷|\[THINK\])"
    r"(?P<said>.*?)(?:(?:</(?P=tag)>|◁/think▷|\[/THINK\])\s*|$)",
    regex.S | regex.I,
)
"""One block at the beginning; without an end it goes to the end of the text."""
_END = rf"(?:</(?:{_NAMES})>|◁/think▷|\[/THINK\])"
_CLOSE = regex.compile(
    rf"(?P<said>(?:(?!<(?:{_NAMES})[\s>]|◁think▷|\[THINK\]).)*?)"
    rf"(?<![`\"“‘「])(?:(?<! ){_END}|{_END}(?! ))(?![`\"”’」])\s*",
    regex.S | regex.I,
)
"""An end without a beginning, which is not one that is written about, in quotation marks or between spaces.

Chat templates of some models put the beginning into the prompt, and some models end twice.
"""


def split_reasoning(text: str) -> tuple[str, str]:
    """The reasoning and the answer in what a model wrote; the text itself, unchanged, where it holds no reasoning.

    Reasoning stands first: in tags that are closed, in tags that are never closed (then there is no answer), or before
    an end tag whose beginning is missing. Tags inside the answer are part of the answer.
    """
    if "<" not in text and "◁" not in text and "[" not in text:
        return "", text
    said: list[str] = []
    rest = text
    while found := _BLOCK.match(rest) or _CLOSE.match(rest):
        said.append(found["said"].strip())
        rest = rest[found.end() :]
    return ("\n\n".join(said), rest) if said else ("", text)
