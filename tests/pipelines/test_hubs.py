"""The hubs' real clients against a server on this machine that answers what they were recorded to ask."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.local_server import Handler, listening

FILES = {
    "README.md": "# 数据集\n".encode(),
    "data/train-00001.jsonl": '{"query": "二", "response": "乙"}\n'.encode(),
    "data/test.jsonl": '{"query": "考", "response": "卷"}\n'.encode(),
    "dataset_infos.json": b'{"default": {}}',
    "data/train-00000.jsonl": '{"query": "一", "response": "甲"}\n'.encode() * 3000,
}
LIST = """
import sys
from pipelines.errors import DanluError
from pipelines.sources.files import list_files
try:
    print(*list_files(sys.argv[1]), sep="\\n")
except DanluError as error:
    print("refused:", error)
"""
FETCH = """
import sys
from pipelines.clean.assets import locate_asset
print(locate_asset("README.md", "flagged_words_filter", {"README.md": sys.argv[1]}))
"""


@dataclass
class Hub:
    """Where it listens, and what was asked."""

    url: str = ""
    asked: list[str] = field(default_factory=list)


def _handler(hub: Hub) -> type[Handler]:
    class HubHandler(Handler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            asked = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(asked.query).items()}
            hub.asked.append(f"{self.command} {asked.path} {query.get('FilePath', '')}".strip())
            if asked.path == "/api/v1/datasets/owner/name/repo/tree":
                entries = [_entry(path, data) for path, data in FILES.items()]
                self.send_json(200, {"Code": 200, "Success": True, "Data": {"Files": entries}})
            elif asked.path in ("/api/v1/datasets/owner/name/repo", "/api/v1/models/owner/model/repo"):
                self._file(FILES[query["FilePath"]])
            elif asked.path == "/api/datasets/owner/name/revision/main":
                self.send_json(
                    200, {"id": "owner/name", "sha": "c0ffee", "siblings": [{"rfilename": path} for path in FILES]}
                )
            elif asked.path == "/api/datasets/owner/name/tree/c0ffee":
                self.send_json(200, [_entry(path, data) for path, data in FILES.items()])
            elif asked.path.startswith("/datasets/owner/name/resolve/c0ffee/"):
                self._file(FILES[asked.path.removeprefix("/datasets/owner/name/resolve/c0ffee/")])
            else:
                self.send(404, b"{}")

        def _file(self, data: bytes) -> None:
            """The file, or the range of it that is asked for."""
            digest = hashlib.sha256(data).hexdigest()
            head = {"ETag": f'"{digest}"', "X-Repo-Commit": "c0ffee", "Accept-Ranges": "bytes"}
            asked = self.headers.get("Range")
            if not asked:
                self.send(200, data, head)
                return
            low, _, high = asked.removeprefix("bytes=").partition("-")
            first, last = int(low), min(int(high), len(data) - 1) if high else len(data) - 1
            self.send(206, data[first : last + 1], {**head, "Content-Range": f"bytes {first}-{last}/{len(data)}"})

    return HubHandler


def _entry(path: str, data: bytes) -> dict[str, Any]:
    """A file as ModelScope lists it, and in lower case as Hugging Face does."""
    digest = hashlib.sha256(data).hexdigest()
    theirs = {"Path": path, "Name": path.rsplit("/", 1)[-1], "Type": "blob", "Size": len(data), "Sha256": digest}
    return {**theirs, "type": "file", "path": path, "size": len(data), "oid": digest}


@pytest.fixture
def hub() -> Iterator[Hub]:
    found = Hub()
    with listening(_handler(found)) as found.url:
        yield found


def said_by(code: str, hub: Hub, source: str, home: Path) -> list[str]:
    """What a process of its own prints: the clients read their environment when they are imported."""
    own = {"HOME": str(home), "MODELSCOPE_CACHE": str(home / "ms"), "MODELSCOPE_DOMAIN": hub.url,
           "MODELSCOPE_ENDPOINT": hub.url, "HF_HOME": str(home / "hf"), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0",
           "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1",
           "DATA_JUICER_CACHE_HOME": str(home / "dj")}  # fmt: skip
    command = [sys.executable, "-c", code, source]
    result = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.parametrize("scheme", ["modelscope", "hf"])
def test_a_data_set_is_downloaded_once_and_its_files_are_in_order(hub: Hub, tmp_path: Path, scheme: str) -> None:
    found = said_by(LIST, hub, f"{scheme}://owner/name", tmp_path)
    assert [Path(path).name for path in found] == ["test.jsonl", "train-00000.jsonl", "train-00001.jsonl"]
    assert [Path(path).read_bytes() for path in found] == [FILES[f"data/{Path(path).name}"] for path in found]
    fetched = [line for line in hub.asked if "GET" in line and "train" in line]
    assert len(fetched) >= 2
    hub.asked.clear()
    assert said_by(LIST, hub, f"{scheme}://owner/name", tmp_path) == found
    assert not [line for line in hub.asked if "GET" in line and "train" in line]


@pytest.mark.parametrize("scheme", ["modelscope", "hf"])
def test_of_a_data_set_only_what_is_asked_for_is_downloaded(hub: Hub, tmp_path: Path, scheme: str) -> None:
    found = said_by(LIST, hub, f"{scheme}://owner/name/data/train-*.jsonl", tmp_path)
    assert [Path(path).name for path in found] == ["train-00000.jsonl", "train-00001.jsonl"]
    assert not [line for line in hub.asked if "test.jsonl" in line or "infos" in line or "README" in line]
    assert "".join(hub.asked).count("train-00001.jsonl") >= 1
    whole = said_by(LIST, hub, f"{scheme}://owner/name/data", tmp_path)
    assert [Path(path).name for path in whole] == ["test.jsonl", "train-00000.jsonl", "train-00001.jsonl"]
    assert said_by(LIST, hub, f"{scheme}://owner/name/**/train-*.jsonl", tmp_path) == found
    source = f"{scheme}://owner/name/data/dev*"
    (said,) = said_by(LIST, hub, source, tmp_path)[-1:]
    assert said.startswith(f"refused: ingest.source {source}: no such file")


@pytest.mark.parametrize("scheme", ["modelscope", "hf"])
def test_a_data_set_that_is_not_there_is_named(hub: Hub, tmp_path: Path, scheme: str) -> None:
    said = "\n".join(said_by(LIST, hub, f"{scheme}://owner/none", tmp_path))
    assert said.startswith(f"refused: ingest.source {scheme}://owner/none: cannot be downloaded (")
    assert "404" in said


def test_a_model_file_is_fetched_by_modelscopes_client_once(hub: Hub, tmp_path: Path) -> None:
    digest = hashlib.sha256(FILES["README.md"]).hexdigest()
    place = f"modelscope://owner/model/README.md#sha256={digest}"
    found = Path(said_by(FETCH, hub, place, tmp_path)[-1])
    assert found.read_bytes() == FILES["README.md"]
    assert found.parent == tmp_path / "dj" / "models"
    assert "GET /api/v1/models/owner/model/repo README.md" in hub.asked
    hub.asked.clear()
    assert said_by(FETCH, hub, place, tmp_path)[-1] == str(found)
    assert not hub.asked
