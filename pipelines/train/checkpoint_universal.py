"""A checkpoint of one number of workers, resumed on another, through DeepSpeed's universal format."""

import argparse
import contextlib
import io
import shutil
from pathlib import Path

SHARDS = "global_step*/*optim_states.pt"


def shard_count(checkpoint: Path) -> int:
    """The number of workers that wrote a checkpoint's optimizer shards; 0 where nothing is sharded (ZeRO-0)."""
    return len(list(checkpoint.glob(SHARDS)))


def to_universal(checkpoint: Path, target: Path) -> None:
    """Write `checkpoint` to `target` in the universal format, which any number of workers can resume from.

    What is not sharded is linked, not copied.
    """
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for path in checkpoint.iterdir():
        (target / path.name).symlink_to(path, target_is_directory=path.is_dir())
    (state,) = checkpoint.glob("global_step*")
    arguments = argparse.Namespace(
        input_folder=str(state),
        output_folder=str(target / "universal"),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # steps and bars
        ds_to_universal.main(arguments)
    (target / "latest_universal").write_text("universal", encoding="utf-8")
