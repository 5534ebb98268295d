"""AdamW with moments in 8 bits over flat gradients: on the CPU with the bits of bitsandbytes' own, tensor by tensor."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from cards import NEEDS_GPU
from eight_bit import DECAY, OPTIONS, tensor_by_tensor
from measured import at_most
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TrainingArguments

from opensloth import flat
from opensloth.errors import DataError
from opensloth.model import attach_adapter, load_weights, save_model, trainable_parameters
from opensloth.opensloth_config import FastModelArgs, LoraArgs, OpenSlothConfig
from opensloth.optimizer import kept, make_optimizer, restore

pytest.importorskip("bitsandbytes")
flat_optimizer = pytest.importorskip("opensloth.flat_optimizer")
STEPS = 4


class Shapes(nn.Module):
    """Large and small matrices and vectors, whole blocks and parts of one, in no order."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = ((7,), (96, 64), (5000,), (3, 5), (130, 33), (4096,), (64, 64), (300,), (61, 83))
        self.tensors = nn.ParameterList(torch.randn(size) for size in sizes)


def gradients(model: nn.Module, step: int) -> list[Tensor]:
    """Of very unlike sizes from tensor to tensor."""
    generator = torch.Generator().manual_seed(step)
    return [
        (torch.randn(p.shape, generator=generator) * 10.0 ** (i % 5 - 2)).to(p.device)
        for i, p in enumerate(model.parameters())
    ]


def train_flat(model: nn.Module, *, most: int = flat.MOST, begin: int = 0, end: int = STEPS, state: Any = None) -> Any:
    parameters = list(model.parameters())
    optimizer = flat_optimizer.FlatAdamW(parameters, weight_decay=DECAY, most=most, **OPTIONS)
    if state is not None:
        optimizer.load_state_dict(state)
    parts = flat.arrange(parameters, most)
    whole = torch.zeros(flat.size_of(parts), device=parameters[0].device)
    places = {
        p: v for part in parts for p, v in zip(part.parameters, flat.views(part, whole[part.begin :]), strict=True)
    }
    for step in range(begin, end):
        for parameter, gradient in zip(parameters, gradients(model, step), strict=True):
            parameter.grad = places[parameter].copy_(gradient)
        optimizer.step()
        optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in parameters)
    return optimizer


def train_plainly(model: nn.Module, optimizer: Any = None) -> None:
    parameters = list(model.parameters())
    optimizer = optimizer or tensor_by_tensor(parameters)
    for step in range(STEPS):
        for parameter, gradient in zip(parameters, gradients(model, step), strict=True):
            parameter.grad = gradient
        optimizer.step()


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("most", [flat.MOST, 6000])
def test_it_has_the_bits_of_each_tensor_trained_alone(most: int) -> None:
    plain, trained = Shapes(), Shapes()
    before = copy.deepcopy(plain)
    train_plainly(plain)
    optimizer = train_flat(trained, most=most)
    assert same(trained, plain)
    assert not any(torch.equal(a, b) for a, b in zip(trained.parameters(), before.parameters(), strict=True))
    launches = sum(len(group["params"]) for group in optimizer.param_groups)
    assert launches == (4 if most == flat.MOST else 8)


@pytest.mark.parametrize("most", [pytest.param(most, marks=NEEDS_GPU) for most in (flat.MOST, 6000)])
def test_the_kernel_trains_as_the_package_does(most: int) -> None:
    """Both round moments to 8 bits; the exact changes are those of torch's own AdamW."""
    exact, plain, trained = (Shapes().to("cuda") for _ in range(3))
    before = [parameter.detach().clone() for parameter in exact.parameters()]
    decays = [{"params": [p], "weight_decay": DECAY * (p.ndim > 1)} for p in exact.parameters()]
    train_plainly(exact, torch.optim.AdamW(decays, **OPTIONS))
    train_plainly(plain)
    train_flat(trained, most=most)
    apart = [
        sum(
            float((a - b).norm() / (b - c).norm())
            for a, b, c in zip(m.parameters(), exact.parameters(), before, strict=True)
        )
        for m in (trained, plain)
    ]
    at_most("changes by AdamW in 8 bits away from the exact ones, beside the package's", apart[0] / apart[1], 1.1)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_it_goes_on_from_its_state(device: str) -> None:
    whole, resumed = Shapes().to(device), Shapes().to(device)
    optimizer = train_flat(whole)
    assert {state["state1"].dtype for state in optimizer.state.values()} == {torch.uint8, torch.float32}
    state = copy.deepcopy(train_flat(resumed, end=2).state_dict())
    train_flat(resumed, begin=2, state=state)
    assert same(resumed, whole)


def test_moments_of_another_optimizer_are_refused() -> None:
    """As when a run that trained by plain torch, or on a GPU, goes on otherwise."""
    model = Shapes()
    optims = [("adamw_8bit", False), ("adamw_8bit", True), ("adamw_torch", False)]
    made = []
    for optim, way in optims:
        arguments = TrainingArguments(output_dir="-", optim=optim, use_cpu=True)
        optimizer = make_optimizer(list(model.parameters()), arguments, flat_gradients=way)
        made.append((optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)))
    for one, other in itertools.permutations(made, 2):
        with pytest.raises(DataError, match="holds the moments of") as caught:
            restore(*other, kept(*one))
        assert "opensloth.engine" in str(caught.value.hint)
    older = {name: value for name, value in kept(*made[0]).items() if name != "kind"}
    with pytest.raises(DataError, match="of other parameters"):
        restore(*made[1], older)


def test_gradients_and_parameters_that_lie_elsewhere_are_refused() -> None:
    model = Shapes()
    optimizer = flat_optimizer.FlatAdamW(list(model.parameters()), weight_decay=0.0, **OPTIONS)
    for parameter, gradient in zip(model.parameters(), gradients(model, 0), strict=True):
        parameter.grad = gradient
    with pytest.raises(RuntimeError, match="do not lie end to end"):
        optimizer.step()
    model.tensors[1].data = model.tensors[1].data.clone()
    with pytest.raises(RuntimeError, match="other memory"):
        optimizer.step()


@pytest.mark.parametrize("adapter", [False, True])
def test_a_model_that_it_trains_is_saved_and_loaded_as_any_other(
    adapter: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is copied where it was trained: transformers copies what lies in one piece with others."""
    model: Any = tiny.make_model("qwen2")
    if adapter:
        asked = FastModelArgs(model_name="-")
        model = attach_adapter(
            model, OpenSlothConfig(data_cache_path="-", fast_model_args=asked, lora_args=LoraArgs(r=8))
        )
    before = copy.deepcopy(model)
    flat_optimizer.FlatAdamW(trainable_parameters(model), weight_decay=0.0, **OPTIONS)
    assert len({p.untyped_storage().data_ptr() for p in trainable_parameters(model)}) < 5
    given: dict[str, Tensor] = {}
    save = transformers.PreTrainedModel.save_pretrained
    monkeypatch.setattr(
        transformers.PreTrainedModel,
        "save_pretrained",
        lambda model, folder, **said: given.update(said.get("state_dict", {})) or save(model, folder, **said),
    )
    save_model(model, tmp_path / "saved")
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in given.values())
    assert bool(given) != adapter
    save_model(before, tmp_path / "before")
    files = sorted(path.name for path in (tmp_path / "before").glob("*.safetensors"))
    for name in files:
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            parameter.zero_()
    load_weights(model, tmp_path / "saved")
    assert same(model, before)
    if not adapter:
        assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), before)
