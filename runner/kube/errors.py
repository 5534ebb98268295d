"""What the API server refuses, as the errors of a command: what, where, and what to do next.

ClusterError (runner.errors)
├── ForbiddenError     a right is missing: says which, and which Role of k8s/ gives it
├── MissingError       the object is not there
├── ConflictError      the object is there already, or has changed meanwhile
├── RefusedError       the object is not valid, or a policy forbids it
└── UnreachableError   no answer from the API server (runner.errors)
    └── UnavailableError   it answers that it cannot now, or cannot reach the node that a log or a command is on
        └── WebhookError   it cannot reach a webhook that has to agree: nothing was changed
"""

from __future__ import annotations

import json
from typing import Any

import urllib3
from kubernetes.client.exceptions import ApiException

from runner.errors import ClusterError, UnreachableError

ROLE_OF = {"pods": "oslo-helper", "pods/exec": "oslo-helper", "workloads": "oslo-queues"}
"""Resource -> the Role of k8s/ that allows what changes it; all else is oslo-submitter's."""


class ForbiddenError(ClusterError):
    pass


class MissingError(ClusterError):
    pass


class ConflictError(ClusterError):
    pass


class RefusedError(ClusterError):
    pass


class UnavailableError(UnreachableError):
    pass


class WebhookError(UnavailableError):
    pass


def explain(error: Exception, verb: str, resource: str, where: str) -> ClusterError:
    """The error of a request as one of ours.

    verb: as Roles have it; resource: plural, with its subresource; where: `namespace oslo of https://host:6443`.
    """
    what = f"{verb} {resource} in {where}"
    if isinstance(error, ApiException):
        return _refused(error, verb, resource, what)
    if isinstance(error, urllib3.exceptions.HTTPError | OSError):
        reason = _innermost(error)
        return UnreachableError(f"no answer from the cluster: {what}: {reason}", "check the network and the kubeconfig")
    return ClusterError(f"{what}: {type(error).__name__}: {error}")


def _refused(error: ApiException, verb: str, resource: str, what: str) -> ClusterError:
    says = _message(error)
    if error.status == 401 or 'User "system:anonymous" cannot' in says:
        return ForbiddenError(
            f"the cluster does not know you: {what}: {says}", "log in again; see `kubectl auth whoami`"
        )
    if error.status == 403 and " cannot " in says.partition(" is forbidden: User ")[2]:
        reads = verb in ("get", "list") and resource not in ("pods/exec", "workloads")
        role = "oslo-submitter" if reads else ROLE_OF.get(resource, "oslo-submitter")
        hint = f"an admin can allow it with the Role {role} (k8s/README.md): verb {verb}, resource {resource}"
        return ForbiddenError(f"you may not {what}: {says}", hint)
    if error.status == 404 and ("could not find the requested resource" in says or "page not found" in says):
        return ClusterError(
            f"{what}: the cluster does not know {resource}",
            "is what provides it installed? k8s/README.md lists what is needed",
        )
    if error.status == 404:
        return MissingError(f"{what}: {says}")
    if error.status == 409:
        return ConflictError(f"{what}: {says}")
    if error.status in (400, 403, 422):
        return RefusedError(f"the cluster refuses to {what}: {says}")
    if "failed calling webhook" in says:
        hint = "does the one that it belongs to run? That is for the cluster's admin to see"
        return WebhookError(f"{what}: a webhook of the cluster does not answer: {says}", hint)
    said = f"{what}: the cluster answered {error.status}: {says}"
    if error.status == 429 or error.status >= 500:
        return UnavailableError(said, "try again; if it stays so, ask the cluster's admin")
    return ClusterError(said)


def _message(error: ApiException) -> str:
    """The sentence in a Status object, else the body or the reason."""
    body: Any = error.body
    text = body.decode(errors="replace") if isinstance(body, bytes) else str(body or "")
    try:
        says = json.loads(text).get("message", "")
    except (ValueError, AttributeError):
        says = text
    return " ".join(str(says).split()) or str(error.reason)


def _innermost(error: BaseException) -> str:
    while (cause := getattr(error, "reason", None)) and isinstance(cause, BaseException):
        error = cause
    return str(error).rpartition(": ")[2] or type(error).__name__
