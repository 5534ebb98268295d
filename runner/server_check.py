"""What only the cluster can tell of a job before it is created: whether it, its pods and its claim would do."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from runner.errors import ClusterError
from runner.kube.api import CLAIMS, JOBS, PODS, Cluster
from runner.kube.errors import ConflictError, ForbiddenError, MissingError
from runner.spec import SHARED_VOLUME

Manifest = Mapping[str, Any]


def check_on_server(cluster: Cluster, manifest: Manifest, say: Callable[[str], None]) -> None:
    """A server dry run of the job and of a pod from each template, and a look at the claims; nothing is kept.

    The operator's webhook alone accepts jobs whose pods Pod Security or a quota then refuses.
    Raises ClusterError with the server's reason.
    """
    _check_claims(cluster, manifest, say)
    with suppress(ConflictError):  # it is there: its successor has the same name
        cluster.create(JOBS, dict(manifest), dry_run=True)
    try:
        for kind, template in _templates(manifest).items():
            cluster.create(PODS, _pod(f"{manifest['metadata']['name']}-{kind}", template), dry_run=True)
    except ForbiddenError as error:
        say(f"note: whether the cluster accepts the pods was not checked: {error.message}")


def _templates(manifest: Manifest) -> dict[str, Manifest]:
    """By replica type; replicas with the same template need one check only."""
    found: dict[str, Manifest] = {}
    for kind, replica in manifest["spec"]["pytorchReplicaSpecs"].items():
        if replica["template"] not in found.values():
            found[kind.lower()] = replica["template"]
    return found


def _pod(name: str, template: Manifest) -> dict[str, Any]:
    meta = {**template["metadata"], "name": f"{name}-{secrets.token_hex(4)}"}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": {**template["spec"], "restartPolicy": "Never"}}


def _check_claims(cluster: Cluster, manifest: Manifest, say: Callable[[str], None]) -> None:
    pods = sum(replica["replicas"] for replica in manifest["spec"]["pytorchReplicaSpecs"].values())
    spec = next(iter(_templates(manifest).values()))["spec"]
    for volume in spec["volumes"]:
        if (claimed := volume.get("persistentVolumeClaim")) is None:
            continue
        name = claimed["claimName"]
        try:
            claim = cluster.get(CLAIMS, name)
        except MissingError as error:
            raise ClusterError(
                f"there is no claim {name} in {cluster.where}", "an admin makes it: k8s/README.md"
            ) from error
        except ForbiddenError as error:
            say(f"note: the claim {name} was not checked: {error.message}")
            continue
        if volume["name"] == SHARED_VOLUME and pods > 1 and not claimed.get("readOnly"):
            _check_shared(name, claim, pods)


def _check_shared(name: str, claim: Manifest, pods: int) -> None:
    modes = claim["spec"].get("accessModes", [])
    if "ReadWriteMany" not in modes:
        raise ClusterError(
            f"job.nodes: {pods} pods would share the claim {name}, which is {', '.join(modes)}: "
            "it can be mounted on one node only",
            "use a ReadWriteMany claim (job.volume), or job.nodes: 1",
        )
