"""The pod template of a PyTorchJob: container, environment, volumes, resources, security. Pure.

It passes Pod Security `restricted`. The root file system is read-only; /tmp is writable and holds HOME and the
compilers' caches, the claim at /shared holds everything that lasts.
"""

from __future__ import annotations

from typing import Any, Final

from opensloth import contract
from runner.grace import LEAST_SECONDS
from runner.quantities import parse_duration, parse_quantity
from runner.spec import CACHE_MOUNT, OWN_PREFIX, SHARED_MOUNT, SHARED_VOLUME, JobArgs, TolerationArgs, VolumeArgs

CONFIG_ANNOTATION: Final = f"{OWN_PREFIX}config"
CONFIG_MOUNT: Final = "/etc/oslo"
CONTAINER: Final = "pytorch"
PORT: Final = {"name": "pytorchjob-port", "containerPort": 23456, "protocol": "TCP"}
USER_ID: Final = 1000
"""uid and gid of the pods: the volume must be writable by one of them."""
LOST_NODE_SECONDS: Final = 60
"""A pod on a node that is gone is replaced after this; Kubernetes' own default is 300."""
KILL_MARGIN_SECONDS: Final = 10
"""What the launcher needs after its ranks, before the kubelet kills the pod."""
Manifest = dict[str, Any]
POD_SECURITY: Final[Manifest] = {
    "runAsNonRoot": True,
    "runAsUser": USER_ID,
    "runAsGroup": USER_ID,
    "fsGroup": USER_ID,
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}
CONTAINER_SECURITY: Final[Manifest] = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
}
"""With POD_SECURITY what Pod Security `restricted` asks for."""


def pod_template(
    run: str, labels: dict[str, str], annotations: dict[str, str], config_text: str, job: JobArgs
) -> Manifest:
    """labels and annotations: those of the job; config_text: reaches the container as a file."""
    return {
        "metadata": {
            # A sidecar would come between the ranks and keep the pod alive after they ended.
            "labels": {**labels, "sidecar.istio.io/inject": "false"},
            "annotations": {**annotations, CONFIG_ANNOTATION: config_text},
        },
        "spec": _drop_empty(
            {
                "automountServiceAccountToken": False,
                "serviceAccountName": job.service_account,
                "enableServiceLinks": False,
                "priorityClassName": job.priority_class,
                "terminationGracePeriodSeconds": _grace_seconds(job),
                "nodeSelector": job.node_selector,
                "tolerations": _tolerations(job),
                "imagePullSecrets": [{"name": name} for name in job.image_pull_secrets],
                "securityContext": dict(POD_SECURITY),
                "containers": [_container(run, job)],
                "volumes": _volumes(job),
            }
        ),
    }


def _container(run: str, job: JobArgs) -> Manifest:
    return {
        "name": CONTAINER,
        "image": job.image,
        "imagePullPolicy": job.image_pull_policy,
        "command": ["python", "-m", "opensloth.launch", f"{SHARED_MOUNT}/{contract.RUNS_DIR}/{run}"],
        "env": _environment(job),
        "ports": [PORT],
        "resources": _resources(job),
        "securityContext": dict(CONTAINER_SECURITY),
        "terminationMessagePath": "/dev/termination-log",
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": _mounts(job),
    }


def _environment(job: JobArgs) -> list[Manifest]:
    """oslo's variables, the user's over them, the secrets by reference.

    RANK, WORLD_SIZE, MASTER_* and PET_* are the operator's: it appends them, so they win.
    """
    values = {
        contract.ROOT_ENV: SHARED_MOUNT,
        contract.CONFIG_PATH_ENV: f"{CONFIG_MOUNT}/{contract.CONFIG_FILE}",
        contract.MAX_RESTARTS_ENV: str(job.max_restarts),
        contract.START_TIMEOUT_ENV: str(parse_duration(job.start_timeout)),
        contract.GRACE_ENV: str(max(1, _grace_seconds(job) - KILL_MARGIN_SECONDS)),
        **({contract.DEADLINE_ENV: str(parse_duration(job.deadline))} if job.deadline else {}),
        "HOME": "/tmp",
        "TRITON_CACHE_DIR": "/tmp/triton",
        "TORCHINDUCTOR_CACHE_DIR": "/tmp/inductor",
        "HF_HOME": f"{SHARED_MOUNT}/hub",
        **({"OMP_NUM_THREADS": str(_threads(job.cpu, job.processes_per_node))} if job.cpu else {}),
        **job.env,
    }
    plain: list[Manifest] = [
        {"name": name, "value": value} for name, value in values.items() if name not in job.secrets
    ]
    return plain + [_secret(name, reference) for name, reference in job.secrets.items()]


def _grace_seconds(job: JobArgs) -> int:
    """config_file.load_file has put the derived period in; a job by itself has no checkpoint that it could be from."""
    return parse_duration(job.grace_period) if job.grace_period else LEAST_SECONDS


def _threads(cpu: str, processes: int) -> int:
    """Threads of one process: its share of the pod's cores; torch would take all cores of the node."""
    return max(1, int(parse_quantity(cpu) / processes))


def _secret(name: str, reference: str) -> Manifest:
    secret, _, key = reference.partition("/")
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}


def _resources(job: JobArgs) -> Manifest:
    """Requests equal limits: such pods are the last to be evicted, and GPUs allow nothing else."""
    asked = _drop_empty(
        {
            "cpu": job.cpu,
            "memory": job.memory,
            "ephemeral-storage": job.ephemeral_storage,
            job.gpu_resource: str(job.gpus_per_node) if job.gpus_per_node else None,
        }
    )
    return {"requests": asked, "limits": dict(asked)} if asked else {}


def _volumes(job: JobArgs) -> list[Manifest]:
    config = {"path": contract.CONFIG_FILE, "fieldRef": {"fieldPath": f"metadata.annotations['{CONFIG_ANNOTATION}']"}}
    volumes: list[Manifest] = [
        {"name": SHARED_VOLUME, "persistentVolumeClaim": {"claimName": job.volume, "readOnly": False}},
        {"name": "config", "downwardAPI": {"items": [config]}},
        {"name": "tmp", "emptyDir": {}},
        # 64 MiB otherwise, too little for NCCL; what is written there counts as the pod's memory.
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": job.shm_size}},
    ]
    if job.cache:
        claim = {"claimName": job.cache.volume, "readOnly": job.cache.read_only}
        volumes.append({"name": "cache", "persistentVolumeClaim": claim})
    return volumes + [{"name": f"extra-{i}", **_source(volume)} for i, volume in enumerate(job.volumes)]


def _source(volume: VolumeArgs) -> Manifest:
    if volume.claim:
        return {"persistentVolumeClaim": {"claimName": volume.claim, "readOnly": volume.read_only}}
    if volume.config_map:
        return {"configMap": {"name": volume.config_map}}
    return {"secret": {"secretName": volume.secret}}


def _mounts(job: JobArgs) -> list[Manifest]:
    mounts: list[Manifest] = [
        {"name": SHARED_VOLUME, "mountPath": SHARED_MOUNT},
        {"name": "config", "mountPath": CONFIG_MOUNT, "readOnly": True},
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    if job.cache:
        mounts.append({"name": "cache", "mountPath": CACHE_MOUNT, "readOnly": job.cache.read_only})
    for index, volume in enumerate(job.volumes):
        read_only = volume.read_only or volume.claim is None
        mounts.append({"name": f"extra-{index}", "mountPath": volume.mount_path, "readOnly": read_only})
    return mounts


def _tolerations(job: JobArgs) -> list[Manifest]:
    """Lost nodes are given up soon, unless the file says otherwise: of two the shorter would count."""
    theirs = {toleration.key for toleration in job.tolerations if toleration.effect in ("NoExecute", None)}
    lost = [
        TolerationArgs(key=key, effect="NoExecute", toleration_seconds=LOST_NODE_SECONDS)
        for key in ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
        if key not in theirs
    ]
    return [_toleration(toleration) for toleration in (*lost, *job.tolerations)]


def _toleration(toleration: TolerationArgs) -> Manifest:
    return _drop_empty(
        {
            "key": toleration.key,
            "operator": "Exists" if toleration.value is None else "Equal",
            "value": toleration.value,
            "effect": toleration.effect,
            "tolerationSeconds": toleration.toleration_seconds,
        }
    )


def _drop_empty(values: Manifest) -> Manifest:
    """Without what is None or an empty list or mapping."""
    return {key: value for key, value in values.items() if value is not None and value not in ([], {})}
