"""A Kubernetes API server in memory, of the size that Helm's engine needs: discovery, objects by POST, PATCH, GET, LIST, WATCH and
DELETE. Nothing acts on objects but what is said in `_give_status`: there are no controllers, no admission, no defaults.
"""

import http.server
import json
import socketserver
import threading
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Self

import yaml

Object = dict[str, Any]
# group/version, resource, namespace, name
Key = tuple[str, str, str, str]

RESOURCES: Final = {
    "v1": {"pods": "Pod", "services": "Service", "configmaps": "ConfigMap", "secrets": "Secret", "serviceaccounts": "ServiceAccount"},
    "apps/v1": {"deployments": "Deployment"},
    "autoscaling/v2": {"horizontalpodautoscalers": "HorizontalPodAutoscaler"},
    "policy/v1": {"poddisruptionbudgets": "PodDisruptionBudget"},
    "networking.k8s.io/v1": {"networkpolicies": "NetworkPolicy"},
    "ray.io/v1": {"rayclusters": "RayCluster"},
    "monitoring.coreos.com/v1": {"podmonitors": "PodMonitor", "prometheusrules": "PrometheusRule"},
}
_VERBS: Final = ("create", "delete", "get", "list", "patch", "update", "watch")
# A watch that nobody ends is ended by us; Helm's come again.
WATCH_S: Final = 10.0
POLL_S: Final = 0.05


@dataclass
class Cluster:
    """What the server holds, and what it was asked."""

    version: str
    objects: dict[Key, Object] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)  # (method, path)
    pod_phase: str = "Succeeded"  # of every pod, at once
    _revision: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def kinds(self) -> dict[str, list[str]]:
        """Names by kind."""
        found: dict[str, list[str]] = {}
        for item in list(self.objects.values()):
            found.setdefault(item["kind"], []).append(item["metadata"]["name"])
        return {kind: sorted(names) for kind, names in found.items()}

    def the(self, kind: str, name: str) -> Object:
        (found,) = [item for item in self.objects.values() if item["kind"] == kind and item["metadata"]["name"] == name]
        return found

    def put(self, key: Key, item: Object) -> Object:
        with self._lock:
            self._revision += 1
            old = self.objects.get(key)
            uid = old["metadata"]["uid"] if old else f"uid-{self._revision}"
            times = {"creationTimestamp": "2026-01-01T00:00:00Z", "resourceVersion": str(self._revision), "uid": uid, "generation": 1}
            item["metadata"] = item["metadata"] | {"namespace": key[2], "name": key[3]} | times
            self._give_status(item)
            self.objects[key] = item
            return item

    @property
    def revision(self) -> str:
        return str(self._revision)

    def _give_status(self, item: Object) -> None:
        if item["kind"] == "Pod":
            item["status"] = {"phase": self.pod_phase, "conditions": []}
        if item["kind"] == "Deployment":
            counts = dict.fromkeys(("replicas", "readyReplicas", "availableReplicas", "updatedReplicas"), item["spec"].get("replicas", 1))
            conditions = [{"type": "Available", "status": "True"}]
            item["status"] = {"observedGeneration": 1, **counts, "conditions": conditions}


class FakeKubeApi:
    """The server, on a free port of this machine, for as long as it is entered."""

    def __init__(self, *, version: str = "1.34") -> None:
        self.cluster = Cluster(version)

        handler = type("Handler", (_Handler,), {"cluster": self.cluster})  # the server makes one per connection, without arguments
        self._server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def kubeconfig(self) -> str:
        return yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "fake", "cluster": {"server": self.url}}],
                "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "nobody"}}],
                "users": [{"name": "nobody", "user": {}}],
                "current-context": "fake",
            }
        )

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": POLL_S}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    cluster: Cluster

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path, query = self._request()
        known = self._discovery(path)
        if known is not None:
            self._answer(known)
            return
        key = self._key(path)
        if key is None:
            self._not_found(path)
        elif key[3]:
            self._answer(self.cluster.objects[key]) if key in self.cluster.objects else self._not_found(path)
        elif "watch" in query:
            self._watch(key, query)
        else:
            kind = f"{RESOURCES[key[0]][key[1]]}List"
            metadata = {"resourceVersion": self.cluster.revision}
            self._answer({"kind": kind, "apiVersion": key[0], "metadata": metadata, "items": list(self._selected(key, query))})

    def do_POST(self) -> None:
        self._write(is_new=True)

    def do_PATCH(self) -> None:
        self._write(is_new=False)

    def do_DELETE(self) -> None:
        path, _ = self._request()
        self._body()
        item = self.cluster.objects.pop(self._key(path) or ("", "", "", ""), None)
        self._answer({"kind": "Status", "apiVersion": "v1", "status": "Success"}) if item else self._not_found(path)

    def _write(self, *, is_new: bool) -> None:
        path, query = self._request()
        body = self._body()
        key = self._key(path)
        if key is None:
            self._not_found(path)
            return
        key = (*key[:3], key[3] or body["metadata"]["name"])
        old = self.cluster.objects.get(key)
        if is_new and old:
            text = f'{key[1]} "{key[3]}" already exists'
            self._answer({"kind": "Status", "status": "Failure", "reason": "AlreadyExists", "code": 409, "message": text}, 409)
            return
        # Server-side apply brings the whole object; other patches a part of it.
        is_whole = is_new or "apply" in self.headers.get("content-type", "")
        item = body if is_whole else _merged(old or {}, body)
        item.setdefault("apiVersion", key[0])
        item.setdefault("kind", RESOURCES[key[0]][key[1]])
        self._answer(item if query.get("dryRun") else self.cluster.put(key, item), 200 if old else 201)

    def _watch(self, key: Key, query: dict[str, str]) -> None:
        """What is there, then what changes."""
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True
        told: dict[str, Object] = {}
        ends_s = time.monotonic() + WATCH_S
        is_first = "sendInitialEvents" in query
        try:
            while time.monotonic() < ends_s:
                now = {item["metadata"]["uid"]: item for item in self._selected(key, query)}
                for uid, item in now.items():
                    if uid not in told or told[uid]["metadata"]["resourceVersion"] != item["metadata"]["resourceVersion"]:
                        self._tell("MODIFIED" if uid in told else "ADDED", item)
                for uid in told.keys() - now.keys():
                    self._tell("DELETED", told[uid])
                if is_first:
                    annotations = {"k8s.io/initial-events-end": "true"}
                    metadata = {"resourceVersion": self.cluster.revision, "annotations": annotations}
                    self._tell("BOOKMARK", {"kind": RESOURCES[key[0]][key[1]], "apiVersion": key[0], "metadata": metadata})
                    is_first = False
                told = now
                time.sleep(POLL_S)
        except OSError:  # the client has seen enough
            pass

    def _tell(self, kind: str, item: Object) -> None:
        self.wfile.write(json.dumps({"type": kind, "object": item}).encode() + b"\n")
        self.wfile.flush()

    def _selected(self, key: Key, query: dict[str, str]) -> Iterator[Object]:
        labels = dict(part.split("=", 1) for part in query.get("labelSelector", "").split(",") if "=" in part)
        name = query.get("fieldSelector", "").removeprefix("metadata.name=")
        for (version, resource, namespace, own_name), item in list(self.cluster.objects.items()):
            is_there = (version, resource) == key[:2] and key[2] in ("", namespace) and name in ("", own_name)
            if is_there and labels.items() <= item["metadata"].get("labels", {}).items():
                yield item

    def _discovery(self, path: str) -> Object | None:
        """What kinds there are."""
        if path == "/version":
            major, _, minor = self.cluster.version.partition(".")
            return {"major": major, "minor": minor, "gitVersion": f"v{self.cluster.version}.0"}
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            groups = [version.split("/") for version in RESOURCES if "/" in version]
            versions = [{"groupVersion": f"{group}/{version}", "version": version} for group, version in groups]
            listed = [{"name": group, "versions": [one], "preferredVersion": one} for (group, _), one in zip(groups, versions, strict=True)]
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}
        if path == "/openapi/v3":
            return {"paths": {_prefix(version): {"serverRelativeURL": f"/openapi/v3/{_prefix(version)}"} for version in RESOURCES}}
        for version in RESOURCES:
            if path == f"/openapi/v3/{_prefix(version)}":
                return _openapi(version)
            if path == f"/{_prefix(version)}":
                resources = [
                    {"name": name, "singularName": kind.lower(), "namespaced": True, "kind": kind, "verbs": list(_VERBS)}
                    for name, kind in RESOURCES[version].items()
                ]
                return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources}
        return None

    def _key(self, path: str) -> Key | None:
        """What a path names; its name is "" where it is a list."""
        for version, resources in RESOURCES.items():
            prefix = f"/{_prefix(version)}/"
            if path.startswith(prefix):
                parts = path.removeprefix(prefix).split("/")
                namespace, parts = (parts[1], parts[2:]) if parts[0] == "namespaces" and len(parts) > 2 else ("", parts)
                if parts[0] in resources and len(parts) <= 2:
                    return version, parts[0], namespace, parts[1] if len(parts) == 2 else ""
        return None

    def _request(self) -> tuple[str, dict[str, str]]:
        url = urllib.parse.urlparse(self.path)
        self.cluster.requests.append((self.command, url.path))
        return url.path.rstrip("/"), {name: values[0] for name, values in urllib.parse.parse_qs(url.query).items()}

    def _body(self) -> Object:
        text = self.rfile.read(int(self.headers.get("content-length") or 0))
        body: Object | None = yaml.safe_load(text)
        return body or {}

    def _not_found(self, path: str) -> None:
        self._answer({"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404, "message": f"{path} not found"}, 404)

    def _answer(self, item: Object, code: int = 200) -> None:
        text = json.dumps(item).encode()
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


def _prefix(version: str) -> str:
    return f"apis/{version}" if "/" in version else f"api/{version}"


def _openapi(version: str) -> Object:
    """Just enough for Helm to see that objects may be patched, with a validation of fields."""
    group, _, plain = version.rpartition("/")
    parameters = [{"name": name, "in": "query", "schema": {"type": "string"}} for name in ("fieldValidation", "dryRun")]
    paths = {}
    for name, kind in RESOURCES[version].items():
        which = {"group": group, "version": plain, "kind": kind}
        patch: Object = {
            "x-kubernetes-action": "patch",
            "x-kubernetes-group-version-kind": which,
            "parameters": parameters,
            "responses": {},
        }
        paths[f"/{_prefix(version)}/namespaces/{{namespace}}/{name}/{{name}}"] = {"patch": patch}
    return {"openapi": "3.0.0", "info": {"title": "fake", "version": "v1"}, "paths": paths, "components": {"schemas": {}}}


def _merged(old: Object, patch: Object) -> Object:
    """A JSON merge patch."""
    result = dict(old)
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = _merged(result.get(name) or {}, value) if isinstance(value, dict) else value
    return result
