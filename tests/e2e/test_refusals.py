"""What a cluster would not accept is said before anything is created; who breaks off leaves nothing behind."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from stage import OnCluster, write_job

pytestmark = pytest.mark.e2e


@pytest.fixture(autouse=True)
def _nothing_is_created(cluster: OnCluster) -> Iterator[None]:
    yield
    left = cluster.kubectl("get", "pytorchjobs,pods", "-o", "name").split()
    cluster.clear()
    assert left == []


@pytest.fixture
def one_node_claim(cluster: OnCluster) -> Iterator[str]:
    spec = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}, "storageClassName": "none"}
    claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "one-node"}, "spec": spec}
    cluster.kubectl("apply", "-f", "-", given=claim)
    yield "one-node"
    cluster.kubectl("delete", "pvc", "one-node")


def test_two_nodes_on_a_claim_for_one(cluster: OnCluster, model: Path, tmp_path: Path, one_node_claim: str) -> None:
    answer = cluster.submit(write_job(tmp_path, model), "--set", f"job.volume={one_node_claim}")
    assert (answer.code, answer.out) == (1, "")
    assert "2 pods would share the claim one-node, which is ReadWriteOnce" in answer.err
    assert "use a ReadWriteMany claim (job.volume), or job.nodes: 1" in answer.err


def test_a_claim_that_is_not_there(cluster: OnCluster, model: Path, tmp_path: Path) -> None:
    answer = cluster.submit(write_job(tmp_path, model), "--set", "job.volume=nosuch")
    assert answer.code == 1
    assert "there is no claim nosuch in namespace oslo-e2e" in answer.err


def test_pods_that_would_be_refused(cluster: OnCluster, model: Path, tmp_path: Path) -> None:
    """The operator's webhook accepts such a job, and its pods then never come."""
    answer = cluster.submit(write_job(tmp_path, model), "--set", "job.service_account=nosuch")
    assert (answer.code, answer.out) == (1, "")
    assert 'serviceaccount "nosuch" not found' in answer.err


def test_the_server_is_asked_without_a_submit(cluster: OnCluster, model: Path, tmp_path: Path) -> None:
    file = write_job(tmp_path, model)
    assert "would accept it" in cluster.oslo("validate", file, "--server").err
    assert cluster.oslo("validate", file, "--server", "--set", "job.service_account=nosuch").code == 1


def test_ctrl_c_while_data_is_copied(cluster: OnCluster, model: Path, tmp_path: Path) -> None:
    file = write_job(tmp_path, model)
    big = tmp_path / f"train-{file.stem.removeprefix('e2e-')}.jsonl"
    big.write_text(big.read_text() * 60_000)  # 900 MB: the copy takes several seconds
    submitting = cluster.start("submit", file, "-y")
    end = time.monotonic() + 60
    while "Running" not in cluster.kubectl("get", "pods", "-l", "app.kubernetes.io/name=oslo-helper"):
        assert time.monotonic() < end, "no helper pod came"
        time.sleep(0.1)
    submitting.send_signal(signal.SIGINT)
    out, err = submitting.communicate(timeout=60)
    assert (submitting.returncode, out) == (130, "")
    assert "interrupted: nothing was submitted" in err
