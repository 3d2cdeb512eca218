"""What is changed in vLLM's server on a CPU."""

import subprocess
import sys
from pathlib import Path

GROUPS = """
import os
import torch
import torch.distributed as dist
from serve.engine.server import share_gloo_thread
share_gloo_thread()
dist.init_process_group("gloo", store=dist.FileStore({store!r}, 2), rank={rank}, world_size=2)
groups = [dist.new_group([0, 1], backend="gloo") for _ in range(3)]
total = torch.tensor([{rank} + 1.0])
for group in (None, *groups):
    dist.all_reduce(total, group=group)
names = [open(f"/proc/self/task/{{task}}/comm").read().strip() for task in os.listdir("/proc/self/task")]
print(total.item(), names.count("gloo_tcp_loop"))
"""


def test_all_groups_of_a_cpu_engine_share_one_network_thread(tmp_path: Path) -> None:
    codes = [GROUPS.format(store=str(tmp_path / "store"), rank=rank) for rank in (0, 1)]
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for code in codes]
    assert [process.communicate(timeout=120)[0].split() for process in both] == [["24.0", "1"]] * 2
