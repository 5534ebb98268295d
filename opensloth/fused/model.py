"""A whole model on the fast path: the loss of a batch and the gradients of what is trained, without autograd."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from opensloth import flat
from opensloth.data.batch import Batch
from opensloth.fused import operations
from opensloth.fused.graphs import Graphs
from opensloth.fused.inputs import Inputs, inputs_of, padded_tokens
from opensloth.fused.keeping import host_has_room
from opensloth.fused.layer import Kept, Layer, Norm
from opensloth.fused.offload import Offload
from opensloth.fused.operations import Documents, gradient_of
from opensloth.fused.projection import Shared
from opensloth.memory_estimate import IN_HOST, LOGITS_BYTES, Keeping, mlp_part


class FusedModel:
    """Takes over the weights of a transformers model, with or without a LoRA adapter; it goes on working on them.

    See `opensloth.fused.support` for which models; others are not to be given. Until `release` the model's weights
    lie in wider buffers, which not everything that saves or merges them can read.
    """

    def __init__(
        self,
        base: Any,
        *,
        keeping: Keeping,
        full_batch: int = 0,
        long_document: int = 0,
        chunk: int | None = None,
    ) -> None:
        """base: transformers' model, without an adapter's wrapper. keeping: for the backward pass. full_batch: tokens
        of one, if they are known. long_document: tokens from which on one attends by `long_documents`; 0: none does.
        chunk: tokens of an MLP at a time where it is computed again; None: `mlp_part`.

        The optimizer's parameters must lie where it wants them by now. After an error `base` is as it was.
        """
        self._full_batch, self._long_document = full_batch, long_document
        decoder = base.model
        self._embedding: nn.Parameter = decoder.embed_tokens.weight
        self._rotary = decoder.rotary_emb
        self._norm = Norm(decoder.norm)
        self._head_weight: nn.Parameter = base.lm_head.weight
        self._device = self._head_weight.device
        try:
            with self._current_device():
                self._take_over(base, keeping, chunk or mlp_part(base.config.intermediate_size, keeping.keep))
        except BaseException:
            vars(self).clear()
            _give_back_weights(base)
            raise

    def _take_over(self, base: Any, keeping: Keeping, chunk: int) -> None:
        dtype = torch.bfloat16 if self._device.type == "cuda" else self._head_weight.dtype
        self._head = self._head_weight.data.to(dtype)  # itself, unless it is trained in another type
        self._layers = self._layers_of(base.model.layers, dtype, keeping, chunk)
        self._projections = [projection for layer in self._layers for projection in layer.projections]
        count = len(self._layers)
        self._offload = Offload(self._device, padded_tokens(self._full_batch, self._full_batch))
        # What the last layer keeps is needed next.
        self._offloaded = [keeping.of_layer(i, count) in IN_HOST and i < count - 1 for i in range(count)]
        self._borders = operations.Copies([entry for p in self._projections for entry in p.borders()])
        self._copies = [copy for projection in self._projections for copy in projection.copies()]
        if self._head.dtype != self._head_weight.dtype:
            self._copies.append((self._head_weight, self._head))
        self._lay_out_gradients([p for p in base.parameters() if p.requires_grad])
        self._graphs = Graphs(self._device)
        self._offloads_embedding = keeping.keep in IN_HOST and self._may_offload_embedding(dtype)
        if self._offloads_embedding:  # at the end: before, an error would leave it there
            here = self._embedding.data
            self._embedding.data = torch.empty(here.shape, dtype=here.dtype, pin_memory=True).copy_(here)

    def _layers_of(self, modules: Any, dtype: torch.dtype, keeping: Keeping, chunk: int) -> list[Layer]:
        """modules: transformers' layers."""
        shared: list[Shared] = [{}, {}, {}, {}]
        count, layers = len(modules), []
        for i, module in enumerate(modules):
            _give_back_cached(self._device)
            keep, keeps_mlp = keeping.of_layer(i, count), keeping.keeps_mlp(i, count)
            layers.append(Layer(module, dtype, shared, keep=keep, keeps_mlp=keeps_mlp, chunk=chunk))
        _give_back_cached(self._device)
        return layers

    def _lay_out_gradients(self, trained: list[nn.Parameter]) -> None:
        parts = flat.arrange(trained)
        self.gradient = torch.zeros(flat.size_of(parts), dtype=torch.float32, device=self._device)
        """All gradients end to end, float32 [n], as `flat.arrange` has them."""
        self._parameters = [parameter for part in parts for parameter in part.parameters]
        self._addresses = [parameter.data_ptr() for parameter in self._parameters]
        self._views = [view for part in parts for view in flat.views(part, self.gradient[part.begin :])]
        self.begin_step()
        of_shape = {projection.shape: projection for projection in self._projections}
        rooms = {shape: projection.room_to_stage() for shape, projection in of_shape.items()}
        for layer in self._layers:
            layer.use_staging([rooms[projection.shape] for projection in layer.projections])

    def release(self) -> None:
        """Leave the transformers model as it was found, trained; this object must not be used any more.

        Weights are given back buffer by buffer: the model must not be there twice, and nothing else stays beside it.
        """
        projections, parameters = self._projections, self._parameters
        offloaded = self._embedding if self._offloads_embedding else None
        device = self._device
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # a graph may still be copying to host memory that is given back
        vars(self).clear()
        for parameter in parameters:
            parameter.grad = None
        while projections:
            _give_back_cached(device)
            projections.pop().release()
        _give_back_cached(device)
        if offloaded is not None:
            offloaded.data = offloaded.data.to(device)

    def _current_device(self) -> contextlib.AbstractContextManager[Any]:
        """Kernels are launched on the current device, wherever their tensors are."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext()

    def _may_offload_embedding(self, dtype: torch.dtype) -> bool:
        """Whether host memory is as good a place: a batch reads few rows, and nobody writes any.

        A trained weight may be frozen for a while, and must stay where the optimizer finds it; its type is another.
        """
        weight = self._embedding
        frozen = not weight.requires_grad and weight.dtype == dtype and weight is not self._head_weight
        return self._device.type == "cuda" and frozen and host_has_room(weight.nbytes)

    def begin_step(self) -> None:
        """Take note of what the optimizer did, and start all gradients at zero.

        Raises RuntimeError when trained parameters were moved since: kernels know them by their addresses.
        """
        if self._addresses != [parameter.data_ptr() for parameter in self._parameters]:
            raise RuntimeError("trained parameters were moved: the optimizer has to be made before the fast path is")
        self.gradient.zero_()
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.grad = view
        self._refresh()

    def _refresh(self) -> None:
        with self._current_device():
            self._borders.run(add=False)
        if self._copies:  # of hundreds, one by one, a step would wait for their launches
            torch._foreach_copy_([place for _, place in self._copies], [weight.data for weight, _ in self._copies])

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradient down to `max_norm` (0: leave it); returns its L2 norm before that, float32."""
        norm = torch.linalg.vector_norm(self.gradient)
        if max_norm > 0:
            self.gradient.mul_(torch.clamp(max_norm / (norm + 1e-6), max=1.0))
        return norm

    @torch.no_grad()
    def accumulate(self, batch: Batch, scale: float) -> Tensor:
        """Add the gradient of (sum of the targets' losses) * scale to .grad; returns the sum, float32.

        batch: flat, on the CPU.
        """
        with self._current_device():
            return self._graphs.replayed(self._run, self._inputs(batch, scale))

    @torch.no_grad()
    def loss_sum(self, batch: Batch) -> Tensor:
        """Sum of the targets' losses, float32, nats. batch: flat, on the CPU."""
        self._refresh()
        with self._current_device():
            return self._graphs.launched(self._forward, self._inputs(batch, 0.0))

    def _forward(self, inputs: Inputs) -> Tensor:
        """One batch, forward alone; returns its sum of losses."""
        x, documents = self._embed(inputs.ids), self._documents(inputs)
        for i, layer in enumerate(self._layers):
            x, _ = layer.forward(x, documents, self._wanted(i, inputs))
        return self._loss(x, inputs, None)

    def _wanted(self, layer: int, inputs: Inputs) -> Tensor | None:
        """The rows of a layer's output that anyone reads; None: all. Of the last one, those that predict a target."""
        return inputs.predictors if layer == len(self._layers) - 1 else None

    def _inputs(self, batch: Batch, scale: float) -> Inputs:
        inputs = inputs_of(batch, scale, self._full_batch, long=self._long_document)
        return inputs.pinned() if self._device.type == "cuda" else inputs

    def _run(self, inputs: Inputs) -> Tensor:
        """One batch, forward and backward; returns its sum of losses."""
        x, documents = self._embed(inputs.ids), self._documents(inputs)
        kept = []
        for i, layer in enumerate(self._layers):
            x, of_layer = layer.forward(x, documents, self._wanted(i, inputs))
            kept.append(of_layer)
            self._put_away(i, of_layer)
        del of_layer  # else the last one's is kept to the end
        self._offload.settle()
        targets, width = x.shape
        dx = self._layers[-1].room_for_gradient(targets)
        loss = self._loss(x, inputs, dx[:, :width])
        del x
        for i in reversed(range(len(self._layers))):
            dx = self._backward(i, dx, kept, documents)
        if self._embedding.requires_grad:  # by sorting, not by atomics: the same bits every time
            gradient_of(self._embedding).index_put_((inputs.ids,), dx[:, :width].float(), accumulate=True)
        return loss

    def _embed(self, ids: Tensor) -> Tensor:
        return operations.rows_of(self._embedding.data, ids).to(self._head.dtype)

    def _room_before(self, layer: int, tokens: int) -> Tensor | None:
        """Where the gradient of a layer's input goes; None when nobody asks for it."""
        if layer:
            return self._layers[layer - 1].room_for_gradient(tokens)
        needed = self._embedding.requires_grad or self._layers[0].needs_input_gradient
        return self._head.new_empty(tokens, self._head.shape[1]) if needed else None

    def _backward(self, layer: int, dz: Tensor, kept: list[Kept], documents: Documents) -> Tensor:
        """dz: with room for a border. kept: of this layer and those before it; this one's is taken out.

        Returns the gradient of the layer's input, likewise; where nobody asks for it, that of its output. From host
        memory comes what is needed next, no sooner than it has to.
        """
        tokens, of_layer = documents.offsets[-1], kept.pop()
        if self._offloaded[layer]:
            of_layer.first = self._offload.take(layer, 0)
            self._offload.fetch(layer, 1)
        dy = self._layers[layer].expand_backward(dz, of_layer, documents)
        if layer and self._offloaded[layer - 1]:
            self._offload.fetch(layer - 1, 0)
        if self._offloaded[layer]:
            of_layer.later = self._offload.take(layer, 1)
        before = self._room_before(layer, tokens)
        dx = None if before is None else before[:, : self._head.shape[1]]
        self._layers[layer].attend_backward(dy, of_layer, documents, dx)
        return dz if before is None else before

    def _put_away(self, layer: int, kept: Kept) -> None:
        if self._offloaded[layer]:
            self._offload.put(layer, (kept.first, kept.later))
            kept.first = kept.later = ()

    def _documents(self, inputs: Inputs) -> Documents:
        cos, sin = self._rotary(inputs.positions.new_empty(0, dtype=torch.float32), inputs.positions[None])
        half = cos.shape[-1] // 2
        cos, sin = (turns[0, :, :half].float().contiguous() for turns in (cos, sin))
        return Documents(inputs.offsets, inputs.tiles, cos, sin, inputs.long)

    def _loss(self, x: Tensor, inputs: Inputs, dx: Tensor | None) -> Tensor:
        """x: the last layer's output where a target is predicted, [m, D]; dx: its gradient, is written."""
        normed = torch.empty_like(x)
        rms = self._norm.forward(x, normed)
        size = max(1, LOGITS_BYTES // (self._head.shape[0] * self._head.element_size()))
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        dnormed = torch.empty_like(normed) if dx is not None else None
        for begin in range(0, len(x), size):
            part = slice(begin, begin + size)
            logits = normed[part] @ self._head.T
            total += operations.cross_entropy_(logits, inputs.targets[part], inputs.scale).sum()
            if dnormed is not None:
                torch.mm(logits, self._head, out=dnormed[part])
                if self._head_weight.requires_grad:
                    operations.add_product(logits.T, normed[part], gradient_of(self._head_weight), accumulate=True)
            del logits  # before the next part's are made
        if dx is not None and dnormed is not None:
            self._norm.backward(dnormed, x, rms, None, dx)
        return total


def _give_back_weights(base: Any) -> None:
    """Weights of their own to layers that some projection had begun to take over when it failed."""
    for module in base.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            weight = module.weight
            if weight.untyped_storage().nbytes() > weight.nbytes:
                weight.data = weight.data.clone(memory_format=torch.contiguous_format)


def _give_back_cached(device: torch.device) -> None:
    """Before weights move: small ones would be cut from the blocks of large ones that have moved.

    What is left of such blocks is of use to nobody: 2 GiB at 7B.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
