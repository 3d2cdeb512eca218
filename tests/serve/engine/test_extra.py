"""Arguments of vLLM that a recipe gives by vLLM's names."""

from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.errors import RecipeError
from pipelines.models.served import ServedModel
from pipelines.recipe.serve import Engine
from serve.engine.command import EnginePlan, vllm_arguments
from serve.engine.extra import check_extra, extra_arguments


def test_arguments_are_written_as_vllms_command_line_takes_them() -> None:
    extra = {
        "block_size": 16,
        "enable_chunked_prefill": False,
        "async_scheduling": True,
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 2},
        "cudagraph_capture_sizes": [1, 2],
        "seed": 0,
    }
    assert extra_arguments(extra) == [
        *("--block-size", "16", "--no-enable-chunked-prefill", "--async-scheduling", "--speculative-config"),
        *('{"method": "ngram", "num_speculative_tokens": 2}', "--cudagraph-capture-sizes", "1", "2", "--seed", "0"),
    ]


def test_parsers_are_keys_and_turn_tool_calls_on() -> None:
    engine = Engine(tool_call_parser="hermes", reasoning_parser="qwen3", extra={"seed": 3})
    arguments = vllm_arguments(EnginePlan("app", ServedModel("base", "/m"), engine, 0, "127.0.0.1", "k", "/logs"))
    assert "--enable-auto-tool-choice" in arguments
    for name, value in (("--tool-call-parser", "hermes"), ("--reasoning-parser", "qwen3"), ("--seed", "3")):
        assert arguments[arguments.index(name) + 1] == value


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"max_model_len": 5}, "has a key of its own: serve.engine.max_model_len"),
        ({"api_key": "x"}, "api_key is set by danlu"),
        ({"middleware": ["x"]}, "middleware is set by danlu"),
        ({"host": "0.0.0.0"}, "host is set by danlu"),
        ({"trust_remote_code": True}, "trust_remote_code is set by danlu"),
        ({"ssl_keyfile": "x"}, "ssl_keyfile is set by danlu"),
        ({"block-size": 5}, "'block-size' is no name of an argument"),
        ({"seed=1 --host": 5}, "is no name of an argument"),
        ({"seed": None}, "seed is null"),
        ({"default_chat_template_kwargs": {}}, "is the recipe's chat_template_kwargs, at its top"),
    ],
)
def test_what_would_undo_the_gateway_is_refused_with_the_recipe(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Engine(extra=extra)


@pytest.mark.slow
def test_the_installed_vllm_is_asked_before_anything_starts() -> None:
    pytest.importorskip("vllm")
    check_extra(Engine(extra={"seed": 3, "enable_chunked_prefill": False}, tool_call_parser="hermes"))
    wrong = {"block_sizes": 16, "seed": "many", "no_such_thing_at_all": 1, "attention_config": "{"}
    with pytest.raises(RecipeError) as refused:
        check_extra(Engine(extra=wrong, tool_call_parser="hermess", reasoning_parser="qwen33"))
    told = {problem.key: problem.message for problem in refused.value.problems}
    assert set(told) == {
        *(f"serve.engine.extra.{name}" for name in wrong),
        *("serve.engine.tool_call_parser", "serve.engine.reasoning_parser"),
    }
    assert "did you mean 'block_size'?" in told["serve.engine.extra.block_sizes"]
    assert "vLLM does not take 'many'" in told["serve.engine.extra.seed"]
    assert "did you mean 'hermes'?" in told["serve.engine.tool_call_parser"]
