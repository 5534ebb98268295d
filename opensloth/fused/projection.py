"""Linear layers of one input, with their adapters in the borders of one weight.

    input   [x | t]          t = x Aᵗ, written beside the input
    weight  [ W | sB ]       y  = [x | t] [W | sB]ᵗ            one product, the adapter included
            [ A |    ]       dx = [dy | u] [W ; A]             u = dy sB, written beside the gradient

So an adapter costs thin products only, never another pass over a large output. W holds several layers' weights one
above the other (q, k and v; gate and up); the layers keep working on their part of it. B is block-diagonal.

T tokens, K input width, N output width, R rank of all adapters together, rounded up to a multiple of 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_ALIGNMENT = 8  # elements: what fast matrix products ask of a row's stride


@dataclass(frozen=True)
class _Adapter:
    """rows: of W. ranks: of the border."""

    a: nn.Parameter
    b: nn.Parameter
    scaling: float
    rows: slice
    ranks: slice


@dataclass(frozen=True)
class Staged:
    """Gradients of a projection's borders before they are dealt out. a: [R, K]; b: [N, R]. Float32."""

    a: Tensor
    b: Tensor


class Projection:
    """One product for all `linears`, which are plain ones or peft's with one LoRA adapter."""

    def __init__(self, linears: Sequence[Any]) -> None:
        plain = [linear.base_layer if hasattr(linear, "base_layer") else linear for linear in linears]
        weights = [linear.weight for linear in plain]
        self.inputs, self.outputs = weights[0].shape[1], sum(weight.shape[0] for weight in weights)
        ranks = [_rank(linear) for linear in linears]
        self.rank = -(-sum(ranks) // _ALIGNMENT) * _ALIGNMENT
        self._buffer = torch.zeros(
            self.outputs + self.rank, self.inputs + self.rank, dtype=weights[0].dtype, device=weights[0].device
        )
        self._adapters: list[_Adapter] = []
        self.bias = _joined_bias(plain)
        row = at = 0
        for linear, base, rank in zip(linears, plain, ranks, strict=True):
            rows = slice(row, row + base.weight.shape[0])
            self._buffer[rows, : self.inputs] = base.weight.data
            base.weight.data = self._buffer[rows, : self.inputs]
            if rank:
                self._adapters.append(_adapter(linear, rows, slice(at, at + rank)))
            row, at = rows.stop, at + rank
        self._weight = self._buffer[: self.outputs, : self.inputs]
        self._with_b = self._buffer[: self.outputs]
        self._with_a = self._buffer[:, : self.inputs]
        self._a = self._buffer[self.outputs :, : self.inputs]
        self._b = self._buffer[: self.outputs, self.inputs :]

    def borders(self) -> list[tuple[Tensor, Tensor, float]]:
        """(parameter, its place in the border, scale) of every adapter's halves."""
        return [
            entry
            for adapter in self._adapters
            for entry in (
                (adapter.a.data, self._a[adapter.ranks], 1.0),
                (adapter.b.data, self._b[adapter.rows, adapter.ranks], adapter.scaling),
            )
        ]

    def gradients(self, staged: Staged) -> list[tuple[Tensor, Tensor, float]]:
        """(where `stage_gradients` leaves it, the parameter's gradient, scale) of every adapter's halves."""
        return [
            entry
            for adapter in self._adapters
            for entry in (
                (staged.a[adapter.ranks], _gradient_of(adapter.a), 1.0),
                (staged.b[adapter.rows, adapter.ranks], _gradient_of(adapter.b), adapter.scaling),
            )
        ]

    def room_to_stage(self) -> Staged:
        """Room for the gradients of both borders; projections of equal shape may share it."""
        a = torch.empty(self.rank, self.inputs, dtype=torch.float32, device=self._buffer.device)
        return Staged(a, torch.empty(self.outputs, self.rank, dtype=torch.float32, device=self._buffer.device))

    def room_for_input(self, tokens: int) -> Tensor:
        """[T, K + R], to be filled up to K."""
        return torch.empty(tokens, self.inputs + self.rank, dtype=self._buffer.dtype, device=self._buffer.device)

    def room_for_gradient(self, tokens: int) -> Tensor:
        """[T, N + R], to be filled up to N."""
        return torch.empty(tokens, self.outputs + self.rank, dtype=self._buffer.dtype, device=self._buffer.device)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[T, N] from `room_for_input`, whose border is filled; `residual` is added."""
        self.fill_border(x)
        if residual is not None:
            return torch.addmm(residual, x, self._with_b.T)
        if self.bias is not None:
            return torch.addmm(self.bias, x, self._with_b.T)
        return torch.mm(x, self._with_b.T)

    def fill_border(self, x: Tensor) -> None:
        if self.rank:
            torch.mm(x[:, : self.inputs], self._a.T, out=x[:, self.inputs :])

    def input_gradient(self, dy: Tensor) -> Tensor:
        """[T, K] from `room_for_gradient`, whose border is filled."""
        self.fill_gradient_border(dy)
        return torch.mm(dy, self._with_a)

    def fill_gradient_border(self, dy: Tensor) -> None:
        if self.rank:
            torch.mm(dy[:, : self.outputs], self._b, out=dy[:, self.outputs :])

    def stage_gradients(self, dy: Tensor, x: Tensor, x_border: Tensor, staged: Staged) -> None:
        """dy: [T, N + R] with its border; x: [T, K]; x_border: [T, R]."""
        if self._adapters:
            _product32(dy[:, self.outputs :].T, x, staged.a)
            _product32(dy[:, : self.outputs].T, x_border, staged.b)


def _gradient_of(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    if gradient is None:
        raise RuntimeError("an adapter without room for its gradient")
    return gradient


def _product32(one: Tensor, other: Tensor, out: Tensor) -> None:
    """one @ other in float32, whatever they are kept in."""
    if one.is_cuda and one.dtype != torch.float32:
        torch.mm(one, other, out_dtype=torch.float32, out=out)
    else:
        torch.mm(one.float(), other.float(), out=out)


def _rank(linear: Any) -> int:
    return int(linear.r[_active(linear)]) if hasattr(linear, "base_layer") else 0


def _active(linear: Any) -> str:
    (name,) = linear.active_adapters
    return str(name)


def _adapter(linear: Any, rows: slice, ranks: slice) -> _Adapter:
    name = _active(linear)
    return _Adapter(linear.lora_A[name].weight, linear.lora_B[name].weight, linear.scaling[name], rows, ranks)


def _joined_bias(plain: Sequence[Any]) -> Tensor | None:
    """One bias for all outputs, which the layers go on sharing; None when none has one."""
    if all(linear.bias is None for linear in plain):
        return None
    parts = [
        linear.bias.data if linear.bias is not None else linear.weight.new_zeros(linear.weight.shape[0])
        for linear in plain
    ]
    return torch.cat(parts)
