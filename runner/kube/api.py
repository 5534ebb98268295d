"""One namespace of a cluster, as this user sees it. Objects are plain mappings, as the API has them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import urllib3
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from kubernetes.config.config_exception import ConfigException
from kubernetes.config.kube_config import KubeConfigMerger

from runner.errors import ClusterError
from runner.kube.access import TOKEN_DIR, Access, in_cluster
from runner.kube.errors import MissingError, WebhookError, explain
from runner.patience import patiently

CONNECT_SECONDS: Final = 10
READ_SECONDS: Final = 60
"""Of what changes something: a webhook may take half of it."""
GET_SECONDS: Final = 30
SILENCE_SECONDS: Final = 60
"""A followed log that says nothing for so long is asked for again: a lost connection shows no other sign."""
WEBHOOK_SECONDS: Final = 60.0
"""How long a change waits for a webhook that does not answer: while an operator is replaced, none does."""
_RETRIES: Final = 3
_VERB: Final = {"POST": "create", "GET": "get", "DELETE": "delete", "PATCH": "patch"}
Manifest = dict[str, Any]


@dataclass(frozen=True)
class Resource:
    """A kind of object. api: `v1` or `group/version`."""

    api: str
    plural: str

    @property
    def prefix(self) -> str:
        return f"/apis/{self.api}" if "/" in self.api else f"/api/{self.api}"


JOBS: Final = Resource("kubeflow.org/v1", "pytorchjobs")
PODS: Final = Resource("v1", "pods")
EVENTS: Final = Resource("v1", "events")
CLAIMS: Final = Resource("v1", "persistentvolumeclaims")


class _Retry(urllib3.Retry):  # type: ignore[misc]
    """Asks again, too, where a server that is busy has turned a request away unread: then also what creates."""

    def is_retry(self, method: str, status_code: int, has_retry_after: bool = False) -> bool:
        return status_code == HTTPStatus.TOO_MANY_REQUESTS or super().is_retry(method, status_code, has_retry_after)


class Cluster:
    """Requests to one namespace. Every error is a ClusterError that says what was asked for, and where."""

    def __init__(self, api_client: client.ApiClient, namespace: str, say: Callable[[str], None]) -> None:
        """say: hears what a request waits for."""
        self.api_client = api_client
        self.namespace = namespace
        self._say = say
        self.requests = 0
        """How many were sent."""

    @classmethod
    def connect(cls, access: Access, say: Callable[[str], None]) -> Cluster:
        """Read the kubeconfig, or a pod's own credentials. Sends nothing.

        Raises ClusterError when there are neither, or the context is not there.
        """
        settings = client.Configuration()
        try:
            if access.has_file or access.kubeconfig:
                namespace = _load_file(access.files, access.context, settings)
            elif in_cluster():
                config.load_incluster_config(client_configuration=settings)
                namespace = (TOKEN_DIR / "namespace").read_text().strip()
            else:
                raise ClusterError(
                    f"no cluster is configured: there is no {access.files}",
                    "set KUBECONFIG or --kubeconfig; or train on this machine with --local",
                )
        except ClusterError:
            raise
        except (ConfigException, OSError) as error:
            raise ClusterError(f"the kubeconfig cannot be used: {error}", f"see {access.files}") from error
        except Exception as error:  # the client's library does not check what stands in the file
            says = " ".join(str(error).split())
            message = f"the kubeconfig cannot be read: {type(error).__name__}: {says}"
            raise ClusterError(message, f"see {access.files}") from error
        settings.retries = _Retry(
            _RETRIES, connect=1, read=1, backoff_factor=0.2, status_forcelist=(429, 503), raise_on_status=False
        )
        settings.connection_pool_maxsize = 16
        return cls(client.ApiClient(settings), access.namespace or namespace or "default", say)

    @property
    def where(self) -> str:
        return f"namespace {self.namespace} of {self.api_client.configuration.host}"

    # --- objects ------------------------------------------------------------------------------------

    def get(self, resource: Resource, name: str) -> Manifest:
        """Raises MissingError."""
        return self._object("GET", resource, name)

    def find(self, resource: Resource, labels: str = "", fields: str = "") -> list[Manifest]:
        """All objects that match the selectors, as `kubectl -l` and `--field-selector` take them."""
        query = [(key, text) for key, text in (("labelSelector", labels), ("fieldSelector", fields)) if text]
        answer = self._object("GET", resource, "", query, verb="list")
        items: list[Manifest] = answer["items"]
        return items

    def create(self, resource: Resource, manifest: Manifest, *, dry_run: bool = False) -> Manifest:
        """dry_run: the server checks it, webhooks and policies included, and keeps nothing. Raises ConflictError."""
        return self._object("POST", resource, "", [("dryRun", "All")] if dry_run else [], manifest)

    def patch(self, resource: Resource, name: str, change: Manifest) -> Manifest:
        """A merge patch: null removes."""
        return self._object("PATCH", resource, name, [], change)

    def delete(
        self, resource: Resource, name: str, *, grace_seconds: int | None = None, uid: str | None = None
    ) -> None:
        """Also what belongs to it, which goes first. One gone is fine.

        grace_seconds: None: as its manifest says. uid: of the one that is meant; raises ConflictError when another
        has its name by now.
        """
        body: Manifest = {"propagationPolicy": "Foreground"}
        if uid is not None:
            body["preconditions"] = {"uid": uid}
        if grace_seconds is not None:
            body["gracePeriodSeconds"] = grace_seconds
        with suppress(MissingError):
            self._object("DELETE", resource, name, [], body)

    def preferred_version(self, group: str) -> str | None:
        """`group/version`; None when the cluster does not know the group."""
        answer = self._parsed(self._data(self._send("GET", "/apis", [], None, "API groups"), "get", "API groups"))
        found = next((one for one in answer["groups"] if one["name"] == group), None)
        return None if found is None else str(found["preferredVersion"]["groupVersion"])

    # --- logs ---------------------------------------------------------------------------------------

    def log(self, pod: str, *, tail: int | None = None, since: str | None = None) -> list[str]:
        """The lines that are there, each behind its RFC 3339 time and a space.

        tail: the last so many; since: an RFC 3339 time, of which the API counts whole seconds.
        """
        response = self._log_request(pod, tail, since, follow=False)
        data = self._data(response, "get", "pods/log")
        return [line.decode(errors="replace") for line in data.removesuffix(b"\n").split(b"\n")] if data else []

    def follow_log(self, pod: str, *, since: str | None = None) -> Iterator[str]:
        """Such lines as they come, until the container ends or the connection does: the caller asks again."""
        response = self._log_request(pod, None, since, follow=True)
        torn = b""
        try:
            for part in response.stream(2**14, decode_content=False):
                *lines, torn = (torn + part).split(b"\n")
                yield from (line.decode(errors="replace") for line in lines)
        except (urllib3.exceptions.HTTPError, OSError):
            return  # lost, or silent for long
        finally:
            response.close()
        if torn:
            yield torn.decode(errors="replace")

    def _log_request(self, pod: str, tail: int | None, since: str | None, *, follow: bool) -> urllib3.HTTPResponse:
        query = [("container", "pytorch"), ("timestamps", "true")]
        query += [("tailLines", str(tail))] if tail is not None else []
        query += [("sinceTime", since)] if since is not None else []
        query += [("follow", "true")] if follow else []
        path = f"{self._path(PODS, pod)}/log"
        return self._send("GET", path, query, None, "pods/log", read_seconds=SILENCE_SECONDS)

    # --- requests -----------------------------------------------------------------------------------

    def _path(self, resource: Resource, name: str) -> str:
        base = f"{resource.prefix}/namespaces/{self.namespace}/{resource.plural}"
        return f"{base}/{quote(name, safe='')}" if name else base

    def _object(
        self,
        method: str,
        resource: Resource,
        name: str,
        query: list[tuple[str, str]] | None = None,
        body: Manifest | None = None,
        verb: str | None = None,
    ) -> Manifest:
        def answer() -> Manifest:
            response = self._send(method, self._path(resource, name), query or [], body, resource.plural, verb)
            return self._parsed(self._data(response, verb or _VERB[method], resource.plural))

        return patiently(answer, WEBHOOK_SECONDS, self._say, WebhookError)

    def _data(self, response: urllib3.HTTPResponse, verb: str, resource: str) -> bytes:
        """The whole body, which may break off after the head has come."""
        try:
            data: bytes = response.data
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise explain(error, verb, resource, self.where) from error
        return data

    def _parsed(self, data: bytes) -> Manifest:
        try:
            answer: Manifest = json.loads(data)
        except ValueError as error:
            says = " ".join(data[:200].decode(errors="replace").split())
            message = f"what answers at {self.api_client.configuration.host} is no API server: {says!r}"
            raise ClusterError(message, "does a proxy or a login page stand in between? See the kubeconfig") from error
        return answer

    def _send(
        self,
        method: str,
        path: str,
        query: list[tuple[str, str]],
        body: Mapping[str, Any] | None,
        resource: str,
        verb: str | None = None,
        *,
        read_seconds: int | None = None,
    ) -> urllib3.HTTPResponse:
        self.requests += 1
        read_seconds = read_seconds or (GET_SECONDS if method == "GET" else READ_SECONDS)
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        try:
            answer = self.api_client.call_api(
                path,
                method,
                query_params=query,
                header_params={"Accept": "application/json, */*", "Content-Type": kind},
                body=body,
                auth_settings=["BearerToken"],
                _preload_content=False,
                _return_http_data_only=True,
                _request_timeout=(CONNECT_SECONDS, read_seconds),
            )
        except (ApiException, urllib3.exceptions.HTTPError, OSError) as error:
            raise explain(error, verb or _VERB[method], resource, self.where) from error
        response: urllib3.HTTPResponse = answer
        return response


def _load_file(file: str, context: str | None, settings: client.Configuration) -> str | None:
    """The namespace of the context."""
    config.load_kube_config(file, context, settings, persist_config=False)
    contexts, current = config.list_kube_config_contexts(file)
    chosen = next((one for one in contexts if one["name"] == context), current)
    token = _token_file(file, chosen["context"].get("user"))
    if token is not None:
        settings.refresh_api_key_hook = lambda settings: _read_token(settings, token)
        settings.get_api_key_with_prefix("authorization")
    namespace: str | None = chosen["context"].get("namespace")
    return namespace


def _token_file(file: str, user: str | None) -> Path | None:
    """Where the kubeconfig's user keeps a token that is renewed meanwhile."""
    merged = KubeConfigMerger(file).config
    if merged is None or not user or not merged.safe_get("users"):
        return None
    found = merged["users"].get_with_name(user, safe=True)
    path = found["user"].safe_get("tokenFile") if found is not None and found.safe_get("user") else None
    return None if path is None else Path(found["user"].path).absolute().parent / path


def _read_token(settings: client.Configuration, path: Path) -> None:
    """The library reads a pod's own token again every minute, but that of a tokenFile only once."""
    with suppress(OSError):  # it is being replaced: the last one may do
        if token := path.read_text().strip():
            settings.api_key["authorization"] = f"Bearer {token}"
