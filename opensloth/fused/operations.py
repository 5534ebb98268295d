"""What a fused layer is made of besides matrix products: Triton on CUDA, plain torch elsewhere.

The plain versions are the definition that the kernels are tested against, and let the whole layer be checked on a
machine without a GPU. T tokens; rows may lie in a wider buffer, dense in their last dimension.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 64
"""Tokens of an attention tile."""
LOG2_E = 1 / math.log(2)
"""exp(a) = 2 ** (a * LOG2_E)."""


@dataclass(frozen=True)
class LongDocuments:
    """Documents that attend each by itself: they lie end to end, shorter ones first, with room behind each.

    lengths: room included; S in all. rows: int64 [S], the token in each place, -1 in room. places: int64 [T], each
    token's place, -1 if it has none.
    """

    lengths: tuple[int, ...]
    rows: Tensor
    places: Tensor


@dataclass(frozen=True)
class Documents:
    """Where documents lie, and the turns of their positions.

    offsets: where each begins, and T. tiles: int32 [n, 3], `tiles_of` those that are not long. cos, sin: float32
    [T, D / 2].
    """

    offsets: list[int]
    tiles: Tensor
    cos: Tensor
    sin: Tensor
    long: LongDocuments | None = None

    def short(self) -> Iterator[slice]:
        """The tokens of each that is not long; known on a CPU only."""
        for begin, end in itertools.pairwise(self.offsets):
            if self.long is None or self.long.places[begin] < 0:
                yield slice(begin, end)


@dataclass(frozen=True)
class Heads:
    """How many query heads and key-value heads attend, and what scores are multiplied with."""

    query: int
    key_value: int
    scale: float

    @property
    def group(self) -> int:
        """Query heads that share a key-value head."""
        return self.query // self.key_value


def tiles_of(offsets: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """int32 [n, 3]: first token, its document's first, its document's end, of every tile of every document."""
    bounds = itertools.pairwise(offsets.tolist())
    rows = [(at, begin, end) for begin, end in bounds for at in range(begin, end, TILE)]
    return np.array(rows, dtype=np.int32)


def rows_of(table: Tensor, ids: Tensor) -> Tensor:
    """table[ids]; the table may lie in pinned host memory where ids are on a GPU. table: [V, D]; ids: int64 [T]."""
    if table.device == ids.device:
        return table[ids]
    out = torch.empty(len(ids), table.shape[1], dtype=table.dtype, device=ids.device)
    gather(table, ids, out)
    return out


def gather(source: Tensor, at: Tensor, out: Tensor) -> None:
    """out = source[at], and zeros where `at` is -1. source: [V, D]; at: int64 [n]; out: [n, D].

    source may lie in pinned host memory where the others are on a GPU.
    """
    if at.is_cuda:
        from opensloth.fused.kernels import rows

        rows.gather(source, at, out)
        return
    out.copy_(source[at.clamp(min=0)].masked_fill((at < 0)[:, None], 0))


def scatter(source: Tensor, at: Tensor, out: Tensor) -> None:
    """out[at] = source, but where `at` is -1. source: [n, D]; at: int64 [n], no row twice; out: [V, D]."""
    if at.is_cuda:
        from opensloth.fused.kernels import rows

        rows.scatter(source, at, out)
        return
    out[at[at >= 0]] = source[at >= 0]


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    """x, out: [T, D]; out is written. Returns float32 [T], one over each row's root mean square."""
    if x.is_cuda:
        from opensloth.fused.kernels import elementwise

        rstd = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
        elementwise.rms_norm(x, weight, eps, out, rstd)
        return rstd
    wide = x.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1) + eps)
    out.copy_(wide * rstd[:, None] * weight.float())
    return rstd


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, residual: Tensor | None, out: Tensor
) -> None:
    """out: gradient of x, plus `residual`; all [T, D]."""
    if x.is_cuda:
        from opensloth.fused.kernels import elementwise

        elementwise.rms_norm_backward(grad, x, weight, rstd, residual, out)
        return
    weighted, normed = grad.float() * weight.float(), x.float() * rstd[:, None]
    dx = rstd[:, None] * (weighted - normed * (weighted * normed).mean(-1, keepdim=True))
    out.copy_(dx if residual is None else dx + residual.float())


def add_norm_gradient(grad: Tensor, x: Tensor, rstd: Tensor, into: Tensor) -> None:
    """Add to a norm's weight gradient, float32 [D]. grad: of the norm's output; x: its input; [T, D] each."""
    if x.is_cuda:
        from opensloth.fused.kernels import elementwise

        into.add_(elementwise.norm_gradient(grad, x, rstd).sum(0))
        return
    into.add_((grad.float() * x.float() * rstd[:, None]).sum(0))


def gradient_of(parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    if gradient is None:
        raise RuntimeError("a trained parameter without room for its gradient")
    return gradient


def add_product(one: Tensor, other: Tensor, into: Tensor, *, accumulate: bool) -> None:
    """into (+)= one @ other in float32, whatever the factors are kept in. accumulate: add to what is there."""
    if not one.is_cuda or one.dtype == torch.float32:
        product = one.float() @ other.float()
        into.add_(product) if accumulate else into.copy_(product)
    elif accumulate:
        torch.addmm(into, one, other, torch.float32, out=into)
    else:
        torch.mm(one, other, torch.float32, out=into)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, heads: int, *, inverse: bool = False) -> None:
    """Turn the first `heads` heads of x [T, ...] by their positions, in place. cos, sin: float32 [T, D / 2]."""
    if x.is_cuda:
        from opensloth.fused.kernels import elementwise

        elementwise.rotate(x, cos, sin, heads, inverse=inverse)
        return
    half = cos.shape[1]
    turned = x[:, : heads * 2 * half].unflatten(1, (heads, 2, half))
    first, second = turned[:, :, 0].float(), turned[:, :, 1].float()
    c, s = cos[:, None], (-sin if inverse else sin)[:, None]
    turned.copy_(torch.stack((first * c - second * s, second * c + first * s), dim=2))


def norm_rotate(
    qkv: Tensor, weights: tuple[Tensor, Tensor], eps: float, documents: Documents, heads: Heads, out: Tensor
) -> Tensor:
    """Norm each query and key head by itself, and turn it by its position; values are copied.

    qkv: [T, (query + 2 key_value) * D]. weights: of query and key heads, [D] each. out: as qkv, is written.
    Returns float32 [T, query + key_value], one over each head's root mean square.
    """
    normed = heads.query + heads.key_value
    width = normed * documents.cos.shape[1] * 2
    out[:, width:] = qkv[:, width:]
    if qkv.is_cuda:
        from opensloth.fused.kernels import elementwise

        rstd = torch.empty(qkv.shape[0], normed, dtype=torch.float32, device=qkv.device)
        elementwise.norm_rotate(qkv, weights, eps, documents.cos, documents.sin, heads.query, out, rstd)
        return rstd
    x = qkv[:, :width].float().unflatten(1, (normed, -1))
    rstd = torch.rsqrt(x.pow(2).mean(-1) + eps)
    out[:, :width] = (x * rstd[..., None] * _by_head(weights, heads)).flatten(1)
    rotate(out, documents.cos, documents.sin, normed)
    return rstd


def norm_rotate_backward(
    grad: Tensor,
    qkv: Tensor,
    weights: tuple[Tensor, Tensor],
    rstd: Tensor,
    documents: Documents,
    heads: Heads,
) -> None:
    """grad: of `norm_rotate`'s out, becomes that of qkv; [T, (query + 2 key_value) * D].

    Where the weights are trained, their gradients are added to.
    """
    if qkv.is_cuda:
        from opensloth.fused.kernels import elementwise

        if any(weight.requires_grad for weight in weights):
            turns = documents.cos, documents.sin
            parts = elementwise.head_norm_gradient(grad, qkv, *turns, heads.query, rstd)
            _add_gradients(weights, parts.sum(0))
        elementwise.norm_rotate_backward(grad, qkv, weights, documents.cos, documents.sin, heads.query, rstd)
        return
    normed = heads.query + heads.key_value
    rotate(grad, documents.cos, documents.sin, normed, inverse=True)
    width = normed * documents.cos.shape[1] * 2
    turned, x = (t[:, :width].float().unflatten(1, (normed, -1)) for t in (grad, qkv))
    x = x * rstd[..., None]
    of_heads = (turned * x).sum(0).split((heads.query, heads.key_value))
    _add_gradients(weights, [part.sum(0) for part in of_heads])
    weighted = turned * _by_head(weights, heads)
    grad[:, :width] = (rstd[..., None] * (weighted - x * (weighted * x).mean(-1, keepdim=True))).flatten(1)


def _add_gradients(weights: Sequence[Tensor], gradients: Iterable[Tensor]) -> None:
    """To those of weights that are trained."""
    for weight, gradient in zip(weights, gradients, strict=True):
        if weight.requires_grad:
            gradient_of(weight).add_(gradient)


def _by_head(weights: tuple[Tensor, Tensor], heads: Heads) -> Tensor:
    """Float32 [query + key_value, D]."""
    query, key = (weight.detach().float() for weight in weights)
    return torch.cat((query.expand(heads.query, -1), key.expand(heads.key_value, -1)))


def swiglu(gate_up: Tensor, out: Tensor) -> None:
    """gate_up: [T, 2 I], gates first. out: [T, I], is written."""
    if out.is_cuda:
        from opensloth.fused.kernels import elementwise

        elementwise.swiglu(gate_up, out)
        return
    gate, up = gate_up.float().chunk(2, dim=1)
    out.copy_(F.silu(gate) * up)


def swiglu_backward_(grad: Tensor, gate_up: Tensor) -> None:
    """grad: of what swiglu made, [T, I], becomes what it made; gate_up, [T, 2 I], its own gradient.

    In place, as these are the largest tensors that there are.
    """
    if grad.is_cuda:
        from opensloth.fused.kernels import elementwise

        elementwise.swiglu_backward_(grad, gate_up)
        return
    gate, up = gate_up.float().chunk(2, dim=1)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    dgate = grad.float() * up * (sigmoid + silu * (1 - sigmoid))
    hidden = silu * up  # before `up` may be overwritten
    gate_up.copy_(torch.cat((dgate, grad.float() * silu), dim=1))
    grad.copy_(hidden)


def attention(qkv: Tensor, documents: Documents, heads: Heads, out: Tensor) -> Tensor:
    """Causal attention inside each document.

    qkv: [T, (query + 2 key_value) * D]. out: [T, query * D], is written.
    Returns float32 [query, T], base-two logarithms of the sums of exponentials.
    """
    lse = torch.empty(heads.query, qkv.shape[0], dtype=torch.float32, device=qkv.device)
    if not qkv.is_cuda:
        for one in documents.short():
            out[one], lse[:, one] = attend(qkv[one], heads)
    elif len(documents.tiles):
        from opensloth.fused.kernels import attention as kernels

        kernels.forward(qkv, documents.tiles, heads, out, lse)
    if documents.long is not None:
        from opensloth.fused import long_documents

        long_documents.attention(qkv, documents.long, heads, out, lse)
    return lse


def attention_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, documents: Documents, heads: Heads, dqkv: Tensor
) -> None:
    """grad: of `attention`'s out, [T, query * D]. dqkv: as qkv, is written."""
    if not qkv.is_cuda:
        for one in documents.short():
            dqkv[one] = attend_backward(grad[one], qkv[one], out[one], lse[:, one], heads)
    elif len(documents.tiles):
        from opensloth.fused.kernels import attention as kernels

        kernels.backward(grad, qkv, out, lse, documents.tiles, heads, dqkv)
    if documents.long is not None:
        from opensloth.fused import long_documents

        long_documents.attention_backward(grad, qkv, out, lse, documents.long, heads, dqkv)


def attend(qkv: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
    """(out, lse) of one document, as `attention` has them: the definition, in plain torch."""
    q, k, v = _heads_of(qkv, heads)
    scores = _causal_scores(q, k, heads.scale)
    out = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
    return out.to(qkv.dtype), torch.logsumexp(scores, dim=-1) / np.log(2)


def attend_backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, heads: Heads) -> Tensor:
    """The gradient of one document's qkv, likewise."""
    q, k, v = _heads_of(qkv, heads)
    g, o = (x.float().unflatten(1, (heads.query, -1)).transpose(0, 1) for x in (grad, out))
    p = torch.exp2(_causal_scores(q, k, heads.scale) / np.log(2) - lse[:, :, None])
    ds = p * (g @ v.transpose(1, 2) - (g * o).sum(-1, keepdim=True)) * heads.scale
    dk, dv = ((x.transpose(1, 2) @ y).unflatten(0, (heads.key_value, heads.group)).sum(1) for x, y in ((ds, q), (p, g)))
    return torch.cat([x.transpose(0, 1).flatten(1) for x in (ds @ k, dk, dv)], dim=1).to(qkv.dtype)


def cross_entropy_(logits: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
    """Float32 [n], nats; logits [n, V] become their gradient times `scale`. A target of -100 counts for nothing."""
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    if logits.is_cuda:
        from opensloth.fused.kernels import cross_entropy as kernels

        kernels.cross_entropy_(logits, targets, scale, losses)
        return losses
    wide, counts = logits.float(), targets >= 0
    losses.copy_(F.cross_entropy(wide, targets, reduction="none"))
    gradient = wide.softmax(-1)
    gradient[torch.arange(len(targets)), targets.clamp(min=0)] -= 1
    logits.copy_(gradient * (scale * counts)[:, None])
    return losses


@dataclass(frozen=True)
class FourBit:
    """A weight [N, K] of bitsandbytes in 4 bits: its bytes, and what it keeps of how they are to be read."""

    packed: Tensor
    state: Any

    @staticmethod
    def holds(linear: Any) -> bool:
        """Whether the layer's weight is one."""
        return getattr(linear.weight, "quant_state", None) is not None

    @classmethod
    def of(cls, linear: Any) -> FourBit:
        packed = linear.weight.data.view(torch.uint8).reshape(-1, 1)  # some are stored as if they were of 16 bits
        return cls(packed, linear.weight.quant_state)


def dequantise(weight: FourBit, out: Tensor) -> None:
    """out: [N, K], is written: each value's place in a table of 16, times the largest of its block."""
    if out.is_cuda:
        from opensloth.fused.kernels import dequantise as kernels

        kernels.dequantise(weight, out)
        return
    import bitsandbytes.functional

    out.copy_(bitsandbytes.functional.dequantize_4bit(weight.packed, weight.state))


class Copies:
    """A fixed list of scaled copies between matrices, which stay where they are; one launch on CUDA."""

    def __init__(self, entries: Sequence[tuple[Tensor, Tensor, float]]) -> None:
        """entries: (source, destination, scale) of one dtype each, of equal shapes, dense in their last dimension."""
        self._entries = list(entries)
        if self._entries and self._entries[0][0].is_cuda:
            rows = [
                (source.data_ptr(), destination.data_ptr(), *source.shape, source.stride(0), destination.stride(0))
                for source, destination, _ in self._entries
            ]
            device = self._entries[0][0].device
            self._table = torch.tensor(rows, dtype=torch.int64, device=device)
            self._scales = torch.tensor([scale for *_, scale in self._entries], dtype=torch.float32, device=device)
            self._largest = max(source.numel() for source, *_ in self._entries)

    def run(self, *, add: bool) -> None:
        """Write, or add to, every destination."""
        if not self._entries:
            return
        if self._entries[0][0].is_cuda:
            from opensloth.fused.kernels import copy_table

            source, destination, _ = self._entries[0]
            copy_table.copy(self._table, self._scales, source, destination, self._largest, add=add)
            return
        for source, destination, scale in self._entries:
            value = source * scale
            destination.copy_(destination + value if add else value)


def _heads_of(qkv: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of one document, float32 [query, n, D] each: keys and values stand before every head of their group."""
    counts = (heads.query, heads.key_value, heads.key_value)
    q, k, v = qkv.float().unflatten(1, (sum(counts), -1)).transpose(0, 1).split(counts)
    return q, k.repeat_interleave(heads.group, dim=0), v.repeat_interleave(heads.group, dim=0)


def _causal_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    scores = q @ k.transpose(1, 2) * scale
    return scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), float("-inf"))
