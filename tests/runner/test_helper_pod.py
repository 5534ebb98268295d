"""The helper pod's manifest, held whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from golden import assert_golden

from runner.helper import Helper
from runner.helper_pod import HELPER_LABEL, helper_pod
from runner.kube.errors import ForbiddenError

GOLDEN = Path(__file__).parent / "golden"
SMALLEST = helper_pod("oslo-helper-1", image="registry.example/opensloth:1.0", volume="training", deadline_seconds=3600)


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

    claim = {"name": "shared", "persistentVolumeClaim": {"claimName": "training"}}
    spec = {"containers": [{"image": "i", "imagePullPolicy": "Always"}], "volumes": [claim]}
    with pytest.raises(ForbiddenError, match="you may not create pods"), Helper(Refuses(), spec, said.append):  # type: ignore[arg-type]
        pass
    assert not said
