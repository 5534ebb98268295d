"""Which GPU a run will have: what `job` says of a cluster's, or this machine's own."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from opensloth.speed_estimate import Card
from runner.quantities import parse_quantity
from runner.spec import JobArgs

PRODUCT_LABEL: Final = "nvidia.com/gpu.product"
MEMORY_LABEL: Final = "nvidia.com/gpu.memory"
"""What NVIDIA's feature discovery puts on nodes: the name with '-' for spaces, and MiB."""
THIS_MACHINE: Final = "this machine"
_MIB: Final = 1 << 20
_AMPERE: Final = 8
_SECONDS: Final = 10


@dataclass(frozen=True)
class Product:
    """mib: as its driver reports it. card: None where it does not compute in bfloat16."""

    mib: int
    card: Card | None


def _card(tera_operations: float, gigabytes: float, pcie: int = 4, *, hopper: bool = False) -> Card:
    """pcie: its generation, of 16 lanes."""
    return Card(tera_operations * 1e12, gigabytes * 1e9, 2.0 ** (pcie + 1) * 1e9, hopper)


_PRODUCTS: Final = (
    ("B200", Product(183_359, _card(2250, 8000, 5))),
    ("H200", Product(143_771, _card(989, 4800, 5, hopper=True))),
    ("H100 NVL", Product(95_830, _card(835, 3900, 5, hopper=True))),
    ("H100 PCIE", Product(81_559, _card(756, 2000, 5, hopper=True))),
    ("H100", Product(81_559, _card(989, 3350, 5, hopper=True))),
    (r"A100.* 80GB", Product(81_920, _card(312, 2000))),
    ("A100", Product(40_960, _card(312, 1555))),
    ("L40S", Product(46_068, _card(362, 864))),
    ("L4", Product(23_034, _card(121, 300))),
    ("A10G?", Product(23_028, _card(125, 600))),
    ("RTX A6000", Product(49_140, _card(155, 768))),
    ("RTX 6000 ADA", Product(49_140, _card(364, 960))),
    ("RTX 5090", Product(32_607, _card(210, 1792, 5))),
    ("RTX 4090", Product(24_564, _card(165, 1008))),
    ("RTX 3090", Product(24_576, _card(71, 936))),
    ("T4", Product(15_360, None)),
    (r"V100.* 32GB", Product(32_768, None)),
    ("V100", Product(16_384, None)),
)
"""What a product's name has in it, the narrower first -> as published."""


@dataclass(frozen=True)
class Gpu:
    """name: "" when it is not known. memory: bytes; None: not known. source: who said so.

    generation: of its compute capability the number before the point; None: not known.
    """

    name: str
    memory: int | None
    source: str
    generation: int | None = None

    @property
    def product(self) -> Product | None:
        words = self.name.upper().replace("-", " ")
        if " MIG " in words:  # a slice
            return None
        return next((product for part, product in _PRODUCTS if re.search(rf"\b{part}\b", words)), None)

    @property
    def computes_in_bfloat16(self) -> bool:
        """Taken for granted of one that is not known."""
        if self.generation is not None:
            return self.generation >= _AMPERE
        return self.product is None or self.product.card is not None


def gpu_of_job(job: JobArgs) -> Gpu:
    """By `job.gpu_memory`, then by the labels that `job.node_selector` asks for."""
    name = job.node_selector.get(PRODUCT_LABEL, "")
    labelled = job.node_selector.get(MEMORY_LABEL, "")
    if job.gpu_memory is not None:
        return Gpu(name, int(parse_quantity(job.gpu_memory)), "job.gpu_memory")
    if labelled.isdigit():
        return Gpu(name, int(labelled) * _MIB, "job.node_selector")
    product = Gpu(name, None, "").product
    return Gpu(name, product.mib * _MIB if product else None, "job.node_selector")


@dataclass(frozen=True)
class _Installed:
    index: str
    uuid: str
    mib: int
    generation: int
    name: str


def gpu_of_this_machine(devices: Sequence[int], environ: Mapping[str, str] = os.environ) -> Gpu | None:
    """The smallest one of those that a run with these `opensloth.devices` takes.

    Without a memory where it cannot be told which those are. None: there is none, or its driver does not answer.
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1"):
        return None
    installed = _installed()
    if not installed:
        return None
    listed = [card.index for card in installed] if visible is None else [part for part in visible.split(",") if part]
    if max(devices) >= len(listed):  # the launcher will say so
        return Gpu("", None, THIS_MACHINE)
    by_bus = environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    chosen = [_named(listed[device], installed, by_bus=by_bus) for device in devices]
    known = [card for card in chosen if card is not None]
    if visible is None and len(devices) == len(installed):
        known = installed
    elif len(known) < len(chosen):
        return Gpu("", None, THIS_MACHINE)
    smallest = min(known, key=lambda card: card.mib)
    return Gpu(smallest.name, smallest.mib * _MIB, THIS_MACHINE, smallest.generation)


def _installed() -> list[_Installed]:
    command = ["nvidia-smi", "--query-gpu=index,uuid,memory.total,compute_cap,name", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return []
    found = re.findall(r"(?m)^(\d+), (\S+), (\d+), (\d+)\.\d+, (.+?)\s*$", done.stdout)
    return [_Installed(index, uuid, int(mib), int(generation), name) for index, uuid, mib, generation, name in found]


def _named(device: str, installed: list[_Installed], *, by_bus: bool) -> _Installed | None:
    """The card behind an entry of CUDA_VISIBLE_DEVICES; None: it cannot be told.

    CUDA numbers the fastest first unless it is told to go by the bus, as nvidia-smi does.
    """
    if device.isdigit():
        alike = len({(card.mib, card.name) for card in installed}) == 1
        return next((card for card in installed if card.index == device), None) if by_bus or alike else None
    found = [card for card in installed if card.uuid.startswith(device)]  # CUDA takes a uuid's beginning
    return found[0] if len(found) == 1 else None
