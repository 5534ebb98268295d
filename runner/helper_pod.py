"""The manifest of a helper pod: it mounts the claim and sleeps, and transfers run commands in it. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from opensloth import contract
from runner.pod import CONTAINER_SECURITY, POD_SECURITY, Manifest
from runner.spec import SHARED_MOUNT, SHARED_VOLUME

HELPER_NAME: Final = "oslo-helper"
"""NetworkPolicies of k8s/ know helper pods by it."""
HELPER_LABELS: Final = {"app.kubernetes.io/name": HELPER_NAME, "app.kubernetes.io/managed-by": "oslo"}
HELPER_LABEL: Final = ",".join(f"{key}={value}" for key, value in HELPER_LABELS.items())
"""As a label selector."""
CONTAINER: Final = "helper"


def helper_pod(  # noqa: PLR0913 - each is a field of the manifest
    name: str,
    *,
    image: str,
    volume: str,
    pull_secrets: Sequence[str] = (),
    service_account: str | None = None,
    image_pull_policy: str = "IfNotPresent",
    node_selector: Mapping[str, str] | None = None,
    tolerations: Sequence[Manifest] = (),
    deadline_seconds: int,
) -> Manifest:
    """A pod that ends by itself after `deadline_seconds`.

    volume: the claim; tolerations: as pods have them. The rest as the training pods have it, because the volume
    may be reachable from their nodes only.
    """
    spec: Manifest = {
        "activeDeadlineSeconds": deadline_seconds,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 0,  # `sleep` as process 1 ignores SIGTERM
        "securityContext": dict(POD_SECURITY),
        "containers": [_container(image, image_pull_policy, deadline_seconds)],
        "volumes": [
            {"name": SHARED_VOLUME, "persistentVolumeClaim": {"claimName": volume}},
            {"name": "tmp", "emptyDir": {}},
        ],
    }
    optional: dict[str, Any] = {
        "serviceAccountName": service_account,
        "nodeSelector": dict(node_selector or {}),
        "tolerations": list(tolerations),
        "imagePullSecrets": [{"name": secret} for secret in pull_secrets],
    }
    spec |= {key: value for key, value in optional.items() if value}
    metadata = {"name": name, "labels": {**HELPER_LABELS, "sidecar.istio.io/inject": "false"}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def _container(image: str, image_pull_policy: str, deadline_seconds: int) -> Manifest:
    values = {contract.ROOT_ENV: SHARED_MOUNT, "HOME": "/tmp"}
    return {
        "name": CONTAINER,
        "image": image,
        "imagePullPolicy": image_pull_policy,
        "command": ["sleep", str(deadline_seconds)],
        "env": [{"name": key, "value": value} for key, value in values.items()],
        # Hashing takes a core; files that are written count as memory, but give way.
        "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"cpu": "2", "memory": "512Mi"}},
        "securityContext": dict(CONTAINER_SECURITY),
        "volumeMounts": [
            {"name": SHARED_VOLUME, "mountPath": SHARED_MOUNT},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }
