"""Each right of k8s/base/access.yaml is needed: without it a command says which is missing and which Role gives it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from stage import NAMESPACE, SUBMITTER, OnCluster, write_job

pytestmark = pytest.mark.e2e
ROLES = ("oslo-submitter", "oslo-helper")
NOWHERE = ("--set", "job.cpu=64")
"""No node has so many cores: the pods stay pending, and nothing is trained here."""


@pytest.fixture
def pending(cluster: OnCluster, model: Path, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A run that waits for ever, and its file."""
    file = write_job(tmp_path, model)
    answer = cluster.submit(file, *NOWHERE)
    assert answer.code == 0, answer.err
    yield answer.handle, file
    cluster.clear()


@pytest.fixture
def without(cluster: OnCluster) -> Iterator[Callable[[str, str], None]]:
    """without("pods", "list"): take a right away, from both Roles."""
    before = {name: json.loads(cluster.kubectl("get", "role", name, "-o", "json")) for name in ROLES}

    taken: list[tuple[str, str]] = []

    def take(resource: str, verb: str) -> None:
        for name, role in before.items():
            rules = [_less(rule, verb) if resource in rule["resources"] else rule for rule in role["rules"]]
            _set(cluster, name, [rule for rule in rules if rule["verbs"]])
        taken.append((resource, verb))
        _await_right(cluster, resource, verb, "no")

    yield take
    for name, role in before.items():
        _set(cluster, name, role["rules"])
    for resource, verb in taken:
        _await_right(cluster, resource, verb, "yes")


def _less(rule: dict[str, Any], verb: str) -> dict[str, Any]:
    return rule | {"verbs": [known for known in rule["verbs"] if known != verb]}


def _set(cluster: OnCluster, role: str, rules: list[dict[str, Any]]) -> None:
    cluster.kubectl("patch", "role", role, "--type=merge", "-p", json.dumps({"rules": rules}))


def _await_right(cluster: OnCluster, resource: str, verb: str, allowed: str) -> None:
    """Until the API server judges by the Roles as they are: it learns of a change to them a moment after it is made."""
    name, _, part = resource.partition("/")
    asked = ["auth", "can-i", verb, name, *([f"--subresource={part}"] if part else [])]
    user = f"--as=system:serviceaccount:{NAMESPACE}:{SUBMITTER}"
    end = time.monotonic() + 30
    while cluster.kubectl(*asked, user, check=False).strip() != allowed:
        assert time.monotonic() < end, f"the right to {verb} {resource} stays as it was"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("resource", "verb", "command"),
    [
        ("pytorchjobs", "get", ["status", "RUN"]),
        ("pytorchjobs", "list", ["list", "--name", "x"]),
        ("pytorchjobs", "create", ["submit", "FILE", "-y", "--set", "training.max_steps=7"]),
        ("pytorchjobs", "patch", ["cancel", "RUN"]),
        ("pods", "list", ["status", "RUN"]),
        ("pods", "get", ["submit", "FILE", "-y", "--set", "training.max_steps=7"]),
        ("pods", "create", ["submit", "FILE", "-y", "--set", "training.max_steps=7"]),
        ("pods", "delete", ["cancel", "RUN", "--force"]),
        ("pods/exec", "get", ["submit", "FILE", "-y", "--set", "training.max_steps=7"]),
        ("persistentvolumeclaims", "get", ["submit", "FILE", "-y", *NOWHERE, "--set", "training.max_steps=8"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_missing_right_is_named(
    cluster: OnCluster,
    pending: tuple[str, Path],
    without: Callable[[str, str], None],
    resource: str,
    verb: str,
    command: list[str],
) -> None:
    run, file = pending
    without(resource, verb)
    answer = cluster.oslo(*[{"RUN": run, "FILE": file}.get(word, word) for word in command], timeout=60)
    says = " ".join(answer.err.split())
    assert f"you may not {verb} {resource}" in says, answer.err
    if (
        resource == "persistentvolumeclaims" or command[0] == "list"
    ):  # what cannot be checked is said, and no reason to stop
        assert answer.code == 0
    else:
        assert answer.code == 1
        assert f"verb {verb}, resource {resource}" in says


def test_a_job_cannot_be_deleted_without_the_right(
    cluster: OnCluster, pending: tuple[str, Path], without: Callable[[str, str], None]
) -> None:
    run, _ = pending
    assert cluster.oslo("cancel", run).code == 0
    without("pytorchjobs", "delete")
    answer = cluster.oslo("delete", run, "-y")
    assert answer.code == 1
    assert "you may not delete pytorchjobs" in answer.err


def test_logs_need_their_right(
    cluster: OnCluster, without: Callable[[str, str], None], model: Path, tmp_path: Path
) -> None:
    """One node: of several the operator deletes a pod that ends last, and the volume is read in its stead."""
    submitted = cluster.submit(write_job(tmp_path, model), "--follow", "--set", "job.nodes=1")
    assert submitted.code == 0, submitted.err
    without("pods/log", "get")
    answer = cluster.oslo("logs", submitted.handle)
    assert answer.code == 1
    assert "you may not get pods/log" in answer.err
    status = cluster.oslo("status", submitted.handle)
    assert status.code == 0
    assert "you may not get pods/log" in status.err
    assert "succeeded" in status.out
    cluster.clear()


def test_events_need_their_right(
    cluster: OnCluster, pending: tuple[str, Path], without: Callable[[str, str], None]
) -> None:
    """They are asked for when pods are missing."""
    run, _ = pending
    pods = list(cluster.pods(run.rpartition("/")[2]))
    without("events", "list")
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}, "spec": {"hard": {"pods": "0"}}}
    cluster.kubectl("apply", "-f", "-", given=quota)
    try:
        cluster.kubectl("delete", "pod", *pods)
        answer, told = cluster.oslo("status", run), cluster.oslo("why", run)
    finally:
        cluster.kubectl("delete", "resourcequota", "none")
    assert "you may not list events" in answer.err
    assert "you may not list events" in told.err
    assert (told.code, "is pending: 0 of 2 pods are there" in told.out) == (0, True)
