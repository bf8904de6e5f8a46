"""What the contract's tests share: models, attached models, the plain formulas that they are held against."""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.contract.cases import Case, Holder
from tests.contract.variants import Variant
from veneer.adapter import LowRank
from veneer.nn.attach import Attachment, attach, attachment_of
from veneer.nn.slots import Slot
from veneer.nn.targets import Target, find_targets
from veneer.storage.quantise import QUANTISERS, quantise_model
from veneer.storage.registry import read_weight, storage_of

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Of the largest number of what is compared."""


def seed_with(seed: int) -> None:
    """Fix what is drawn on the CPU; `torch.manual_seed` also writes a stack trace down for each other device."""
    torch.default_generator.manual_seed(seed)


def make_model(case: Case, storage: str = "float32", seed: int = 0) -> Holder:
    """Return a model of one layer in evaluation mode, its weight held as asked."""
    seed_with(seed)
    model = Holder(case.build()).eval().requires_grad_(False)
    if storage in QUANTISERS:
        quantise_model(model, storage)
        return model
    return model.to(DTYPES[storage])


def make_inputs(case: Case, storage: str = "float32", seed: int = 1) -> tuple[Any, ...]:
    """Return the arguments of a model."""
    seed_with(seed)
    return cast(case.inputs(), DTYPES.get(storage, torch.float32))


def cast(inputs: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """Return arguments with their floating tensors in a dtype."""
    return tuple(one.to(dtype) if isinstance(one, Tensor) and one.is_floating_point() else one for one in inputs)


def attach_variant(model: nn.Module, case: Case, variant: Variant, **changes: Any) -> Attachment:
    """Attach a fresh adapter of a variant, with whatever its start has to see."""
    config = variant.config(case, **changes)
    observed = None
    if variant.observe is not None:
        generator = torch.Generator().manual_seed(7)
        observed = {one.path: variant.observe(one, generator) for one in find_targets(model, config)}
    return attach(model, config, observed=observed)


def randomise(attachment: Attachment, seed: int = 2) -> None:
    """Give all that trains other values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, one in attachment.parameters().items():
            values = torch.randn(one.shape, generator=generator, dtype=torch.float64) / 2
            one.copy_(values.abs() + 0.5 if name.endswith("magnitude") else values)


def attached(case: Case, variant: Variant, storage: str = "float32") -> tuple[Holder, Attachment]:
    """Return a model with an adapter that is not at its start."""
    model = make_model(case, storage)
    attachment = attach_variant(model, case, variant)
    randomise(attachment)
    return model, attachment


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Check that two tensors differ by no more than a share of the largest number."""
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=tolerance * max(largest, 1e-3))


# The plain formulas. Shapes: O out, I in, R rank, E experts, g groups.


def naive_delta(form: str, A: Tensor, B: Tensor, groups: int) -> Tensor:
    """Return `B · A` in the shape of the weight, written once more and apart from `veneer.factors`."""
    if form in ("transposed", "embedding"):
        return (B @ A).T
    if form not in ("conv", "conv_transpose"):
        return B @ A
    blocks = []
    for A_g, B_g in zip(A.chunk(groups), B.chunk(groups), strict=True):
        block = torch.einsum("or,ri...->oi...", B_g.flatten(1), A_g)
        blocks.append(block if form == "conv" else block.transpose(0, 1))
    return torch.cat(blocks)


def naive_weight(weight: Tensor, slot: Slot, groups: int = 1, transposed: bool = False) -> Tensor:
    """Return the weight that a slot stands for: `W + s (B A - B0 A0)`, with a magnitude its rows at that length.

    The slot's frozen pair holds the minus.
    """
    if slot.parts:
        rank = slot.lora_A.shape[0] // len(slot.parts)
        delta, taken = torch.zeros(slot.out_features, slot.lora_A.shape[1], dtype=slot.lora_A.dtype), 0
        for place, (start, stop) in enumerate(slot.parts):
            rows = slot.lora_B[taken : taken + stop - start] @ slot.lora_A[place * rank : (place + 1) * rank]
            taken += stop - start
            delta = torch.cat([delta[:start], rows, delta[stop:]])
        delta = delta.T if slot.form == "transposed" else delta
    else:
        delta = naive_delta(slot.form, slot.lora_A, slot.lora_B, groups)
    if slot.frozen_A is not None and slot.frozen_B is not None:
        delta = delta + naive_delta(slot.form, slot.frozen_A, slot.frozen_B, groups)
    delta = slot.scaling * (delta.mT if transposed else delta)
    return with_magnitude(weight + delta, slot.magnitude, slot.form, groups)


def with_magnitude(total: Tensor, magnitude: Tensor | None, form: str, groups: int) -> Tensor:
    """Return `magnitude · total / ‖total‖`, the norm of each output's weights, a constant for the gradient."""
    if magnitude is None:
        return total
    if form in ("transposed", "embedding"):
        return total / _length(total, (0,)) * magnitude
    if form == "conv_transpose":
        split = total.unflatten(0, (groups, -1))
        ones = [1] * (split.ndim - 3)
        scaled = split / _length(split, (1, *range(3, split.ndim))) * magnitude.view([groups, 1, -1, *ones])
        return scaled.flatten(0, 1)
    ones = [1] * (total.ndim - 1)
    return total / _length(total, tuple(range(1, total.ndim))) * magnitude.view([-1, *ones])


def _length(values: Tensor, axes: tuple[int, ...]) -> Tensor:
    return values.detach().square().sum(axes, keepdim=True).sqrt()


def naive_twin(base: nn.Module) -> nn.Module:
    """Return a layer in float64 that computes what a base does; a quantised one becomes plain."""
    stored = storage_of(base)
    if stored is not None and stored.name in QUANTISERS:
        weight, others = read_weight(base), dict(base.named_parameters())
        base = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in others)
        base.load_state_dict({"weight": weight, **others})
    return deepcopy(base).double().eval()


def naive_forward(model: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    """Compute an attached model's output by the plain formulas, differentiably, in the dtype of its factors."""
    attachment = attachment_of(model)
    layer = attachment.layers["layer"]
    twin = naive_twin(layer.base)
    weights = {}
    for target in attachment.targets:
        name = target.member or "weight"
        weights[name] = naive_weight(twin.get_parameter(name), attachment.slot(target), *_layout(twin))
    out = functional_call(twin, weights, cast(inputs, torch.float64))
    return out[0] if isinstance(out, tuple) else out


def _layout(module: nn.Module) -> tuple[int, bool]:
    values = vars(module)
    return values.get("groups", 1), values.get("is_transposed", False)


def merged(base: nn.Module, pairs: dict[Target, LowRank]) -> Holder:
    """Return a copy of a base with an adapter's values added to its weights."""
    twin = naive_twin(base)
    groups, transposed = _layout(twin)
    with torch.no_grad():
        for target, pair in pairs.items():
            weight = twin.get_parameter(target.member or "weight")
            delta = pair.delta().mT if transposed else pair.delta()
            magnitude = None if pair.magnitude is None else pair.magnitude.double()
            weight.copy_(with_magnitude(weight + delta, magnitude, pair.form, groups))
    return Holder(twin)
