"""k8s/ on a real cluster: who may do what, whether a job's pods are accepted, and that pruning runs.

    KUBECONFIG=... OSLO_IMAGE_LOAD=... pytest -m e2e tests/k8s

Applies k8s/operator to the cluster's operator, and k8s/overlays/dev under another name, which it removes again.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from kubectl import REPOSITORY, built_image, get, kubectl, needs_cluster

from runner.pytorchjob import render_pytorchjob
from runner.spec import check_job

pytestmark = [needs_cluster, pytest.mark.e2e, pytest.mark.timeout(1500)]
NAMESPACE: Final = "oslo-admin-test"
SUBMITTER: Final = ("--as", "somebody", "--as-group", "oslo-submitters", "--as-group", "system:authenticated")
PIPELINE: Final = ("--as", f"system:serviceaccount:{NAMESPACE}:oslo-ci")
TRAINING: Final = ("--as", f"system:serviceaccount:{NAMESPACE}:oslo-training")


@pytest.fixture(scope="module")
def image() -> str:
    return built_image()


@pytest.fixture(scope="module", autouse=True)
def applied(tmp_path_factory: pytest.TempPathFactory, image: str) -> Iterator[None]:
    kubectl("apply", "--server-side", "--field-manager=oslo", "-k", str(REPOSITORY / "k8s" / "operator"))
    kubectl("rollout", "status", "deployment/training-operator", "-n", "kubeflow", "--timeout=120s", seconds=130)
    overlay = tmp_path_factory.mktemp("overlay")
    dev = Path("../" * len(overlay.parts[1:])) / (REPOSITORY / "k8s" / "overlays" / "dev").relative_to("/")
    name, _, tag = image.rpartition(":")
    images = f"[{{name: localhost/opensloth, newName: {name}, newTag: {tag}}}]"
    text = f"namespace: {NAMESPACE}\nresources: [{dev}]\nimages: {images}\n"
    (overlay / "kustomization.yaml").write_text(text)
    kubectl("delete", "namespace", NAMESPACE, "--ignore-not-found", "--wait")  # an earlier test's may be on its way out
    kubectl("apply", "-k", str(overlay))
    claim = "--for=jsonpath={.status.phase}=Bound"
    kubectl("wait", "pvc/training", "-n", NAMESPACE, claim, "--timeout=60s")
    yield
    kubectl("delete", "namespace", NAMESPACE, "--wait=false")


def may(who: tuple[str, ...], verb: str, resource: str, namespace: str = NAMESPACE) -> bool:
    resource, _, part = resource.partition("/")
    asked = ["auth", "can-i", verb, resource, "-n", namespace, *who, *([f"--subresource={part}"] if part else [])]
    return kubectl(*asked, check=False).strip() == "yes"


@pytest.mark.parametrize("who", [SUBMITTER, PIPELINE], ids=["group", "pipeline"])
def test_submitters_may_what_the_commands_need(who: tuple[str, ...]) -> None:
    for verb in ("create", "get", "list", "patch", "delete"):
        assert may(who, verb, "pytorchjobs.kubeflow.org"), verb
    for verb, resource in (("get", "pods/log"), ("list", "events"), ("get", "persistentvolumeclaims")):
        assert may(who, verb, resource), (verb, resource)
    for verb, resource in (("create", "pods"), ("delete", "pods"), ("create", "pods/exec"), ("get", "pods/exec")):
        assert may(who, verb, resource), (verb, resource)


@pytest.mark.parametrize("who", [SUBMITTER, PIPELINE, TRAINING], ids=["group", "pipeline", "training"])
def test_nobody_may_more(who: tuple[str, ...]) -> None:
    for verb, resource in (
        ("get", "secrets"), ("list", "secrets"), ("update", "pytorchjobs.kubeflow.org"), ("watch", "pods"),
        ("patch", "pods"), ("create", "persistentvolumeclaims"), ("create", "roles.rbac.authorization.k8s.io"),
        ("create", "serviceaccounts/token"), ("get", "configmaps"),
    ):  # fmt: skip
        assert not may(who, verb, resource), (verb, resource)
    assert not may(who, "list", "pods", "default")
    assert not may(who, "list", "nodes")


def test_training_pods_may_nothing() -> None:
    assert not may(TRAINING, "list", "pods")
    assert not may(TRAINING, "create", "pytorchjobs.kubeflow.org")


def job(image: str, name: str) -> dict[str, Any]:
    """As submit renders it for two nodes, with a short command in the place of the launcher."""
    values = {
        "image": image, "volume": "training", "namespace": NAMESPACE, "service_account": "oslo-training", "nodes": 2,
        "gpus_per_node": 0, "memory": "1Gi", "cpu": "500m", "env": {"OMP_NUM_THREADS": "1"},
    }  # fmt: skip
    args, problems = check_job(values)
    assert args is not None, problems
    manifest = render_pytorchjob(name, "admin", "0" * 64, "name: admin\n", args)
    write = (
        "import os, opensloth.launch, pathlib; rank = os.environ['RANK'];"
        "pathlib.Path('/shared/rank-' + rank).write_text(open('/etc/oslo/config.yaml').read())"
    )
    for replica in manifest["spec"]["pytorchReplicaSpecs"].values():
        replica["template"]["spec"]["containers"][0]["command"] = ["python", "-c", write]
    return manifest


def test_the_namespace_accepts_a_jobs_pods_and_they_write_to_the_volume(image: str) -> None:
    kubectl("create", *SUBMITTER, "-f", "-", given=job(image, "admin-1"))
    done = "--for=condition=Succeeded"
    kubectl("wait", "pytorchjob/admin-1", "-n", NAMESPACE, done, "--timeout=150s", check=False, seconds=160)
    events = [event["message"] for event in get("events", "-n", NAMESPACE)["items"]]
    conditions = get("pytorchjob", "admin-1", "-n", NAMESPACE)["status"]["conditions"]
    assert conditions[-1]["type"] == "Succeeded", events
    assert not [message for message in events if "PodSecurity" in message]
    pods = get("pods", "-n", NAMESPACE, "-l", "training.kubeflow.org/job-name=admin-1")["items"]
    worker = next(p for p in pods if p["metadata"]["labels"]["training.kubeflow.org/replica-type"] == "worker")
    (init,) = worker["spec"]["initContainers"]
    assert init["securityContext"]["runAsNonRoot"] is True


def test_a_pod_that_is_not_restricted_is_refused(image: str) -> None:
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "loose", "namespace": NAMESPACE},
        "spec": {"containers": [{"name": "loose", "image": image}]},
    }
    assert kubectl("create", "--dry-run=server", "-o", "name", "-f", "-", given=pod, check=False) == ""


def test_pruning_runs_on_the_volume() -> None:
    kubectl("create", "job", "prune-now", "--from=cronjob/oslo-prune", "-n", NAMESPACE)
    kubectl("wait", "job/prune-now", "-n", NAMESPACE, "--for=condition=Complete", "--timeout=90s")
    assert "freed" in kubectl("logs", "job/prune-now", "-n", NAMESPACE)
