"""Which GPU a run will have."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.gpu import Gpu, gpu_of_job, gpu_of_this_machine
from runner.spec import JobArgs

GIB = 1 << 30


@pytest.mark.parametrize(
    ("name", "gib", "tera"),
    [
        ("NVIDIA-H100-80GB-HBM3", 79.6, 989),
        ("NVIDIA H100 PCIe", 79.6, 756),
        ("NVIDIA-H200", 140.4, 989),
        ("NVIDIA-A100-SXM4-80GB", 80.0, 312),
        ("NVIDIA A100 80GB PCIe", 80.0, 312),
        ("NVIDIA-A100-SXM4-40GB", 40.0, 312),
        ("NVIDIA L40S", 45.0, 362),
        ("NVIDIA L4", 22.5, 121),
        ("NVIDIA A10G", 22.5, 125),
        ("NVIDIA GeForce RTX 4090", 24.0, 165),
    ],
)
def test_products_by_the_names_that_drivers_and_labels_have(name: str, gib: float, tera: float) -> None:
    product = Gpu(name, None, "").product
    assert product is not None
    assert product.card is not None
    assert product.mib / 1024 == pytest.approx(gib, abs=0.1)
    assert product.card.operations == tera * 1e12


@pytest.mark.parametrize("name", ["", "AMD Instinct MI300X", "NVIDIA-A100-SXM4-40GB-MIG-1g.5gb", "NVIDIA L400"])
def test_products_that_are_not_known(name: str) -> None:
    assert Gpu(name, None, "").product is None


def test_older_products_have_no_bfloat16() -> None:
    product = Gpu("Tesla T4", None, "").product
    assert product is not None
    assert product.card is None


@pytest.mark.parametrize(
    ("job", "memory", "source"),
    [
        (
            {"gpu_memory": "24Gi", "node_selector": {"nvidia.com/gpu.product": "NVIDIA-L40S"}},
            24 * GIB,
            "job.gpu_memory",
        ),
        (
            {"node_selector": {"nvidia.com/gpu.memory": "10240", "nvidia.com/gpu.product": "NVIDIA-L40S"}},
            10 * GIB,
            "job.node_selector",
        ),
        ({"node_selector": {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-40GB"}}, 40 * GIB, "job.node_selector"),
        ({"node_selector": {"nvidia.com/gpu.product": "NVIDIA-B7"}}, None, "job.node_selector"),
        ({}, None, "job.node_selector"),
    ],
)
def test_what_a_job_says(job: dict[str, object], memory: int | None, source: str) -> None:
    found = gpu_of_job(JobArgs(**job))  # type: ignore[arg-type]
    assert (found.memory, found.source) == (memory, source)


def nvidia_smi(folder: Path, script: str) -> dict[str, str]:
    """PATH with this script as nvidia-smi alone."""
    command = folder / "nvidia-smi"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    return {"PATH": f"{folder}:/bin:/usr/bin"}


def test_this_machine_has_the_smallest_of_its_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = 'test "$1" = --query-gpu=memory.total,name && echo "81559, NVIDIA H100 80GB HBM3\n23034, NVIDIA L4"'
    environ = nvidia_smi(tmp_path, script)
    monkeypatch.setenv("PATH", environ["PATH"])
    assert gpu_of_this_machine({}) == Gpu("NVIDIA L4", 23034 << 20, "this machine")
    assert gpu_of_this_machine({"CUDA_VISIBLE_DEVICES": ""}) is None


@pytest.mark.parametrize("script", ["exit 9", "echo No devices were found", "echo '[N/A], Thor'"])
def test_a_machine_without_one(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", nvidia_smi(tmp_path, script)["PATH"])
    assert gpu_of_this_machine({}) is None
    monkeypatch.setenv("PATH", "/nonexistent")
    assert gpu_of_this_machine({}) is None
