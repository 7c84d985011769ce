"""A W&B server of the size of a test: GraphQL, file stream and uploads over HTTP, on 127.0.0.1.

It keeps what a real server keeps (runs with configuration, rows and summary, files, artifacts, views) by the rules that
matter here: rows go where the client says (an offset), and a resumed run is told how many rows it has. What it is asked
and does not know is an error and stays in ``unknown``; whatever it received, headers included, stays in ``received``.
"""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = "team"
_OPERATION = re.compile(r"\b(?:query|mutation)\s+(\w+)")
_STREAM = re.compile(r"^/files/([^/]+)/([^/]+)/([^/]+)/file_stream$")


@dataclass
class StoredRun:
    """One run as the server has it."""

    name: str
    project: str
    display_name: str = ""
    group: str | None = None
    job_type: str | None = None
    host: str | None = None
    program: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, dict[int, str]] = field(default_factory=dict)
    """File of the stream → line number → line."""
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None
    upserts: int = 0

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Rows of the history in the order of their lines."""
        found = self.lines.get("wandb-history.jsonl", {})
        return [json.loads(found[number]) for number in sorted(found)]

    @property
    def summary(self) -> dict[str, Any]:
        """The latest summary."""
        found = self.lines.get("wandb-summary.json", {})
        return json.loads(found[max(found)]) if found else {}

    @property
    def values(self) -> dict[str, Any]:
        """The configuration without W&B's own wrapping."""
        return {key: entry["value"] for key, entry in self.config.items() if key != "_wandb"}

    @property
    def state(self) -> str:
        return "running" if self.exit_code is None else "failed" if self.exit_code else "finished"


@dataclass
class Artifact:
    """One version of an artifact: its files by path, once its manifest came."""

    name: str
    kind: str
    run: str
    manifest: dict[str, Any] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    committed: bool = False


class Server:
    """Serves until `close`; a context manager."""

    def __init__(self) -> None:
        self.runs: dict[str, StoredRun] = {}
        self.artifacts: dict[str, Artifact] = {}
        self.views: dict[str, dict[str, Any]] = {}
        self.projects: set[str] = set()
        self.received: list[bytes] = []
        self.operations: list[str] = []
        self.unknown: list[str] = []
        self.refuse: set[str] = set()
        """Operations that are answered with an error."""
        self._lock = threading.Lock()
        self._http = _Http(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop answering."""
        self._http.shutdown()
        self._http.server_close()

    def answer(self, method: str, path: str, body: bytes) -> Any:
        """What a request is answered with: JSON, or bytes."""
        with self._lock:
            self.received.append(body)
            if path == "/graphql":
                return self._graphql(json.loads(body))
            if stream := _STREAM.match(path):
                return self._stream(self._run(stream[3], stream[2]), json.loads(body))
            kind, _, rest = path.removeprefix("/storage/").partition("/")
            owner, _, name = rest.partition("/")
            if kind == "run" and method == "PUT":
                self.runs[owner].files[name] = body
            elif kind == "blob" and method == "PUT":
                self.artifacts[owner].blobs[name] = body
            elif kind == "manifest" and method == "PUT":
                self.artifacts[owner].manifest = json.loads(body)
            elif path not in ("/", "/healthz"):
                self.unknown.append(f"{method} {path}")
            return {}

    def _run(self, name: str, project: str) -> StoredRun:
        self.projects.add(project)
        return self.runs.setdefault(name, StoredRun(name, project))

    def _graphql(self, request: dict[str, Any]) -> Any:
        found = _OPERATION.search(request["query"])
        name = found[1] if found else ""
        self.operations.append(name)
        if name in self.refuse:
            return {"errors": [{"message": f"{name} is refused by the test"}], "data": None}
        answer = _ANSWERS.get(name)
        if answer is None:
            self.unknown.append(name)
            return {"errors": [{"message": f"unknown operation {name}"}], "data": None}
        return {"data": answer(self, request.get("variables") or {})}

    @staticmethod
    def _stream(run: StoredRun, body: dict[str, Any]) -> Any:
        for name, chunk in (body.get("files") or {}).items():
            lines = run.lines.setdefault(name, {})
            for number, line in enumerate(chunk["content"], chunk["offset"]):
                lines[number] = line
        if body.get("complete"):
            run.exit_code = body.get("exitcode") or 0
        return {}

    # Answers of GraphQL, one an operation.

    def _features(self, asked: dict[str, Any]) -> Any:
        return {"serverInfo": {"features": [], "cliVersionInfo": {}, "latestLocalVersionInfo": None}}

    def _viewer(self, asked: dict[str, Any]) -> Any:
        who = {"id": "VXNlcjox", "entity": ENTITY, "username": "someone", "email": "", "flags": "{}"}
        return {
            "viewer": {**who, "name": "", "admin": False, "teams": {"edges": []}, "apiKeys": {"edges": []}}
        }

    def _upsert_run(self, asked: dict[str, Any]) -> Any:
        name = asked.get("name") or next(key for key, run in self.runs.items() if _id(run) == asked["id"])
        inserted = name not in self.runs
        run = self._run(name, asked.get("project") or self.runs[name].project)
        run.upserts += 1
        run.display_name = asked.get("displayName") or run.display_name or name
        run.group, run.job_type = asked.get("groupName") or run.group, asked.get("jobType") or run.job_type
        run.host, run.program = asked.get("host") or run.host, asked.get("program") or run.program
        if asked.get("config"):
            run.config |= json.loads(asked["config"])
        run.exit_code = None
        return {
            "upsertBucket": {
                "bucket": {**_bucket(run), "project": _project(run.project)},
                "inserted": inserted,
            }
        }

    def _resume_status(self, asked: dict[str, Any]) -> Any:
        run = self.runs.get(asked["name"])
        bucket = None
        if run is not None:
            bucket = {
                **_bucket(run),
                "summaryMetrics": json.dumps(run.summary),
                "logLineCount": len(run.lines.get("output.log", {})),
                "eventsLineCount": len(run.lines.get("wandb-events.jsonl", {})),
                "historyTail": json.dumps([json.dumps(row) for row in run.rows[-1:]]),
                "eventsTail": "[]",
                "tags": [],
                "notes": None,
                "wandbConfig": '{"t": {}}',
            }
        return {"model": {**_project(asked["project"]), "bucket": bucket}}

    def _run_files(self, asked: dict[str, Any]) -> Any:
        files = [
            {"name": n, "uploadUrl": f"{self.url}/storage/run/{asked['run']}/{n}"} for n in asked["files"]
        ]
        return {"createRunFiles": {"runID": asked["run"], "uploadHeaders": [], "files": files}}

    def _artifact_type(self, asked: dict[str, Any]) -> Any:
        wanted = asked["name"].split(":")[0]
        kinds = [a.kind for a in self.artifacts.values() if a.name == wanted and a.committed]
        return {"project": {"artifact": {"artifactType": {"name": kinds[0]}} if kinds else None}}

    def _create_artifact(self, asked: dict[str, Any]) -> Any:
        given = asked["input"]
        key = f"QXJ0{len(self.artifacts)}"
        self.artifacts[key] = Artifact(
            given["artifactCollectionNames"][0]
            if given.get("artifactCollectionNames")
            else given["artifactCollectionName"],
            given["artifactTypeName"],
            given.get("runName") or "",
        )
        made = {"id": key, "state": "PENDING", "artifactSequence": {"id": "S", "latestArtifact": None}}
        return {"createArtifact": {"artifact": made}}

    def _create_manifest(self, asked: dict[str, Any]) -> Any:
        key = asked["artifactID"]
        place = {"id": "F", "uploadUrl": f"{self.url}/storage/manifest/{key}/x", "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": f"M{key}", "file": place}}}

    def _update_manifest(self, asked: dict[str, Any]) -> Any:
        key = asked["artifactManifestID"][1:]
        place = {"id": "F", "uploadUrl": f"{self.url}/storage/manifest/{key}/x", "uploadHeaders": []}
        return {"updateArtifactManifest": {"artifactManifest": {"id": f"M{key}", "file": place}}}

    def _artifact_files(self, asked: dict[str, Any]) -> Any:
        edges = []
        for given in asked["input"]["artifactFiles"]:
            key, name = given["artifactID"], given["name"]
            place = {"uploadUrl": f"{self.url}/storage/blob/{key}/{name}", "uploadHeaders": []}
            node = {"storagePath": name, **place, "uploadMultipartUrls": None, "artifact": {"id": key}}
            edges.append({"node": node})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _commit_artifact(self, asked: dict[str, Any]) -> Any:
        self.artifacts[asked["artifactID"]].committed = True
        return {"commitArtifact": {"artifact": {"id": asked["artifactID"], "digest": "d"}}}

    def _list_runs(self, asked: dict[str, Any]) -> Any:
        wanted = json.loads(asked.get("filters") or "{}")
        chosen = [
            run
            for run in self.runs.values()
            if run.project == asked["project"]
            and run.group == wanted.get("group", run.group)
            and run.job_type == wanted.get("jobType", run.job_type)
        ]
        edges = [{"node": _listed(run), "cursor": run.name} for run in chosen]
        page = {"endCursor": chosen[-1].name if chosen else None, "hasNextPage": False}
        listed = {"edges": edges, "pageInfo": page}
        if asked["project"] not in self.projects:
            return {"project": None}
        return {"project": {"internalId": "1", "runCount": len(chosen), "readOnly": False, "runs": listed}}

    def _one_run(self, asked: dict[str, Any]) -> Any:
        return {"project": {"run": _listed(self.runs[asked["name"]])}}

    def _history(self, asked: dict[str, Any]) -> Any:
        rows = self.runs[asked["runName"]].rows
        return {"project": {"run": {"parquetHistory": {"parquetUrls": [], "liveData": rows}}}}

    def _history_page(self, asked: dict[str, Any]) -> Any:
        rows = self.runs[asked["run"]].rows
        rows = [json.dumps(row) for row in rows if asked["minStep"] <= row["_step"] < asked["maxStep"]]
        return {"project": {"run": {"history": rows}}}

    def _project_id(self, asked: dict[str, Any]) -> Any:
        return {"project": _project(asked["projectName"]) if asked["projectName"] in self.projects else None}

    def _list_projects(self, asked: dict[str, Any]) -> Any:
        page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
        made = {"entityName": ENTITY, "createdAt": "2026-01-01T00:00:00Z", "isBenchmark": False, "user": None}
        nodes = [
            {"__typename": "Project", "id": name, "name": name, **made} for name in sorted(self.projects)
        ]
        return {"models": {"pageInfo": page, "edges": [{"node": node} for node in nodes]}}

    def _upsert_view(self, asked: dict[str, Any]) -> Any:
        key = asked.get("id") or f"Vmlld{len(self.views)}"
        inserted = key not in self.views
        self.views[key] = {**asked, "spec": json.loads(asked["spec"])}
        view = {
            "id": key,
            "type": asked["type"],
            "name": asked["name"],
            "displayName": asked["displayName"],
            "description": asked.get("description"),
            "project": {"id": "P", "name": asked["projectName"], "entityName": asked["entityName"]},
            "spec": asked["spec"],
            "createdAt": "2026-01-01T00:00:00Z",
            "updatedAt": "2026-01-01T00:00:00Z",
        }
        return {"upsertView": {"view": view, "inserted": inserted}}


def _id(run: StoredRun) -> str:
    return f"UnVu{run.name}"


def _bucket(run: StoredRun) -> dict[str, Any]:
    return {
        "id": _id(run),
        "name": run.name,
        "displayName": run.display_name,
        "description": None,
        "config": json.dumps(run.config),
        "sweepName": None,
        "historyLineCount": len(run.lines.get("wandb-history.jsonl", {})),
    }


def _listed(run: StoredRun) -> dict[str, Any]:
    keys = {key: {} for row in run.rows for key in row}
    last = max((row["_step"] for row in run.rows), default=-1)
    made = "2026-01-01T00:00:00Z"
    return {
        **_bucket(run),
        "projectId": "1",
        "tags": [],
        "state": run.state,
        "group": run.group,
        "jobType": run.job_type,
        "commit": None,
        "readOnly": False,
        "createdAt": made,
        "heartbeatAt": made,
        "notes": None,
        "systemMetrics": "{}",
        "summaryMetrics": json.dumps(run.summary),
        "user": {"name": "Some One", "username": "someone"},
        "historyKeys": {"sets": [], "keys": keys, "lastStep": last},
    }


def _project(name: str) -> dict[str, Any]:
    return {
        "id": f"UHJv{name}",
        "internalId": f"UHJv{name}",
        "name": name,
        "entity": {"id": "RW50", "name": ENTITY},
    }


_ANSWERS: dict[str, Callable[[Server, dict[str, Any]], Any]] = {
    "ServerFeaturesQuery": Server._features,
    "Viewer": Server._viewer,
    "GetViewer": Server._viewer,
    "GetDefaultEntity": Server._viewer,
    "OrganizationCoreWeaveOrganizationID": lambda server, asked: {"entity": None},
    "UpsertBucket": Server._upsert_run,
    "RunResumeStatus": Server._resume_status,
    "CreateRunFiles": Server._run_files,
    "ArtifactType": Server._artifact_type,
    "CreateArtifact": Server._create_artifact,
    "CreateArtifactManifest": Server._create_manifest,
    "UpdateArtifactManifest": Server._update_manifest,
    "CreateArtifactFiles": Server._artifact_files,
    "CommitArtifact": Server._commit_artifact,
    "Runs": Server._list_runs,
    "Run": Server._one_run,
    "RunHistoryKeys": Server._one_run,
    "RunParquetHistory": Server._history,
    "HistoryPage": Server._history_page,
    "ProjectInternalId": Server._project_id,
    "GetProjects": Server._list_projects,
    "UpsertView2": Server._upsert_view,
    "upsertView": Server._upsert_view,
}


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that is killed, or ends, resets its connections: that is what is tested, and no error."""


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            kept = {key: value for key, value in self.headers.items() if key.lower() != "authorization"}
            server.received.append(json.dumps(kept).encode())
            data = json.dumps(server.answer(self.command, self.path.partition("?")[0], body)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_HEAD = _handle

        def log_message(self, format: str, *args: object) -> None:
            """Silence."""

    return Handler
