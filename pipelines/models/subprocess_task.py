"""Work that takes much memory, in a process that ends afterwards, so that the memory comes back."""

from collections.abc import Callable
from typing import Any

from pipelines.errors import DanluError, StageError


def run_in_subprocess(work: Callable[..., Any], *arguments: Any, num_cpus: float = 1) -> Any:
    """What `work` returns, done by a Ray worker of its own; errors of our family are raised here as they were."""
    import ray

    task = ray.remote(max_calls=1, num_cpus=num_cpus)(work)
    try:
        return ray.get(task.remote(*arguments))
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, DanluError) else error) from None
    except ray.exceptions.WorkerCrashedError as error:  # Ray's own killer is told of in out_of_memory.py
        raise StageError(f"{work.__name__}: its process was killed, most likely for want of memory\n{error}") from None
