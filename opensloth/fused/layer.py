"""One decoder layer of the Llama kind, forward and backward.

    y = x + o(attention(qkv(norm(x))))
    z = y + down(swiglu(gate_up(norm(y))))

The backward pass makes the gradient of the input and those of whatever is trained.
T tokens of documents end to end, D hidden width, I width of the MLP.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opensloth.fused import operations
from opensloth.fused.operations import Documents, Heads
from opensloth.fused.projection import Projection, Shared, Staged, gradient_of
from opensloth.memory_estimate import Keep


class Norm:
    """An RMS norm; its weight may be trained."""

    def __init__(self, module: Any) -> None:
        self._weight, self._eps = module.weight, float(module.variance_epsilon)

    @property
    def is_trained(self) -> bool:
        return bool(self._weight.requires_grad)

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """x, out: [T, D]; out is written. Returns each row's scale, float32 [T]."""
        return operations.rms_norm(x, self._weight, self._eps, out)

    def backward(self, grad: Tensor, x: Tensor, scale: Tensor, residual: Tensor | None, out: Tensor) -> None:
        """out: gradient of x, plus `residual`, is written; the weight's is added to."""
        if self.is_trained:
            operations.add_norm_gradient(grad, x, scale, gradient_of(self._weight))
        operations.rms_norm_backward(grad, x, self._weight, scale, residual, out)


@dataclass
class Attended:
    """What the first half of a layer keeps for its way back. T rows each; norms' scales are float32.

    raw: qkv before its heads are normed; the same tensor as qkv, turned, with head_scale None, where they are not.
    """

    x: Tensor
    scale: Tensor
    normed: Tensor
    raw: Tensor
    head_scale: Tensor | None
    qkv: Tensor
    attended: Tensor
    lse: Tensor


@dataclass
class Expanded:
    """What the second half keeps; hidden_border: [T, R], what down's adapter saw of its input."""

    y: Tensor
    scale: Tensor
    normed: Tensor
    gate_up: Tensor
    hidden_border: Tensor


@dataclass
class Kept:
    """What a layer keeps, one of three.

    All: `attended` and `expanded`. Its input alone: `large` is (x,), with x [T, D]. What takes long to compute again up
    to the MLP: `large` is (x, `Attended.raw`, `Attended.attended`, y), y [T, D] too, and `lse` attention's, float32.
    `large` may lie in host memory meanwhile, the others never do.
    """

    large: tuple[Tensor, ...] = ()
    lse: Tensor | None = None
    attended: Attended | None = None
    expanded: Expanded | None = None


class Layer:
    """A decoder layer whose weights have been taken over into `Projection`s."""

    def __init__(self, module: Any, dtype: torch.dtype, shared: Sequence[Shared], *, keep: Keep, chunk: int) -> None:
        """module: transformers' layer. dtype: to compute in. shared: with all other layers, one for each projection.

        chunk: tokens of an MLP that is computed again at a time.
        """
        attention, mlp = module.self_attn, module.mlp
        groups = (
            [attention.q_proj, attention.k_proj, attention.v_proj],
            [attention.o_proj],
            [mlp.gate_proj, mlp.up_proj],
            [mlp.down_proj],
        )
        self._qkv, self._out, self._gate_up, self._down = (
            Projection(group, dtype, place) for group, place in zip(groups, shared, strict=True)
        )
        self._norms = (Norm(module.input_layernorm), Norm(module.post_attention_layernorm))
        self._heads = Heads(
            query=self._out.inputs // attention.head_dim,
            key_value=attention.k_proj.out_features // attention.head_dim,
            scale=float(attention.scaling),
        )
        self._turned = self._heads.query + self._heads.key_value
        self._head_norms: tuple[Tensor, Tensor] | None = None
        if hasattr(attention, "q_norm"):
            self._head_norms = (attention.q_norm.weight, attention.k_norm.weight)
            self._head_eps = float(attention.q_norm.variance_epsilon)
        self._keep, self._chunk = keep, chunk
        self._staged: dict[Projection, Staged] = {}
        self._deal_attention = self._deal_mlp = operations.Copies([])

    @property
    def needs_input_gradient(self) -> bool:
        """Whether its own gradients need that of its input: its first norm's is made with it."""
        return self._norms[0].is_trained

    def use_staging(self, staged: Sequence[Staged]) -> None:
        """staged: room for each of `projections`; the parameters' gradients have their final places."""
        self._staged = dict(zip(self.projections, staged, strict=True))
        first, second = (
            operations.Copies([entry for p in pair for entry in p.gradients(self._staged[p])])
            for pair in ((self._qkv, self._out), (self._gate_up, self._down))
        )
        self._deal_attention, self._deal_mlp = first, second

    @property
    def projections(self) -> tuple[Projection, ...]:
        return self._qkv, self._out, self._gate_up, self._down

    def room_for_gradient(self, tokens: int) -> Tensor:
        """Where the gradient of this layer's output is to be written, up to D."""
        return self._down.room_for_gradient(tokens)

    def forward(self, x: Tensor, documents: Documents) -> tuple[Tensor, Kept]:
        """x: [T, D]. Returns the output and what `backward` needs."""
        self._load()
        attended, y = self._attend(x, documents)
        if self._keep is Keep.ALL:
            z, expanded = self._expand(y)
            return z, Kept(attended=attended, expanded=expanded)
        z = torch.empty_like(y)
        for rows in self._parts(len(y)):
            z[rows] = self._expand(y[rows])[0]
        if self._keep is Keep.HOST:
            return z, Kept((x, attended.raw, attended.attended, y), attended.lse)
        return z, Kept((x,))

    def backward(self, dz: Tensor, kept: Kept, documents: Documents, dx: Tensor | None) -> None:
        """dz: `room_for_gradient`, filled. dx: [T, D], is written; None when nobody needs it."""
        self._load()
        if kept.attended is None or kept.expanded is None:
            attended, dy = self._expand_backward_again(dz, kept, documents)
        else:
            attended, dy = kept.attended, self._out.room_for_gradient(len(dz))
            self._expand_backward(dz, kept.expanded, dy[:, : self._out.outputs])
            kept.expanded = None  # before the attention's gradients are made
        self._attend_backward(dy, attended, documents, dx)

    def _expand_backward_again(self, dz: Tensor, kept: Kept, documents: Documents) -> tuple[Attended, Tensor]:
        """From what is kept; the MLP part by part."""
        attended, y = self._attend_again(kept, documents)
        dy = self._out.room_for_gradient(len(dz))
        for rows in self._parts(len(dz)):
            expanded = self._expand_again(y[rows])
            self._expand_backward(dz[rows], expanded, dy[rows, : self._out.outputs])
            del expanded  # before the next part's are made
        return attended, dy

    def _load(self) -> None:
        for projection in self.projections:
            projection.load()

    # --- attention ----------------------------------------------------------------------------------

    def _attend(self, x: Tensor, documents: Documents) -> tuple[Attended, Tensor]:
        normed, scale = self._normed(x)
        raw = self._qkv.forward(normed)
        if self._head_norms is None:
            operations.rotate(raw, documents.cos, documents.sin, self._turned)
        qkv, head_scale = self._norm_heads(raw, documents)
        attended = self._out.room_for_input(len(x))
        lse = operations.attention(qkv, documents, self._heads, attended[:, : self._out.inputs])
        y = self._out.forward(attended, residual=x)
        return Attended(x, scale, normed, raw, head_scale, qkv, attended, lse), y

    def _attend_again(self, kept: Kept, documents: Documents) -> tuple[Attended, Tensor]:
        if kept.lse is None:
            (x,) = kept.large
            return self._attend(x, documents)
        x, raw, attended, y = kept.large
        normed, scale = self._normed(x)
        self._qkv.fill_border(normed)
        qkv, head_scale = self._norm_heads(raw, documents)
        return Attended(x, scale, normed, raw, head_scale, qkv, attended, kept.lse), y

    def _normed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        normed = self._qkv.room_for_input(len(x))
        return normed, self._norms[0].forward(x, normed[:, : self._qkv.inputs])

    def _norm_heads(self, raw: Tensor, documents: Documents) -> tuple[Tensor, Tensor | None]:
        """Queries and keys normed by heads, then turned; `raw`, turned already, where a model has no such norms."""
        if self._head_norms is None:
            return raw, None
        qkv = torch.empty_like(raw)
        return qkv, operations.norm_rotate(raw, self._head_norms, self._head_eps, documents, self._heads, qkv)

    def _attend_backward(self, dy: Tensor, kept: Attended, documents: Documents, dx: Tensor | None) -> None:
        width = self._out.inputs
        dattended = self._out.input_gradient(dy)
        self._out.add_gradients(dy, kept.attended[:, :width], kept.attended[:, width:], self._staged[self._out])
        dqkv = self._qkv.room_for_gradient(len(dy))
        operations.attention_backward(
            dattended,
            kept.qkv,
            kept.attended[:, :width],
            kept.lse,
            documents,
            self._heads,
            dqkv[:, : self._qkv.outputs],
        )
        if self._head_norms is None or kept.head_scale is None:
            operations.rotate(dqkv, documents.cos, documents.sin, self._turned, inverse=True)
        else:
            operations.norm_rotate_backward(dqkv, kept.raw, self._head_norms, kept.head_scale, documents, self._heads)
        width = self._qkv.inputs
        if dx is None:
            self._qkv.fill_gradient_border(dqkv)
        else:
            dnormed = self._qkv.input_gradient(dqkv)
        self._qkv.add_gradients(dqkv, kept.normed[:, :width], kept.normed[:, width:], self._staged[self._qkv])
        self._deal_attention.run(add=True)
        if dx is not None:
            self._norms[0].backward(dnormed, kept.x, kept.scale, dy[:, : self._out.outputs], dx)

    # --- MLP ----------------------------------------------------------------------------------------

    def _expand(self, y: Tensor) -> tuple[Tensor, Expanded]:
        scale, normed, gate_up = self._gate_and_up(y)
        hidden = self._down.room_for_input(len(y))
        operations.swiglu(gate_up, hidden[:, : self._down.inputs])
        z = self._down.forward(hidden, residual=y)
        return z, Expanded(y, scale, normed, gate_up, hidden[:, self._down.inputs :].clone())

    def _expand_again(self, y: Tensor) -> Expanded:
        """As `_expand` without its output, which nobody needs any more."""
        scale, normed, gate_up = self._gate_and_up(y)
        hidden = self._down.room_for_input(len(y))
        operations.swiglu(gate_up, hidden[:, : self._down.inputs])
        self._down.fill_border(hidden)
        return Expanded(y, scale, normed, gate_up, hidden[:, self._down.inputs :].clone())

    def _gate_and_up(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normed = self._gate_up.room_for_input(len(y))
        scale = self._norms[1].forward(y, normed[:, : self._gate_up.inputs])
        return scale, normed, self._gate_up.forward(normed)

    def _expand_backward(self, dz: Tensor, kept: Expanded, dy: Tensor) -> None:
        dhidden = self._down.input_gradient(dz)
        dgate_up = self._gate_up.room_for_gradient(len(dz))
        hidden = torch.empty_like(dhidden)
        operations.swiglu_backward(dhidden, kept.gate_up, dgate_up[:, : self._gate_up.outputs], hidden)
        self._down.add_gradients(dz, hidden, kept.hidden_border, self._staged[self._down])
        dnormed = self._gate_up.input_gradient(dgate_up)
        width = self._gate_up.inputs
        self._gate_up.add_gradients(
            dgate_up, kept.normed[:, :width], kept.normed[:, width:], self._staged[self._gate_up]
        )
        self._deal_mlp.run(add=True)
        self._norms[1].backward(dnormed, kept.y, kept.scale, dz[:, : self._down.outputs], dy)

    # --- parts --------------------------------------------------------------------------------------

    def _parts(self, tokens: int) -> Iterator[slice]:
        return itertools.starmap(slice, ((at, min(tokens, at + self._chunk)) for at in range(0, tokens, self._chunk)))
