"""Two nodes train one model on a real cluster: the same losses as one process, whatever becomes of a pod on the way."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from stage import Here, OnCluster, write_job

pytestmark = pytest.mark.e2e
SIX_DIGITS = 1e-5
LATE_SECONDS = float(os.environ.get("OSLO_E2E_LATE_SECONDS", "10"))
"""How late a worker comes. 660 was tried once: torchrun's own rendezvous gives up after 600."""
HOME = os.environ["HOME"]
"""Of who runs the tests; each test has another."""


@pytest.fixture(autouse=True)
def _tidy(cluster: OnCluster) -> Iterator[None]:
    yield
    cluster.clear()


def steps_of(events: list[dict[str, Any]]) -> dict[int, float]:
    """step -> loss."""
    return {event["step"]: event["loss"] for event in events if event["event"] == "step"}


def rows_by_rank(cluster: OnCluster, run: str) -> dict[int, list[int]]:
    """rank -> the rows of the plan that it says it trained, at log_level debug."""
    answer = cluster.oslo("logs", run, "-o", "json", "--grep", r"^step \d+ rows ")
    found: dict[int, list[int]] = {}
    for line in map(json.loads, answer.out.splitlines()):
        found.setdefault(line["rank"], []).extend(map(int, line["text"].partition(" rows ")[2].split()))
    return found


def same_losses(ours: dict[int, float], theirs: dict[int, float]) -> bool:
    return ours.keys() == theirs.keys() and all(
        abs(ours[step] - theirs[step]) <= SIX_DIGITS * abs(theirs[step]) for step in ours
    )


def test_two_nodes_train_the_rows_of_one_plan_with_the_losses_of_one_process(
    cluster: OnCluster, here: Here, model: Path, tmp_path: Path
) -> None:
    file = write_job(tmp_path, model, max_steps=-1, num_train_epochs=1, global_batch_size=4)
    debug = ("--set", "opensloth.log_level=debug")
    submitted = cluster.submit(file, *debug)
    assert submitted.code == 0, submitted.err
    run = submitted.handle.rpartition("/")[2]
    # While the run goes on: a worker that still leaves when the job has succeeded is taken away.
    _until(lambda: set(cluster.pods(run)) == {f"{run}-master-0", f"{run}-worker-0"})
    assert cluster.oslo("wait", run).code == 0, cluster.status(run)

    rows = rows_by_rank(cluster, run)
    events = cluster.events(run)
    plan = next(event for event in events if event["event"] == "plan")
    assert set(rows) == {0, 1}
    assert not set(rows[0]) & set(rows[1])
    assert sorted(rows[0] + rows[1]) == list(range(plan["rows"]))

    alone = here.submit(file, "--follow")
    assert alone.code == 0, alone.err
    assert same_losses(steps_of(events), steps_of(here.events(alone.handle)))


def test_the_second_run_with_the_same_data_finds_it_prepared(cluster: OnCluster, model: Path, tmp_path: Path) -> None:
    file = write_job(tmp_path, model)
    first = cluster.submit(file, "--follow")
    assert first.code == 0, first.err
    assert f"copying train-{file.stem.removeprefix('e2e-')}.jsonl: " in first.err
    second = cluster.submit(file, "--set", "training.learning_rate=1e-4", "--follow")
    assert second.code == 0, second.err
    assert second.handle != first.handle
    assert "dataset prepared: " in first.out
    assert second.out.count("dataset found in the cache: ") == 2  # once for each pod
    assert "dataset prepared: " not in second.out


@pytest.mark.parametrize("victim", ["worker-0", "master-0"])
def test_a_pod_deleted_midway_costs_time_but_no_bit(
    cluster: OnCluster, model: Path, tmp_path: Path, victim: str
) -> None:
    steps = 600
    file = write_job(tmp_path, model, max_steps=steps, save_steps=20)
    submitted = cluster.submit(file)
    assert submitted.code == 0, submitted.err
    run = submitted.handle.rpartition("/")[2]
    cluster.until(run, lambda status: (status["step"] or 0) >= 0.3 * steps)
    name = f"{run}-{victim}"
    before = cluster.pods(run)[name]["metadata"]["uid"]
    cluster.kubectl("delete", "pod", name, "--wait=false")
    # Looked for while the run goes on: a pod that still leaves when the job has succeeded is taken away.
    _until(lambda: cluster.pods(run).get(name, {"metadata": {"uid": before}})["metadata"]["uid"] != before)
    assert cluster.oslo("wait", run).code == 0, cluster.status(run)
    resumed = [event["step"] for event in cluster.events(run) if event["event"] == "resumed"]
    assert resumed, "it began anew"
    assert 0.3 * steps <= resumed[-1] <= 0.7 * steps
    assert cluster.status(run)["attempt"] >= 2

    undisturbed = cluster.submit(file, "--fresh", "--follow")
    assert undisturbed.code == 0, undisturbed.err
    for handle, folder in ((run, "disturbed"), (undisturbed.handle, "undisturbed")):
        pulled = cluster.oslo("pull", handle, tmp_path / folder)
        assert pulled.code == 0, pulled.err
    weights = "adapter_model.safetensors"
    assert (tmp_path / "disturbed" / weights).read_bytes() == (tmp_path / "undisturbed" / weights).read_bytes()


def test_a_pod_that_cannot_be_created_is_named_and_joins_late(cluster: OnCluster, model: Path, tmp_path: Path) -> None:
    """Room for one pod at a time: the helper's, then that of the node which the operator makes first."""
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "few"}, "spec": {"hard": {"pods": "1"}}}
    cluster.kubectl("apply", "-f", "-", given=quota)
    submitting = cluster.start("submit", write_job(tmp_path, model), "-y", "--follow")
    try:
        _until(lambda: len(_pods(cluster)) == 1)
        (first,) = _pods(cluster)
        time.sleep(LATE_SECONDS)
        assert submitting.poll() is None, submitting.communicate()
        cluster.kubectl("delete", "resourcequota", "few")
        out, err = submitting.communicate(timeout=240)
    finally:
        submitting.kill()
        cluster.kubectl("delete", "resourcequota", "few", "--ignore-not-found")
    assert submitting.returncode == 0, err
    assert re.search(r"pods? cannot be created: .*exceeded quota", err), err
    if first.endswith("-master-0"):
        assert "[launcher] waiting for node 1 of 2 to start" in out
    assert "[0] step 6/6" in out


def _pods(cluster: OnCluster) -> list[str]:
    return cluster.kubectl("get", "pods", "-l", "app.kubernetes.io/name=opensloth", "-o", "name").split()


def _until(seen: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not seen():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.5)


def test_a_deleted_job_is_still_told_by_its_files(cluster: OnCluster, model: Path, tmp_path: Path) -> None:
    file = write_job(tmp_path, model)
    submitted = cluster.submit(file, "--follow")
    assert submitted.code == 0, submitted.err
    run = submitted.handle.rpartition("/")[2]
    deleted = cluster.oslo("delete", run, "-y")
    assert deleted.code == 0, deleted.err
    assert "stays on the volume" in deleted.err
    status = cluster.status(run)
    assert (status["state"], status["step"], status["handle"]) == ("succeeded", 6, submitted.handle)
    assert list(steps_of(cluster.events(run))) == [1, 2, 3, 4, 5, 6]
    assert f"{submitted.handle} has succeeded after 6 steps" in cluster.oslo("why", run).out
    assert cluster.oslo("pull", run, tmp_path / "result").code == 0
    again = cluster.submit(file, "--follow")
    assert again.code == 0, again.err
    assert "this run has already succeeded" in again.out
    assert cluster.oslo("delete", run, "-y", "--files").code == 0
    assert cluster.oslo("status", run).code == 102


def test_nothing_is_left_behind(cluster: OnCluster, model: Path, tmp_path: Path) -> None:
    """No helper pod, no Secret, no ConfigMap: the job is the only object, and it goes with its pods."""
    before = _objects(cluster)
    submitted = cluster.submit(write_job(tmp_path, model), "--follow")
    assert submitted.code == 0, submitted.err
    assert cluster.oslo("delete", submitted.handle, "-y").code == 0
    assert _objects(cluster) == before


def _objects(cluster: OnCluster) -> set[str]:
    kinds = "pods,services,secrets,configmaps,serviceaccounts,persistentvolumeclaims,pytorchjobs,jobs,roles"
    return set(cluster.kubectl("get", kinds, "-o", "name").split())


@pytest.mark.timeout(1800)
def test_the_quickstart_on_two_nodes(cluster: OnCluster) -> None:
    """A real pretrained model and data that exist on the submitting side only; answers are scored in plain peft."""
    script = Path(__file__).resolve().parents[2] / "examples" / "quickstart" / "run.py"
    env = cluster.env | {"HOME": HOME}  # where the converted model is kept
    command = [sys.executable, str(script), "--cluster", "--set", "job.memory=6Gi"]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "of 40 after" in ran.stdout
