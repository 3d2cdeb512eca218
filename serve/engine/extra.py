"""`serve.engine.extra`: arguments of vLLM that have no key of their own, checked against the installed version."""

import argparse
import importlib.util
import json
from collections.abc import Mapping
from typing import Any

from pipelines.errors import Problem, RecipeError, nearest
from pipelines.recipe.serve import Engine


def extra_arguments(extra: Mapping[str, Any]) -> list[str]:
    """vLLM's command line for arguments by vLLM's names, such as `swap_space` or `speculative_config`."""
    arguments: list[str] = []
    for name, value in extra.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            arguments.append(option)
        elif value is False:
            arguments.append(f"--no-{name.replace('_', '-')}")
        elif isinstance(value, list):
            arguments += [option, *map(_word, value)]
        else:
            arguments += [option, _word(value)]
    return arguments


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)


def check_extra(engine: Engine) -> None:
    """Raise RecipeError for every argument that the installed vLLM does not have, or whose value it does not take.

    Where vLLM is installed on the cluster's nodes alone, the engine says so when it starts.
    """
    if not (engine.extra or engine.tool_call_parser or engine.reasoning_parser):
        return
    if importlib.util.find_spec("vllm") is None:
        return
    # vLLM takes seconds to load: only a recipe that asks for it waits for it
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser: Any = make_arg_parser(FlexibleArgumentParser())  # type: ignore[no-untyped-call]
    names = {action.dest for action in parser._actions}
    problems = []
    for name, value in engine.extra.items():
        key = f"serve.engine.extra.{name}"
        if name not in names:
            problems.append(Problem(key, f"the installed vLLM has no such argument; {nearest(name, names)}"))
        elif reason := _refusal(parser, extra_arguments({name: value})):
            problems.append(Problem(key, reason))
    problems += _parser_problems(engine)
    if problems:
        raise RecipeError("serve", problems)


def _refusal(parser: Any, arguments: list[str]) -> str | None:
    """Why vLLM's parser does not take an argument; None where it does."""

    def refuse(message: str) -> None:
        raise ValueError(message)

    parser.error = refuse
    try:
        parser.parse_args(arguments)
    except (ValueError, TypeError, argparse.ArgumentError) as error:
        return f"vLLM does not take {' '.join(arguments[1:])!r}: {error}"
    return None


def _parser_problems(engine: Engine) -> list[Problem]:
    """Names of parsers that the installed vLLM does not have."""
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    asked = {
        "tool_call_parser": (engine.tool_call_parser, ToolParserManager.list_registered()),
        "reasoning_parser": (engine.reasoning_parser, ReasoningParserManager.list_registered()),
    }
    return [
        Problem(f"serve.engine.{key}", f"the installed vLLM has no parser {name!r}; {nearest(name, known)}")
        for key, (name, known) in asked.items()
        if name is not None and name not in known
    ]
