"""The jobs of README's cluster section, in its own words, on a cluster whose nodes share nothing but a bucket."""

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pipelines.artifacts.workspace import Workspace
from tests.pipelines.train.conftest import chats
from tests.rayjobs.conftest import BIN

PROJECT = Path(__file__).parents[2]
HERE = {"train.num_workers=8": "train.num_workers=2", "{GPU: 1}": "{CPU: 1}"}
"""What this machine has in the place of eight GPUs."""


@pytest.fixture(scope="module", autouse=True)
def bucket() -> Iterator[Workspace]:
    """README's bucket, whose keys the cluster's nodes have in their environment, since it starts after."""
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**keys, "AWS_ENDPOINT_URL": f"http://{address}:{port}"}.items():
            patch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()  # which remembers the server before
        root = Workspace("s3://bucket")
        root.fs.mkdir(root.root)
        yield Workspace("s3://bucket/run")
        root.fs.rm(root.root, recursive=True)  # what is stored outlives a server
    server.stop()


def submitted() -> list[str]:
    """The lines of README that submit a recipe."""
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^danlu submit .*$", text, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_readmes_two_jobs_share_one_workspace_and_clean_once(
    head: dict[str, str], bucket: Workspace, tiny_model: Path, tmp_path: Path
) -> None:
    rows = [{"query": row["query"], "response": row["response"]} for row in chats(40)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
    recipe = {
        "name": "mine",
        "ingest": {"source": "rows.jsonl"},
        "clean": {"process": [{"text_length_filter": {"min_len": 1}}]},
        "split": {"test_ratio": 0.2},
        "train": {
            **{"model": str(tiny_model), "dtype": "float32", "max_length": 256},
            **{"global_batch_size": 4, "max_steps": 3, "eval_rows": 4},
        },
        "merge": {},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    clean, train = submitted()
    for before, after in HERE.items():
        assert before in train
        train = train.replace(before, after)
    said = []
    for command in (clean, train, f"{clean} --wait"):
        done = subprocess.run(
            [str(BIN / "danlu"), *shlex.split(command)[1:]],
            cwd=tmp_path,
            env=head,
            capture_output=True,
            text=True,
            timeout=1200,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        said.append(done.stdout)
    assert "clean: done" in said[0] and "clean: up to date" in said[1]
    assert re.search("train: done in .* 3 steps", said[1]) and "merge: done" in said[1], said[1]
    (manifest,) = (path for path in bucket.files(bucket.path("train")) if path.endswith("/manifest.json"))
    assert bucket.read_json(manifest)["report"]["workers"] == 2
    assert any(path.endswith("/model/model.safetensors") for path in bucket.files(bucket.path("merge")))
    by_ray = ("ray", "job", "submit", "--working-dir", ".", "--", "python", "-m", "rayjobs.clean", "mine.yaml")
    again = subprocess.run(
        [*by_ray, "--workspace", bucket.root], cwd=tmp_path, env=head, capture_output=True, text=True, timeout=300
    )
    assert again.returncode == 0 and "clean: up to date" in again.stdout + again.stderr, again.stdout + again.stderr
