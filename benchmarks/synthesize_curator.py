"""The peer of benchmarks.synthesize: bespokelabs-curator with the same prompts against the same server.

    PEER_PYTHON benchmarks/synthesize_curator.py URL PROMPTS IN_FLIGHT FOLDER

It runs in curator's own virtual environment, and imports nothing of ours.
"""

import importlib.util
import os
import sys
from pathlib import Path


def main() -> None:
    """Ask every prompt once."""
    url, prompts, in_flight, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    litellm = importlib.util.find_spec("litellm")
    assert litellm and litellm.origin
    os.environ |= {
        "OPENAI_API_KEY": "none",
        "TELEMETRY_ENABLED": "false",
        "CURATOR_CACHE_DIR": folder,
        "CURATOR_DISABLE_RICH_DISPLAY": "1",
        "HF_HOME": folder,
        # the one vocabulary of tiktoken's that is there without a network; gpt-4 is counted with it
        "TIKTOKEN_CACHE_DIR": str(Path(litellm.origin).parent / "litellm_core_utils" / "tokenizers"),
    }
    from bespokelabs import curator  # after its environment is set

    unlimited = 1_000_000_000
    limits = {"max_requests_per_minute": unlimited, "max_tokens_per_minute": unlimited}
    model = curator.LLM(
        model_name="gpt-4",
        backend="openai",
        backend_params={"base_url": url, "max_concurrent_requests": in_flight, **limits},
    )
    answered = model([f"祝人{number}" for number in range(prompts)])
    print(len(answered.dataset), "answers")


if __name__ == "__main__":
    main()
