"""One rank of a group that trains several runs one after another, without Ray: `worker.py RANK WORLD PORT FILE`.

FILE is a pickled list of runs. Each run's facts are written to its folder by rank 0.
"""

import json
import os
import pickle
import sys
from dataclasses import asdict
from pathlib import Path


def main() -> None:
    rank, world, port, file = sys.argv[1:]
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    import torch
    import torch.distributed as dist
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from pipelines.train.loop import train_loop

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for run in pickle.loads(Path(file).read_bytes()):
        facts = train_loop(run, lambda: None)
        if rank == "0":
            (run.folder / "facts.json").write_text(json.dumps(asdict(facts)))
        AcceleratorState._reset_state(True)
        unset_hf_deepspeed_config()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
