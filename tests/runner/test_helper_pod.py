"""The helper pod's manifest, held whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from golden import assert_golden

from runner.helper import Helper
from runner.helper_pod import HELPER_LABEL, helper_pod
from runner.kube.errors import ForbiddenError, MissingError, RefusedError

GOLDEN = Path(__file__).parent / "golden"
SMALLEST = helper_pod("oslo-helper-1", image="registry.example/opensloth:1.0", volume="training", deadline_seconds=3600)
CLAIM = {"name": "shared", "persistentVolumeClaim": {"claimName": "training"}}
POD_SPEC = {"containers": [{"image": "i", "imagePullPolicy": "Always"}], "volumes": [CLAIM]}


def test_the_smallest() -> None:
    assert_golden(GOLDEN / "helper-pod.yaml", yaml.safe_dump(SMALLEST, sort_keys=False))


def test_where_the_training_pods_run() -> None:
    taint = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    pod = helper_pod(
        "oslo-helper-1",
        image="registry.example/opensloth:1.0",
        volume="training",
        deadline_seconds=3600,
        pull_secrets=["registry"],
        service_account="trainer",
        image_pull_policy="Always",
        node_selector={"pool": "ml"},
        tolerations=[taint],
    )
    more = {key: value for key, value in pod["spec"].items() if key not in SMALLEST["spec"]}
    assert more == {
        "serviceAccountName": "trainer",
        "nodeSelector": {"pool": "ml"},
        "tolerations": [taint],
        "imagePullSecrets": [{"name": "registry"}],
    }
    assert pod["spec"]["containers"][0]["imagePullPolicy"] == "Always"


def test_its_label_is_its_own() -> None:
    """Who removes finished helper pods by it must not meet training pods."""
    pairs = dict(pair.split("=") for pair in HELPER_LABEL.split(","))
    assert pairs.items() <= SMALLEST["metadata"]["labels"].items()
    assert pairs["app.kubernetes.io/name"] != "opensloth"


def test_a_pod_that_was_refused_is_not_deleted() -> None:
    """Whoever may not create pods may not delete them either, and would hear of a pod that is not there."""
    said: list[str] = []

    class Refuses:
        api_client, namespace = None, "oslo"

        def find(self, *_: object) -> list[object]:
            return []

        def create(self, *_: object) -> None:
            raise ForbiddenError("you may not create pods")

        def delete(self, *_: object, **__: object) -> None:
            raise ForbiddenError("you may not delete pods")

    with pytest.raises(ForbiddenError, match="you may not create pods"), Helper(Refuses(), POD_SPEC, said.append):  # type: ignore[arg-type]
        pass
    assert not said


@pytest.mark.parametrize("gone", [True, False])
def test_a_transfer_that_outlasts_its_pod_goes_on_in_another(monkeypatch: pytest.MonkeyPatch, gone: bool) -> None:
    """A pod ends by its deadline after an hour."""

    class Pods:
        api_client, namespace = None, "oslo"

        def __init__(self) -> None:
            self.phases: dict[str, str] = {}

        def find(self, *_: object) -> list[object]:
            return []

        def create(self, _: object, pod: dict[str, Any]) -> None:
            self.phases[pod["metadata"]["name"]] = "Running"

        def get(self, _: object, name: str) -> dict[str, Any]:
            if name not in self.phases:
                raise MissingError(f"{name} not found")
            return {"metadata": {"name": name}, "status": {"phase": self.phases[name]}}

        def delete(self, _: object, name: str, **__: object) -> None:
            self.phases.pop(name, None)

    pods, said = Pods(), list[str]()

    def open_exec(_: object, __: str, pod: str, command: list[str]) -> str:
        if pods.phases.get(pod) != "Running":
            raise RefusedError("the cluster refuses to create pods/exec")
        if command == ["refused"]:
            raise RefusedError("it may not")
        return pod

    monkeypatch.setattr("runner.helper.open_exec", open_exec)
    with Helper(pods, POD_SPEC, said.append) as helper:  # type: ignore[arg-type]
        first = helper.open(["cat"])
        pods.phases[str(first)] = "Failed"
        if gone:
            del pods.phases[str(first)]
        second = helper.open(["cat"])
        assert second != first
        assert list(pods.phases) == [second] == [helper.name]
        assert said == [f"... the helper pod {first} has ended: starting another"]
        with pytest.raises(RefusedError, match="it may not"):
            helper.open(["refused"])
    assert not pods.phases
