"""A pipeline's pod needs no kubeconfig: its account's token is enough."""

from __future__ import annotations

import json
import time

import pytest
from stage import SUBMITTER, OnCluster

from runner.pod import CONTAINER_SECURITY, POD_SECURITY

pytestmark = pytest.mark.e2e


def test_oslo_in_a_pod_of_the_pipelines_account(cluster: OnCluster) -> None:
    container = {
        "name": "pipeline",
        "image": cluster.image,
        "imagePullPolicy": "Never" if cluster.image.startswith("localhost/") else "IfNotPresent",
        "command": ["oslo", "list", "-o", "json"],
        "env": [{"name": "OSLO_ROOT", "value": "/tmp/oslo"}],
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    spec = {
        "serviceAccountName": SUBMITTER,
        "automountServiceAccountToken": True,
        "restartPolicy": "Never",
        "securityContext": POD_SECURITY,
        "containers": [container],
        "volumes": [{"name": "tmp", "emptyDir": {}}],
    }
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pipeline"}, "spec": spec}
    cluster.kubectl("apply", "-f", "-", given=pod)
    try:
        end = time.monotonic() + 120
        while (phase := _phase(cluster)) not in ("Succeeded", "Failed"):
            assert time.monotonic() < end, phase
            time.sleep(0.5)
        said = cluster.kubectl("logs", "pipeline")
    finally:
        cluster.kubectl("delete", "pod", "pipeline", "--grace-period=0", "--force")
    assert phase == "Succeeded", said
    assert isinstance(json.loads(said), list)


def _phase(cluster: OnCluster) -> str:
    return cluster.kubectl("get", "pod", "pipeline", "-o", "jsonpath={.status.phase}")
