"""How much GPU memory training takes, from sizes alone: each term is a buffer that the code makes. Pure.

    peak = weights + trained + kept + max(loss, layer) + other

Counted is what torch allocates at the worst moment (`torch.cuda.max_memory_allocated`). The CUDA context comes on top.
Every process holds a whole model, so all of it is of one GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from opensloth.model_shape import ModelShape

GIB = 1 << 30
CONTEXT_BYTES = int(0.6 * GIB)
"""Of a card's memory before the first tensor: the driver, the CUDA context, and the code of the kernels."""
LOGITS_BYTES = GIB // 4
"""Room for logits at a time."""
MLP_BYTES = GIB
"""Room for what an MLP makes again and its gradients, which may be made in parts."""
_OTHER_BYTES = GIB // 10
"""cuBLAS' workspaces, a batch's indices and turns, gradients of adapters before they are dealt out."""
_USABLE = 0.9
"""Of what is free: blocks of batches of several shapes do not lie without gaps. On an H100 up to 5 % more was reserved
than allocated."""
_HALF, _FLOAT = 2, 4
_FOUR_BITS = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in NF4: itself, an 8-bit scale of 64, a 32-bit scale of 256 of those."""
BORDER = 16
"""An adapter's rank in the border of a weight is rounded up to a multiple of it, and so is every stride of the weight:
matrix products ask for 8, and Triton reads and writes widely by 16."""
_ALIGNED = 128
"""Elements: rows of activations that have a border begin at a multiple of it."""
_GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""The fast path makes each one product."""


class Keep(Enum):
    """ALL: all that the backward pass reads. INPUTS: the layers' inputs; the rest is computed again. HOST: in host
    memory the inputs and what attention made of them; norms and MLPs are computed again. HOST_INPUTS: as INPUTS, but in
    host memory. With both of these the embeddings lie there too, if they are neither trained nor the head's.
    """

    ALL = "all"
    INPUTS = "inputs"
    HOST = "attention in host memory"
    HOST_INPUTS = "inputs in host memory"


@dataclass(frozen=True)
class Keeping:
    """What each layer keeps. whole: how many compute nothing again, whatever the others do; of HOST they keep on the
    GPU what their MLPs made, and the rest in host memory as the others do.

    They are the last ones: their way back is the first, and then their memory is there for what is computed again.
    """

    keep: Keep
    whole: int = 0

    def whole_of(self, layers: int) -> int:
        """How many of so many layers keep all."""
        return layers if self.keep is Keep.ALL else self.whole

    def of_layer(self, layer: int, layers: int) -> Keep:
        return Keep.ALL if layer >= layers - self.whole and self.keep is not Keep.HOST else self.keep

    def keeps_mlp(self, layer: int, layers: int) -> bool:
        """Whether it keeps what its MLP made, though not all."""
        return layer >= layers - self.whole and self.keep is Keep.HOST

    def __str__(self) -> str:
        if not self.whole or self.keep is Keep.ALL:
            return self.keep.value
        layers = "1 layer" if self.whole == 1 else f"{self.whole} layers"
        if self.keep is Keep.HOST:
            return f"{self.keep.value}, and the MLPs of {layers}"
        return f"all in {layers}, {self.keep.value} in the others"


IN_HOST = (Keep.HOST, Keep.HOST_INPUTS)
_SCARCITY = 4
"""With HOST_INPUTS, MLPs are made in one part in so many of their room: it is taken where nothing else fits."""


@dataclass(frozen=True)
class Method:
    """How a model is trained.

    rank: of the adapter; 0: every weight is trained. targets: the modules that have one. bits: of frozen weights, 4, 8
    or 16 (32: no bfloat16). moments: bytes of the optimizer for each trained weight. fused: by the fast path.
    """

    rank: int
    targets: tuple[str, ...]
    bits: int
    moments: float
    fused: bool

    @property
    def is_full(self) -> bool:
        return not self.rank


@dataclass(frozen=True)
class Batch:
    """tokens: of one micro-batch, padding included. targets: those that predict something."""

    tokens: int
    targets: int


@dataclass(frozen=True)
class Estimate:
    """Bytes on one GPU.

    weights: in which is computed. trained: adapters or float32 weights, with gradient and moments. kept: for the
    backward pass. loss, layer: the head with its loss at work, one layer at work; never both.
    """

    weights: int
    trained: int
    kept: int
    loss: int
    layer: int
    other: int

    @property
    def peak(self) -> int:
        """What torch has allocated at the worst moment."""
        return self.weights + self.trained + self.working

    @property
    def working(self) -> int:
        """What a batch needs beside weights and optimizer."""
        return self.kept + max(self.loss, self.layer) + self.other

    @property
    def of_card(self) -> int:
        """What a GPU must have for it."""
        return self.peak + CONTEXT_BYTES


def estimate(shape: ModelShape, method: Method, batch: Batch, keeping: Keeping) -> Estimate:
    """keeping: plain torch knows ALL and INPUTS only, for all layers; with it, the figure is a rough one."""
    if method.fused:
        kept, loss, layer = _fused_working(shape, method, batch, keeping)
    else:
        kept, loss, layer = _autograd_working(shape, method, batch, keeping.keep)
    trained = trained_parameters(shape, method) * (2 * _FLOAT + method.moments)
    weights = _frozen(shape, method) + added_weights(shape, method) - offloaded_embeddings(shape, method, keeping.keep)
    return Estimate(int(weights), int(trained), int(kept), int(loss), int(layer), _OTHER_BYTES)


def roomiest(
    shape: ModelShape,
    method: Method,
    batch: Batch,
    free: int,
    choices: Sequence[Keep] = tuple(Keep),
    *,
    offloads_embeddings: bool = True,
) -> Keeping | None:
    """The first that fits of `choices`; None: no one does.

    On the fast path as many layers as fit keep all, or of HOST their MLPs; where ALL is not among them, as many as take
    no more than none.
    free: bytes of the device when all weights, gradients and moments have their places there. offloads_embeddings:
    whether host memory has room for those that may lie there.
    """
    for keep in choices:
        limit = _USABLE * (free + (offloaded_embeddings(shape, method, keep) if offloads_embeddings else 0))
        if Keep.ALL not in choices:  # no more than it takes anyway
            limit = min(limit, estimate(shape, method, batch, Keeping(keep)).working)
        mixed = method.fused and (keep in IN_HOST or (keep is Keep.INPUTS and Keep.ALL in choices))
        for whole in range(shape.layers - 1 if mixed else 0, -1, -1):
            keeping = Keeping(keep, whole)
            if estimate(shape, method, batch, keeping).working <= limit:
                return keeping
    return None


def order(*, copies_keep_up: bool) -> tuple[Keep, ...]:
    """Ways to keep, the fastest that are left when the one before does not fit."""
    return (Keep.ALL, *IN_HOST) if copies_keep_up else tuple(Keep)


def to_come(shape: ModelShape, method: Method) -> int:
    """Bytes that a loaded model will ask for before its first batch: gradients, moments, other weights."""
    return int(trained_parameters(shape, method) * (_FLOAT + method.moments)) + added_weights(shape, method)


def trained_parameters(shape: ModelShape, method: Method) -> int:
    if method.is_full:
        return shape.parameters
    sizes = shape.projections
    return shape.layers * method.rank * sum(sum(sizes[name]) for name in method.targets if name in sizes)


def mlp_part(intermediate: int, keep: Keep) -> int:
    """Tokens that the fast path sends through an MLP at a time where it is computed again.

    In small parts products take longer: at 7B a step of 1,024 at a time 5 % (H100), of 2,048 4 %, of 4,096 2 %.
    """
    room = MLP_BYTES // (_SCARCITY if keep is Keep.HOST_INPUTS else 1)
    return max(1024, room // (_HALF * 3 * intermediate) // 1024 * 1024)


def row_stride(width: int, border: int) -> int:
    """Elements from one row of activations to the next, with room for an adapter's border.

    On an H100 SwiGLU's gradient takes 9 % longer where rows begin at a multiple of 16 elements, and large products 2 %.
    """
    return -(-(width + border) // _ALIGNED) * _ALIGNED if border else width


def added_weights(shape: ModelShape, method: Method) -> int:
    """Bytes beside the weights as they are loaded: what training computes with instead, or in front of, them."""
    if method.is_full:  # a copy in 16 bits: of matrices and head on the fast path, of what autocast meets elsewhere
        return 0 if method.bits > 16 else _HALF * (shape.linear + shape.head_parameters)
    if not method.fused:
        largest = max(outputs * inputs for outputs, inputs in shape.projections.values())
        return _HALF * largest if method.bits == 4 else 0
    whole = _HALF * shape.layer_linear if method.bits == 4 else 0  # one layer's, made of those in 4 bits
    return whole + _HALF * shape.layers * _borders(shape, method)


def _frozen(shape: ModelShape, method: Method) -> float:
    """Bytes of the weights that are not trained, as they are loaded."""
    if method.is_full:
        return 0
    size = {4: _FOUR_BITS, 8: 1}.get(method.bits, method.bits / 8)
    return size * shape.linear + max(_HALF, method.bits // 8) * (shape.parameters - shape.linear)


def offloaded_embeddings(shape: ModelShape, method: Method, keep: Keep) -> int:
    """Bytes of the embeddings, if they lie in host memory."""
    if keep not in IN_HOST or not method.fused or method.is_full or shape.tied:
        return 0
    return max(_HALF, method.bits // 8) * shape.vocabulary * shape.hidden


def _borders(shape: ModelShape, method: Method) -> int:
    """Elements of a layer's weights that are adapters'."""
    ranks = _ranks(method)
    widths = [
        sum(shape.projections[name][0] for name in group) + shape.projections[group[0]][1] + rank
        for group, rank in zip(_GROUPS, ranks, strict=True)
    ]
    return sum(width * rank for width, rank in zip(widths, ranks, strict=True))


def _ranks(method: Method) -> tuple[int, ...]:
    """Of the borders of qkv, o, gate and up, down."""
    sums = [method.rank * sum(name in method.targets for name in group) for group in _GROUPS]
    return tuple(-(-rank // BORDER) * BORDER for rank in sums)


def offloaded_bytes(shape: ModelShape, method: Method, keep: Keep) -> int:
    """Of one token and layer, in host memory."""
    attention = shape.qkv + shape.attended + _ranks(method)[1] + shape.hidden
    return _HALF * {Keep.HOST_INPUTS: shape.hidden, Keep.HOST: shape.hidden + attention}.get(keep, 0)


def _fused_working(shape: ModelShape, method: Method, batch: Batch, keeping: Keeping) -> tuple[float, float, float]:
    """kept, loss, layer of `opensloth.fused`."""
    width, tokens, whole = shape.hidden, batch.tokens, keeping.whole_of(shape.layers)
    of_other, work_of_other = _fused_layer(shape, method, batch, keeping.keep)
    of_mlp = _HALF * row_stride(2 * shape.intermediate, _ranks(method)[2])
    if keeping.keep is Keep.HOST:
        of_whole, work_of_whole = of_other + of_mlp * tokens, work_of_other - of_mlp * _part(shape, batch, Keep.HOST)
    else:
        of_whole, work_of_whole = _fused_layer(shape, method, batch, Keep.ALL)
    here = offloaded_bytes(shape, method, keeping.keep)  # of one layer, at work or to be
    if keeping.keep is Keep.HOST_INPUTS:  # and of the one before it
        here *= 2
    kept = whole * of_whole + (shape.layers - whole) * of_other + here * tokens
    if whole:  # the last layer is one of these, and its MLP is computed for targets alone
        kept -= of_mlp * (tokens - batch.targets)
    layer = work_of_whole if whole else 0.0
    if whole < shape.layers:
        layer = max(layer, work_of_other - whole * of_whole)
    logits = min(LOGITS_BYTES, _HALF * shape.vocabulary * batch.targets)
    loss = _HALF * width * (2 * tokens + 3 * batch.targets) + logits
    return kept, loss, layer


def _part(shape: ModelShape, batch: Batch, keep: Keep) -> int:
    return min(batch.tokens, mlp_part(shape.intermediate, keep))


def _fused_layer(shape: ModelShape, method: Method, batch: Batch, keep: Keep) -> tuple[float, float]:
    """What one layer keeps, and what it needs beside that when it needs most."""
    width, inner, tokens = shape.hidden, shape.intermediate, batch.tokens
    qkv_border, out_border, up_border, down_border = _ranks(method)
    turned = 2 if shape.head_norms else 1  # qkv before and after its heads are normed
    scales = _FLOAT * (2 + shape.heads + turned // 2 * (shape.heads + shape.key_value_heads))
    attended = (
        _HALF * (row_stride(width, qkv_border) + turned * shape.qkv + row_stride(shape.attended, out_border) + width)
        + scales
    )
    expanded = _HALF * (row_stride(width, up_border) + row_stride(2 * inner, up_border))
    of_input, of_border = _HALF * width, _HALF * down_border
    kept = {
        Keep.ALL: of_input + attended + expanded + of_border,
        Keep.INPUTS: of_input + of_border,
        Keep.HOST: _FLOAT * shape.heads + of_border,
        Keep.HOST_INPUTS: of_border,
    }[keep]
    part = tokens if keep is Keep.ALL else _part(shape, batch, keep)
    again_mlp = 0 if keep is Keep.ALL else expanded * part
    again = attended * tokens if keep in (Keep.INPUTS, Keep.HOST_INPUTS) else 0
    mlp = again_mlp + _HALF * (inner + width) * part
    attention = _HALF * (shape.attended + shape.qkv + width) * tokens
    if keep is Keep.HOST:  # the input normed again, and the heads
        attention += _HALF * (width + (turned - 1) * shape.qkv) * tokens
    work = (
        _HALF * (width + row_stride(width, down_border) + row_stride(width, out_border)) * tokens
        + again
        + max(mlp, attention)
    )
    if keep is Keep.HOST:  # on the way there, while what the layer before it kept is leaving
        leaving = offloaded_bytes(shape, method, keep) + _HALF * width
        work = max(work, leaving * tokens + again_mlp + _HALF * inner * part)
    return kept * tokens, work


def _autograd_working(shape: ModelShape, method: Method, batch: Batch, keep: Keep) -> tuple[float, float, float]:
    """The same of transformers' layers under autograd and autocast, about; all logits are made at once."""
    width, inner, tokens = shape.hidden, shape.intermediate, batch.tokens
    cast = {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), width),
        "o_proj": shape.attended,
        "down_proj": inner,
    }
    # Norms in float32, expanded keys and values, SwiGLU; then an input in 16 bits for every adapter.
    layer = 8 * width + 8 * shape.attended + 6 * inner
    if method.is_full:
        layer += 8 * width + 10 * width + 2 * inner
    else:
        layer += _HALF * sum(size for name, size in cast.items() if name in method.targets)
    if method.bits > 16:
        layer *= 2
    of_input = width * (_FLOAT if method.is_full or method.bits > 16 else _HALF)
    logits = 3 * _FLOAT * shape.vocabulary * batch.targets  # log-probabilities, and gradients on both their sides
    if keep is Keep.ALL:
        return shape.layers * layer * tokens, logits, 0
    return shape.layers * of_input * tokens, logits, layer * tokens
