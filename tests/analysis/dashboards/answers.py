"""What the server of `server` answers, one function an operation of GraphQL."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tests.analysis.dashboards.stored import ENTITY, Artifact, StoredRun

if TYPE_CHECKING:
    from tests.analysis.dashboards.server import Server


def _features(server: Server, asked: dict[str, Any]) -> Any:
    return {"serverInfo": {"features": [], "cliVersionInfo": {}, "latestLocalVersionInfo": None}}


def _viewer(server: Server, asked: dict[str, Any]) -> Any:
    who = {"id": "VXNlcjox", "entity": ENTITY, "username": "someone", "email": "", "flags": "{}"}
    return {"viewer": {**who, "name": "", "admin": False, "teams": {"edges": []}, "apiKeys": {"edges": []}}}


def _upsert_run(server: Server, asked: dict[str, Any]) -> Any:
    name = asked.get("name") or next(key for key, run in server.runs.items() if _id(run) == asked["id"])
    inserted = name not in server.runs
    run = server.run_of(name, asked.get("project") or server.runs[name].project)
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


def _resume_status(server: Server, asked: dict[str, Any]) -> Any:
    run = server.runs.get(asked["name"])
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


def _run_files(server: Server, asked: dict[str, Any]) -> Any:
    files = [{"name": n, "uploadUrl": f"{server.url}/storage/run/{asked['run']}/{n}"} for n in asked["files"]]
    return {"createRunFiles": {"runID": asked["run"], "uploadHeaders": [], "files": files}}


def _artifact_type(server: Server, asked: dict[str, Any]) -> Any:
    wanted = asked["name"].split(":")[0]
    kinds = [a.kind for a in server.artifacts.values() if a.name == wanted and a.committed]
    return {"project": {"artifact": {"artifactType": {"name": kinds[0]}} if kinds else None}}


def _create_artifact(server: Server, asked: dict[str, Any]) -> Any:
    given = asked["input"]
    key = f"QXJ0{len(server.artifacts)}"
    server.artifacts[key] = Artifact(
        given["artifactCollectionNames"][0]
        if given.get("artifactCollectionNames")
        else given["artifactCollectionName"],
        given["artifactTypeName"],
        given.get("runName") or "",
    )
    made = {"id": key, "state": "PENDING", "artifactSequence": {"id": "S", "latestArtifact": None}}
    return {"createArtifact": {"artifact": made}}


def _create_manifest(server: Server, asked: dict[str, Any]) -> Any:
    key = asked["artifactID"]
    place = {"id": "F", "uploadUrl": f"{server.url}/storage/manifest/{key}/x", "uploadHeaders": []}
    return {"createArtifactManifest": {"artifactManifest": {"id": f"M{key}", "file": place}}}


def _update_manifest(server: Server, asked: dict[str, Any]) -> Any:
    key = asked["artifactManifestID"][1:]
    place = {"id": "F", "uploadUrl": f"{server.url}/storage/manifest/{key}/x", "uploadHeaders": []}
    return {"updateArtifactManifest": {"artifactManifest": {"id": f"M{key}", "file": place}}}


def _artifact_files(server: Server, asked: dict[str, Any]) -> Any:
    edges = []
    for given in asked["input"]["artifactFiles"]:
        key, name = given["artifactID"], given["name"]
        place = {"uploadUrl": f"{server.url}/storage/blob/{key}/{name}", "uploadHeaders": []}
        node = {"storagePath": name, **place, "uploadMultipartUrls": None, "artifact": {"id": key}}
        edges.append({"node": node})
    return {"createArtifactFiles": {"files": {"edges": edges}}}


def _commit_artifact(server: Server, asked: dict[str, Any]) -> Any:
    server.artifacts[asked["artifactID"]].committed = True
    return {"commitArtifact": {"artifact": {"id": asked["artifactID"], "digest": "d"}}}


def _list_runs(server: Server, asked: dict[str, Any]) -> Any:
    wanted = json.loads(asked.get("filters") or "{}")
    comparison = [
        run
        for run in server.runs.values()
        if run.project == asked["project"]
        and run.group == wanted.get("group", run.group)
        and run.job_type == wanted.get("jobType", run.job_type)
    ]
    edges = [{"node": _listed(run), "cursor": run.name} for run in comparison]
    page = {"endCursor": comparison[-1].name if comparison else None, "hasNextPage": False}
    listed = {"edges": edges, "pageInfo": page}
    if asked["project"] not in server.projects:
        return {"project": None}
    return {"project": {"internalId": "1", "runCount": len(comparison), "readOnly": False, "runs": listed}}


def _one_run(server: Server, asked: dict[str, Any]) -> Any:
    return {"project": {"run": _listed(server.runs[asked["name"]])}}


def _history(server: Server, asked: dict[str, Any]) -> Any:
    rows = server.runs[asked["runName"]].rows
    return {"project": {"run": {"parquetHistory": {"parquetUrls": [], "liveData": rows}}}}


def _history_page(server: Server, asked: dict[str, Any]) -> Any:
    rows = server.runs[asked["run"]].rows
    rows = [json.dumps(row) for row in rows if asked["minStep"] <= row["_step"] < asked["maxStep"]]
    return {"project": {"run": {"history": rows}}}


def _project_id(server: Server, asked: dict[str, Any]) -> Any:
    return {"project": _project(asked["projectName"]) if asked["projectName"] in server.projects else None}


def _list_projects(server: Server, asked: dict[str, Any]) -> Any:
    page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
    made = {"entityName": ENTITY, "createdAt": "2026-01-01T00:00:00Z", "isBenchmark": False, "user": None}
    nodes = [{"__typename": "Project", "id": name, "name": name, **made} for name in sorted(server.projects)]
    return {"models": {"pageInfo": page, "edges": [{"node": node} for node in nodes]}}


def _upsert_view(server: Server, asked: dict[str, Any]) -> Any:
    key = asked.get("id") or f"Vmlld{len(server.views)}"
    inserted = key not in server.views
    server.views[key] = {**asked, "spec": json.loads(asked["spec"])}
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


ANSWERS: dict[str, Callable[[Server, dict[str, Any]], Any]] = {
    "ServerFeaturesQuery": _features,
    "Viewer": _viewer,
    "GetViewer": _viewer,
    "GetDefaultEntity": _viewer,
    "OrganizationCoreWeaveOrganizationID": lambda server, asked: {"entity": None},
    "UpsertBucket": _upsert_run,
    "RunResumeStatus": _resume_status,
    "CreateRunFiles": _run_files,
    "ArtifactType": _artifact_type,
    "CreateArtifact": _create_artifact,
    "CreateArtifactManifest": _create_manifest,
    "UpdateArtifactManifest": _update_manifest,
    "CreateArtifactFiles": _artifact_files,
    "CommitArtifact": _commit_artifact,
    "Runs": _list_runs,
    "Run": _one_run,
    "RunHistoryKeys": _one_run,
    "RunParquetHistory": _history,
    "HistoryPage": _history_page,
    "ProjectInternalId": _project_id,
    "GetProjects": _list_projects,
    "UpsertView2": _upsert_view,
    "upsertView": _upsert_view,
}
