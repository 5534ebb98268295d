"""bitsandbytes' AdamW with moments in 8 bits, in one launch for all tensors that are treated alike.

By itself the package launches each tensor alone and waits for the GPU after it: of 290 tensors, a quarter of a step. On
CUDA `eight_bit_adamw` takes the step: the package's kernel searches each moment's code, as long again as the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from bitsandbytes.optim import AdamW
from torch import Tensor, nn

from opensloth import flat


class FlatAdamW(AdamW):
    """Computes what the package's own does, tensor by tensor, on the CPU with the same bits.

    On CUDA, where the package decays weights after the update, lets small second moments become zero, and keeps the
    signs of first ones, the kernel does as the package does on the CPU, but for rounding to the very nearest code and
    for second moments, of which only zero is rounded to zero.
    Every gradient must lie as `flat.arrange` has it. The parameters become views of longer ones, which this optimizer
    trains; they must stay where they are.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], *, weight_decay: float, most: int = flat.MOST, **options: Any
    ) -> None:
        """parameters: of one type, on one device. weight_decay: of matrices; vectors have none. options: as AdamW's.

        most: elements of one launch, unless a single tensor has more.
        """
        if len({(parameter.dtype, parameter.device) for parameter in parameters}) > 1:
            raise ValueError("parameters of one type on one device are needed")
        self._parts = [(part, _whole(part)) for part in flat.arrange(parameters, most)]
        groups = [
            {"params": [whole], "weight_decay": weight_decay * part.is_matrices, "is_small": part.is_small}
            for part, whole in self._parts
        ]
        super().__init__(groups, **options | {"optim_bits": 8})
        self._kernel = self._find_kernel()

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        """Tensors that are small by themselves keep their moments in 32 bits, however many there are."""
        config: dict[str, Any] = super().get_config(gindex, pindex, group)
        return config | {"optim_bits": 32 if group["is_small"] else 8, "min_8bit_size": 0}

    def update_step(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        state = self.state[p]
        if self._kernel is None or state["state1"].dtype != torch.uint8:
            super().update_step(group, p, gindex, pindex)
            return
        assert p.grad is not None, "the package asks for no step of such a one"
        state["step"] += 1
        self._kernel(p, p.grad, state, self.get_config(gindex, pindex, group))

    def _find_kernel(self) -> Callable[..., None] | None:
        """`eight_bit_adamw.step`, if it is for these parameters and for this version's codes."""
        if any(not whole.is_cuda or whole.dtype != torch.float32 for _, whole in self._parts):
            return None
        from opensloth.fused.kernels import eight_bit_adamw

        known = eight_bit_adamw.knows(self.name2qmap["dynamic"], self.name2qmap["udynamic"])
        return eight_bit_adamw.step if known else None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for part, whole in self._parts:
            if not flat.lie_from(part, part.parameters, whole.data_ptr()):
                raise RuntimeError("a parameter was given other memory than the optimizer trains")
            whole.grad = flat.whole_gradient(part)
        return super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for part, _ in self._parts:
            for parameter in part.parameters:
                parameter.grad = None


def _whole(part: flat.Part) -> nn.Parameter:
    first = part.parameters[0]
    whole = nn.Parameter(torch.zeros(part.size, dtype=first.dtype, device=first.device))
    for parameter, place in zip(part.parameters, flat.views(part, whole.data), strict=True):
        place.copy_(parameter.data)
        parameter.data = place
    return whole
