"""A chat server that answers as a function of the prompt, and finished stages to evaluate."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.artifacts.rows import ROW
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.recipe.schema import Recipe
from tests.local_server import Handler, listening

Answer = Callable[[str, str], str]


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


def make_recipe(url: str, **sections: Any) -> Recipe:
    """A recipe whose models answer at `url`."""
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
        tree[name] = {**tree[name], **section} if isinstance(section, dict) else section
    return Recipe.model_validate(tree)


def finished(place: Place, report: dict[str, Any]) -> Place:
    """The place of a stage that is complete with the given report."""
    place.finish({"stage": place.stage, "fingerprint": place.fingerprint, "seconds": 1.0, "report": report})
    return place


def place_at(root: Path, stage: str) -> Place:
    """A place for an evaluation stage after stages that are complete below `root`."""
    workspace = Workspace(str(root))
    inputs = {name: Place(workspace, name, "0" * 16) for name in ("split", "train", "merge")}
    return Place(workspace, stage, "3" * 16, inputs)


def make_place(root: Path, stage: str, rows: list[dict[str, Any]]) -> Place:
    """The same, with a split whose test side holds `rows`."""
    place = place_at(root, stage)
    names = [name for name in ROW.names if name != "messages" or any("messages" in row for row in rows)]
    schema = pa.schema([ROW.field(name) for name in names])
    table = pa.Table.from_pylist([{"pos": i, **row} for i, row in enumerate(rows)], schema=schema)
    split = place.inputs["split"]
    with place.workspace.parquet_writer(split.path("test.parquet"), schema) as writer:
        writer.write_table(table)
    finished(split, {"digest": "s", "outputs": {"train": [], "test": ["test.parquet"]}})
    finished(place.inputs["train"], {"digest": "t", "model": "base", "adapter": "adapter", "checkpoints": []})
    finished(place.inputs["merge"], {"digest": "m", "model": "model"})
    return place
