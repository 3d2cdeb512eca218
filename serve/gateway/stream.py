"""Streamed answers: whole events, without the one that the gateway asked for and the client did not."""

import json
import re

EVENT_END = b"\n\n"
NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')


class EventFilter:
    """Passes on a stream's events whole; an event that an engine did not finish is held back.

    The gateway counts tokens by the usage chunk at a stream's end. A client that did not ask for
    `stream_options.include_usage` must not get that chunk: its `choices` is empty, and OpenAI's own loop reads
    `chunk.choices[0]`. `drop_usage` takes it out.
    """

    def __init__(self, drop_usage: bool) -> None:
        self._drop_usage = drop_usage
        self._held = b""

    def feed(self, received: bytes) -> bytes:
        """What of the stream may be sent on after these bytes; empty while an event is unfinished."""
        events = self._held + received if self._held else received
        end = len(events) if events.endswith(EVENT_END) else events.rfind(EVENT_END) + len(EVENT_END)
        if end < len(EVENT_END):  # no event has ended
            self._held = events
            return b""
        events, self._held = events[:end], events[end:]
        if not self._drop_usage or NO_CHOICES.search(events) is None:
            return events
        kept = (event for event in events.split(EVENT_END)[:-1] if not is_usage_chunk(event))
        return b"".join(event + EVENT_END for event in kept)

    def rest(self) -> bytes:
        """What was held back, for an engine that ends without an empty line."""
        return self._held


def is_usage_chunk(event: bytes) -> bool:
    """Whether an event is the chunk of token counts alone, as `stream_options.include_usage` adds it."""
    if NO_CHOICES.search(event) is None:
        return False
    try:
        chunk = json.loads(event.removeprefix(b"data:"))
    except ValueError:
        return False
    return isinstance(chunk, dict) and chunk.get("choices") == [] and chunk.get("usage") is not None
