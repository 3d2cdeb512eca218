"""The process of one engine: vLLM's own OpenAI server on a port of its choice.

    python -m serve.engine.server --report-fd N --host ADDRESS -- VLLM_ARGUMENTS

Started by `serve.engine.replica`; not a command for people. It writes its port to the pipe N once the port is open,
and ends with the process that started it.
"""

import argparse
import functools
import json
import os
import socket
import sys
from datetime import timedelta
from typing import Any

import uvloop

from pipelines.kill_with_parent import die_with_parent


def main(arguments: list[str]) -> None:
    """Serve until told to stop by SIGTERM."""
    die_with_parent()
    parser = argparse.ArgumentParser()
    parser.add_argument("--report-fd", type=int, required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("vllm", nargs="*", help="vLLM's own arguments, after --")
    options = parser.parse_args(arguments)
    listener = socket.create_server((options.host, 0), backlog=2048)
    with os.fdopen(options.report_fd, "w") as pipe:
        json.dump({"port": listener.getsockname()[1]}, pipe)
    uvloop.run(_serve(options.vllm, options.host, listener))


async def _serve(engine_arguments: list[str], host: str, listener: socket.socket) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.api_server.entry import build_and_serve
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM

    port = listener.getsockname()[1]
    args = _vllm_arguments([*engine_arguments, "--host", host, "--port", str(port)])
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    if current_platform.is_cpu() and config.parallel_config.distributed_executor_backend == "uni":
        fork_the_core()
        share_gloo_thread()
    llm = AsyncLLM.from_vllm_config(config, disable_log_stats=args.disable_log_stats)
    try:
        await (await build_and_serve(llm, f"http://{host}:{port}", listener, args))
    finally:
        llm.shutdown()


def _vllm_arguments(arguments: list[str]) -> argparse.Namespace:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())  # type: ignore[no-untyped-call]
    args: argparse.Namespace = parser.parse_args(arguments)
    validate_parsed_serve_args(args)
    return args


def fork_the_core() -> None:
    """Let vLLM's engine core be a fork of this process, which has imported everything already.

    On a CPU vLLM spawns two more interpreters, for the core and for one worker, and each imports vLLM again: 21 s
    instead of 9 s on two cores. It does so to set OpenMP's environment, which `serve.engine.command` sets beforehand.
    """
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"


def share_gloo_thread() -> None:
    """Let all gloo groups made from here on share one network thread.

    vLLM makes a dozen groups even for a world of one, each with a thread that wakes up a hundred times a second and
    interrupts the threads that compute.
    """
    from torch.distributed import distributed_c10d

    module: Any = distributed_c10d
    gloo = module.ProcessGroupGloo

    @functools.cache
    def device() -> Any:
        return gloo.create_default_device()

    class OnOneThread(gloo):  # type: ignore[misc, valid-type]
        def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
            options = gloo._Options()
            options._devices, options._timeout = [device()], timeout
            super().__init__(store, rank, size, options)

    module.ProcessGroupGloo = OnOneThread


if __name__ == "__main__":
    main(sys.argv[1:])
