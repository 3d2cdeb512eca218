"""What an engine's process is started with."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import StageError
from pipelines.models.served import ServedModel
from pipelines.recipe.serve import Engine
from serve.engine.command import HUGE_PAGES, EnginePlan, environment, vllm_arguments


def plan(model: ServedModel, num_gpus: float = 0, **engine: object) -> EnginePlan:
    return EnginePlan("app", model, Engine.model_validate(engine), num_gpus, "127.0.0.1", "secret-key", "/logs")


def value(arguments: list[str], name: str) -> str:
    return arguments[arguments.index(name) + 1]


@pytest.fixture
def adapter(tmp_path: Path) -> str:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 12}))
    return str(tmp_path)


def test_engines_on_a_cpu_never_start_without_the_corrections(adapter: str) -> None:
    arguments = vllm_arguments(plan(ServedModel("base", "/m", {"a": adapter})))
    assert value(arguments, "--worker-extension-cls") == "serve.engine.cpu.RequireCorrections"
    assert (
        value(vllm_arguments(plan(ServedModel("base", "/m"))), "--worker-extension-cls")
        == "serve.engine.cpu.RequireCorrections"
    )
    assert value(arguments, "--max-lora-rank") == "16"  # the least of vLLM's sizes that holds rank 12
    assert value(arguments, "--lora-modules") == f"a={adapter}"
    assert "--worker-extension-cls" not in vllm_arguments(plan(ServedModel("base", "/m", {"a": adapter}), num_gpus=1))
    assert "--enable-lora" not in vllm_arguments(plan(ServedModel("base", "/m")))


def test_what_the_chat_template_is_given_is_the_engines_default() -> None:
    given = {"enable_thinking": False, "effort": "低"}
    arguments = vllm_arguments(plan(ServedModel("base", "/m", chat_template_kwargs=given)))
    assert json.loads(value(arguments, "--default-chat-template-kwargs")) == given
    assert "--default-chat-template-kwargs" not in vllm_arguments(plan(ServedModel("base", "/m")))


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}


def test_positions_are_told_to_vllm_as_transformers_reads_them(tmp_path: Path) -> None:
    def overrides(config: dict[str, object], **extra: object) -> dict[str, object]:
        (tmp_path / "config.json").write_text(json.dumps(config))
        arguments = vllm_arguments(plan(ServedModel("base", str(tmp_path)), extra=extra))
        return json.loads(value(arguments, "--hf-overrides")) if "--hf-overrides" in arguments else {}

    rope = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}
    told = overrides({"rope_parameters": rope}, hf_overrides={"vocab_size": 300})
    assert told["vocab_size"] == 300
    assert overrides({"rope_parameters": rope}, hf_overrides='{"vocab_size": 300}') == told
    assert told["rope_parameters"] == {**rope, "attn_factor": pytest.approx(1 / (0.1 * math.log(4) + 1))}
    assert overrides({"rope_scaling": {**YARN, "attention_factor": 1.0}}).keys() == {"rope_scaling"}
    scaled = overrides({"rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1}})
    assert scaled == {"llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 128}}
    layers = {"full_attention": {**YARN, "attention_factor": 1.0}, "sliding_attention": {"rope_type": "default"}}
    of_layers: Any = overrides({"rope_parameters": layers})["rope_parameters"]
    assert of_layers["full_attention"].keys() - YARN.keys() == {"attention_factor", "attn_factor"}
    assert of_layers["sliding_attention"] == layers["sliding_attention"]
    for config in ({}, {"rope_parameters": YARN}, {"rope_parameters": rope, "kv_lora_rank": 512}):
        assert overrides(config) == {}


def test_a_cpu_computes_in_float32_unless_asked_otherwise() -> None:
    model = ServedModel("base", "/m")
    assert value(vllm_arguments(plan(model)), "--dtype") == "float32"
    assert value(vllm_arguments(plan(model, dtype="bfloat16")), "--dtype") == "bfloat16"
    assert value(vllm_arguments(plan(model, num_gpus=1)), "--dtype") == "auto"


def test_the_key_is_in_the_environment_and_not_in_the_command_line(
    adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DANLU_API_KEYS", "a-client-s-key")
    engine = plan(ServedModel("base", "/m", {"a": adapter}, registry="/registry"))
    assert "secret-key" not in " ".join(vllm_arguments(engine))
    variables = environment(engine)
    assert variables["VLLM_API_KEY"] == "secret-key"
    assert "a-client-s-key" not in variables.values()
    assert variables["VLLM_PLUGINS"].split(",") == ["danlu_cpu", "lora_filesystem_resolver"]
    assert (variables["HF_HUB_OFFLINE"], variables["VLLM_NO_USAGE_STATS"]) == ("1", "1")


def test_an_engine_on_a_cpu_gets_the_libraries_that_vllm_would_preload() -> None:
    model = ServedModel("base", "/m")
    libraries = environment(plan(model))["LD_PRELOAD"].split(":")
    assert [Path(library).name[:7] for library in libraries if Path(library).is_file()] == ["libgomp"] * len(libraries)
    assert "LD_PRELOAD" not in environment(plan(model, num_gpus=1))


def test_an_engine_on_a_cpu_asks_for_huge_pages_unless_the_user_said_how(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = plan(ServedModel("base", "/m"))
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert environment(engine)["GLIBC_TUNABLES"] == HUGE_PAGES
    assert "GLIBC_TUNABLES" not in environment(plan(ServedModel("base", "/m"), num_gpus=1))
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.perturb=7")
    assert environment(engine)["GLIBC_TUNABLES"] == "glibc.malloc.perturb=7"


def test_a_folder_that_is_no_adapter_is_named(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"adapter_config\.json: no such file"):
        vllm_arguments(plan(ServedModel("base", "/m", {"a": str(tmp_path)})))
