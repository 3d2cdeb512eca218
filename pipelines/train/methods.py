"""The model as it is trained: all of it, or an adapter on it, or an adapter on its quantized weights.

Imported in training workers and where models are merged only: torch stands behind it.
"""

from typing import Any

from pipelines.models.skeleton import loaded_whole
from pipelines.recipe.train import Train
from pipelines.train.arguments import dtype_of
from pipelines.train.attention import NAME, ONE_SAMPLE, has_one_sample_a_row
from pipelines.train.fused_lora import fuse
from pipelines.train.peft_warnings import peft_warnings_off
from pipelines.train.run import Run
from pipelines.train.sequence import check_heads
from pipelines.train.targets import adapter_config


def load_model(run: Run, arguments: Any) -> Any:
    """The base model, prepared for the recipe's method."""
    from transformers import AutoConfig, AutoModelForCausalLM

    section = run.section
    dtype = dtype_of(arguments)
    shared = section.sequence_parallel_size > 1
    if shared:
        check_heads(AutoConfig.from_pretrained(run.model), section.sequence_parallel_size)
    loading: Any = AutoModelForCausalLM.from_pretrained(
        run.model,
        dtype=dtype,
        attn_implementation=ONE_SAMPLE if has_one_sample_a_row(section) else NAME,
        output_loading_info=True,
        **({"quantization_config": quantization(dtype)} if section.method == "qlora" else {}),
    )
    model = loaded_whole(loading, run.model)
    if section.method == "full":
        return model
    if section.method == "qlora":
        _keep_trainable(model)
    if section.gradient_checkpointing:
        model.enable_input_require_grads()
    adapted = _with_adapter(model, section)
    if section.zero_stage != 3:  # which gathers a layer's weights when its own forward pass is called
        fuse(adapted)
    return adapted


def _with_adapter(model: Any, section: Train) -> Any:
    from peft import PeftModel, get_peft_model

    config = adapter_config(section, model)
    with peft_warnings_off():
        if section.adapter is not None:
            return PeftModel.from_pretrained(model, section.adapter, is_trainable=True, config=config)
        return get_peft_model(model, config)


def _keep_trainable(model: Any) -> None:
    """Stop bitsandbytes from repacking weights at the first evaluation on a CPU: no gradient flows through those."""
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def quantization(dtype: Any) -> Any:
    """NF4 with double quantization; stored as `dtype`, so that ZeRO-3 can shard it like any other weight."""
    import torch
    from transformers import BitsAndBytesConfig

    config_class: Any = BitsAndBytesConfig
    return config_class(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype if dtype != torch.float32 else torch.uint8,
    )
