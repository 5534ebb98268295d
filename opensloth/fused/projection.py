"""Linear layers of one input as one product, with their adapters in the borders of its weight.

    input   [x | t]          t = x Aᵗ, written beside the input
    weight  [ W | sB ]       y  = [x | t] [W | sB]ᵗ            one product, the adapter included
            [ A |    ]       dx = [dy | u] [W ; A]             u = dy sB, written beside the gradient

So an adapter costs thin products only, never another pass over a large output. W holds several layers' weights one
above the other (q, k and v; gate and up). Frozen ones are taken over: the layers keep working on their part of W.
Trained ones are copied into it after every step; frozen ones of another type, which would be rounded, once. Those in 4
bits stay where they are: W is made anew of them for every use, in a buffer that projections of one shape share. B is
block-diagonal.

T tokens, K input width, N output width, R rank of all adapters together, rounded up to a multiple of 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from opensloth.fused.operations import FourBit, add_product, dequantise, gradient_of
from opensloth.memory_estimate import BORDER, row_stride


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


Shared = dict[tuple[int, int, int], Tensor]
"""The buffer of all projections of one shape whose weights are in 4 bits: one of them is at work at a time."""


class Projection:
    """One product for all `linears`, which are plain ones or peft's with one LoRA adapter, all of one precision."""

    def __init__(self, linears: Sequence[Any], dtype: torch.dtype, shared: Shared) -> None:
        """dtype: of inputs, products and W. shared: where weights in 4 bits are made whole."""
        plain = [linear.base_layer if hasattr(linear, "base_layer") else linear for linear in linears]
        ranks = [_rank(linear) for linear in linears]
        self.inputs = int(plain[0].in_features)
        self.outputs = sum(int(linear.out_features) for linear in plain)
        self.rank = -(-sum(ranks) // BORDER) * BORDER
        self._in_four_bits = FourBit.holds(plain[0])
        self._buffer = self._new_buffer(plain[0].weight.device, dtype, shared)
        self._bias = self._buffer.new_zeros(self.outputs) if any(p.bias is not None for p in plain) else None
        self._adapters: list[_Adapter] = []
        self._taken_over: list[Any] = []
        self._trained: list[tuple[nn.Parameter, slice]] = []
        self._trained_biases: list[tuple[nn.Parameter, slice]] = []
        self._packed: list[tuple[FourBit, Tensor]] = []
        begin = at = 0
        for linear, base, rank in zip(linears, plain, ranks, strict=True):
            rows = slice(begin, begin + base.out_features)
            self._take_over(base, rows)
            if rank:
                self._adapters.append(_adapter(linear, rows, slice(at, at + rank)))
            begin, at = rows.stop, at + rank
        self._with_b = self._buffer[: self.outputs]
        self._with_a = self._buffer[:, : self.inputs]
        self._a = self._buffer[self.outputs :, : self.inputs]
        self._b = self._buffer[: self.outputs, self.inputs :]
        # Where the borders stay: in the buffer, unless it is shared.
        self._own_a = torch.zeros_like(self._a) if self._in_four_bits else self._a
        self._own_b = torch.zeros_like(self._b) if self._in_four_bits else self._b

    def _new_buffer(self, device: torch.device, dtype: torch.dtype, shared: Shared) -> Tensor:
        if self._in_four_bits and self.shape in shared:
            return shared[self.shape]
        buffer = torch.zeros(self.outputs + self.rank, self.inputs + self.rank, dtype=dtype, device=device)
        if self._in_four_bits:
            shared[self.shape] = buffer
        return buffer

    def _take_over(self, base: Any, rows: slice) -> None:
        place = self._buffer[rows, : self.inputs]
        if self._in_four_bits:
            self._packed.append((FourBit.of(base), place))
        else:
            self._take_over_weight(base, place, rows)
        if base.bias is not None and self._bias is not None:
            self._bias[rows] = base.bias.data
            if base.bias.requires_grad:
                self._trained_biases.append((base.bias, rows))

    def _take_over_weight(self, base: Any, place: Tensor, rows: slice) -> None:
        place.copy_(base.weight.data)
        if base.weight.requires_grad:
            self._trained.append((base.weight, rows))
        elif base.weight.dtype == place.dtype:
            base.weight.data = place
            self._taken_over.append(base)

    def copies(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Trained weights, and where they are copied to once they have changed; for adapters that is `borders`."""
        weights = [(weight, self._buffer[rows, : self.inputs]) for weight, rows in self._trained]
        if self._bias is None:
            return weights
        return weights + [(bias, self._bias[rows]) for bias, rows in self._trained_biases]

    def load(self) -> None:
        """Make the buffer hold this projection: to be called before it is used after another of its shape."""
        if not self._in_four_bits:
            return
        for weight, place in self._packed:
            dequantise(weight, place)
        self._a.copy_(self._own_a)
        self._b.copy_(self._own_b)

    def release(self) -> None:
        """Give the layers weights of their own again: nobody else expects them in a wider buffer."""
        for base in self._taken_over:
            base.weight.data = base.weight.data.clone(memory_format=torch.contiguous_format)
        self._taken_over.clear()

    def borders(self) -> list[tuple[Tensor, Tensor, float]]:
        """(parameter, its place in the border, scale) of every adapter's halves."""
        return [
            entry
            for adapter in self._adapters
            for entry in (
                (adapter.a.data, self._own_a[adapter.ranks], 1.0),
                (adapter.b.data, self._own_b[adapter.rows, adapter.ranks], adapter.scaling),
            )
        ]

    def gradients(self, staged: Staged) -> list[tuple[Tensor, Tensor, float]]:
        """(where `add_gradients` leaves it, the parameter's gradient, scale) of every adapter's halves in training."""
        return [
            (place, gradient_of(half), scale)
            for adapter in self._adapters
            for place, half, scale in (
                (staged.a[adapter.ranks], adapter.a, 1.0),
                (staged.b[adapter.rows, adapter.ranks], adapter.b, adapter.scaling),
            )
            if half.requires_grad
        ]

    @property
    def shape(self) -> tuple[int, int, int]:
        """N, K, R."""
        return self.outputs, self.inputs, self.rank

    def room_to_stage(self) -> Staged:
        """Room for the gradients of both borders; projections of equal `shape` may share it."""
        a = torch.empty(self.rank, self.inputs, dtype=torch.float32, device=self._buffer.device)
        return Staged(a, torch.empty(self.outputs, self.rank, dtype=torch.float32, device=self._buffer.device))

    def room_for_input(self, tokens: int, *, dense: bool = False) -> Tensor:
        """[T, K + R], to be filled up to K. dense: with nothing between its rows."""
        if dense:
            return self._buffer.new_empty(tokens, self.inputs + self.rank)
        return self._room(tokens, self.inputs)

    def room_for_gradient(self, tokens: int) -> Tensor:
        """[T, N + R], to be filled up to N."""
        return self._room(tokens, self.outputs)

    def _room(self, tokens: int, width: int) -> Tensor:
        return self._buffer.new_empty(tokens, row_stride(width, self.rank))[:, : width + self.rank]

    def room_for_border(self, tokens: int) -> Tensor:
        """[T, R], what is beside an input."""
        return self._buffer.new_empty(tokens, self.rank)

    def forward(self, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """[T, N] from `room_for_input`, whose border is filled; `residual` is added. out: is written, if given."""
        self.fill_border(x)
        if residual is not None:
            return torch.addmm(residual, x, self._with_b.T, out=out)
        if self._bias is not None:
            return torch.addmm(self._bias, x, self._with_b.T, out=out)
        return torch.mm(x, self._with_b.T, out=out)

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

    def add_gradients(self, dy: Tensor, x: Tensor, x_border: Tensor, staged: Staged) -> None:
        """Add to the gradients of trained weights, and stage those of the adapters.

        dy: [T, N + R] with its border; x: [T, K]; x_border: [T, R].
        """
        if self._adapters:
            add_product(dy[:, self.outputs :].T, x, staged.a, accumulate=False)
            add_product(dy[:, : self.outputs].T, x_border, staged.b, accumulate=False)
        for weight, rows in self._trained:
            add_product(dy[:, rows].T, x, gradient_of(weight), accumulate=True)
        for bias, rows in self._trained_biases:
            gradient_of(bias).add_(dy[:, rows].sum(0, dtype=torch.float32))


def _rank(linear: Any) -> int:
    return int(linear.r[_active(linear)]) if hasattr(linear, "base_layer") else 0


def _active(linear: Any) -> str:
    (name,) = linear.active_adapters
    return str(name)


def _adapter(linear: Any, rows: slice, ranks: slice) -> _Adapter:
    name = _active(linear)
    return _Adapter(linear.lora_A[name].weight, linear.lora_B[name].weight, linear.scaling[name], rows, ranks)
