"""What goes wrong under a run: killed processes, a full disk, a file that cannot be read, and a second node."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.artifacts.reports.rows import RowsReport
from pipelines.artifacts.stage import Output
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.clean.stage import CleanInputs, CleanStage
from pipelines.errors import DataError, StageError
from pipelines.recipe.clean import Clean
from rayjobs import pipeline
from tests.outputs import finished_rows, rows_of
from tests.test_crash import assert_nothing_survives, finish, start

SLOW = """
import os
import time

import pyarrow as pa

from pipelines.clean.column import Column
from pipelines.clean.operators import operator


@operator("mapper")
def slow_mapper(column: Column) -> pa.Array:
    time.sleep(0.5 if os.path.exists({flag!r}) else 0)
    return column.array
"""

FILLED = """
import os
import resource
import threading
import time

import pyarrow as pa

from pipelines.clean.column import Column
from pipelines.clean.operators import operator


@operator("mapper")
def filled_disk_mapper(column: Column) -> pa.Array:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if os.path.exists({flag!r}) and column.contains("here").any():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        threading.Thread(target=lift, args=(hard,), daemon=True).start()
    return column.array


def lift(hard: int) -> None:
    # Other tests' tasks run in this process later.
    while os.path.exists({flag!r}):
        time.sleep(0.02)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
"""


def made_rows(count: int, width: int) -> pa.Table:
    random = np.random.default_rng(3)
    texts = [f"{i} " + random.bytes(width).hex() for i in range(count)]
    texts[-1] += " here"
    return pa.table({"row_id": [f"r{i}" for i in range(count)], "pos": range(count), "response": texts})


def ingested(workspace: Workspace, table: pa.Table, shards: int) -> Output[RowsReport]:
    found = Place(workspace, "ingest", "in")
    names = [f"rows/{index}.parquet" for index in range(shards)]
    for index, name in enumerate(names):
        low, high = table.num_rows * index // shards, table.num_rows * (index + 1) // shards
        with workspace.parquet_writer(found.path(name), table.schema) as writer:
            writer.write_table(table.slice(low, high - low))
    return finished_rows(found, table.num_rows, names)


def stage(process: list[Any], *custom: Path) -> CleanStage:
    return CleanStage(Clean(process=process, custom_operators=[str(path) for path in custom]))


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a short path, since Ray puts sockets below TMPDIR; by its name its processes are found."""
    folder = Path(tempfile.mkdtemp(prefix="df-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def flag(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "flag"
    path.touch()
    yield path
    path.unlink(missing_ok=True)


def test_a_full_disk_stops_the_run_and_loses_nothing(tmp_path: Path, ray_cluster: None, flag: Path) -> None:
    (tmp_path / "ops.py").write_text(FILLED.format(flag=str(flag)), encoding="utf-8")
    made = stage(["filled_disk_mapper", {"text_length_filter": {"min_len": 5}}], tmp_path / "ops.py")
    workspace = Workspace(str(tmp_path / "w"))
    inputs = CleanInputs(ingested(workspace, made_rows(400, 1000), 4))
    found = Place(workspace, "clean", "c")
    with pytest.raises(StageError, match=r"no room to write it \(File too large\); make room and run again"):
        made.run(found, inputs)
    before = {path: workspace.read(path) for path in workspace.list(found.path("rows-0", "commits"))}
    assert len(before) < 4
    flag.unlink()
    time.sleep(1)  # until the limit is lifted
    assert made.run(found, inputs).rows == 400
    assert {path: workspace.read(path) for path in before} == before
    left = {Path(path).name for path in workspace.list(found.path("rows-0", "data"))}
    commits = [workspace.read_json(path) for path in workspace.list(found.path("rows-0", "commits"))]
    assert left == {name for commit in commits for name in commit["files"].values()}  # what was half written is gone


@pytest.mark.parametrize("damage", ["gone", "cut", "garbled"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, ray_cluster: None, damage: str) -> None:
    workspace = Workspace(str(tmp_path / "w"))
    source = ingested(workspace, made_rows(200, 500), 3)
    path = Path(source.paths(source.report.outputs.rows)[1])
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(
        {"gone": b"", "cut": whole[:middle], "garbled": whole[:9] + b"\xff" * middle + whole[9 + middle :]}[damage]
    )
    if damage == "gone":
        path.unlink()
    found = Place(workspace, "clean", "c")
    length = stage([{"text_length_filter": {"min_len": 5}}])
    with pytest.raises(
        DataError, match=r"(?s)1\.parquet: cannot be read .*; copy the workspace again, or do the file's stage again"
    ):
        length.run(found, CleanInputs(source))
    path.write_bytes(whole)
    assert length.run(found, CleanInputs(source)).rows == 200


def of_run(folder: Path, wanted: str) -> list[psutil.Process]:
    """Processes of the run in `folder` whose title or command holds `wanted`."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TMPDIR") == str(folder) and wanted in " ".join(process.cmdline()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def output_of(folder: Path, stage: str, arguments: list[str]) -> Output[Any]:
    recipe = pipeline.load(arguments[0], arguments[1:])
    return pipeline.status(recipe, Workspace(str(folder / "w")))[stage]


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["worker", "driver", "raylet"])
def test_a_killed_process_changes_nothing_in_the_result(short: Path, flag: Path, victim: str) -> None:
    (short / "ops.py").write_text(SLOW.format(flag=str(flag)), encoding="utf-8")
    arguments = ["tiny", "ingest.shard_bytes=3000", f"clean.custom_operators=[{short / 'ops.py'}]"]
    process = ["slow_mapper", {"text_length_filter": {"min_len": 30}}, {"document_deduplicator": {}}]
    arguments.append(f"clean.process={json.dumps(process)}")
    running = start(short, "clean", *arguments)
    deadline = time.monotonic() + 300
    while len(list(short.glob("w/clean/*/rows-0/commits/*.json"))) < 3:
        assert running.poll() is None and time.monotonic() < deadline, running.communicate()[0]
        time.sleep(0.01)
    title = {"worker": "ray::Map", "driver": "clean", "raylet": "raylet/raylet"}[victim]
    killed = [running.pid] if victim == "driver" else [found.pid for found in of_run(short, title)]
    assert killed
    os.kill(killed[0], signal.SIGKILL)
    said, _ = running.communicate(timeout=300)
    flag.unlink()
    if victim == "worker":
        assert running.returncode == 0, said  # its shard is done again by another
    else:
        assert running.returncode != 0
        assert_nothing_survives(short)
        finish(short, "clean", *arguments)
    straight = short / "straight"
    finish(straight, "clean", *arguments)
    reports = [output_of(folder, "clean", arguments).report for folder in (short, straight)]
    assert reports[0].digest == reports[1].digest and reports[0].rows > 0
    assert [o.rows_out for o in reports[0].operators] == [o.rows_out for o in reports[1].operators]


TWO_NODES = """
import json, sys
import ray
from ray.cluster_utils import Cluster
from pipelines.artifacts.workspace import Workspace
from pipelines.similarity import on_ray
from rayjobs import cluster, pipeline

nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 200 << 20})
nodes.add_node(num_cpus=1, object_store_memory=200 << 20)
on_ray.ALONE = 100
ray.init(address=nodes.address, log_to_driver=False)
assert len(ray.nodes()) == 2
pipeline.run(pipeline.load(sys.argv[1]), Workspace(sys.argv[2]), cluster.Cluster(nodes.address))
ray.shutdown()
nodes.shutdown()
"""


@pytest.mark.slow
def test_two_nodes_give_data_juicers_rows(
    short: Path,
    corpus: pa.Table,
    shared_data: Path,
    assets: dict[str, str],
    zhihu_process: Any,
) -> None:
    golden = pq.read_table(shared_data / "goldens" / "zhihu_real_m1.parquet").to_pylist()
    perplexed = {row["id"] for row in golden if row["dropped_by"] == "perplexity_filter"}
    rows = corpus.drop_columns(["row_id"]).rename_columns({"pos": "id"})
    rows = rows.filter(pa.array([key not in perplexed for key in rows["id"].to_pylist()]))
    pq.write_table(rows, short / "rows.parquet", row_group_size=500)
    section = {"process": zhihu_process(1, 100), "dialect": "data_juicer", "assets": assets}
    source = {"source": str(short / "rows.parquet"), "shard_bytes": 100_000, "adapter": "columns"}
    (short / "r.yaml").write_text(json.dumps({"name": "r", "ingest": source, "clean": section}), encoding="utf-8")
    command = [sys.executable, "-c", TWO_NODES, str(short / "r.yaml"), str(short / "w")]
    env = {**os.environ, "TMPDIR": str(short), "RAY_TMPDIR": str(short)}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    found = output_of(short, "clean", [str(short / "r.yaml")])
    kept = [row["id"] for row in rows_of(found, found.report.outputs.rows)]
    ranked = sorted((row for row in golden if row["final_rank"] is not None), key=lambda row: row["final_rank"])
    assert kept == [row["id"] for row in ranked]
