"""Processes that train together: the only reader of torchrun's variables, and every collective.

Gradients are summed in one flat buffer in a fixed order, not by DDP: DDP rebuilds its buckets after the
first step, so that a resumed run of four ranks would add in another order than an uninterrupted one.
"""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from opensloth import contract


@dataclass(frozen=True)
class World:
    """This process among the others. Without torchrun: the only one."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def is_launched() -> bool:
    """Whether a launcher started this process, with or without torchrun: it shows a rank its own devices only."""
    return contract.LAUNCHER_ENV in os.environ or _under_torchrun()


def _under_torchrun() -> bool:
    return "LOCAL_RANK" in os.environ


def join_world(*, cuda: bool, timeout_seconds: int, devices: Sequence[int] = (0,)) -> World:
    """Read torchrun's variables, choose the device, and meet the other processes.

    devices: without torchrun, the first of these CUDA devices is used; the launcher shows each rank only its own.
    RANK alone is not trusted: in a pod the operator sets it to the node's number; only torchrun sets LOCAL_RANK.
    """
    rank, local_rank, size = (
        int(os.environ[name]) if _under_torchrun() else default
        for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    device = torch.device("cuda", local_rank if is_launched() else devices[0]) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if size > 1 and not torch_dist.is_initialized():
        torch_dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if cuda else "gloo",
            timeout=dt.timedelta(seconds=timeout_seconds),
            device_id=device if cuda else None,
        )
    return World(rank, local_rank, size, device)


def leave_world() -> None:
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


def sum_over_ranks(values: Sequence[float], world: World) -> list[float]:
    """Element-wise sums over all ranks, in float64; over the hosts' network, so that no device is waited for."""
    if world.size == 1:
        return list(values)
    buffer = torch.tensor(values, dtype=torch.float64)
    torch_dist.all_reduce(buffer)
    return list(buffer.tolist())


def barrier(world: World) -> None:
    """Return when every rank is here."""
    sum_over_ranks([0.0], world)


def sum_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Replace each .grad by its sum over all ranks; a rank without a gradient counts as zero."""
    if world.size == 1:
        return
    trained = list(parameters)
    flat = torch.cat([_gradient(parameter).reshape(-1).float() for parameter in trained])
    torch_dist.all_reduce(flat)
    begin = 0
    for parameter in trained:
        end = begin + parameter.numel()
        parameter.grad = flat[begin:end].view_as(parameter).to(parameter.dtype)
        begin = end


def broadcast_parameters(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Give every rank the weights of rank 0."""
    if world.size > 1:
        for parameter in parameters:
            torch_dist.broadcast(parameter.data, src=0)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
