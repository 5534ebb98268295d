"""End-to-end tests on a real cluster: any KUBECONFIG of an admin who may apply k8s/ and patch the operator.

The tests themselves run as the namespace's submitter. OSLO_E2E_IMAGE names an image that the nodes have; without
it image.sh builds and loads one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from kubectl import HAS_CLUSTER, built_image
from stage import Here, OnCluster, Place, prepare_namespace


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of two layers, which exists on this machine only."""
    import tiny

    return tiny.save(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> OnCluster:
    """k8s/ applied, the operator patched, and a submitter who may do what the Roles say."""
    if not HAS_CLUSTER:
        pytest.fail("set KUBECONFIG to that of a cluster's admin")
    folder = tmp_path_factory.mktemp("submitter")
    return OnCluster(folder, prepare_namespace(folder), built_image())


@pytest.fixture
def here(tmp_path: Path) -> Here:
    return Here(tmp_path)


@pytest.fixture(params=[pytest.param("here", marks=pytest.mark.slow), pytest.param("cluster", marks=pytest.mark.e2e)])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """Both backends, for the tests that all of them pass."""
    found: Place = request.getfixturevalue(request.param)
    yield found
    found.clear()
