"""The wishes without an API: the 135M model answers a small grid in the cluster, and behind `danlu serve`, alike."""

import os
import signal
import subprocess
import sys
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.artifacts.stage import Output
from pipelines.artifacts.workspace import Workspace
from rayjobs import pipeline
from serve.app import claim_port
from tests.outputs import rows_of

pytestmark = pytest.mark.slow

GRID = [
    "synthesize.dimensions.name=[姐姐, 李总]",
    "synthesize.dimensions.scene=[生日, 春节]",
    "synthesize.compatibility=[]",
    "synthesize.samples_per_cell=1",
    "synthesize.generation.temperature=0",
    "synthesize.generation.max_tokens=96",
    'synthesize.generation.stop=["\\n", "。", "，", " "]',  # it would go on and on; four is what APIs take
]

# `danlu serve` with a model that needs no training: everything after it is the command's own.
SERVE = """
import sys
from rayjobs import cli, deploy
from pipelines.models.served import ServedModel
model = ServedModel("base", sys.argv[1])
deploy.finished_models = lambda *_: [model]
sys.argv = ["danlu", "serve", "tiny", *sys.argv[2:]]
cli.main()
"""


def refined(folder: Path | str, *overrides: str) -> dict[str, Output[Any]]:
    """Run the shipped recipe to its refined rows; what its finished stages left, by name."""
    command = [str(Path(sys.executable).parent / "danlu"), "run", "wishes", "--to", "refine"]
    environment = {name: value for name, value in os.environ.items() if not name.endswith("API_KEY")}
    done = subprocess.run(
        [*command, "--workspace", str(folder), *GRID, *overrides],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    return pipeline.status(pipeline.load("wishes", [*GRID, *overrides]), Workspace(str(folder)))


def suggested(folder: Path, *overrides: str) -> dict[str, Any]:
    """What the model proposes beside the people that there are."""
    command = [str(Path(sys.executable).parent / "danlu"), "synthesize", "wishes", "--suggest-values", "name=3"]
    done = subprocess.run(
        [*command, "--workspace", str(folder), *GRID, *overrides], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    proposed: dict[str, Any] = yaml.safe_load(done.stdout)
    return proposed


def answers(output: Output[Any]) -> dict[str, Any]:
    kept, dropped = (rows_of(output, names) for names in (output.report.outputs.rows, output.report.outputs.dropped))
    return {row["row_id"]: row["response"] for row in kept} | {
        row["row_id"]: (row["reason"], row["text"]) for row in dropped
    }


LOCAL = ("synthesize.engine=vllm", "synthesize.model=tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in a folder, in which engines in the cluster have answered."""
    return tmp_path_factory.mktemp("local")


@pytest.fixture(scope="module")
def local(folder: Path) -> dict[str, Output[Any]]:
    """Its finished stages."""
    return refined(folder, *LOCAL)


def test_a_workspace_on_a_bucket_has_the_same_answers(local: dict[str, Output[Any]], bucket: str) -> None:
    there = Workspace(f"{bucket}/run")
    assert answers(refined(there.root, *LOCAL)["synthesize"]) == answers(local["synthesize"])
    kept = {path.removeprefix(there.path("")).partition("/")[0] for path in there.files(there.root)}
    assert {"models", "ledger", "synthesize"} <= kept
    for path in there.files(there.path("synthesize")):
        there.remove(path)
    kept_answers = set(there.files(there.path("ledger")))
    refined(there.root, *LOCAL)
    assert set(there.files(there.path("ledger"))) == kept_answers  # nothing was asked again


def test_a_small_grid_in_the_cluster_and_behind_danlu_serve(
    tmp_path: Path, folder: Path, local: dict[str, Output[Any]]
) -> None:
    said = answers(local["synthesize"])
    assert len(said) == 12 and set(said) == {
        f"{name}/{scene}/{style}#0"
        for name in ("姐姐", "李总")
        for scene in ("生日", "春节")
        for style in ("小红书", "正常", "严肃")
    }
    assert local["refine"].report.operators[0].rows_in == local["synthesize"].report.rows
    (model,) = (str(path.parent) for path in (folder / "models").glob("*/config.json"))  # converted above
    port = claim_port("127.0.0.1", None)
    command = [sys.executable, "-c", SERVE, model, "--port", str(port), "--workspace", str(tmp_path / "serve")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as served:
        assert served.stderr is not None
        try:
            until = list(takewhile(lambda line: "Ctrl-C stops" not in line, served.stderr))
            assert served.poll() is None, "".join(until)
            url = f"synthesize.endpoints=[{{base_url: 'http://127.0.0.1:{port}/v1'}}]"
            over_http = refined(tmp_path / "http", url, "synthesize.model=base")
            proposed = suggested(tmp_path / "http", url, "synthesize.model=base")
        finally:
            served.send_signal(signal.SIGTERM)
            served.stderr.read()
    assert answers(over_http["synthesize"]) == said
    assert proposed["dimensions"]["name"][:2] == ["姐姐", "李总"]  # so small a model seldom proposes anything
    assert answers(over_http["refine"]) == answers(local["refine"])
