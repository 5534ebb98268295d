"""The manifests that an admin applies: they build, give no more rights than the commands use, and pass `restricted`."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from kubectl import REPOSITORY

from runner import pod
from runner.spec import check_job

K8S: Final = REPOSITORY / "k8s"
OVERLAYS: Final = ("base", "overlays/dev", "overlays/prod", "overlays/kueue")
RIGHTS: Final = {
    "oslo-submitter": {
        "pytorchjobs": {"create", "get", "list", "patch", "delete"},
        "pods": {"get", "list"},
        "pods/log": {"get"},
        "events": {"list"},
        "persistentvolumeclaims": {"get"},
    },
    "oslo-helper": {"pods": {"create", "get", "list", "delete"}, "pods/exec": {"create", "get"}},
    "oslo-queues": {"workloads": {"list", "patch"}},
}
needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
Manifest = dict[str, Any]


@cache
def build(folder: Path) -> list[Manifest]:
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]


def of_kind(kind: str, overlay: str) -> list[Manifest]:
    return [manifest for manifest in build(K8S / overlay) if manifest["kind"] == kind]


def one(kind: str, overlay: str = "base") -> Manifest:
    (found,) = of_kind(kind, overlay)
    return found


@pytest.mark.parametrize("path", sorted(K8S.rglob("*.yaml")), ids=lambda path: path.relative_to(K8S).as_posix())
def test_every_file_parses(path: Path) -> None:
    text = re.sub(r"\{\{\.\w+\}\}", "x", path.read_text())  # one is a template of the operator's
    assert all(list(yaml.safe_load_all(text)))


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_builds_whole(overlay: str) -> None:
    kinds = {manifest["kind"] for manifest in build(K8S / overlay)}
    assert {"Namespace", "ServiceAccount", "Role", "RoleBinding", "PersistentVolumeClaim", "NetworkPolicy"} <= kinds
    images = [
        container["image"]
        for container in one("CronJob", overlay)["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    ]
    assert overlay == "base" or all(":" in image for image in images)


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_rights_are_those_of_the_table_and_of_one_namespace(overlay: str) -> None:
    assert not of_kind("ClusterRole", overlay)
    assert not of_kind("ClusterRoleBinding", overlay)
    for role in of_kind("Role", overlay):
        given = {name: set(rule["verbs"]) for rule in role["rules"] for name in rule["resources"]}
        assert given == RIGHTS[role["metadata"]["name"]]
    assert {role["metadata"]["name"] for role in of_kind("Role", "overlays/kueue")} == set(RIGHTS)


def test_the_readme_explains_every_right() -> None:
    rows = [line for line in (K8S / "README.md").read_text().splitlines() if line.startswith("| `oslo-")]
    explained: dict[str, dict[str, set[str]]] = {}
    for row in rows:
        role, resource, verb, why = (cell.strip().strip("`") for cell in row.strip("|").split("|"))
        assert why
        for name in verb.replace("`", "").split(", "):
            explained.setdefault(role, {}).setdefault(resource, set()).add(name)
    assert explained == RIGHTS


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_namespace_of_another_name_is_one_line(tmp_path: Path, overlay: str) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    resource = Path("../" * len(mine.parts[1:])) / K8S.relative_to("/") / overlay
    (mine / "kustomization.yaml").write_text(f"namespace: mine\nresources: [{resource}]\n")
    manifests = build(mine)
    assert {manifest["metadata"].get("namespace", "mine") for manifest in manifests} == {"mine"}
    assert [m["metadata"]["name"] for m in manifests if m["kind"] == "Namespace"] == ["mine"]
    accounts = [
        s for m in manifests if m["kind"] == "RoleBinding" for s in m["subjects"] if s["kind"] == "ServiceAccount"
    ]
    assert {account["namespace"] for account in accounts} == {"mine"}


@needs_kubectl
def test_the_namespace_is_restricted() -> None:
    labels = one("Namespace")["metadata"]["labels"]
    assert {labels[f"pod-security.kubernetes.io/{mode}"] for mode in ("enforce", "warn", "audit")} == {"restricted"}


@needs_kubectl
def test_no_account_mounts_a_token() -> None:
    assert all(account["automountServiceAccountToken"] is False for account in of_kind("ServiceAccount", "base"))


def containers_of_pods() -> Iterator[tuple[Manifest, Manifest]]:
    """(pod's securityContext, container)"""
    spec = one("CronJob")["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    yield spec["securityContext"], spec["containers"][0]
    text = (K8S / "operator" / "initContainer.yaml").read_text()
    for word in ("InitContainerImage", "MasterAddr", "MaxTries"):
        assert f"{{{{.{word}}}}}" in text
        text = text.replace(f"{{{{.{word}}}}}", "x")
    (init,) = yaml.safe_load(text)
    assert init["name"] == "init-pytorch"
    yield init["securityContext"], init


@needs_kubectl
def test_what_the_folder_starts_passes_pod_security_restricted() -> None:
    for security, container in containers_of_pods():
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] > 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["securityContext"]["readOnlyRootFilesystem"] is True


@needs_kubectl
def test_pruning_runs_as_the_training_pods_do_where_they_keep_their_files() -> None:
    spec = one("CronJob")["spec"]
    template = spec["jobTemplate"]["spec"]["template"]["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    assert template["securityContext"]["runAsUser"] == pod.USER_ID
    assert {"name": "shared", "mountPath": "/shared"} in template["containers"][0]["volumeMounts"]
    command = template["containers"][0]["command"]
    assert command[:3] == ["python", "-m", "opensloth.prune"]


@needs_kubectl
def test_the_policies_select_the_pods_that_oslo_makes() -> None:
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in of_kind("NetworkPolicy", "base")}
    training = policies["oslo-training"]
    assert training["podSelector"] == {"matchLabels": {"app.kubernetes.io/name": "opensloth"}}
    assert training["ingress"] == [{"from": [{"podSelector": training["podSelector"]}]}]
    closed = policies["oslo-volume-only"]
    assert closed["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in closed
    assert "egress" not in closed


def test_the_defaults_for_users_are_a_valid_job_section() -> None:
    values = yaml.safe_load((K8S / "defaults.yaml").read_text())
    assert list(values) == ["job"]
    job, problems = check_job(values["job"])
    assert problems == []
    assert job is not None
    assert (job.volume, job.service_account) == ("training", "oslo-training")


@needs_kubectl
def test_the_operators_part_adds_and_replaces_nothing() -> None:
    deployment, config_map = one("Deployment", "operator"), one("ConfigMap", "operator")
    spec = deployment["spec"]["template"]["spec"]
    assert set(spec) == {"containers", "volumes"}
    assert set(spec["containers"][0]) == {"name", "volumeMounts"}
    assert spec["volumes"][0]["configMap"]["name"] == config_map["metadata"]["name"] != "oslo-init-container"
    assert spec["containers"][0]["volumeMounts"][0]["mountPath"] == "/etc/config"
    assert list(config_map["data"]) == ["initContainer.yaml"]
