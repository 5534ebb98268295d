"""Where the end-to-end tests run `oslo`: on this machine, or as a submitter on a cluster."""

from __future__ import annotations

import functools
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from kubectl import REPOSITORY, kubectl
from stand_in import Answer

OSLO = Path(sys.executable).with_name("oslo")
NAMESPACE = "oslo-e2e"
SUBMITTER = "oslo-ci"
"""The ServiceAccount of k8s/base for pipelines."""
CLAIM = "training"


class Place:
    """`oslo` as a command in a place: its arguments, its environment."""

    flags: tuple[str, ...] = ()
    """What `submit` is given."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "OSLO_ROOT": str(folder / "root")}

    def oslo(self, *arguments: object, timeout: float = 600) -> Answer:
        """Run it to its end."""
        command = [str(OSLO), *map(str, arguments)]
        ran = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env=self.env, stdin=subprocess.DEVNULL
        )
        return Answer(ran.returncode, ran.stdout, ran.stderr)

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        """Run it beside the test. Ctrl-C reaches it even where the tests ignore it (`make e2e &`)."""
        command, pipe = [str(OSLO), *map(str, arguments)], subprocess.PIPE
        heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=self.env, preexec_fn=heed)

    def submit(self, file: Path, *arguments: object) -> Answer:
        return self.oslo("submit", file, *self.flags, "-y", *arguments)

    def status(self, job: str) -> dict[str, Any]:
        answer = self.oslo("status", job, "-o", "json")
        assert answer.code == 0, answer.err
        found: dict[str, Any] = answer.json()
        return found

    def until(self, job: str, seen: Callable[[dict[str, Any]], bool], seconds: float = 240) -> dict[str, Any]:
        """Ask for the status until it shows what is wanted."""
        end = time.monotonic() + seconds
        while not seen(status := self.status(job)):
            assert time.monotonic() < end, f"it did not happen in time: {status}"
            time.sleep(0.5)
        return status

    def events(self, job: str, *arguments: object) -> list[dict[str, Any]]:
        """All events of its log."""
        answer = self.oslo("logs", job, "-o", "json", *arguments)
        assert answer.code == 0, answer.err
        lines = [json.loads(line) for line in answer.out.splitlines()]
        return [line["event"] for line in lines if line["event"]]

    def clear(self) -> None:
        """End what still runs."""
        for run in json.loads(self.oslo("list", "-o", "json").out or "[]"):
            if run["state"] not in ("succeeded", "failed", "cancelled"):
                self.oslo("cancel", run["handle"], "--force")


class Here(Place):
    """This machine."""

    flags = ("--local",)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.env["KUBECONFIG"] = "/nonexistent"


class OnCluster(Place):
    """A namespace that enforces Pod Security `restricted`, as its submitter."""

    def __init__(self, folder: Path, kubeconfig: Path, image: str) -> None:
        super().__init__(folder)
        self.image = image
        self.env["KUBECONFIG"] = str(kubeconfig)
        self.env["OSLO_DEFAULTS"] = str(folder / "defaults.yaml")
        job = {
            "image": image,
            "image_pull_policy": "Never" if image.startswith("localhost/") else "IfNotPresent",
            "volume": CLAIM,
            "nodes": 2,
            "gpus_per_node": 0,
            "memory": "4Gi",
            "shm": "256Mi",
            "service_account": "oslo-training",
            "env": {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        }
        (folder / "defaults.yaml").write_text(yaml.safe_dump({"job": job}))

    def kubectl(self, *arguments: str, given: object = None, check: bool = True) -> str:
        """As the admin, in the namespace."""
        return kubectl("-n", NAMESPACE, *arguments, given=given, check=check)

    def pods(self, run: str) -> dict[str, Any]:
        """The run's pods by name."""
        listed = self.kubectl("get", "pods", "-l", f"training.kubeflow.org/job-name={run}", "-o", "json")
        return {pod["metadata"]["name"]: pod for pod in json.loads(listed)["items"]}

    def clear(self) -> None:
        self.kubectl("delete", "pytorchjobs", "--all", "--wait=true")
        self.kubectl("delete", "pods", "-l", "app.kubernetes.io/name=opensloth", "--grace-period=0", "--force")


def write_job(folder: Path, model: Path, *, rows: int = 120, bad_row: bool = False, **training: Any) -> Path:
    """A config file with data that no other test has; training: keys of that section."""
    token = secrets.token_hex(3)
    data = folder / f"train-{token}.jsonl"
    lines = [_row(i, token) for i in range(rows)]
    if bad_row:
        lines.insert(2, json.dumps({"messages": "not a conversation"}))
    data.write_text("\n".join(lines) + "\n")
    settings = {"max_steps": 6, "learning_rate": 1e-3, "optim": "adamw_torch"}
    settings |= {} if "global_batch_size" in training else {"gradient_accumulation_steps": 1}
    values = {
        "name": f"e2e-{token}",
        "opensloth": {
            "fast_model_args": {"model_name": str(model), "max_seq_length": 128, "load_in_4bit": False},
            "lora_args": {"r": 4, "lora_alpha": 8},
        },
        "dataset": {"path": data.name},
        "training": settings | training,
    }
    file = folder / f"{values['name']}.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


def _row(i: int, token: str) -> str:
    user = {"role": "user", "content": f"{token}: what is {i} plus {i + 1}?"}
    return json.dumps({"messages": [user, {"role": "assistant", "content": f"It is {2 * i + 1}."}]})


# --- the cluster -------------------------------------------------------------------------------------


def prepare_namespace(folder: Path) -> Path:
    """Apply k8s/ as its README says, in a namespace of the tests' own; returns the submitter's kubeconfig."""
    operator = str(REPOSITORY / "k8s" / "operator")
    kubectl("apply", "--server-side", "--force-conflicts", "--field-manager=oslo", "-k", operator)
    await_operator()
    overlay = folder / "overlay"
    overlay.mkdir()
    base = os.path.relpath(REPOSITORY / "k8s" / "overlays" / "dev", overlay)
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump({"namespace": NAMESPACE, "resources": [base]}))
    manifest = kubectl("kustomize", str(overlay))
    kubectl("apply", "-f", "-", given=manifest)
    kubectl("-n", NAMESPACE, "delete", "pytorchjobs,pods,resourcequotas", "--all", "--wait=true")
    return submitter_kubeconfig(folder / "kubeconfig")


def await_operator() -> None:
    """Until its pod is ready, and its webhook has answered three times in a row.

    For some seconds after its pod has been replaced, the way to the service may still lead to the pod that is gone.
    """
    kubectl("-n", "kubeflow", "rollout", "status", "deployment/training-operator", "--timeout=180s")
    job = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": "webhook-probe"},
        "spec": {"pytorchReplicaSpecs": {}},
    }
    end, answered = time.monotonic() + 120, 0
    while answered < 3:
        assert time.monotonic() < end, "the operator's webhook does not answer"
        said = kubectl("create", "--dry-run=server", "-f", "-", given=job, check=False)
        answered = answered + 1 if "created" in said else 0
        time.sleep(0.5)


def submitter_kubeconfig(path: Path) -> Path:
    token = kubectl("-n", NAMESPACE, "create", "token", SUBMITTER, "--duration=4h").strip()
    config = json.loads(kubectl("config", "view", "--raw", "--minify", "-o", "json"))
    cluster = config["clusters"][0]
    context = {"cluster": cluster["name"], "user": "submitter", "namespace": NAMESPACE}
    config |= {
        "users": [{"name": "submitter", "user": {"token": token}}],
        "contexts": [{"name": "e2e", "context": context}],
        "current-context": "e2e",
    }
    path.write_text(json.dumps(config))
    return path
