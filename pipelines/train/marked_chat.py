"""A chat as its template renders it, with marks that tell where in the rendering each text came to stand."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from jinja2 import TemplateError

from pipelines.errors import DataError
from pipelines.models.tokenizer import template_source
from pipelines.train.tool_calls import lessened, parsed

MARKS = range(0xF0000, 0x110000)
"""Private code points of which those that a chat does not use mark places in its texts."""

SPOKEN = ("content", "reasoning")
"""What a turn says in text."""

EMPTY_THOUGHT = "\n</think>\n\n"
"""How DeepSeek-R1 ends a thought, for templates that open one in the generation prompt and write none in a turn."""

OWN_TEMPLATE = "give train.chat_template"
"""The way out where the model's own template cannot be trained by."""

Turn = dict[str, Any]


@dataclass(frozen=True)
class MarkedChat:
    """A chat for a template: control tokens in its texts broken up by `gap`, and a pair of marks for each text."""

    tokenizer: Any
    turns: list[Turn]
    """As templates read them, with `gap` in their control tokens."""
    tools: list[Any] | None
    gap: str
    marks: dict[tuple[int, str], tuple[str, str]]
    """Of each text that a turn says, by turn and field, the marks before and after it."""
    thought: str
    """A mark for a thought that a turn does not have."""

    @classmethod
    def of(
        cls, tokenizer: Any, control: "re.Pattern[str]", messages: Sequence[Turn], tools: str | None
    ) -> "MarkedChat":
        free = unused(messages, tools)
        gap, thought = islice(free, 2)
        turns = [
            {name: value if name == "role" else broken_up(value, control, gap) for name, value in turn.items()}
            for turn in messages
        ]
        spoken = [(n, name) for n, turn in enumerate(turns) for name in SPOKEN if (turn.get(name) or "").strip()]
        marks = {key: (next(free), next(free)) for key in spoken}
        known = parsed(broken_up(tools, control, gap), "tools") if tools else None
        return cls(tokenizer, turns, known, gap, marks, thought)

    def require_tools(self) -> None:
        """DataError where the template renders the chat alike without its tools or calls, or a part of the last."""
        calls = any(turn.get("tool_calls") for turn in self.turns)
        less: dict[str, MarkedChat] = {}
        if self.tools is not None:
            less["tools"] = replace(self, tools=None)
        if calls:
            bare = [{name: value for name, value in turn.items() if name != "tool_calls"} for turn in self.turns]
            less["tool calls"] = replace(self, turns=bare)
        *before, last = self.turns
        if isinstance(last.get("tool_calls"), str):
            for what, rest in lessened(last["tool_calls"]):
                less[what] = replace(self, turns=[*before, {**last, "tool_calls": rest}])
        for what, without in less.items():
            rendered = self._render(self.turns)
            try:
                is_the_same = without._render(without.turns) == rendered
            except DataError:  # gpt-oss's renders no answer of a tool that was not called
                continue
            if is_the_same:
                raise DataError(_not_written(what))

    def prompt(self) -> str:
        """What a server would be sent for the answer, as text."""
        return self._render(self.turns[:-1], add_generation_prompt=True)

    def answered(self, prompt: str) -> tuple[str, dict[int, list[tuple[int, int]]]]:
        """The prompt and the answer after it, and where in that each turn's texts stand, whitespace around them apart.

        DataError where the template does not render the turns before the answer as in the prompt.
        """
        last = self.turns[-1]
        attempts = [(self.turns, "", "")]
        if not last.get("reasoning"):
            attempts.append(([*self.turns[:-1], {**last, "reasoning": self.thought}], self.thought, ""))
        opened = re.search(r"<think>\s*$", prompt)
        if opened:
            bare = {name: value for name, value in last.items() if name != "reasoning"}
            attempts.append(([*self.turns[:-1], bare], "", prompt[: opened.start()]))
        for turns, removed, head in attempts:
            text = self._render(turns).replace(removed, "") if removed else self._render(turns)
            if head and text.startswith(head) and not text[len(head) :].startswith("<think>"):
                return self._after_thought(turns, text, prompt, head)
            if not head and text.startswith(prompt):
                return self._with_spots(turns, text, removed)
        place = len(self.turns)
        if last.get("reasoning") and re.search(r"</think>\s*$", prompt):
            raise DataError(
                f"train.thinking: turn {place} has reasoning, and what a server sends for it has closed the thought "
                "already (enable_thinking: false); train without it (train.thinking: strip), or let the model think"
            )
        raise DataError(
            f"train.model: its chat template renders the turns before turn {place} differently once it is there, so "
            "what a server sends for it cannot be told from the answer; give train.chat_template"
        )

    def _after_thought(
        self, turns: list[Turn], text: str, prompt: str, head: str
    ) -> tuple[str, dict[int, list[tuple[int, int]]]]:
        """For templates that open a thought in the generation prompt and write none in a turn: it is closed."""
        _, spots = self._with_spots(turns, text, "")
        thought = (self.turns[-1].get("reasoning") or "").strip("\n")
        closed = prompt + thought + EMPTY_THOUGHT
        by = len(closed) - len(head)
        last = len(turns) - 1
        spots[last] = [(start + by, stop + by) for start, stop in spots[last]]
        if thought:
            spots[last].append((len(prompt), len(prompt) + len(thought)))
        return closed + text[len(head) :], spots

    def _with_spots(self, turns: list[Turn], text: str, removed: str) -> tuple[str, dict[int, list[tuple[int, int]]]]:
        """The text, and where in it each turn's texts stand; DataError where one is left out or changed."""
        marked = [
            {name: _marked(value, self.marks.get((place, name))) for name, value in turn.items()}
            for place, turn in enumerate(turns)
        ]
        rendered = self._render(marked)
        rendered = rendered.replace(removed, "") if removed else rendered
        every = {mark for pair in self.marks.values() for mark in pair}
        places: dict[str, int] = {}
        seen = 0
        plain: list[str] = []
        for character in rendered:
            if character in every:
                places[character] = seen
            else:
                plain.append(character)
                seen += 1
        if "".join(plain) != text:
            raise DataError(
                "train.model: its chat template changes what a turn says by how it begins or ends; " + OWN_TEMPLATE
            )
        spots: dict[int, list[tuple[int, int]]] = {place: [] for place in range(len(turns))}
        for (place, name), (before, after) in self.marks.items():
            turn = turns[place]
            if name not in turn:
                continue
            if before in places and after in places:
                spots[place].append((places[before], places[after]))
                said = turn[name].strip()
                if text[places[before] : places[after]] != said:
                    raise DataError(
                        f"train.model: its chat template changes the text of turn {place + 1}; {OWN_TEMPLATE}"
                    )
            elif name == "content" or place == len(turns) - 1:
                raise DataError(_left_out(place, turn["role"], name))
        return text, spots

    def tagged(self, text: str, begin: int, spoken: list[tuple[int, int]]) -> int:
        """Where loss begins by the template's `{% generation %}`, for an answer that begins at `begin`; else there.

        DataError where that holds only a part of the texts, which stand where `spoken` says.
        """
        if not _GENERATION.search(template_source(self.tokenizer)):
            return begin
        from transformers.utils.chat_template_utils import render_jinja_template

        tokenizer = self.tokenizer
        found: Any = render_jinja_template(
            conversations=[for_template(self.turns)],
            chat_template=tokenizer.get_chat_template(None, self.tools),
            tools=self.tools,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
        rendered, spans = found
        inside: list[tuple[int, int]] = [(start, stop) for start, stop in spans[0] if stop > begin]
        is_whole = inside and all(inside[0][0] <= start and stop <= inside[-1][1] for start, stop in spoken)
        if rendered[0] not in (text, text.removesuffix(tokenizer.eos_token or "")) or not is_whole:
            raise DataError(
                "train.model: {% generation %} of its chat template does not hold the whole answer; " + OWN_TEMPLATE
            )
        return max(begin, inside[0][0])

    def _render(self, turns: Sequence[Turn], add_generation_prompt: bool = False) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                for_template(turns),
                tools=self.tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except TEMPLATE_ERRORS as error:
            roles = ", ".join(turn["role"] for turn in turns)
            hint = f"; {OWN_TEMPLATE}"
            if turns and turns[0]["role"] == "system":
                hint = "; train.merge_system: true puts the system prompt before the first question"
            raise DataError(
                f"train.model: its chat template does not render its turns ({roles}): {error}{hint}"
            ) from None
        return text


TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What rendering raises where a template cannot be read, or computes with what turns do not have."""

_GENERATION = re.compile(r"{%-?\s*generation\b")


def _left_out(place: int, role: str, name: str) -> str:
    if role == "system":
        return (
            "train.model: its chat template leaves the system prompt out; train.merge_system: true puts it before the "
            "first question"
        )
    if name == "reasoning":
        return _not_written(name)
    return f"train.model: its chat template leaves out the text of turn {place + 1}, of the role {role}; {OWN_TEMPLATE}"


def _not_written(what: str) -> str:
    return (
        f"train.model: its chat template leaves out {what}, which the row has; train a model whose template "
        f"writes {what}, give train.chat_template, or remove {what} from the data"
    )


def for_template(turns: Sequence[Turn]) -> list[Turn]:
    """Turns by the keys that chat templates read: a thought is called differently by each family."""
    made = []
    for turn in turns:
        given = {name: value for name, value in turn.items() if name not in ("reasoning", "loss") and value is not None}
        if turn.get("reasoning"):
            given |= {"reasoning_content": turn["reasoning"], "thinking": turn["reasoning"]}
        if isinstance(given.get("tool_calls"), str):
            given["tool_calls"] = parsed(given["tool_calls"], "tool calls")
        made.append(given)
    return made


def unused(messages: Sequence[Turn], tools: str | None) -> Iterator[str]:
    """Characters that may mark places in a chat, since no text of it has them."""
    texts = [value for turn in messages for value in turn.values() if isinstance(value, str)]
    used = {character for text in (*texts, tools or "") for character in text if ord(character) >= MARKS.start}
    return (mark for mark in map(chr, MARKS) if mark not in used)


def broken_up(value: Any, control: "re.Pattern[str]", gap: str) -> Any:
    """A text with the gap inside each control token, so that the tokenizer reads it as text."""
    if not isinstance(value, str):
        return value
    return control.sub(lambda match: match[0][0] + gap + match[0][1:], value)


def _marked(value: Any, marks: tuple[str, str] | None) -> Any:
    """A text with a mark before and after it, inside of the whitespace around it, which templates strip."""
    if marks is None:
        return value
    begin = len(value) - len(value.lstrip())
    end = len(value.rstrip())
    return f"{value[:begin]}{marks[0]}{value[begin:end]}{marks[1]}{value[end:]}"
