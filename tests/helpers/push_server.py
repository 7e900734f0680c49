"""A hub on this machine that takes models: as much of Hugging Face's interface as an upload asks for."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from local_http import QuietHandler, local_http

TOKEN = "hf_of_the_test"


@dataclass
class Hub:
    """What was pushed: the files of each repository, as its last commits left them."""

    address: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)  # by checksum, as Git LFS has them
    forbidden: bool = False  # whether a commit is refused


@contextmanager
def push_server() -> Iterator[Hub]:
    """Takes uploads of who has `TOKEN`: *.safetensors as large files, all others within the commit."""
    hub = Hub()

    class Handler(QuietHandler):
        def do_GET(self) -> None:
            if self.allowed() and self.path == "/api/whoami-v2":
                self.tell({"type": "user", "name": "me"})
            else:
                self.tell({"error": "not here"}, 404)

        def do_PUT(self) -> None:
            body = self.body()
            hub.large[hashlib.sha256(body).hexdigest()] = body
            self.tell({})

        def do_POST(self) -> None:
            path, body = unquote(urlsplit(self.path).path), self.body()
            if not self.allowed():
                return
            if path == "/api/validate-yaml":
                assert json.loads(body)["content"].startswith("---\n")
                self.tell({"warnings": [], "errors": []})
            elif path == "/api/repos/create":
                about = json.loads(body)
                name = f"{about['organization']}/{about['name']}"
                hub.repositories.setdefault(name, {})
                self.tell({"url": f"{hub.address}/{name}"})
            elif path.endswith(".git/info/lfs/objects/batch"):
                objects = [of | {"actions": self.upload(of["oid"])} for of in json.loads(body)["objects"]]
                self.tell({"transfer": "basic", "objects": objects})
            elif "/preupload/" in path:
                self.tell({"files": [self.way_of(file["path"]) for file in json.loads(body)["files"]]})
            elif "/commit/" in path and hub.forbidden:
                self.tell({"error": "no right to write"}, 403)
            elif "/commit/" in path:
                self.commit(path.removeprefix("/api/models/").partition("/commit/")[0], body)
            else:
                self.tell({"error": "not here"}, 404)

        def upload(self, oid: str) -> dict[str, Any]:
            return {"upload": {"href": f"{hub.address}/large/{oid}"}}

        def way_of(self, path: str) -> dict[str, Any]:
            large = path.endswith(".safetensors")
            return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

        def commit(self, repo: str, body: bytes) -> None:
            for entry in map(json.loads, body.splitlines()):
                file = entry["value"]
                if entry["key"] == "file":
                    hub.repositories[repo][file["path"]] = base64.b64decode(file["content"])
                elif entry["key"] == "lfsFile":
                    hub.repositories[repo][file["path"]] = hub.large[file["oid"]]
            self.tell({"commitUrl": f"{hub.address}/{repo}/commit/{'0' * 40}", "commitOid": "0" * 40})

        def allowed(self) -> bool:
            if ours := self.headers.get("authorization") == f"Bearer {TOKEN}":
                return ours
            self.tell({"error": "who are you?"}, 401)
            return False

        def tell(self, value: Any, status: int = 200) -> None:
            self.reply(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    with local_http(Handler) as hub.address, pytest.MonkeyPatch.context() as patch:
        for name, value in (("ENDPOINT", hub.address), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
            patch.setattr(f"huggingface_hub.constants.{name}", value)
        patch.setenv("HF_TOKEN", TOKEN)
        yield hub
