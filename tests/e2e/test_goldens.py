"""A real cluster takes what is rendered: the operator's webhook the jobs, Pod Security `restricted` their pods.

Everything is a dry run on the server; what a manifest names must exist for that where admission asks (the account,
the priority class), claims and secrets need not.
"""

from __future__ import annotations

import copy
import json
import os
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from goldens import GOLDEN_NAMES, golden_job, templates

from runner.pytorchjob import CONFIG_LIMIT_BYTES, render_pytorchjob
from runner.spec import check_job

ADMIN = os.environ.get("KUBECONFIG", "")
NAMESPACE = f"oslo-goldens-{secrets.token_hex(3)}"
ACCOUNTS = ("default", "trainer")
PRIORITY_CLASS = "low"
Manifest = dict[str, Any]

pytestmark = pytest.mark.e2e
each_golden = pytest.mark.parametrize("name", GOLDEN_NAMES)


def kubectl(*arguments: str, given: object = None) -> subprocess.CompletedProcess[str]:
    text = None if given is None else json.dumps(given)
    command = ["kubectl", "--kubeconfig", ADMIN, *arguments]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module", autouse=True)
def restricted_namespace() -> Iterator[None]:
    if not ADMIN:
        pytest.fail("set KUBECONFIG to a cluster's admin")
    meta: Manifest = {"name": NAMESPACE, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}}
    made = kubectl("apply", "-f", "-", given={"apiVersion": "v1", "kind": "Namespace", "metadata": meta})
    assert made.returncode == 0, made.stderr
    kubectl("-n", NAMESPACE, "create", "serviceaccount", "trainer")
    ours = kubectl("create", "priorityclass", PRIORITY_CLASS, "--value=-10").returncode == 0
    try:
        until(lambda: all(kubectl("-n", NAMESPACE, "get", "sa", one).returncode == 0 for one in ACCOUNTS))
        yield
    finally:
        kubectl("delete", "namespace", NAMESPACE, "--wait=false")
        if ours:
            kubectl("delete", "priorityclass", PRIORITY_CLASS)


def until(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.5)


def refusal(manifest: Manifest) -> str:
    """Why the server would not create it; "" when it would."""
    manifest = copy.deepcopy(manifest)
    manifest["metadata"]["namespace"] = NAMESPACE
    tried = kubectl("create", "--dry-run=server", "--validate=strict", "-f", "-", given=manifest)
    return tried.stderr if tried.returncode else ""


def as_pod(name: str, template: Manifest) -> Manifest:
    """As the operator makes it of a template when the replica's policy is ExitCode."""
    meta, spec = {**template["metadata"], "name": f"{name}-0"}, {**template["spec"], "restartPolicy": "Never"}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec}


@each_golden
def test_the_operator_takes_the_job(name: str) -> None:
    assert refusal(golden_job(name)) == ""


@each_golden
def test_a_restricted_namespace_takes_its_pods(name: str) -> None:
    for template in templates(golden_job(name)):
        assert refusal(as_pod(name, template)) == ""


def test_a_config_and_annotations_of_the_largest_size_are_taken() -> None:
    annotations = {"example.com/notes": "x" * 40_000}
    job, problems = check_job({"image": "i", "volume": "v", "nodes": 2, "annotations": annotations})
    assert job is not None, problems
    manifest = render_pytorchjob("large-12345678", "large", "0" * 64, "x" * CONFIG_LIMIT_BYTES, job)
    assert refusal(manifest) == ""
    assert refusal(as_pod("large", templates(manifest)[0])) == ""


# --- and these tests can fail ------------------------------------------------------------------------


def test_a_job_without_the_operators_container_is_refused() -> None:
    job = golden_job("two-nodes")
    for template in templates(job):
        template["spec"]["containers"][0]["name"] = "trainer"
    assert "must have at least one container with name pytorch" in refusal(job)


def test_a_master_whose_replicas_are_left_to_the_default_is_refused() -> None:
    job = golden_job("two-nodes")
    del job["spec"]["pytorchReplicaSpecs"]["Master"]["replicas"]
    assert "spec.pytorchReplicaSpecs[Master].replicas: Forbidden: must be 1" in refusal(job)


def test_a_field_that_does_not_exist_is_refused() -> None:
    job = golden_job("one-gpu")
    job["spec"]["nprocPernode"] = "1"
    assert 'unknown field "spec.nprocPernode"' in refusal(job)


@pytest.mark.parametrize("missing", ["pod", "container"])
def test_a_pod_without_its_security_context_is_refused(missing: str) -> None:
    (template,) = templates(golden_job("one-gpu"))
    spec = template["spec"]
    del (spec if missing == "pod" else spec["containers"][0])["securityContext"]
    assert 'violates PodSecurity "restricted' in refusal(as_pod("one-gpu", template))
