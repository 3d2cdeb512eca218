"""A hub on this machine that speaks the calls ModelScope's client makes, as recorded from that client.

POST /api/v1/models | /api/v1/datasets                               create a repository
POST /api/v1/repos/<kind>s/<owner>/<name>/info/lfs/objects/batch     which blobs are missing, and where they go
PUT  /blob/<sha256>                                                  one blob
POST /api/v1/repos/<kind>s/<owner>/<name>/commit/<revision>          files: content, or the blob's sha256
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email import message_from_bytes
from typing import Any

from tests.local_server import Handler, listening


@dataclass
class Hub:
    """Repositories with their files, blobs by digest, and what was asked."""

    token: str
    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    created: list[dict[str, Any]] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    breaks: int = 0
    """How many more blob uploads are cut off half-way."""


def _handler(hub: Hub) -> type[Handler]:
    class HubHandler(Handler):
        def do_POST(self) -> None:
            body = self._body()
            hub.calls.append(f"POST {self.path}")
            if self.headers.get("Authorization") != f"Bearer {hub.token}":
                self.send_json(401, {"Code": 10010103009, "Message": "AccessToken is invalid", "Success": False})
            elif self.path.endswith("/objects/batch"):
                self.send_json(200, {"Code": 200, "Success": True, "Data": {"objects": self._missing(body["objects"])}})
            elif "/commit/" in self.path:
                kind_and_name = self.path.removeprefix("/api/v1/repos/").split("/commit/")[0]
                self._commit(hub.repositories[kind_and_name], body["actions"])
            else:
                self._create(body)

        def do_PUT(self) -> None:
            hub.calls.append("PUT blob")
            size = int(self.headers["Content-Length"])
            if hub.breaks:
                hub.breaks -= 1
                self.rfile.read(size // 2)
                self.connection.close()
                return
            data = self.rfile.read(size)
            digest = self.path.rsplit("/", 1)[1]
            assert hashlib.sha256(data).hexdigest() == digest
            hub.blobs[digest] = data
            self.send_json(200, {"Code": 200, "Success": True})

        def _body(self) -> dict[str, Any]:
            """The JSON document, or the form, with which data sets are created."""
            data = self.rfile.read(int(self.headers["Content-Length"]))
            kind = self.headers["Content-Type"]
            if kind.startswith("application/json"):
                found: dict[str, Any] = json.loads(data)
                return found
            form = message_from_bytes(f"Content-Type: {kind}\n\n".encode() + data)
            parts = {
                part.get_param("name", header="content-disposition"): part.get_payload() for part in form.get_payload()
            }
            return parts | {"Visibility": int(parts["Visibility"])}

        def _create(self, body: dict[str, Any]) -> None:
            kind = self.path.rsplit("/", 1)[1]
            name = f"{kind}/{body.get('Path') or body['Owner']}/{body['Name']}"
            if name in hub.repositories:
                self.send_json(400, {"Code": 10010101001, "Message": "model already exists", "Success": False})
                return
            hub.repositories[name] = {}
            hub.created.append({"name": name, **body})
            self.send_json(200, {"Code": 200, "Success": True, "Data": body})

        def _missing(self, objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return [
                {"oid": item["oid"], "actions": {"upload": {"href": f"{hub.url}/blob/{item['oid']}"}}}
                for item in objects
                if item["oid"] not in hub.blobs
            ]

        def _commit(self, files: dict[str, bytes], actions: list[dict[str, Any]]) -> None:
            for action in actions:
                inline = action["type"] == "normal"
                content = base64.b64decode(action["content"]) if inline else hub.blobs[action["sha256"]]
                files[action["path"]] = content
            self.send_json(200, {"Code": 200, "Success": True, "Data": {}})

    return HubHandler


@contextmanager
def running_hub(token: str) -> Iterator[Hub]:
    """A hub on a free port that knows one token."""
    hub = Hub(token)
    with listening(_handler(hub)) as hub.url:
        yield hub
