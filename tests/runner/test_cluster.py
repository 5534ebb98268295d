"""The cluster's backend when several submit, delete and watch at once, over a stand-in that keeps objects by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from runner import cluster as cluster_module
from runner.backend import LogQuery, Outcome, Submission
from runner.cluster import KubernetesBackend
from runner.errors import ClusterError, NotFoundError, UnreachableError
from runner.kube.api import EVENTS, PODS, Resource
from runner.kube.errors import ConflictError, ForbiddenError, MissingError

RUN = "x-0123abcd"


def job(uid: str, *conditions: str, suspend: bool = False) -> dict[str, Any]:
    template = {"metadata": {"annotations": {}}, "spec": {"containers": [{"image": "i"}], "volumes": []}}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": RUN, "uid": uid, "labels": {}, "creationTimestamp": "2027-01-15T08:00:00Z"},
        "spec": {
            "runPolicy": {"suspend": suspend},
            "pytorchReplicaSpecs": {"Master": {"replicas": 1, "template": template}},
        },
        "status": {"conditions": [{"type": kind, "status": "True"} for kind in conditions]},
    }


class Objects:
    """One namespace with one job at most. on_delete: what others do right after a deletion."""

    namespace = "oslo"

    def __init__(self, there: dict[str, Any] | None, on_delete: Callable[[Objects], None] | None = None) -> None:
        self.job, self.pods, self.on_delete = there, list[dict[str, Any]](), on_delete
        self.events: list[dict[str, Any]] | Exception = []
        self.created: list[dict[str, Any]] = []

    def get(self, resource: Resource, name: str) -> dict[str, Any]:
        if self.job is None:
            raise MissingError(name)
        return self.job

    def find(self, resource: Resource, labels: str = "", fields: str = "") -> list[dict[str, Any]]:
        if resource is EVENTS and isinstance(self.events, Exception):
            raise self.events
        return {PODS: self.pods, EVENTS: self.events}[resource]  # type: ignore[return-value]

    def create(self, resource: Resource, manifest: dict[str, Any]) -> None:
        if self.job is not None:
            raise ConflictError("already exists")
        self.created.append(manifest)
        self.job = job("new")

    def delete(self, resource: Resource, name: str, *, uid: str | None = None, **options: Any) -> None:
        if self.job is not None and uid not in (None, self.job["metadata"]["uid"]):
            raise ConflictError("Precondition failed: UID in precondition")
        self.job = None
        if self.on_delete:
            self.on_delete(self)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def backend(said: list[str]) -> Callable[[Objects], KubernetesBackend]:
    return lambda objects: KubernetesBackend(objects, said.append)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module, "_GONE_SECONDS", 0.0)


def by_another(objects: Objects) -> None:
    objects.job = job("another's")


def test_a_failed_run_is_taken_up_in_a_new_object(backend: Callable[[Objects], KubernetesBackend]) -> None:
    objects = Objects(job("old", "Failed"))
    assert backend(objects).submit(RUN, Submission("", job("mine"))) is Outcome.RESUMED
    assert len(objects.created) == 1


def test_who_comes_second_attaches_to_what_the_first_has_made(backend: Callable[[Objects], KubernetesBackend]) -> None:
    objects = Objects(job("old", "Failed"), on_delete=by_another)
    assert backend(objects).submit(RUN, Submission("", job("mine"))) is Outcome.ATTACHED
    assert not objects.created


def test_what_another_has_made_meanwhile_is_not_deleted(
    backend: Callable[[Objects], KubernetesBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = Objects(job("another's"))
    subject = backend(objects)
    looks = iter([job("old", "Failed")])
    monkeypatch.setattr(subject, "find", lambda run: next(looks, objects.job))
    assert subject.submit(RUN, Submission("", job("mine"))) is Outcome.ATTACHED
    assert objects.job is not None
    assert objects.job["metadata"]["uid"] == "another's"


def test_a_new_object_that_is_refused_says_that_the_old_one_is_gone(
    backend: Callable[[Objects], KubernetesBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = Objects(job("old", "Failed"))

    def refuse(*_: object) -> None:
        raise ClusterError("the webhook does not answer")

    monkeypatch.setattr(objects, "create", refuse)
    with pytest.raises(ClusterError, match="was deleted, and none was made in its place: the webhook") as caught:
        backend(objects).resume(RUN)
    assert "submit again" in caught.value.hint


class NoHistory:
    """Stands in for ClusterHistory. error: what reading and deleting come to."""

    error: Exception

    def __init__(self, *_: object) -> None:
        """As ClusterHistory."""

    def __enter__(self) -> NoHistory:
        return self

    def __exit__(self, *_: object) -> None:
        """As ClusterHistory."""

    def logs(self, *_: object) -> Iterator[Any]:
        raise self.error

    def delete(self, *_: object, **__: object) -> None:
        raise self.error

    def attempts(self, *_: object) -> list[Any]:
        raise self.error


@pytest.fixture
def no_history(monkeypatch: pytest.MonkeyPatch) -> type[NoHistory]:
    monkeypatch.setattr(cluster_module, "ClusterHistory", NoHistory)
    monkeypatch.setattr(cluster_module, "Helper", lambda *_: None)
    return NoHistory


def test_files_of_a_run_that_never_began(
    backend: Callable[[Objects], KubernetesBackend], no_history: type[NoHistory]
) -> None:
    no_history.error = NotFoundError("/shared/runs/x does not exist")
    objects = Objects(job("old", "Failed"))
    backend(objects).delete(RUN, files=True)
    assert objects.job is None


def test_what_pods_are_left_say_it_when_the_volume_cannot(
    backend: Callable[[Objects], KubernetesBackend],
    no_history: type[NoHistory],
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    no_history.error = ClusterError("the helper pod did not start: exceeded quota")
    objects = Objects(job("old", "Failed"))
    objects.job["spec"]["pytorchReplicaSpecs"]["Master"]["replicas"] = 2  # type: ignore[index]
    labels = {"training.kubeflow.org/replica-type": "master", "training.kubeflow.org/replica-index": "0"}
    objects.pods = [{"metadata": {"name": "x-master-0", "labels": labels}, "status": {}}]
    monkeypatch.setattr(cluster_module.cluster_logs, "read", lambda *_: iter(["left"]))
    assert list(backend(objects).logs(RUN, LogQuery())) == ["left"]
    assert said == ["warning: only the logs of pods that are left: the helper pod did not start: exceeded quota"]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (NotFoundError("there is no run"), []),
        (
            ClusterError("the helper pod did not start"),
            ["warning: the run's folder on the volume was not read: the helper pod did not start"],
        ),
    ],
)
def test_why_is_told_without_the_volume_if_it_must(
    backend: Callable[[Objects], KubernetesBackend],
    no_history: type[NoHistory],
    said: list[str],
    error: Exception,
    says: list[str],
) -> None:
    no_history.error = error
    findings = backend(Objects(job("old", "Failed"))).findings(RUN)
    assert (findings.status.state, findings.attempts) == ("failed", [])
    assert said == says


def test_why_of_a_run_that_waits_reads_no_volume(
    backend: Callable[[Objects], KubernetesBackend], no_history: type[NoHistory], said: list[str]
) -> None:
    no_history.error = AssertionError("no helper pod is needed")
    objects = Objects(job("old", "Created"))
    about = {"kind": "PyTorchJob", "name": RUN}
    objects.events = [{"reason": "FailedCreatePod", "message": "exceeded quota: few", "involvedObject": about}]
    findings = backend(objects).findings(RUN)
    assert findings.status.reason == "0 of 1 pods are there: exceeded quota: few"
    assert said == []


def test_a_warning_is_said_once(backend: Callable[[Objects], KubernetesBackend], said: list[str]) -> None:
    objects = Objects(job("old", "Created"))
    objects.events = ForbiddenError("you may not list events")
    subject = backend(objects)
    for _ in range(3):
        subject.get(RUN)
    assert said == ["warning: why pods are missing is not known: you may not list events"]


def test_a_run_that_waits_in_a_queue_lacks_no_pods(backend: Callable[[Objects], KubernetesBackend]) -> None:
    objects = Objects(job("old", "Created", suspend=True))
    objects.events = AssertionError("nobody need ask for events")
    assert backend(objects)._look(RUN).waits is not None


@pytest.mark.parametrize("there", [None, job("old", "Failed")])
def test_a_submit_that_got_no_answer_may_have_come_through(
    backend: Callable[[Objects], KubernetesBackend], monkeypatch: pytest.MonkeyPatch, there: dict[str, Any] | None
) -> None:
    objects = Objects(there)

    def silence(*_: object) -> None:
        raise UnreachableError("no answer from the cluster: create pytorchjobs: read timed out")

    monkeypatch.setattr(objects, "create", silence)
    with pytest.raises(UnreachableError, match="may have been submitted all the same") as caught:
        backend(objects).submit(RUN, Submission("", job("mine")))
    assert "submit again" in caught.value.hint
    assert "none was made" not in caught.value.message


@pytest.mark.parametrize("wanted", ["-sft", "sft-", "größe", "x" * 64, "a/b", ""])
def test_what_can_be_no_name_is_not_asked_for(backend: Callable[[Objects], KubernetesBackend], wanted: str) -> None:
    """The API server would answer that the selector is not valid."""
    assert backend(Objects(None)).named(wanted) is None
