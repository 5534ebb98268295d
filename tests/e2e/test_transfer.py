"""Files to a claim and back through a real helper pod, in a namespace that enforces Pod Security `restricted`."""

from __future__ import annotations

import json
import random
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from kubectl import HAS_CLUSTER, KUBECONFIG, REPOSITORY, built_image, kubectl

from opensloth.fingerprint import source_sha256
from runner import transfer
from runner.channel import LostError
from runner.helper_pod import helper_pod
from runner.kube.access import Access
from runner.kube.api import PODS, Cluster
from runner.kube.errors import ForbiddenError, MissingError
from runner.kube.exec import Channel, open_exec

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.enable_socket,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:HTTPResponse.getheaders:DeprecationWarning"),  # of the client's own code
]
"""Read at import: the tests' environment has none."""
MIB = 1 << 20
POD_SECONDS = 120
KILL_SECONDS = 10
"""Between the end of a pod's object and the end of its processes."""


@dataclass
class HelperPod:
    """One pod, as a VolumeSession. watch: is told of the bytes that were sent so far, before every send."""

    cluster: Cluster
    name: str
    watch: Callable[[int], None] = lambda sent: None

    def open(self, command: list[str]) -> Channel:
        channel = open_exec(self.cluster.api_client, self.cluster.namespace, self.name, command)
        send, sent = channel.send, 0

        def watched(data: bytes) -> None:
            nonlocal sent
            self.watch(sent)
            send(data)
            sent += len(data)

        channel.send = watched
        return channel

    def delete(self) -> None:
        self.cluster.delete(PODS, self.name, grace_seconds=0)
        end = time.monotonic() + POD_SECONDS
        while any(pod["metadata"]["name"] == self.name for pod in self.cluster.find(PODS)):
            assert time.monotonic() < end, "it does not go"
            time.sleep(0.2)


@dataclass
class Namespace:
    name: str
    image: str

    def cluster(self, account: str) -> Cluster:
        """As a service account."""
        token = kubectl("-n", self.name, "create", "token", account, "--duration=1h").strip()
        cluster = Cluster.connect(Access(KUBECONFIG, None, self.name), print)
        settings = cluster.api_client.configuration
        settings.cert_file = settings.key_file = None
        settings.api_key = {"authorization": token}
        settings.api_key_prefix = {"authorization": "Bearer"}
        return Cluster(type(cluster.api_client)(settings), self.name, print)

    def start(self, cluster: Cluster) -> HelperPod:
        name = f"oslo-helper-{secrets.token_hex(4)}"
        policy = "Never" if self.image.startswith("localhost/") else "IfNotPresent"
        manifest = helper_pod(name, image=self.image, volume="training", image_pull_policy=policy, deadline_seconds=900)
        cluster.create(PODS, manifest)
        end = time.monotonic() + POD_SECONDS
        while (pod := cluster.get(PODS, name))["status"]["phase"] != "Running":
            assert time.monotonic() < end, f"it does not start: {json.dumps(pod['status'])}"
            time.sleep(0.2)
        return HelperPod(cluster, name)


@pytest.fixture(scope="module")
def namespace() -> Iterator[Namespace]:
    """With the claim, and the Role of helper pods bound to one of its two accounts."""
    if not HAS_CLUSTER:
        pytest.fail("set KUBECONFIG to that of a cluster's admin")
    name = f"oslo-transfer-{secrets.token_hex(3)}"
    base = REPOSITORY / "k8s" / "base"
    wanted = {("Role", "oslo-helper"), ("PersistentVolumeClaim", "training")}
    objects = [
        *yaml.safe_load_all((base / "access.yaml").read_text()),
        yaml.safe_load((base / "volume.yaml").read_text()),
    ]
    chosen = [one for one in objects if (one["kind"], one["metadata"]["name"]) in wanted]
    for one in chosen:
        if one["kind"] == "PersistentVolumeClaim":
            one["spec"]["resources"]["requests"]["storage"] = "1Gi"
    kubectl("create", "namespace", name)
    try:
        kubectl("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted")
        kubectl("-n", name, "apply", "-f", "-", given=yaml.safe_dump_all(chosen))
        for account in ("submitter", "stranger"):
            kubectl("-n", name, "create", "serviceaccount", account)
        binding = f"--serviceaccount={name}:submitter"
        kubectl("-n", name, "create", "rolebinding", "helper", "--role=oslo-helper", binding)
        yield Namespace(name, built_image())
    finally:
        kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture
def pod(namespace: Namespace) -> Iterator[HelperPod]:
    """Made by somebody who has that Role and nothing else."""
    made = namespace.start(namespace.cluster("submitter"))
    yield made
    made.cluster.delete(PODS, made.name, grace_seconds=0)


def some_file(folder: Path, mebibytes: int, seed: int) -> Path:
    path = folder / "my däta.jsonl"
    path.write_bytes(random.Random(seed).randbytes(mebibytes * MIB))
    return path


def as_input(path: Path) -> dict[str, Path]:
    return {f"/shared/inputs/{source_sha256(path)}/{path.name}": path}


def test_there_and_back(tmp_path: Path, pod: HelperPod) -> None:
    source = some_file(tmp_path, 200, seed=time.time_ns())
    events: list[dict[str, object]] = []
    report = transfer.upload(pod, as_input(source), events.append)
    assert report.sent_bytes == source.stat().st_size
    assert transfer.upload(pod, as_input(source), events.append).sent == ()

    begin = time.monotonic()
    (pulled,) = transfer.pull(pod, f"inputs/{source_sha256(source)}", tmp_path / "back", events.append)
    assert source_sha256(pulled) == source_sha256(source)
    print(f"\nupload {200 / report.seconds:.0f} MiB/s, pull {200 / (time.monotonic() - begin):.0f} MiB/s")  # noqa: T201


def test_an_interrupted_upload(tmp_path: Path, pod: HelperPod) -> None:
    source = some_file(tmp_path, 100, seed=time.time_ns())

    def interrupt(sent: int) -> None:
        if sent > 70 * MIB:
            raise KeyboardInterrupt

    pod.watch = interrupt
    with pytest.raises(KeyboardInterrupt):
        transfer.upload(pod, as_input(source), lambda event: None)
    pod.watch = lambda sent: None
    time.sleep(1)  # the goodbye is on its way to the pod
    report = transfer.upload(pod, as_input(source), lambda event: None)
    assert report.sent_bytes < 70 * MIB, "it began anew"
    assert report.seconds < 10, "it waited for an upload that had said goodbye"
    assert transfer.missing_bytes(pod, as_input(source)) == 0


def test_a_pod_that_vanishes(tmp_path: Path, namespace: Namespace, pod: HelperPod) -> None:
    source = some_file(tmp_path, 100, seed=time.time_ns())
    deleted: list[bool] = []

    def delete(sent: int) -> None:
        if sent > 70 * MIB and not deleted:
            deleted.append(True)
            pod.delete()
            time.sleep(KILL_SECONDS)

    pod.watch = delete
    with pytest.raises((LostError, MissingError), match=pod.name):
        transfer.upload(pod, as_input(source), lambda event: None)
    assert deleted

    second = namespace.start(pod.cluster)
    try:
        report = transfer.upload(second, as_input(source), lambda event: None)
        (pulled,) = transfer.pull(second, f"inputs/{source_sha256(source)}", tmp_path / "back")
    finally:
        second.delete()
    assert report.sent_bytes < 70 * MIB, "it began anew"
    assert source_sha256(pulled) == source_sha256(source)


def test_every_byte_and_the_exit_code(pod: HelperPod) -> None:
    data = bytes(range(256)) * 5000
    channel = pod.open(["sh", "-c", f"head -c {len(data)}; echo words >&2; exit 7"])
    channel.send(data)
    answer = b""
    while part := channel.receive():
        answer += part
    assert answer == data
    assert (channel.exit_code, channel.stderr) == (7, "words\n")


def test_who_may_not(namespace: Namespace, pod: HelperPod) -> None:
    stranger = HelperPod(namespace.cluster("stranger"), pod.name)
    with pytest.raises(ForbiddenError) as caught:
        stranger.open(["true"])
    assert "pods/exec" in caught.value.message
    assert "Role oslo-helper" in caught.value.hint


def test_a_pod_that_never_was(namespace: Namespace) -> None:
    gone = HelperPod(namespace.cluster("submitter"), "oslo-helper-none")
    with pytest.raises(MissingError, match="oslo-helper-none"):
        gone.open(["true"])
