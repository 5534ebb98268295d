"""Faults in pods, caused for real: the run goes on by itself, or ends with a sentence that says what to do.

`oslo why` is asked in each of these states. Faults from inside a pod come from pod_faults.py, mounted as
sitecustomize.py. docs/faults.md has the table.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubectl import kubectl
from stage import CLAIM, NAMESPACE, OnCluster, await_operator, write_job

from runner.helper_pod import helper_pod

pytestmark = pytest.mark.e2e
STEPS = 400
ADAPTER = "adapter_model.safetensors"
FAULTS = "pod-faults"
"""The ConfigMap with pod_faults.py."""
ONE_NODE = ("--set", "job.nodes=1")
FINALIZER = "example.com/hold"
ENDED_FOR = "{.items[*].status.containerStatuses[*].state.terminated.reason}"


@pytest.fixture(autouse=True)
def _tidy(cluster: OnCluster) -> Iterator[None]:
    yield
    cluster.clear()


@dataclass
class Undisturbed:
    """A run on two nodes that nothing happened to: its file, and the weights that it came to."""

    file: Path
    weights: bytes


@pytest.fixture(scope="module")
def undisturbed(cluster: OnCluster, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    file = write_job(folder, model, max_steps=STEPS, save_steps=20)
    answer = cluster.submit(file, "--follow")
    assert answer.code == 0, answer.err
    return Undisturbed(file, weights_of(cluster, answer.handle, folder / "result"))


@pytest.fixture(scope="module")
def faults(cluster: OnCluster) -> Iterator[None]:
    source = Path(__file__).with_name("pod_faults.py")
    cluster.kubectl("create", "configmap", FAULTS, f"--from-file=sitecustomize.py={source}")
    yield
    cluster.kubectl("delete", "configmap", FAULTS)


# --- what the tests do ---------------------------------------------------------------------------------


def weights_of(cluster: OnCluster, run: str, folder: Path) -> bytes:
    pulled = cluster.oslo("pull", run, folder)
    assert pulled.code == 0, pulled.err
    return (folder / ADAPTER).read_bytes()


def midway(cluster: OnCluster, file: Path) -> str:
    """A fresh run of `file` that has come to 30 percent of its steps."""
    submitted = cluster.submit(file, "--fresh")
    assert submitted.code == 0, submitted.err
    run = submitted.handle.rpartition("/")[2]
    cluster.until(run, lambda status: (status["step"] or 0) >= 0.3 * STEPS)
    return run


def ends_the_same(cluster: OnCluster, run: str, undisturbed: Undisturbed, folder: Path) -> None:
    """It finishes by itself, goes on from a step before 70 percent, and comes to the same weights, bit for bit."""
    assert cluster.oslo("wait", run).code == 0, why(cluster, run)
    resumed = [event["step"] for event in cluster.events(run) if event["event"] == "resumed"]
    assert resumed, "it began anew"
    assert 0 < resumed[-1] <= 0.7 * STEPS
    assert weights_of(cluster, run, folder) == undisturbed.weights


def with_faults(file: Path, **faults: Any) -> Path:
    """The file, with a fault inside its pods."""
    values = yaml.safe_load(file.read_text())
    env = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": "/faults", "POD_FAULTS": json.dumps(faults)}
    values["job"] = {"env": env, "volumes": [{"config_map": FAULTS, "mount_path": "/faults"}]}
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


def why(cluster: OnCluster, run: str) -> dict[str, Any]:
    answer = cluster.oslo("why", run, "-o", "json")
    assert answer.code == 0, answer.err
    found: dict[str, Any] = answer.json()
    return found


def why_says(cluster: OnCluster, run: str, pattern: str, seconds: float = 120) -> dict[str, Any]:
    """Ask until the sentence matches."""
    end = time.monotonic() + seconds
    while not re.search(pattern, (told := why(cluster, run))["sentence"]):
        assert time.monotonic() < end, told
        time.sleep(1)
    return told


def evict(cluster: OnCluster, pod: str) -> None:
    order = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": NAMESPACE}}
    cluster.kubectl("create", "--raw", f"/api/v1/namespaces/{NAMESPACE}/pods/{pod}/eviction", "-f", "-", given=order)


def signal_rank(cluster: OnCluster, run: str, rank: int, name: str) -> None:
    """Sent inside its pod."""
    pod = f"{run}-master-0" if rank == 0 else f"{run}-worker-{rank - 1}"
    code = (
        "import os, signal, pathlib\n"
        "for p in pathlib.Path('/proc').glob('[0-9]*'):\n"
        "    command = (p / 'cmdline').read_bytes()\n"
        "    if b'opensloth.train' in command and b'torch.distributed.run' not in command:\n"
        f"        os.kill(int(p.name), signal.{name}); print('sent')\n"
    )
    assert "sent" in cluster.kubectl("exec", pod, "-c", "pytorch", "--", "python", "-c", code)


def on_the_volume(cluster: OnCluster, code: str, claim: str = CLAIM) -> str:
    """Run Python in a pod that mounts the volume, with the uid of the training pods."""
    name, policy = "at-the-volume", "Never" if cluster.image.startswith("localhost/") else "IfNotPresent"
    pod = helper_pod(name, image=cluster.image, volume=claim, image_pull_policy=policy, deadline_seconds=600)
    cluster.kubectl("apply", "-f", "-", given=pod)
    try:
        cluster.kubectl("wait", "--for=condition=Ready", f"pod/{name}", "--timeout=120s")
        return cluster.kubectl("exec", name, "--", "python", "-c", code)
    finally:
        cluster.kubectl("delete", "pod", name, "--grace-period=0", "--force")


# --- pods that go --------------------------------------------------------------------------------------


def test_both_pods_deleted_at_once(cluster: OnCluster, undisturbed: Undisturbed, tmp_path: Path) -> None:
    run = midway(cluster, undisturbed.file)
    cluster.kubectl("delete", "pod", f"{run}-master-0", f"{run}-worker-0", "--wait=false")
    ends_the_same(cluster, run, undisturbed, tmp_path / "result")


@pytest.mark.parametrize("victim", ["worker-0", "master-0"])
def test_a_pod_deleted_by_force_has_no_time_to_save(
    cluster: OnCluster, undisturbed: Undisturbed, tmp_path: Path, victim: str
) -> None:
    """Its object is gone at once, and the kubelet gives its processes a second."""
    run = midway(cluster, undisturbed.file)
    cluster.kubectl("delete", "pod", f"{run}-{victim}", "--grace-period=0", "--force")
    ends_the_same(cluster, run, undisturbed, tmp_path / "result")


def test_a_pod_is_evicted_and_its_node_cordoned(cluster: OnCluster, undisturbed: Undisturbed, tmp_path: Path) -> None:
    run = midway(cluster, undisturbed.file)
    worker = f"{run}-worker-0"
    node = cluster.pods(run)[worker]["spec"]["nodeName"]
    with cordoned(cluster):
        evict(cluster, worker)
        told = why_says(cluster, run, "cannot be scheduled")
        assert told["state"] == "pending"
        assert "were unschedulable" in told["sentence"]
        assert "cordoned" in told["hint"]
        assert "kubectl uncordon" in told["hint"]
        assert any("FailedScheduling" in line or "on no node" in line for line in told["evidence"])
    assert node
    ends_the_same(cluster, run, undisturbed, tmp_path / "result")
    attempts = why_attempts(cluster, run)
    assert attempts[0]["cause"] == "terminated", "the eviction left time for a checkpoint"


@contextmanager
def cordoned(cluster: OnCluster) -> Iterator[None]:
    """All nodes: nothing new is scheduled."""
    nodes = cluster.kubectl("get", "nodes", "-o", "name").split()
    cluster.kubectl("cordon", *nodes)
    try:
        yield
    finally:
        cluster.kubectl("uncordon", *nodes)


def why_attempts(cluster: OnCluster, run: str) -> list[dict[str, Any]]:
    """From the volume, also of a run that has succeeded."""
    command = ["oslo", "why", f"local://{run}", "-o", "json"]
    said = on_the_volume(cluster, f"import subprocess; subprocess.run({command!r}, check=True)")
    found: list[dict[str, Any]] = json.loads(said)["attempts"]
    return found


def test_a_pod_that_is_stuck_terminating_is_let_go_by_the_command_that_why_gives(
    cluster: OnCluster, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    run = midway(cluster, undisturbed.file)
    worker = f"{run}-worker-0"
    hold = [{"op": "add", "path": "/metadata/finalizers", "value": [FINALIZER]}]
    cluster.kubectl("patch", "pod", worker, "--type=json", "-p", json.dumps(hold))
    try:
        cluster.kubectl("delete", "pod", worker, "--grace-period=1", "--wait=false")
        told = why_says(cluster, run, "is stuck")
        held = rf"should have left at \d\d:\d\d:\d\d UTC, and is held by its finalizer {FINALIZER}"
        assert re.search(held, told["sentence"])
        command = re.search(r"kubectl -n .*\}\}'", told["hint"])
        assert command, told["hint"]
        cluster.until(run, lambda status: status["attempt"] == 2)  # the other pod has begun anew, and waits
        before = files_of_attempt(cluster, run, 1)
        subprocess.run(shlex.split(command[0]), check=True, env=admin_env())
        ends_the_same(cluster, run, undisturbed, tmp_path / "result")
    finally:
        let_go = ("patch", "pod", worker, "--type=merge", "-p", '{"metadata":{"finalizers":null}}')
        cluster.kubectl(*let_go, check=False)  # it may be gone
    assert files_of_attempt(cluster, run, 1) == before, "the pod that was let go wrote nothing more"


def test_a_pod_that_does_not_leave_is_given_up_by_force(
    cluster: OnCluster, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """Its rank is stopped, so that it hears of nothing. What `why` advises for a node that does not answer."""
    run = midway(cluster, undisturbed.file)
    signal_rank(cluster, run, 1, "SIGSTOP")
    cluster.kubectl("delete", "pod", f"{run}-worker-0", "--wait=false")
    began = time.monotonic()
    forced = cluster.oslo("cancel", run, "--force")
    assert forced.code == 0, forced.err
    assert time.monotonic() - began < 60, "the grace period is two minutes"
    assert cluster.pods(run) == {}
    assert cluster.status(run)["state"] == "cancelled"
    resumed = cluster.oslo("resume", run)
    assert resumed.code == 0, resumed.err
    ends_the_same(cluster, run, undisturbed, tmp_path / "result")


def admin_env() -> dict[str, str]:
    from kubectl import KUBECONFIG

    return {**os.environ, "KUBECONFIG": str(KUBECONFIG)}


def files_of_attempt(cluster: OnCluster, run: str, number: int) -> str:
    """Hashes of all that the attempt has written into its folder."""
    code = (
        "import hashlib, pathlib\n"
        f"folder = pathlib.Path('/shared/runs/{run}/attempts/{number}')\n"
        "for p in sorted(folder.iterdir()):\n"
        "    print(p.name, hashlib.sha256(p.read_bytes()).hexdigest())\n"
    )
    return on_the_volume(cluster, code)


def test_a_checkpoint_of_45_seconds_survives_the_deletion_of_its_pod(
    cluster: OnCluster, faults: None, model: Path, tmp_path: Path
) -> None:
    file = with_faults(write_job(tmp_path, model, max_steps=STEPS, save_steps=10 * STEPS), stopped_save_seconds=45)
    submitted = cluster.submit(file)
    assert submitted.code == 0, submitted.err
    run = submitted.handle.rpartition("/")[2]
    cluster.until(run, lambda status: (status["step"] or 0) >= 0.2 * STEPS)
    cluster.kubectl("delete", "pod", f"{run}-master-0", "--wait=false")
    assert cluster.oslo("wait", run).code == 0, why(cluster, run)
    first = cluster.events(run, "--attempt", "1")
    saved = next(event for event in first if event["event"] == "checkpoint")
    assert saved["seconds"] >= 45
    resumed = next(event for event in cluster.events(run) if event["event"] == "resumed")
    assert resumed["step"] == saved["step"] >= 0.2 * STEPS


# --- processes that go ---------------------------------------------------------------------------------


def test_a_rank_is_asked_to_stop_in_its_pod(cluster: OnCluster, undisturbed: Undisturbed, tmp_path: Path) -> None:
    run = midway(cluster, undisturbed.file)
    signal_rank(cluster, run, 1, "SIGTERM")
    ends_the_same(cluster, run, undisturbed, tmp_path / "result")
    saved = [event["step"] for event in cluster.events(run, "--attempt", "1") if event["event"] == "checkpoint"]
    resumed = [event["step"] for event in cluster.events(run) if event["event"] == "resumed"]
    assert resumed == saved[-1:], "the step that all ranks agreed on"
    assert why_attempts(cluster, run)[0]["cause"] == "terminated"


def test_a_rank_is_killed_in_its_pod(cluster: OnCluster, undisturbed: Undisturbed, tmp_path: Path) -> None:
    run = midway(cluster, undisturbed.file)
    signal_rank(cluster, run, 1, "SIGKILL")
    cluster.until(run, lambda status: status["attempt"] == 2 and status["state"] == "running")
    told = why(cluster, run)
    assert re.search(r"is running: step \d+ of 400", told["sentence"])
    assert any("attempt 1: killed: " in line and "rank 1 was killed (SIGKILL)" in line for line in told["evidence"])
    assert any(re.fullmatch(r"attempt 2 went on from step \d+", line) for line in told["evidence"])
    ends_the_same(cluster, run, undisturbed, tmp_path / "result")


def test_a_rank_hangs_in_its_pod(cluster: OnCluster, faults: None, model: Path, tmp_path: Path) -> None:
    file = with_faults(write_job(tmp_path, model, max_steps=STEPS, save_steps=20), hung_seconds=10)
    submitted = cluster.submit(file)
    assert submitted.code == 0, submitted.err
    run = submitted.handle.rpartition("/")[2]
    cluster.until(run, lambda status: (status["step"] or 0) >= 0.3 * STEPS)
    signal_rank(cluster, run, 1, "SIGSTOP")
    cluster.until(run, lambda status: status["attempt"] == 2 and status["state"] == "running")
    told = why(cluster, run)
    assert any("attempt 1" in line and "hung" in line and "rank 1" in line for line in told["evidence"]), told
    assert set(told["attempts"][0]["stood"]) == {"0", "1"}
    assert "stopped by a signal" in told["attempts"][0]["stood"]["1"]
    assert cluster.oslo("wait", run).code == 0


def test_a_rank_that_runs_out_of_the_containers_memory_ends_the_run(
    cluster: OnCluster, faults: None, model: Path, tmp_path: Path
) -> None:
    file = with_faults(write_job(tmp_path, model, max_steps=STEPS), memory={"who": "rank", "step": 5})
    answer = cluster.submit(file, *ONE_NODE, "--set", "job.memory=1500Mi", "--follow")
    assert answer.code == 100, answer.err
    told = why(cluster, answer.handle)
    assert (told["cause"], len(told["attempts"])) == ("out_of_memory", 1)
    assert "rank 0 was killed (SIGKILL): the container reached its memory limit of 1.5 GiB" in told["sentence"]
    assert "raise job.memory" in told["hint"]
    assert told["sentence"] in answer.err


def test_a_container_that_is_killed_for_memory_again_and_again_ends_the_run(
    cluster: OnCluster, faults: None, model: Path, tmp_path: Path
) -> None:
    """All of it: on cgroup v2 the kernel kills the whole container, so no launcher is left to say why."""
    file = with_faults(write_job(tmp_path, model, max_steps=STEPS), memory={"who": "launcher", "step": 5})
    submitting = cluster.start(
        "submit", file, *cluster.flags, "-y", *ONE_NODE, "--set", "job.memory=1500Mi", "--follow"
    )
    reasons = set()
    while submitting.poll() is None:
        reasons |= set(cluster.kubectl("get", "pods", "-o", f"jsonpath={ENDED_FOR}").split())
        time.sleep(0.2)
    out, err = submitting.communicate()
    assert submitting.returncode == 100, err
    assert "OOMKilled" in reasons
    told = why(cluster, out.splitlines()[-1])
    assert (told["cause"], len(told["attempts"])) == ("out_of_memory", 4)
    assert "killed three times at step 4 (attempts 1, 2, 3): most likely out of host memory" in told["sentence"]
    assert "raise job.memory" in told["hint"]


def test_attempts_that_are_lost_one_after_another_spend_the_budget(
    cluster: OnCluster, faults: None, model: Path, tmp_path: Path
) -> None:
    file = with_faults(write_job(tmp_path, model, max_steps=STEPS), killed={"step": 3})
    answer = cluster.submit(file, *ONE_NODE, "--set", "job.max_restarts=1", "--follow")
    assert answer.code == 100, answer.err
    told = why(cluster, answer.handle)
    assert told["cause"] == "budget"
    assert "2 attempts in a row were lost without a new checkpoint" in told["sentence"]
    assert told["next"] == f"oslo resume {answer.handle}"
    assert [attempt["cause"] for attempt in told["attempts"]] == ["killed", "killed", "budget"]


def test_a_deadline_runs_out_with_a_checkpoint_first(cluster: OnCluster, model: Path, tmp_path: Path) -> None:
    file = write_job(tmp_path, model, max_steps=20_000, save_steps=100_000)
    answer = cluster.submit(file, *ONE_NODE, "--set", "job.deadline=20s", "--follow")
    assert answer.code == 100, answer.err
    told = why(cluster, answer.handle)
    assert told["cause"] == "deadline"
    assert "20 s" in told["sentence"] or "20s" in told["sentence"]
    assert "raise job.deadline and submit again" in told["hint"]
    saved = next(event for event in cluster.events(answer.handle) if event["event"] == "checkpoint")
    again = cluster.submit(file, *ONE_NODE, "--set", "job.deadline=10m")
    assert again.handle == answer.handle
    cluster.until(again.handle, lambda status: status["state"] == "running")
    resumed = next(event for event in cluster.events(again.handle) if event["event"] == "resumed")
    assert resumed["step"] == saved["step"]


# --- the volume ----------------------------------------------------------------------------------------


def test_a_checkpoint_that_was_torn_on_the_volume_is_passed_over(
    cluster: OnCluster, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    run = midway(cluster, undisturbed.file)
    cancelled = cluster.oslo("cancel", run)
    assert cancelled.code == 0, cancelled.err
    torn, whole = on_the_volume(
        cluster,
        "import os, pathlib\n"
        f"whole, torn = sorted(pathlib.Path('/shared/runs/{run}/checkpoints').glob('step-*'))[-2:]\n"
        "os.truncate(torn / 'optimizer.pt', (torn / 'optimizer.pt').stat().st_size // 2)\n"
        "print(torn.name, whole.name)\n",
    ).split()
    resumed = cluster.oslo("resume", run, "--follow")
    assert resumed.code == 0, resumed.err
    assert f"checkpoint {torn} is passed over: " in resumed.out
    assert f"{whole}" in resumed.out
    assert [e["step"] for e in cluster.events(run) if e["event"] == "resumed"] == [int(whole.removeprefix("step-"))]
    assert weights_of(cluster, run, tmp_path / "result") == undisturbed.weights


def test_a_folder_that_may_not_be_written_is_named(cluster: OnCluster, model: Path, tmp_path: Path) -> None:
    file = write_job(tmp_path, model, max_steps=20_000, save_steps=50)
    submitted = cluster.submit(file, *ONE_NODE)
    assert submitted.code == 0, submitted.err
    run = submitted.handle.rpartition("/")[2]
    cluster.until(run, lambda status: (status["step"] or 0) >= 50)
    folder = f"/shared/runs/{run}/checkpoints"
    cluster.kubectl("exec", f"{run}-master-0", "-c", "pytorch", "--", "chmod", "0555", folder)
    assert cluster.oslo("wait", run).code == 100
    told = why(cluster, run)
    assert told["cause"] == "config"
    assert f"uid 1000, gid 1000 may not write in {folder} (mode 0555, owner 1000:" in told["sentence"]
    assert "make the volume writable for that uid or gid" in told["hint"]


SMALL_MIB = 160


@pytest.fixture(scope="module")
def small_volume(cluster: OnCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A claim of a file system of its own, on this machine: only where this machine's root is the node's."""
    address = "{.items[*].status.addresses[?(@.type=='InternalIP')].address}"
    if os.geteuid() != 0 or not all(map(is_here, cluster.kubectl("get", "nodes", "-o", f"jsonpath={address}").split())):
        pytest.skip("the node is another machine, or this is not its root: no file system can be mounted there")
    folder = tmp_path_factory.mktemp("small")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL_MIB}m,mode=2777", "tmpfs", folder], check=True)
    meta = {"name": "small", "namespace": NAMESPACE}
    spec = {"accessModes": ["ReadWriteMany"], "storageClassName": "", "volumeName": "oslo-e2e-small"}
    claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": meta}
    claim["spec"] = spec | {"resources": {"requests": {"storage": "1Mi"}}}
    volume = {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": "oslo-e2e-small"}}
    volume["spec"] = {
        "accessModes": ["ReadWriteMany"],
        "capacity": {"storage": "1Mi"},
        "hostPath": {"path": str(folder)},
        "persistentVolumeReclaimPolicy": "Retain",
        "storageClassName": "",
    }
    for thing in (volume, claim):
        cluster.kubectl("apply", "-f", "-", given=thing)
    yield folder
    cluster.clear()
    cluster.kubectl("delete", "pvc", "small")
    cluster.kubectl("delete", "pv", "oslo-e2e-small")
    subprocess.run(["umount", "-l", folder], check=True)


def is_here(address: str) -> bool:
    """Whether it is an address of this machine."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe, suppress(OSError):
        probe.bind((address, 0))
        return True
    return False


def test_a_volume_that_is_full_or_read_only_ends_the_run_until_it_is_mended(
    cluster: OnCluster, small_volume: Path, model: Path, tmp_path: Path
) -> None:
    file = write_job(tmp_path, model, max_steps=STEPS, save_steps=20, save_total_limit=2)
    run = cluster.submit(file, *ONE_NODE, "--set", "job.volume=small").handle
    cluster.until(run, lambda status: (status["step"] or 0) >= 60)
    filler = small_volume / "filler"
    fill(filler)
    assert cluster.oslo("wait", run).code == 100
    told = why(cluster, run)
    assert told["cause"] == "config"
    assert re.search("no (space|room) is left on the volume", told["sentence"])
    assert "oslo delete RUN --files" in told["hint"]
    filler.unlink()

    subprocess.run(["mount", "-o", "remount,ro", small_volume], check=True)
    try:
        assert cluster.oslo("resume", run, "--follow").code == 100
        told = why(cluster, run)
    finally:
        subprocess.run(["mount", "-o", "remount,rw", small_volume], check=True)
    assert told["cause"] == "config"
    assert "cannot write, because it is mounted read-only, in /shared" in told["sentence"]

    resumed = cluster.oslo("resume", run, "--follow")
    assert resumed.code == 0, resumed.err
    steps = [event["step"] for event in cluster.events(run) if event["event"] == "resumed"]
    assert len(steps) == 1
    assert steps[0] >= 40


def fill(file: Path) -> None:
    """Until nothing more goes onto its file system."""
    with suppress(OSError), file.open("wb") as stream:
        while True:
            stream.write(b"x" * (1 << 20))
            stream.flush()


# --- the operator --------------------------------------------------------------------------------------


@contextmanager
def no_operator() -> Iterator[None]:
    """Away, as while it is replaced or its node is drained."""
    deployment = ("-n", "kubeflow", "deployment/training-operator")
    kubectl("scale", *deployment, "--replicas=0")
    kubectl("-n", "kubeflow", "wait", "pods", "-l", "control-plane=kubeflow-training-operator", "--for=delete")
    try:
        yield
    finally:
        kubectl("scale", *deployment, "--replicas=1")
        await_operator()


def test_the_operator_is_away_during_a_submit(cluster: OnCluster, model: Path, tmp_path: Path) -> None:
    with no_operator():
        submitting = cluster.start("submit", write_job(tmp_path, model), *cluster.flags, "-y")
        assert submitting.stderr is not None
        said = next(line for line in submitting.stderr if "a webhook of the cluster does not answer" in line)
        assert said.endswith("; trying again\n")
        assert submitting.poll() is None
    out, err = submitting.communicate(timeout=120)
    assert submitting.returncode == 0, err
    assert cluster.oslo("wait", out.splitlines()[-1]).code == 0


# --- what never starts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says", "hint"),
    [
        ("job.secrets.KEY=nosuch/key", 'secret "nosuch" not found', "job.secrets"),
        ("job.volumes=[{config_map: nosuch, mount_path: /more}]", 'configmap "nosuch" not found', "job.volumes"),
        ("job.cpu=64", "Insufficient cpu", "job.cpu"),
    ],
)
def test_what_keeps_pods_from_starting(
    cluster: OnCluster, undisturbed: Undisturbed, change: str, says: str, hint: str
) -> None:
    submitted = cluster.submit(undisturbed.file, "--fresh", "--set", change)
    assert submitted.code == 0, submitted.err
    told = why_says(cluster, submitted.handle, re.escape(says))
    assert told["state"] == "pending"
    assert hint in told["hint"]
    assert cluster.oslo("cancel", submitted.handle).code == 0
