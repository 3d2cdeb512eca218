"""A chat server that answers as a function of the prompt, and finished stages to evaluate."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from pipelines.artifacts.reports.evaluate import CompareReport, EvaluateReport
from pipelines.artifacts.reports.rows import SplitReport
from pipelines.artifacts.reports.train import MergeReport, TrainReport
from pipelines.artifacts.rows import ROW
from pipelines.artifacts.stage import Output, Report, read_manifest
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.evaluate.compare import CompareStage
from pipelines.evaluate.endpoint import ModelInputs
from pipelines.evaluate.stage import EvaluateStage
from pipelines.models.lineup import Lineup, lineup_of
from pipelines.recipe.schema import Recipe
from tests.local_server import Handler, listening
from tests.outputs import finished, finished_split, merge_report, train_report

Answer = Callable[[str, str], str]
R = TypeVar("R", bound=Report)


@dataclass
class ChatServer:
    """What was asked of the server, and how it answers: `answer(model, query)`."""

    models: list[str]
    answer: Answer
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    delay: float = 0.0
    status: int = 200
    error: str = "broken"

    def asked(self) -> list[tuple[str, str]]:
        """Model and query of every chat request so far."""
        return [(request["model"], request["messages"][-1]["content"]) for request in self.requests]


def _handler(server: ChatServer) -> type[Handler]:
    class ChatHandler(Handler):
        def do_GET(self) -> None:
            self.send_json(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in server.models]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.requests.append(body)
            server.keys.add(self.headers.get("Authorization", ""))
            time.sleep(server.delay)
            if server.status != 200:
                self.send_json(server.status, {"error": {"message": server.error, "type": "x", "code": server.status}})
                return
            text = server.answer(body["model"], body["messages"][-1]["content"])
            message = {"role": "assistant", "content": text}
            usage = {"prompt_tokens": 3, "completion_tokens": len(text), "total_tokens": 3 + len(text)}
            choice = {"index": 0, "message": message, "finish_reason": "length" if text.endswith("…") else "stop"}
            completion = {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"]}
            self.send_json(200, {**completion, "choices": [choice], "usage": usage})

    return ChatHandler


@contextmanager
def chat_server_running() -> Iterator[ChatServer]:
    """A server of base, tiny and tiny-merged on a free port of this machine."""
    state = ChatServer(["base", "tiny", "tiny-merged"], lambda model, query: f"{model}：{query}")
    with listening(_handler(state)) as url:
        state.url = f"{url}/v1"
        yield state


def make_recipe(url: str | None, **sections: Any) -> Recipe:
    """A recipe whose models answer at `url`, or have engines started for them."""
    tree: dict[str, Any] = {
        "name": "tiny",
        "ingest": {"source": "rows.jsonl"},
        "split": {"test_ratio": 0.1},
        "train": {"model": "base"},
        "merge": {},
        "evaluate": {"endpoint": url, "generation": {"max_tokens": 32}},
        "compare": {"endpoint": url, "queries": 2, "generation": {"max_tokens": 32}},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section} if isinstance(section, dict) else section
    return Recipe.model_validate(tree)


def lineup(recipe: Recipe) -> Lineup:
    """The models of a recipe that trains."""
    found = lineup_of(recipe)
    assert found
    return found


def evaluate_stage(recipe: Recipe) -> EvaluateStage:
    """The stage `evaluate` of a recipe."""
    assert recipe.evaluate and recipe.train
    return EvaluateStage(recipe.evaluate, lineup(recipe), recipe.serve, recipe.train.system, recipe.seed)


def compare_stage(recipe: Recipe) -> CompareStage:
    """The stage `compare` of a recipe."""
    assert recipe.compare and recipe.train
    return CompareStage(recipe.compare, lineup(recipe), recipe.serve, recipe.train.system, recipe.seed)


def evaluate(recipe: Recipe, inputs: ModelInputs) -> EvaluateReport:
    """What the stage `evaluate` of a recipe reports at its place beside its inputs."""
    return evaluate_stage(recipe).run(place_beside(inputs, "evaluate"), inputs)


def compare(recipe: Recipe, inputs: ModelInputs) -> CompareReport:
    """What the stage `compare` of a recipe reports at its place beside its inputs."""
    return compare_stage(recipe).run(place_beside(inputs, "compare"), inputs)


def place_beside(inputs: ModelInputs, stage: str) -> Place:
    """A place for a stage in the workspace of its inputs."""
    return Place(inputs.train.folder.workspace, stage, "3" * 16)


def make_inputs(
    root: Path, rows: list[dict[str, Any]], train: TrainReport | None = None, merge: MergeReport | None = None
) -> ModelInputs:
    """Finished stages below `root`: a split whose test side holds `rows`, a training, and a merge."""
    workspace = Workspace(str(root))
    places = [Place(workspace, stage, "0" * 16) for stage in ("split", "train", "merge")]
    names = [name for name in ROW.names if name != "messages" or any("messages" in row for row in rows)]
    schema = pa.schema([ROW.field(name) for name in names])
    table = pa.Table.from_pylist([{"pos": i, **row} for i, row in enumerate(rows)], schema=schema)
    with workspace.parquet_writer(places[0].path("test.parquet"), schema) as writer:
        writer.write_table(table)
    report = train or train_report()
    if report.model == "base":
        (root / "base").mkdir(parents=True, exist_ok=True)
        (root / "base" / "config.json").write_text("{}", encoding="utf-8")
        report = report.model_copy(update={"model": str(root / "base")})
    return ModelInputs(
        finished_split(places[0], [], ["test.parquet"]),
        finished(places[1], report),
        finished(places[2], merge or merge_report()),
    )


def read_inputs(root: Path) -> ModelInputs:
    """What `make_inputs` left below `root`, in another process."""

    def output(stage: str, kind: type[R]) -> Output[R]:
        place = Place(Workspace(str(root)), stage, "0" * 16)
        return Output(stage, place, read_manifest(place, kind))

    return ModelInputs(output("split", SplitReport), output("train", TrainReport), output("merge", MergeReport))
