"""The training image: what goes in, what is locked, and what the built one can do in a pod with no rights."""

from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from kubectl import REPOSITORY, built_image, get, kubectl, needs_cluster
from packaging.requirements import Requirement

DOCKERFILE: Final = (REPOSITORY / "docker" / "train.Dockerfile").read_text()
LOCKS: Final = {"train": ("train",), "train-gpu": ("train", "gpu")}


def locked(name: str) -> list[Requirement]:
    lines = (REPOSITORY / "docker" / f"requirements-{name}.lock").read_text().splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


def pinned(name: str) -> dict[str, list[str]]:
    """Package -> its versions: more than one where a marker tells which."""
    found: dict[str, list[str]] = {}
    for requirement in locked(name):
        found.setdefault(requirement.name, []).append(next(iter(requirement.specifier)).version)
    return found


def direct_requirements(extras: tuple[str, ...]) -> list[Requirement]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *(text for extra in extras for text in project["optional-dependencies"][extra])]
    return [Requirement(text) for text in texts]


# --- the locks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_pins_every_package_by_name(name: str) -> None:
    for requirement in locked(name):
        assert requirement.url is None
        assert [one.operator for one in requirement.specifier] == ["=="]


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_satisfies_what_pyproject_asks_for(name: str) -> None:
    versions = pinned(name)
    for requirement in direct_requirements(LOCKS[name]):
        found = versions.get(requirement.name.lower(), [])
        assert found, f"{requirement.name} is not locked: make lock"
        assert all(requirement.specifier.contains(version) for version in found), f"{requirement}: {found}; make lock"


def test_the_locks_agree() -> None:
    cpu, gpu = pinned("train"), pinned("train-gpu")
    assert {name: gpu.get(name) for name in cpu} == cpu


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_knows_no_index_and_no_machine(name: str) -> None:
    text = (REPOSITORY / "docker" / f"requirements-{name}.lock").read_text()
    assert not re.search(r"https?:|--index|--find-links|file:| @ |/", text)


# --- what goes in -------------------------------------------------------------------------------------


def is_ignored(path: str) -> bool:
    """As .dockerignore is read: the last pattern that matches the path or a folder above it decides."""
    parts = path.split("/")
    ignored = False
    for line in (REPOSITORY / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        if not pattern or pattern.startswith("#"):
            continue
        names = parts if line.startswith("**/") else ["/".join(parts[: i + 1]) for i in range(len(parts))]
        if any(fnmatch.fnmatchcase(name, pattern) for name in names):
            ignored = not line.startswith("!")
    return ignored


@pytest.mark.parametrize(
    "path",
    [".git/config", "tests/conftest.py", "docs/data.md", "examples/quickstart/run.py", ".venv/bin/python",
     "opensloth/__pycache__/train.cpython-311.pyc", "runner/kube/__pycache__/api.cpython-311.pyc", "k8s/defaults.yaml",
     "docker/README.md", "id_rsa"],
)  # fmt: skip
def test_what_the_build_does_not_see(path: str) -> None:
    assert is_ignored(path)


def test_the_build_sees_all_that_the_dockerfile_copies() -> None:
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    for pattern in " ".join(copied).split():
        found = list(REPOSITORY.glob(pattern))
        assert found
        for path in found:
            inside = next(path.rglob("*.py"), path) if path.is_dir() else path
            assert not is_ignored(inside.relative_to(REPOSITORY).as_posix())


def test_the_dockerfile_says_what_the_image_is_and_who_runs_it() -> None:
    for label in ("title", "description", "licenses"):
        assert f"org.opencontainers.image.{label}=" in DOCKERFILE
    assert "\nUSER 1000:1000\n" in DOCKERFILE
    assert not re.search(r"(?i)pip_|index-url|trusted-host|proxy|\.pem|\.crt", DOCKERFILE)


# --- the key ------------------------------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """As much of the repository as the key looks at."""
    for name in ("LICENSE", "README.md", "pyproject.toml", ".dockerignore"):
        shutil.copy(REPOSITORY / name, tmp_path)
    for name in ("docker", "opensloth", "runner"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def key(folder: Path, *arguments: str) -> str:
    command = [sys.executable, str(folder / "docker" / "image-key"), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize(
    "changed", ["opensloth/train.py", "runner/cli.py", "docker/train.Dockerfile", "docker/requirements-train.lock"]
)
def test_a_change_of_what_the_image_holds_changes_its_key(copied: Path, changed: str) -> None:
    before = key(copied)
    with (copied / changed).open("a") as stream:
        stream.write("#\n")
    assert key(copied) != before


def test_a_key_is_a_tag_that_only_the_content_decides(copied: Path) -> None:
    before = key(copied)
    assert re.fullmatch(r"[0-9a-f]{16}", before)
    (copied / "opensloth" / "__pycache__").mkdir()
    (copied / "opensloth" / "__pycache__" / "train.cpython-311.pyc").write_bytes(b"x")
    (copied / "docker" / "README.md").write_text("another")
    assert key(copied) == before
    assert key(copied, "EXTRAS=train,gpu") != before


# --- on a cluster -------------------------------------------------------------------------------------

NAMESPACE: Final = "oslo-image-test"
PROBE: Final = """
import os, pwd, subprocess, sys
import torch
import opensloth.launch, opensloth.train, opensloth.prune, runner.cli

def f(x):
    return torch.nn.functional.gelu(x).sin() + x.mean(-1, keepdim=True)  # no sum that cancels: two orders, one value

torch.manual_seed(0)
x = torch.randn(64, 64, dtype=torch.float64)
torch.testing.assert_close(torch.compile(f)(x), f(x))
try:
    open("/opt/venv/x", "w")
    raise SystemExit("the root is writable")
except OSError:
    pass
assert os.access("/opt/venv/lib", os.W_OK) is False
help = subprocess.run(["oslo", "--help"], check=True, capture_output=True, text=True).stdout
who = subprocess.run(["whoami"], check=True, capture_output=True, text=True).stdout.strip()
print("PROBE", who, os.getuid(), pwd.getpwuid(os.getuid()).pw_dir, help.split()[1], os.path.realpath(sys.prefix))
"""


def restricted_pod(image: str) -> dict[str, Any]:
    container = {
        "name": "probe",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python", "-c", PROBE],
        "env": [{"name": "OMP_NUM_THREADS", "value": "1"}],
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
    }
    security = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}  # the user is the image's own
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "probe", "namespace": NAMESPACE},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "securityContext": security,
            "containers": [container],
            "volumes": [{"name": "tmp", "emptyDir": {}}],
        },
    }


@pytest.fixture
def restricted_namespace() -> Iterator[None]:
    kubectl("delete", "namespace", NAMESPACE, "--ignore-not-found", "--wait")  # an earlier test's may be on its way out
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    meta = {"name": NAMESPACE, "labels": labels}
    kubectl("apply", "-f", "-", given={"apiVersion": "v1", "kind": "Namespace", "metadata": meta})
    yield
    kubectl("delete", "namespace", NAMESPACE, "--wait=false")


@needs_cluster
@pytest.mark.e2e
@pytest.mark.timeout(1500)
@pytest.mark.usefixtures("restricted_namespace")
def test_the_image_compiles_with_no_rights_and_a_read_only_root() -> None:
    kubectl("create", "-f", "-", given=restricted_pod(built_image()))
    end = time.monotonic() + 150
    while get("pod", "probe", "-n", NAMESPACE)["status"]["phase"] not in ("Succeeded", "Failed"):
        assert time.monotonic() < end, kubectl("describe", "pod", "probe", "-n", NAMESPACE)
        time.sleep(1)
    log = kubectl("logs", "probe", "-n", NAMESPACE)
    assert "PROBE oslo 1000 /tmp oslo /opt/venv" in log, log
