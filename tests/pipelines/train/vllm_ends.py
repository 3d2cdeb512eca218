"""How vLLM ends an answer with a model folder's own settings: `vllm_ends.py RESULT FOLDER …`.

RESULT gets a JSON list with, for each folder, the tokens of a greedy answer and why it ended. It runs in a process of
its own, because an engine takes its process's threads and memory.
"""

import json
import os
import sys
from pathlib import Path

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", VLLM_CPU_NUM_OF_RESERVED_CPU="0")


def main() -> None:
    result, *folders = sys.argv[1:]
    from vllm import LLM, SamplingParams

    told = []
    for folder in folders:
        engine = LLM(
            folder,
            dtype="float32",
            enforce_eager=True,
            max_model_len=64,
            max_num_seqs=1,
            kv_cache_memory_bytes=16 << 20,
        )
        (output,) = engine.chat([{"role": "user", "content": "?"}], SamplingParams(max_tokens=8, temperature=0))
        told.append([list(output.outputs[0].token_ids), output.outputs[0].finish_reason])
    Path(result).write_text(json.dumps(told))


if __name__ == "__main__":
    main()
