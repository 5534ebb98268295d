"""What the API server answers, as an error that says whose move it is: the admin's, the user's, or nobody's."""

from __future__ import annotations

import json

import pytest
from kubernetes.client.exceptions import ApiException

from runner.errors import ClusterError, UnreachableError
from runner.kube.errors import ForbiddenError, RefusedError, UnavailableError, explain


def explained(status: int, says: str, verb: str = "create", resource: str = "pods") -> ClusterError:
    answer = ApiException(status=status, reason="Reason")
    answer.body = json.dumps({"kind": "Status", "message": says})
    return explain(answer, verb, resource, "namespace oslo of https://host:6443")


def test_a_right_that_is_missing_names_the_role() -> None:
    error = explained(403, 'pods is forbidden: User "eve" cannot create resource "pods" in API group ""')
    assert isinstance(error, ForbiddenError)
    assert "oslo-helper" in error.hint


def test_queues_have_a_role_of_their_own() -> None:
    says = 'workloads.kueue.x-k8s.io is forbidden: User "eve" cannot list resource "workloads" in API group "x"'
    assert "oslo-queues" in explained(403, says, "list", "workloads").hint


@pytest.mark.parametrize(
    "says",
    [
        'pods "x" is forbidden: violates PodSecurity "restricted:latest": allowPrivilegeEscalation != false',
        'pods "x" is forbidden: exceeded quota: oslo, requested: pods=1, used: pods=0, limited: pods=0',
        'pods "x" is forbidden: error looking up service account oslo/typo: serviceaccount "typo" not found',
        'pods "x" is forbidden: no PriorityClass with name typo was found',
        'pods "x" is forbidden: [maximum cpu usage per Container is 4, but limit is 8]',
        'admission webhook "validator.pytorchjob" denied the request: you cannot use this image',
    ],
)
def test_what_admission_forbids_is_no_missing_right(says: str) -> None:
    error = explained(403, says)
    assert isinstance(error, RefusedError)
    assert says in error.message


def test_who_is_not_known_is_told_to_log_in() -> None:
    says = 'pytorchjobs.kubeflow.org is forbidden: User "system:anonymous" cannot list resource "pytorchjobs"'
    assert "log in" in explained(403, says, "list", "pytorchjobs").hint


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_server_that_cannot_now_may_be_asked_again(status: int) -> None:
    error = explained(status, "etcdserver: request timed out", "get", "pytorchjobs")
    assert isinstance(error, UnavailableError)
    assert isinstance(error, UnreachableError)
    assert f"the cluster answered {status}: etcdserver: request timed out" in error.message
