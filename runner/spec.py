"""JobArgs: the `job` section. Where and how a run runs on a cluster; training itself never sees it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from opensloth.errors import Problem
from opensloth.opensloth_config import Section
from opensloth.run_config import check_section, shown
from runner.quantities import parse_duration, parse_quantity
from runner.secret_values import looks_secret

DEFAULT_SHM: Final = "2Gi"
SHARED_MOUNT: Final = "/shared"
SHARED_VOLUME: Final = "shared"
"""Name of the volume in the pods that holds the claim."""
CACHE_MOUNT: Final = "/cache"
OWN_PREFIX: Final = "opensloth/"
_OPERATOR_PREFIX: Final = "training.kubeflow.org/"
_OPERATOR_VARIABLES: Final = re.compile(
    r"RANK|WORLD_SIZE|LOCAL_RANK|MASTER_ADDR|MASTER_PORT|PYTHONUNBUFFERED|PET_.*|OSLO_.*"
)
_OWN_LABELS: Final = {
    "app.kubernetes.io/name": "is set by oslo",
    "app.kubernetes.io/instance": "is set by oslo",
    "app.kubernetes.io/managed-by": "is set by oslo",
    "sidecar.istio.io/inject": "is always false: a sidecar would outlive the training",
    "kueue.x-k8s.io/queue-name": "is job.queue: on the pods it would queue each by itself",
}
_DNS_LABEL: Final = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"
_DNS_NAME: Final = r"^[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?$"
_LABEL_KEY: Final = re.compile(r"(?:[a-z0-9][-.a-z0-9]{0,251}/)?[A-Za-z0-9](?:[-_.A-Za-z0-9]{0,61}[A-Za-z0-9])?")
_LABEL_VALUE: Final = re.compile(r"(?:[A-Za-z0-9](?:[-_.A-Za-z0-9]{0,61}[A-Za-z0-9])?)?")
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET_REFERENCE: Final = re.compile(r"[a-z0-9][-.a-z0-9]*/[-._a-zA-Z0-9]+")


def _duration(text: str) -> str:
    parse_duration(text)
    return text


def _quantity(value: object) -> object:
    """`cpu: 8` is a quantity too."""
    text = str(value) if type(value) in (int, float) else value
    if isinstance(text, str):
        parse_quantity(text)
    return text


Duration = Annotated[str, AfterValidator(_duration)]
"""`90s`, `30m`, `12h`, `7d`, `1h30m`."""
Quantity = Annotated[
    str, BeforeValidator(_quantity), WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "number"}]})
]
"""A Kubernetes quantity: 4, 500m, 64Gi."""
ObjectName = Annotated[str, Field(pattern=_DNS_NAME)]


class JobSection(Section):
    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, validate_assignment=False)


class TolerationArgs(JobSection):
    """A taint that the pods tolerate, as Kubernetes has it."""

    key: str | None = None
    """None: every taint."""
    value: str | None = None
    """The taint's value. None: any (operator Exists)."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """None: every effect."""
    toleration_seconds: int | None = Field(None, ge=0)
    """Seconds that a pod stays after a NoExecute taint. None: for ever."""

    @model_validator(mode="after")
    def _value_has_a_key(self) -> TolerationArgs:
        if self.value is not None and self.key is None:
            raise ValueError("value needs a key")
        if self.toleration_seconds is not None and self.effect != "NoExecute":
            raise ValueError("toleration_seconds needs effect: NoExecute")
        return self


class VolumeArgs(JobSection):
    """One more volume in every pod: a claim, a ConfigMap or a Secret. No hostPath."""

    mount_path: str = Field(pattern=r"^/.+")
    """Absolute path in the pod."""
    claim: ObjectName | None = None
    """A PersistentVolumeClaim of the namespace."""
    config_map: ObjectName | None = None
    secret: ObjectName | None = None
    read_only: bool = False
    """For a claim; ConfigMaps and Secrets are read-only anyway."""

    @model_validator(mode="after")
    def _one_source(self) -> VolumeArgs:
        given = [name for name in ("claim", "config_map", "secret") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected one of claim, config_map, secret; got {', '.join(given) or 'none'}")
        taken = {SHARED_MOUNT, CACHE_MOUNT, "/tmp", "/dev/shm", "/etc/oslo"}
        if self.mount_path.rstrip("/") in taken:
            raise ValueError(f"mount_path {self.mount_path} is oslo's own: choose another")
        return self


class CacheArgs(JobSection):
    """A claim of its own for prepared datasets, mounted at /cache."""

    volume: ObjectName
    """The claim."""
    read_only: bool = False
    """Datasets must have been built before (`oslo data build`); a missing one ends the job."""


class JobArgs(JobSection):
    """The `job` section. A local run needs none of it."""

    image: str | None = Field(None, min_length=1)
    """The training image. A cluster needs it."""
    nodes: int = Field(1, ge=1, le=1000)
    """Pods; one master and nodes - 1 workers."""
    gpus_per_node: int = Field(1, ge=0)
    """GPUs of a pod, one process for each. 0: CPU, one process a pod."""
    volume: ObjectName | None = None
    """The claim that every pod mounts at /shared. A cluster needs it; on several nodes ReadWriteMany."""
    cache: CacheArgs | None = None
    """None: prepared datasets are kept under /shared."""
    namespace: Annotated[str, Field(pattern=_DNS_LABEL)] | None = None
    """None: the kubeconfig's."""
    context: str | None = None
    """The kubeconfig's context. None: its current one."""
    cpu: Quantity | None = None
    """Cores of a pod, asked for and at most. None: neither."""
    memory: Quantity | None = None
    """Memory of a pod, asked for and at most, shared memory included. None: neither."""
    shm: Quantity | None = None
    """Size of /dev/shm, a part of `memory`. None: 2Gi, or a quarter of `memory` if that is less."""
    ephemeral_storage: Quantity | None = None
    """Local disk of a pod (/tmp, logs), asked for and at most. None: neither."""
    gpu_resource: str = Field("nvidia.com/gpu", min_length=1)
    """The resource that a GPU is counted by."""
    gpu_memory: Quantity | None = None
    """Memory of one GPU, as in 80Gi, which a submit compares its prediction with; pods do not ask for it.
    None: by the GPU that `node_selector` names."""
    queue: ObjectName | None = None
    """Kueue's LocalQueue. None: the job starts without a queue."""
    priority_class: ObjectName | None = None
    """PriorityClass of the pods; Kueue ranks by it too."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    tolerations: list[TolerationArgs] = Field(default_factory=list)
    image_pull_secrets: list[ObjectName] = Field(default_factory=list)
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    service_account: ObjectName | None = None
    """None: the namespace's default; its token is never mounted."""
    labels: dict[str, str] = Field(default_factory=dict)
    """On the job and its pods."""
    annotations: dict[str, str] = Field(default_factory=dict)
    """On the job and its pods."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of every pod. Values that give access belong in `secrets`."""
    secrets: dict[str, str] = Field(default_factory=dict)
    """Environment variable: `secret/key` of a Secret in the namespace."""
    volumes: list[VolumeArgs] = Field(default_factory=list)
    max_restarts: int = Field(3, ge=0)
    """Restarts without progress after which the job fails."""
    deadline: Duration | None = None
    """Training time over all attempts, suspended time left out. None: no end."""
    start_timeout: Duration = "30m"
    """Time within which all pods of an attempt must have started."""
    grace_period: Duration | None = None
    """Time that a pod has to save a checkpoint when it is asked to stop. None: from the checkpoint's size."""
    ttl: Duration | None = None
    """Time after which a succeeded job's object is removed; its files stay. None: never."""

    @model_validator(mode="after")
    def _agree(self) -> JobArgs:
        said = []
        if self.memory and self.shm and parse_quantity(self.shm) >= parse_quantity(self.memory):
            said.append(f"shm {self.shm} is a part of memory {self.memory} and must be less: raise memory or lower shm")
        mounts = [volume.mount_path.rstrip("/") for volume in self.volumes]
        said += [f"volumes: {path} is mounted twice" for path in sorted({m for m in mounts if mounts.count(m) > 1})]
        if said:
            raise ValueError("; ".join(said))
        return self

    @property
    def world(self) -> int:
        """Processes of the job."""
        return self.nodes * self.processes_per_node

    @property
    def processes_per_node(self) -> int:
        """Processes of a pod."""
        return max(1, self.gpus_per_node)

    @property
    def shm_size(self) -> str:
        """Size of /dev/shm as a quantity."""
        if self.shm:
            return self.shm
        if self.memory and (quarter := parse_quantity(self.memory) / 4) < parse_quantity(DEFAULT_SHM):
            return str(int(quarter))
        return DEFAULT_SHM


def check_job(values: object) -> tuple[JobArgs | None, list[Problem]]:
    """Turn the mapping of a `job` section into JobArgs.

    Returns the arguments and no problems, or None and all problems, with paths that start with `job`.
    """
    problems: list[Problem] = []
    if not isinstance(values, Mapping):
        return check_section(JobArgs, values, "job", problems), problems
    values = dict(values)
    for key, section in (("volumes", VolumeArgs), ("tolerations", TolerationArgs)):
        if isinstance(values.get(key), list):
            values[key] = _check_items(section, values[key], f"job.{key}", problems)
    variables = _variable_problems(values)
    refused = {problem.path for problem in variables}
    for key in ("env", "secrets"):
        if isinstance(values.get(key), Mapping):  # less those: the check of types would show their values
            values[key] = {name: value for name, value in values[key].items() if f"job.{key}.{name}" not in refused}
    problems += [*variables, *_label_problems(values)]
    job = check_section(JobArgs, values, "job", problems)
    return (None if problems else job), problems


def needs_of_a_cluster(job: JobArgs) -> list[Problem]:
    """What a cluster needs and a local run does not."""
    needed = {
        "image": "a cluster needs the training image, as in job: {image: registry.example/opensloth:1.0}",
        "volume": "a cluster needs the claim that pods mount at /shared, as in job: {volume: training}",
    }
    return [Problem(f"job.{key}", "missing", why) for key, why in needed.items() if getattr(job, key) is None]


def _check_items(section: type[Section], items: list[Any], path: str, problems: list[Problem]) -> list[Section]:
    """Check each item on its own, so that every problem has the item's path."""
    checked = []
    for index, item in enumerate(items):
        where = f"{path}[{index}]"
        if isinstance(item, dict) and (host := {"hostPath", "host_path"} & item.keys()):
            why = "a path of the node opens the node to the pod, and Pod Security forbids it"
            problems.append(Problem(f"{where}.{host.pop()}", f"not supported: {why}", "use a claim"))
            continue
        built = check_section(section, item, where, problems)
        if built is not None:
            checked.append(built)
    return checked


def _variable_problems(values: Mapping[str, Any]) -> list[Problem]:
    env, secrets = _mapping(values, "env"), _mapping(values, "secrets")
    problems = []
    for key, variables in (("env", env), ("secrets", secrets)):
        for name in variables:
            path = f"job.{key}.{name}"
            if not _VARIABLE.fullmatch(name):
                problems.append(Problem(path, "not a name of an environment variable"))
            elif _OPERATOR_VARIABLES.fullmatch(name):
                problems.append(Problem(path, "is set by the training operator or by oslo", "leave it out"))
    for name, value in env.items():
        if name in secrets:
            problems.append(Problem(f"job.env.{name}", "is in job.secrets too", "keep one of the two"))
        elif looks_secret(name, value):
            found = "looks like a secret, and values of a file end up in objects and logs"
            hint = f"put it in a Secret and write job: {{secrets: {{{name}: SECRET/KEY}}}}"
            problems.append(Problem(f"job.env.{name}", found, hint))
    for name, reference in secrets.items():
        if not (isinstance(reference, str) and _SECRET_REFERENCE.fullmatch(reference)):
            # What stands there may be the secret itself: it is not shown.
            expected = "expected SECRET/KEY: the name of a Secret and a key in it"
            problems.append(Problem(f"job.secrets.{name}", expected, "as in HF_TOKEN: hf-token/token"))
    return problems


def _label_problems(values: Mapping[str, Any]) -> list[Problem]:
    problems = []
    for key in ("labels", "annotations", "node_selector"):
        for name, value in _mapping(values, key).items():
            path = f"job.{key}.{name}"
            if not _LABEL_KEY.fullmatch(name):
                problems.append(
                    Problem(path, "not a valid key: expected NAME or PREFIX/NAME, at most 63 characters each")
                )
            elif key != "node_selector" and name.startswith((OWN_PREFIX, _OPERATOR_PREFIX)):
                problems.append(
                    Problem(path, "this prefix belongs to oslo or to the training operator", "leave it out")
                )
            elif key == "labels" and name in _OWN_LABELS:
                problems.append(Problem(path, _OWN_LABELS[name], "leave it out"))
            elif key != "annotations" and isinstance(value, str) and not _LABEL_VALUE.fullmatch(value):
                expected = "expected at most 63 letters, digits, '-', '_' and '.'"
                problems.append(Problem(path, f"{expected}, got {shown(value)}"))
    return problems


def _mapping(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """`values[key]` if it is a mapping; what else it is, the type check reports."""
    found = values.get(key)
    return found if isinstance(found, Mapping) else {}
