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
    assert not Gpu("Tesla T4", None, "").computes_in_bfloat16
    assert not T1000.computes_in_bfloat16
    assert Gpu("", None, "").computes_in_bfloat16


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


L4 = Gpu("NVIDIA L4", 23034 << 20, "this machine", 8)
T1000 = Gpu("NVIDIA T1000", 4096 << 20, "this machine", 7)
NOT_TOLD = Gpu("", None, "this machine")
BY_BUS = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


@pytest.mark.parametrize(
    ("devices", "environ", "gpu"),
    [
        ([0], BY_BUS, L4),
        ([1], BY_BUS, T1000),
        ([0, 1], {}, T1000),
        ([0], {}, NOT_TOLD),  # CUDA has its own order
        ([0], BY_BUS | {"CUDA_VISIBLE_DEVICES": "1,0"}, T1000),
        ([1], BY_BUS | {"CUDA_VISIBLE_DEVICES": "1,0"}, L4),
        ([0], {"CUDA_VISIBLE_DEVICES": "GPU-a1"}, L4),
        ([0], {"CUDA_VISIBLE_DEVICES": "GPU-"}, NOT_TOLD),
        ([0], {"CUDA_VISIBLE_DEVICES": "MIG-a1"}, NOT_TOLD),
        ([2], BY_BUS, NOT_TOLD),
        ([0], {"CUDA_VISIBLE_DEVICES": ""}, None),
    ],
)
def test_the_smallest_of_the_gpus_that_the_run_takes(
    devices: list[int], environ: dict[str, str], gpu: Gpu | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards = "0, GPU-a1, 23034, 8.9, NVIDIA L4\n1, GPU-b2, 4096, 7.5, NVIDIA T1000"
    script = f'test "$1" = --query-gpu=index,uuid,memory.total,compute_cap,name && echo "{cards}"'
    monkeypatch.setenv("PATH", nvidia_smi(tmp_path, script)["PATH"])
    assert gpu_of_this_machine(devices, environ) == gpu


def test_cards_that_are_alike_need_no_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = 'echo "0, GPU-a1, 23034, 8.9, NVIDIA L4\n1, GPU-b2, 23034, 8.9, NVIDIA L4"'
    monkeypatch.setenv("PATH", nvidia_smi(tmp_path, script)["PATH"])
    assert gpu_of_this_machine([1], {}) == L4


@pytest.mark.parametrize("script", ["exit 9", "echo No devices were found", "echo '0, GPU-1, [N/A], 11.0, Thor'"])
def test_a_machine_without_one(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", nvidia_smi(tmp_path, script)["PATH"])
    assert gpu_of_this_machine([0], {}) is None
    monkeypatch.setenv("PATH", "/nonexistent")
    assert gpu_of_this_machine([0], {}) is None
