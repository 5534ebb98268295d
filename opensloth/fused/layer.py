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
from opensloth.fused.operations import Documents, Heads, gradient_of
from opensloth.fused.projection import Projection, Shared, Staged
from opensloth.memory_estimate import Keep


class Norm:
    """An RMS norm; its weight may be trained."""

    def __init__(self, module: Any) -> None:
        self._weight, self._eps = module.weight, float(module.variance_epsilon)

    @property
    def is_trained(self) -> bool:
        return bool(self._weight.requires_grad)

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """x, out: [T, D]; out is written. Returns one over each row's root mean square, float32 [T]."""
        return operations.rms_norm(x, self._weight, self._eps, out)

    def backward(self, grad: Tensor, x: Tensor, rstd: Tensor, residual: Tensor | None, out: Tensor) -> None:
        """out: gradient of x, plus `residual`, is written; the weight's is added to."""
        if self.is_trained:
            operations.add_norm_gradient(grad, x, rstd, gradient_of(self._weight))
        operations.rms_norm_backward(grad, x, self._weight, rstd, residual, out)


@dataclass
class Attended:
    """What the first half of a layer keeps for its way back. T rows each; rstd: one over a norm's root mean square,
    float32.

    raw: qkv before its heads are normed; the same tensor as qkv, turned, with head_rstd None, where they are not.
    """

    x: Tensor
    rstd: Tensor
    normed: Tensor
    raw: Tensor
    head_rstd: Tensor | None
    qkv: Tensor
    attended: Tensor
    lse: Tensor


@dataclass
class Expanded:
    """What the second half keeps.

    gate_up: [T, 2 I + R], whose border is room. hidden_border: [T, R], what down's adapter saw of its input.
    """

    y: Tensor
    rstd: Tensor
    normed: Tensor
    gate_up: Tensor
    hidden_border: Tensor


@dataclass
class Kept:
    """What a layer keeps, one of three.

    All: `attended` and `expanded`. Its input alone: `first` is (x,), with x [T, D]. What takes long to compute again up
    to the MLP: `first` is (y,), likewise, `later`, which is needed once the MLP's gradient is made, (x,
    `Attended.raw`, `Attended.attended`), and `lse` attention's, float32. `first` and `later` may lie in host memory
    meanwhile, the others never do. border: `Expanded.hidden_border`, which is small, and would take the MLP's hidden
    state to make again. gate_up: `Expanded.gate_up`, if it is kept.
    """

    first: tuple[Tensor, ...] = ()
    later: tuple[Tensor, ...] = ()
    border: Tensor | None = None
    lse: Tensor | None = None
    gate_up: Tensor | None = None
    attended: Attended | None = None
    expanded: Expanded | None = None
    wanted: Tensor | None = None


class Layer:
    """A decoder layer whose weights have been taken over into `Projection`s."""

    def __init__(
        self,
        module: Any,
        dtype: torch.dtype,
        shared: Sequence[Shared],
        *,
        keep: Keep,
        keeps_mlp: bool = False,
        chunk: int,
    ) -> None:
        """module: transformers' layer. dtype: to compute in. shared: with all other layers, one for each projection.

        keeps_mlp: its largest product too, where not all is kept. chunk: tokens of an MLP at a time there.
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
        self._keep, self._keeps_mlp, self._chunk = keep, keeps_mlp, chunk
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

    def forward(self, x: Tensor, documents: Documents, wanted: Tensor | None = None) -> tuple[Tensor, Kept]:
        """x: [T, D]. wanted: int64 [m], the rows of the output that anyone reads; None: all.

        Returns these rows, and what their way back needs. A row may be named again if its gradient is zero.
        """
        self._load()
        attended, y = self._attend(x, documents)
        if wanted is not None:
            y = y[wanted]
        kept = Kept(wanted=wanted)
        if self._keep is Keep.ALL:
            kept.attended = attended
            z, kept.expanded = self._expand(y)
            return z, kept
        kept.first = (x,)
        if self._keep is Keep.HOST:
            kept.first, kept.later, kept.lse = (y,), (x, attended.raw, attended.attended), attended.lse
        del attended  # of which the rest is not needed any more
        return self._expand_in_parts(y, kept), kept

    def _expand_in_parts(self, y: Tensor, kept: Kept) -> Tensor:
        """The layer's output; `kept` is given what else is kept."""
        z, kept.border = torch.empty_like(y), self._down.room_for_border(len(y))
        if self._keeps_mlp:
            kept.gate_up = self._gate_up.room_for_gradient(len(y))
        for rows in self._parts(len(y)):
            _, expanded = self._expand(y[rows], z[rows], None if kept.gate_up is None else kept.gate_up[rows])
            kept.border[rows] = expanded.hidden_border
            del expanded  # before the next part's are made
        return z

    def expand_backward(self, dz: Tensor, kept: Kept, documents: Documents) -> Tensor:
        """The way back through the MLP, which is the first half of it; uses up what is kept for it.

        dz: `room_for_gradient`, filled, of the rows that are wanted. Returns the gradient of all of y, [T, D], with
        room for a border.
        """
        self._load()
        dy = self._out.room_for_gradient(len(dz))
        if kept.expanded is not None:
            self._expand_backward(dz, kept.expanded, dy[:, : self._out.outputs])
            kept.expanded = None
            return self._in_all_rows(dy, kept, documents)
        y = self._before_mlp(kept, documents)
        for rows in self._parts(len(dz)):
            expanded = self._expand_again(y[rows], kept, rows)
            self._expand_backward(dz[rows], expanded, dy[rows, : self._out.outputs])
            del expanded  # before the next part's are made
        kept.first, kept.gate_up = (), None
        return self._in_all_rows(dy, kept, documents)

    def _in_all_rows(self, dy: Tensor, kept: Kept, documents: Documents) -> Tensor:
        """dy: of the rows that are wanted. The others' gradient is zero."""
        if kept.wanted is None:
            return dy
        width = self._out.outputs
        every = self._out.room_for_gradient(documents.offsets[-1])
        every[:, :width].zero_()
        every[:, :width][kept.wanted] = dy[:, :width]
        return every

    def _before_mlp(self, kept: Kept, documents: Documents) -> Tensor:
        """y; of a layer that keeps its input alone made again, and with it all that attention keeps."""
        (first,) = kept.first
        if kept.lse is not None:  # `later` may be still on its way
            return first
        kept.attended, y = self._attend(first, documents)
        return y if kept.wanted is None else y[kept.wanted]

    def attend_backward(self, dy: Tensor, kept: Kept, documents: Documents, dx: Tensor | None) -> None:
        """The rest. dy: of `expand_backward`. dx: [T, D], is written; None when nobody needs it."""
        attended = kept.attended or self._attended_again(kept, documents)
        self._attend_backward(dy, attended, documents, dx)

    def _load(self) -> None:
        for projection in self.projections:
            projection.load()

    # --- attention ----------------------------------------------------------------------------------

    def _attend(self, x: Tensor, documents: Documents) -> tuple[Attended, Tensor]:
        normed, rstd = self._normed(x)
        raw = self._qkv.forward(normed)
        if self._head_norms is None:
            operations.rotate(raw, documents.cos, documents.sin, self._turned)
        qkv, head_rstd = self._norm_heads(raw, documents)
        attended = self._out.room_for_input(len(x), dense=self._keep is Keep.HOST)  # as it is copied in one piece
        lse = operations.attention(qkv, documents, self._heads, attended[:, : self._out.inputs])
        y = self._out.forward(attended, residual=x)
        return Attended(x, rstd, normed, raw, head_rstd, qkv, attended, lse), y

    def _attended_again(self, kept: Kept, documents: Documents) -> Attended:
        """Of `Kept.later`."""
        assert kept.lse is not None
        x, raw, attended = kept.later
        normed, rstd = self._normed(x)
        self._qkv.fill_border(normed)
        qkv, head_rstd = self._norm_heads(raw, documents)
        return Attended(x, rstd, normed, raw, head_rstd, qkv, attended, kept.lse)

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
        if self._head_norms is None or kept.head_rstd is None:
            operations.rotate(dqkv, documents.cos, documents.sin, self._turned, inverse=True)
        else:
            operations.norm_rotate_backward(dqkv, kept.raw, self._head_norms, kept.head_rstd, documents, self._heads)
        width = self._qkv.inputs
        if dx is None:
            self._qkv.fill_gradient_border(dqkv)
        else:
            dnormed = self._qkv.input_gradient(dqkv)
        self._qkv.add_gradients(dqkv, kept.normed[:, :width], kept.normed[:, width:], self._staged[self._qkv])
        self._deal_attention.run(add=True)
        if dx is not None:
            self._norms[0].backward(dnormed, kept.x, kept.rstd, dy[:, : self._out.outputs], dx)

    # --- MLP ----------------------------------------------------------------------------------------

    def _expand(self, y: Tensor, out: Tensor | None = None, gate_up: Tensor | None = None) -> tuple[Tensor, Expanded]:
        """out, gate_up: where the output and the first product are written; None: somewhere new."""
        normed, rstd = self._normed_for_mlp(y)
        gate_up = self._gate_and_up(normed, gate_up)
        hidden = self._down.room_for_input(len(y))
        operations.swiglu(gate_up[:, : self._gate_up.outputs], hidden[:, : self._down.inputs])
        z = self._down.forward(hidden, residual=y, out=out)
        return z, Expanded(y, rstd, normed, gate_up, hidden[:, self._down.inputs :].clone())

    def _expand_again(self, y: Tensor, kept: Kept, rows: slice) -> Expanded:
        """What `_expand` made of these rows, y, but its output, which nobody needs any more."""
        normed, rstd = self._normed_for_mlp(y)
        if kept.gate_up is None:
            gate_up = self._gate_and_up(normed, None)
        else:
            gate_up = kept.gate_up[rows]
            self._gate_up.fill_border(normed)
        assert kept.border is not None
        return Expanded(y, rstd, normed, gate_up, kept.border[rows])

    def _gate_and_up(self, normed: Tensor, out: Tensor | None) -> Tensor:
        """[T, 2 I + R], where the gradient will be: its border is room."""
        gate_up = self._gate_up.room_for_gradient(len(normed)) if out is None else out
        self._gate_up.forward(normed, out=gate_up[:, : self._gate_up.outputs])
        return gate_up

    def _normed_for_mlp(self, y: Tensor) -> tuple[Tensor, Tensor]:
        normed = self._gate_up.room_for_input(len(y))
        return normed, self._norms[1].forward(y, normed[:, : self._gate_up.inputs])

    def _expand_backward(self, dz: Tensor, kept: Expanded, dy: Tensor) -> None:
        hidden, gate_up = self._down.input_gradient(dz), kept.gate_up
        operations.swiglu_backward_(hidden, gate_up[:, : self._gate_up.outputs])
        self._down.add_gradients(dz, hidden, kept.hidden_border, self._staged[self._down])
        dnormed = self._gate_up.input_gradient(gate_up)
        width = self._gate_up.inputs
        self._gate_up.add_gradients(
            gate_up, kept.normed[:, :width], kept.normed[:, width:], self._staged[self._gate_up]
        )
        self._deal_mlp.run(add=True)
        self._norms[1].backward(dnormed, kept.y, kept.rstd, dz[:, : self._down.outputs], dy)

    # --- parts --------------------------------------------------------------------------------------

    def _parts(self, tokens: int) -> Iterator[slice]:
        return itertools.starmap(slice, ((at, min(tokens, at + self._chunk)) for at in range(0, tokens, self._chunk)))
