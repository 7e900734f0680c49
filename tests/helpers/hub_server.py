"""A hub of datasets on this machine: as much of Hugging Face's interface as the `datasets` library asks for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote, urlsplit

from local_http import QuietHandler, local_http


@contextmanager
def hub_server(repo: str, revisions: Mapping[str, Mapping[str, bytes]]) -> Iterator[tuple[str, list[str]]]:
    """Serves the files of a dataset: for each commit, of 40 hexadecimal digits, its files; the last one is main.

    Gives the address, and the paths asked for so far.
    """
    asked: list[str] = []

    class Handler(QuietHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_POST(self) -> None:
            body = self.body()
            self.answer(json.loads(body)["paths"] if "paths-info" in self.path else [])

        def do_GET(self) -> None:
            self.answer([])

        def answer(self, paths: list[str]) -> None:
            asked.append(path := unquote(urlsplit(self.path).path))
            kind, _, rest = path.removeprefix("/api").removeprefix(f"/datasets/{repo}/").partition("/")
            revision, _, name = rest.partition("/")
            commit = list(revisions)[-1] if revision == "main" else revision
            files = revisions.get(commit)
            if files is None or (kind == "resolve" and name not in files):
                self.reply(404, b"", {"X-Error-Code": "EntryNotFound" if files else "RevisionNotFound"})
            elif kind == "resolve":
                etag = hashlib.sha256(files[name]).hexdigest()
                self.reply(200, files[name], {"X-Repo-Commit": commit, "ETag": f'"{etag}"'})
            elif kind in ("tree", "paths-info"):
                folders = {name.rpartition("/")[0] for name in files} - {""}
                entries: list[dict[str, Any]] = [
                    {"type": "directory", "path": folder, "oid": "0" * 40} for folder in folders
                ]
                entries += [
                    {"type": "file", "path": n, "size": len(data), "oid": "1" * 40} for n, data in files.items()
                ]
                inside = [e for e in entries if str(e["path"]).rpartition("/")[0] == name]
                chosen = inside if kind == "tree" else [e for e in entries if e["path"] in paths]
                self.reply(200 if chosen or kind != "tree" else 404, json.dumps(chosen).encode())
            else:
                siblings = [{"rfilename": n} for n in files]
                about = {
                    "id": repo,
                    "sha": commit,
                    "siblings": siblings,
                    "tags": [],
                    "private": False,
                    "disabled": False,
                }
                self.reply(200, json.dumps(about | {"downloads": 0, "likes": 0, "gated": False}).encode())

    with local_http(Handler) as address:
        yield address, asked
