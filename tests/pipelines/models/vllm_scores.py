"""Log-probabilities that vLLM's own class gives a published checkpoint: `vllm_scores.py FOLDER TOKENS RESULT`.

TOKENS is a JSON list; RESULT gets float32 [tokens - 1, vocabulary], the scores of what follows each token. It runs in
a process of its own, because an engine takes its process's threads and memory.
"""

import json
import os
import sys
from pathlib import Path

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", VLLM_CPU_NUM_OF_RESERVED_CPU="0")


def main() -> None:
    folder, tokens, result = sys.argv[1:]
    import numpy as np
    from transformers import AutoConfig, PretrainedConfig
    from vllm import LLM, SamplingParams

    class InternLM2Config(PretrainedConfig):
        """What configuration_internlm2.py beside the published weights defines: a name for what config.json says."""

        model_type = "internlm2"

    AutoConfig.register("internlm2", InternLM2Config)
    engine = LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=128,
        max_num_seqs=1,
        kv_cache_memory_bytes=16 << 20,
        max_logprobs=-1,
    )
    everything = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1, detokenize=False)
    (output,) = engine.generate([{"prompt_token_ids": json.loads(tokens)}], everything, use_tqdm=False)
    rows = [[row[number].logprob for number in range(len(row))] for row in output.prompt_logprobs[1:]]
    np.save(Path(result), np.array(rows, dtype=np.float32))


if __name__ == "__main__":
    main()
