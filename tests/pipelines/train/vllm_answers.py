"""What vLLM answers with models on a CPU: `vllm_answers.py RESULT TOKENS COUNT FOLDER …`.

TOKENS is a JSON list, the prompt. RESULT gets a JSON list with, for each folder, the first of DTYPES in which it loads
and its COUNT greedy tokens, or null and the errors with which it does not. One engine after another, in a process of
its own, because an engine takes its process's threads and memory.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", VLLM_CPU_NUM_OF_RESERVED_CPU="0")
DTYPES = ("float32", "bfloat16")


def main() -> None:
    result, tokens, count, *folders = sys.argv[1:]
    told = [answer(folder, json.loads(tokens), int(count)) for folder in folders]
    Path(result).write_text(json.dumps(told))


def answer(folder: str, tokens: list[int], count: int) -> tuple[str | None, list[int] | str]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    from serve.engine.command import CPU_EXTENSION
    from serve.engine.positions import config_overrides

    sampling = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True, detokenize=False)
    errors: dict[str, None] = {}
    for dtype in DTYPES:
        engine: Any = None
        try:
            engine = LLM(
                folder,
                dtype=dtype,
                enforce_eager=True,
                skip_tokenizer_init=True,
                max_model_len=64,
                max_num_seqs=1,
                kv_cache_memory_bytes=16 << 20,
                worker_extension_cls=CPU_EXTENSION,
                hf_overrides=config_overrides(folder),
            )
            (output,) = engine.generate([{"prompt_token_ids": tokens}], sampling, use_tqdm=False)
            return dtype, list(output.outputs[0].token_ids)
        except Exception as error:  # whatever the model's class raises is what is told of it
            errors[" ".join(f"{type(error).__name__}: {error}".split())] = None
        finally:
            engine = None
            cleanup_dist_env_and_memory()  # an engine without experts leaves groups that one with experts lacks some of
    return None, "; ".join(errors)


if __name__ == "__main__":
    main()
