"""The first values of a layer's factors."""

import hashlib

import torch
from torch import Tensor, nn

from veneer.adapter import LowRank
from veneer.config import LoRAConfig
from veneer.errors import ConfigError
from veneer.factors import cat_ranks, compute_delta, row_axes
from veneer.nn.conv import outputs_first
from veneer.nn.targets import Target
from veneer.ops.initialise import Factors, InitialRequest, initial_factors, initialisation_named
from veneer.storage.registry import read_weight, storage_of


def weight_of(module: nn.Module, member: str) -> Tensor:
    """Return a layer's weight in the form that its delta has, at least float32; a copy where it is stored otherwise.

    Example:
        >>> weight_of(nn.Linear(2, 3), "").shape
        torch.Size([3, 2])
    """
    if member:
        parameter = module.get_parameter(member).detach()
        return parameter.to(torch.promote_types(parameter.dtype, torch.float32))
    return read_weight(module)


def norm_axes(target: Target, ndim: int) -> tuple[int, ...]:
    """Return the axes of a target's weight that its magnitude is a norm over."""
    return row_axes(target.kind.form, ndim)


def fresh_pair(
    module: nn.Module, target: Target, config: LoRAConfig, seed: int, observed: Tensor | None = None
) -> LowRank:
    """Return the first factors of a layer; what is random depends on the seed and the layer's path alone.

    Args:
        module: The module that is wrapped.
        target: What is adapted of it.
        config: How.
        seed: Fixes what is drawn.
        observed: What the initialisation needs beside the layer: directions of its inputs (eva), the gradient of its
            weight (lora_ga), its weight in full precision (loftq).

    Raises:
        ConfigError: If the initialisation cannot start this layer, naming it.
    """
    key = hashlib.sha256(f"{seed}\0{target.path}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    try:
        factors = _factors(module, target, config, generator, observed)
    except ConfigError as error:
        raise ConfigError(f"{target.path}: {error.message}", error.problems) from None
    A, B = factors.lora_A, factors.lora_B
    frozen = 0
    if factors.compensated:
        # scaling (B A - B0 A0) is zero up to rounding: both halves of each product are the same numbers.
        A, B = cat_ranks(target.kind.form, [(A, B), (A, -B)])
        frozen = target.rank
    magnitude = _first_magnitude(module, target, A, B) if config.use_dora else None
    return LowRank(A, B, target.scaling, target.kind.form, magnitude, frozen)


def _factors(
    module: nn.Module, target: Target, config: LoRAConfig, generator: torch.Generator, observed: Tensor | None
) -> Factors:
    """Return an initialisation's factors in the shapes of the target."""
    row, _ = initialisation_named(config.init)
    shape_A, shape_B = target.shapes
    if row.needs == "nothing":
        # Each matrix of a stack, and each part, is drawn like one of its own.
        count = shape_A[0] if target.kind.form == "experts" else max(1, len(target.parts))
        shape, options = (target.out_features, target.in_features), dict(config.init_options)
        request = InitialRequest(shape, target.rank, target.scaling, generator, options=options)
        drawn = [initial_factors(config.init, request) for _ in range(count)]
        A = torch.cat([one.lora_A for one in drawn]).reshape(shape_A)
        # Several are only drawn where all start from zero.
        B = drawn[0].lora_B if drawn[0].lora_B.shape == shape_B else torch.zeros(shape_B)
        return Factors(A, B, drawn[0].compensated)
    needs_weight = row.needs == "weight"
    weight_OI = observed if row.needs == "full_weight" else _matrix(module, target) if needs_weight else None
    stored = storage_of(module)
    held = _matrix(module, target) if row.needs == "full_weight" else None
    if row.needs == "full_weight" and (stored is None or stored.name == "plain"):
        raise ConfigError("init='loftq' repairs a quantised weight, and this one is not quantised")
    return initial_factors(
        config.init,
        InitialRequest(
            (target.out_features, target.in_features),
            target.rank,
            target.scaling,
            generator,
            weight_OI=weight_OI,
            inputs=observed if row.needs == "inputs" else None,
            gradient_OI=observed if row.needs == "gradient" else None,
            quantise=None if held is None else lambda _: held,
            options=dict(config.init_options),
        ),
    )


def _matrix(module: nn.Module, target: Target) -> Tensor:
    """Return the weight as (out, in)."""
    weight = weight_of(module, target.member)
    return weight.T if target.kind.form in ("transposed", "embedding") else weight


def _first_magnitude(module: nn.Module, target: Target, A: Tensor, B: Tensor) -> Tensor:
    """Return the norms of `W + scaling · B A`: with them DoRA's first output is LoRA's."""
    weight = weight_of(module, target.member)
    if B.any():
        weight = weight + compute_delta(target.kind.form, A, B, target.scaling).to(weight)
    return weight_norms(weight, target, module)


def weight_norms(weight: Tensor, target: Target, module: nn.Module) -> Tensor:
    """Return the norm of each output's weights, (out,)."""
    if target.kind.form == "conv_transpose":
        weight = outputs_first(weight, module.groups)  # type: ignore[arg-type]
    return torch.linalg.vector_norm(weight, dim=norm_axes(target, weight.ndim), dtype=torch.float64).to(weight.dtype)
