"""YAML as recipes use it: plain values, in bounded time and memory whatever the text is.

Bounded are the size of the text, which bounds the time that it is looked at; the depth, since what builds the values
and the schema call themselves for each level; and the values with what anchors repeat counted each time, since a text
of a thousand characters can stand for a billion of them. No tags: nothing is built but text, numbers and flags.
"""

import re
from typing import Any, ClassVar

import yaml

MAX_BYTES = 512 << 10
"""Of a recipe; the longest that are known have some 10,000."""
MAX_DEPTH = 30
MAX_VALUES = 100_000

_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast where libyaml is there


class _Loader(_Base):  # type: ignore[misc]  # whichever of the two
    """YAML that refuses a key given twice, reads `1e-4` as a number and leaves dates as the text they are."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {
        first: [entry for entry in entries if entry[0] != "tag:yaml.org,2002:timestamp"]
        for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d+)(?:[eE][-+]?\d+)$|^[-+]?\d[\d_]*\.[\d_]*$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def _mapping(loader: Any, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(
                None, None, "a key is a word, not a list or mapping", key.start_mark
            )
        name = loader.construct_object(key, deep=True)
        if name in seen:
            raise _at(key.start_mark, f"key {repr(name)[:80]} is given twice")
        seen.add(name)
    made: dict[Any, Any] = loader.construct_mapping(node, deep=True)
    return made


def _number(loader: Any, node: yaml.ScalarNode) -> Any:
    kind = node.tag.rpartition(":")[2]
    try:
        return getattr(_Base, f"construct_yaml_{kind}")(loader, node)
    except ValueError:  # 0b_, or more digits than Python takes
        raise _at(node.start_mark, f"{node.value[:40]!r} is no number; write it in quotes if it is text") from None


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _number)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text; yaml.YAMLError, with the line, for every text that has none or passes a bound."""
    if len(text) > MAX_BYTES:
        raise yaml.YAMLError(f"{len(text):,} characters; a recipe has at most {MAX_BYTES:,}")
    _check_events(text)
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _measured(node, {}, 1)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _check_events(text: str) -> None:
    """Refuse what is too deep to be composed at all, and tags."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise _at(event.start_mark, f"nested deeper than {MAX_DEPTH} levels")
        if tag := getattr(event, "tag", None):
            raise _at(event.start_mark, f"the tag {str(tag)[:40]!r}; a recipe has plain values alone")
        value = getattr(event, "value", "")
        if "\0" in value:
            raise _at(event.start_mark, "NUL (\\0), which no path and no text holds; delete it")
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise _at(event.start_mark, "half a character (a lone surrogate such as \\ud83d); delete it")


def _measured(node: yaml.Node, known: dict[yaml.Node, tuple[int, int]], depth: int) -> tuple[int, int]:
    """How many values a node stands for, with what anchors repeat counted each time, and its levels."""
    if isinstance(node, yaml.ScalarNode):
        return 1, 1
    if depth > MAX_DEPTH:  # one that holds itself gets here
        raise _at(node.start_mark, f"nested deeper than {MAX_DEPTH} levels")
    if node not in known:
        values, levels = 1, 0
        for child in node.value:
            for part in child if isinstance(child, tuple) else (child,):
                below = _measured(part, known, depth + 1)
                values, levels = values + below[0], max(levels, below[1])
        known[node] = values, levels + 1
    values, levels = known[node]
    if values > MAX_VALUES:
        raise _at(node.start_mark, f"more than {MAX_VALUES:,} values, counted as often as anchors repeat them")
    if depth + levels > MAX_DEPTH + 1:
        raise _at(node.start_mark, f"nested deeper than {MAX_DEPTH} levels")
    return values, levels


def _at(mark: Any, problem: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, mark)
