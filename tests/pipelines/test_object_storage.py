"""A workspace on S3, at a local server that speaks its protocol."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.artifacts.workspace import Workspace
from pipelines.errors import InputError

PROJECT = Path(__file__).parents[2]
PROCESS = (
    "import sys; from pipelines.artifacts.workspace import Workspace; Workspace(sys.argv[1]).write(sys.argv[2], b'two')"
)


def test_what_another_process_wrote_is_listed(bucket: str) -> None:
    workspace = Workspace(f"{bucket}/run")
    one, two = workspace.path("commits", "1.json"), workspace.path("commits", "2.json")
    assert workspace.write_if_absent(one, b"one")
    assert not workspace.write_if_absent(one, b"late")
    assert workspace.list(workspace.path("commits")) == [one]
    subprocess.run([sys.executable, "-c", PROCESS, workspace.root, two], check=True, cwd=PROJECT)
    assert workspace.list(workspace.path("commits")) == [one, two]
    assert workspace.read(one) == b"one"


def test_a_scheme_without_its_package_is_named() -> None:
    with pytest.raises(InputError, match=r"gs://bucket/run: .*gcsfs"):
        Workspace("gs://bucket/run").list("gs://bucket/run")


def danlu(*arguments: str) -> str:
    command = [str(Path(sys.executable).parent / "danlu"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.mark.slow
def test_a_run_with_lost_commits_goes_on_to_the_same_rows(bucket: str, tmp_path: Path) -> None:
    for part in range(3):
        rows = ({"query": f"问题{part}-{i}？", "response": f"这是第{part}部分的第{i}个回答，" * 4} for i in range(50))
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        (tmp_path / f"part-{part}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    operator = "[{text_length_filter: {min_len: 10}}, {document_simhash_deduplicator: {}}]"
    recipe = ["tiny", f"ingest.source={tmp_path}/*.jsonl", f"clean.process={operator}"]
    workspace = Workspace(f"{bucket}/run")
    digests = {}
    for stage in ("ingest", "clean"):
        danlu("run", *recipe, "--to", stage, "--workspace", workspace.root)
        (folder,) = workspace.list(workspace.path(stage))
        digests[stage] = workspace.read_json(f"{folder}/manifest.json")["report"]["digest"]
        workspace.remove(f"{folder}/manifest.json")  # as a killed run leaves it: its last pass half committed
        plans = [path for path in workspace.fs.find(folder) if path.endswith("/plan.json")]
        last = max(plans, key=workspace.fs.modified).removesuffix("/plan.json")
        workspace.remove(f"{last}/commits/00001.json")
        danlu("run", *recipe, "--to", stage, "--workspace", workspace.root)
        assert workspace.read_json(f"{folder}/manifest.json")["report"]["digest"] == digests[stage]
    local = tmp_path / "local"
    danlu("run", *recipe, "--to", "clean", "--workspace", str(local))
    on_disk = [json.loads(path.read_text("utf-8"))["report"]["digest"] for path in local.glob("clean/*/manifest.json")]
    assert on_disk == [digests["clean"]]
