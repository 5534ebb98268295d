"""What is rendered, held whole; and what must be true of it whatever the file says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from golden import assert_golden
from stand_in import SMALLEST, Answer

from opensloth import run_config
from runner.errors import UsageError
from runner.pytorchjob import CONFIG_LIMIT_BYTES, notes, render_pytorchjob
from runner.spec import check_job

GOLDEN = Path(__file__).parent / "golden"
JOBS = {
    "one-gpu": "{image: registry.example/opensloth:1.0, volume: training}",
    "two-nodes": "{image: registry.example/opensloth:1.0, volume: training, nodes: 2, gpus_per_node: 8, cpu: 64, "
    "memory: 512Gi, shm: 64Gi, ephemeral_storage: 100Gi, deadline: 12h, ttl: 7d, grace_period: 5m, max_restarts: 5}",
    "cpu": "{image: registry.example/opensloth:1.0, volume: training, gpus_per_node: 0, cpu: 500m, memory: 2Gi}",
    "everything": """
  image: registry.example/opensloth:1.0
  volume: training
  namespace: team-a
  queue: batch
  priority_class: low
  service_account: trainer
  node_selector: {gpu: h100}
  tolerations: [{key: nvidia.com/gpu, effect: NoSchedule}, {key: pool, value: ml}]
  image_pull_secrets: [registry]
  image_pull_policy: Always
  gpu_resource: amd.com/gpu
  labels: {team: a}
  annotations: {example.com/cost: "17"}
  env: {NCCL_DEBUG: WARN, HF_HOME: /shared/team-a/hub}
  secrets: {HF_TOKEN: hf-token/token}
  cache: {volume: datasets, read_only: true}
  volumes: [{mount_path: /models, claim: models, read_only: true}, {mount_path: /etc/ca, config_map: ca}]
""",
}


@pytest.fixture
def render(tmp_path: Path, oslo: Callable[..., Answer]) -> Callable[..., Answer]:
    def call(job: str, *arguments: str) -> Answer:
        (tmp_path / "train.jsonl").write_text("{}\n")
        file = tmp_path / "sft.yaml"
        file.write_text(f"{SMALLEST}job: {job}\n")
        return oslo("render", file, *arguments)

    return call


@pytest.mark.parametrize("name", JOBS)
def test_golden(name: str, render: Callable[..., Answer]) -> None:
    answer = render(JOBS[name])
    assert answer.code == 0, answer.err
    assert_golden(GOLDEN / f"{name}.yaml", answer.out)


@pytest.mark.parametrize("name", JOBS)
def test_passes_pod_security_restricted(name: str, render: Callable[..., Answer]) -> None:
    for pod in pods(yaml.safe_load(render(JOBS[name]).out)):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
        allowed = {"name", "persistentVolumeClaim", "downwardAPI", "emptyDir", "configMap", "secret"}
        assert all(set(volume) <= allowed for volume in spec["volumes"])


@pytest.mark.parametrize("name", JOBS)
def test_what_the_operator_needs(name: str, render: Callable[..., Answer]) -> None:
    job = yaml.safe_load(render(JOBS[name]).out)
    spec = job["spec"]
    assert spec["nprocPerNode"] == str(int(spec["nprocPerNode"]))
    assert spec["pytorchReplicaSpecs"]["Master"]["replicas"] == 1
    assert len(f"{job['metadata']['name']}-worker-999") <= 63
    for replica in spec["pytorchReplicaSpecs"].values():
        assert replica["restartPolicy"] == "ExitCode"
    for pod in pods(job):
        (container,) = pod["spec"]["containers"]
        assert container["name"] == "pytorch"
        assert {port["name"]: port["containerPort"] for port in container["ports"]} == {"pytorchjob-port": 23456}
        names = [variable["name"] for variable in container["env"]]
        assert len(names) == len(set(names))
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]}


def test_the_config_arrives_as_it_was_checked(render: Callable[..., Answer]) -> None:
    job = yaml.safe_load(render(JOBS["two-nodes"]).out)
    for pod in pods(job):
        config = run_config.load(pod["metadata"]["annotations"]["opensloth/config"])
        assert config.opensloth.devices == list(range(8))
        assert config.opensloth.data_cache_path == "/shared/cache"
        assert config.training.wrote("seed") is False


def test_the_same_file_gives_the_same_bytes_in_another_process(tmp_path: Path, sft: Path) -> None:
    sft.write_text(f"{SMALLEST}job: {JOBS['everything']}\n")
    seen = {
        subprocess.run(
            [sys.executable, "-m", "runner", "render", str(sft)],
            env={"PYTHONHASHSEED": seed, "HOME": str(tmp_path)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1


def test_json_is_the_same_object(render: Callable[..., Answer]) -> None:
    assert json.loads(render(JOBS["everything"], "-o", "json").out) == yaml.safe_load(render(JOBS["everything"]).out)


def test_other_content_is_another_run(render: Callable[..., Answer]) -> None:
    def name(*arguments: str) -> str:
        return str(yaml.safe_load(render(JOBS["one-gpu"], *arguments).out)["metadata"]["name"])

    assert name() == name("--set", "job.context=other")
    assert len({name(), name("--set", "job.image=other"), name("--set", "training.seed=1")}) == 3


def test_a_config_too_large_for_an_annotation() -> None:
    job, _ = check_job({"image": "i", "volume": "v"})
    assert job is not None
    render_pytorchjob("a-12345678", "a", "0" * 64, "x" * CONFIG_LIMIT_BYTES, job)
    with pytest.raises(UsageError, match="has 204,801 bytes; an object takes 204,800"):
        render_pytorchjob("a-12345678", "a", "0" * 64, "x" * (CONFIG_LIMIT_BYTES + 1), job)


def test_what_is_not_obeyed_is_said() -> None:
    job, _ = check_job({"image": "i", "volume": "v", "nodes": 2, "ttl": "1d"})
    assert job is not None
    assert [note.split(":")[0] for note in notes(job)] == [
        "job.ttl removes the object of a succeeded job only",
        "2 pods mount the claim v",
        "job.max_restarts and job.start_timeout have no effect yet",
    ]


def test_a_deadline_that_nobody_keeps_is_said() -> None:
    job, _ = check_job({"image": "i", "volume": "v", "deadline": "12h"})
    assert job is not None
    assert notes(job)[-1].startswith("job.max_restarts, job.start_timeout and job.deadline have no effect yet")


@pytest.mark.parametrize(
    ("job", "size"),
    [({}, "2Gi"), ({"memory": "64Gi"}, "2Gi"), ({"memory": "4Gi"}, str(2**30)), ({"shm": "8Gi"}, "8Gi")],
)
def test_shared_memory_is_a_part_of_memory(job: dict[str, Any], size: str) -> None:
    checked, problems = check_job(job)
    assert checked is not None, problems
    assert checked.shm_size == size


def test_shared_memory_must_fit() -> None:
    _, problems = check_job({"memory": "4Gi", "shm": "4Gi"})
    assert [str(problem) for problem in problems] == [
        "job: shm 4Gi is a part of memory 4Gi and must be less: raise memory or lower shm"
    ]


def pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    return [replica["template"] for replica in job["spec"]["pytorchReplicaSpecs"].values()]
