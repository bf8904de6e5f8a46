"""How the factors of a fresh adapter start: a registry of plain functions.

Veneer's base stays untouched. Where a method would take its first product out of the base's weight (PiSSA, OLoRA,
LoRA-GA), its factors are marked `compensated`: the update is then `scaling · (B A - B0 A0)`, and the first output is
the base's up to rounding. LoftQ alone changes the first output, on purpose: it repairs a quantised weight.

    name        needs        compensated  first update
    kaiming     nothing      no           zero
    gaussian    nothing      no           zero
    orthogonal  nothing      no           zero up to rounding
    pissa       weight       yes          zero
    olora       weight       yes          zero
    loftq       full_weight  no           what quantisation took from the weight
    eva         inputs       no           zero
    lora_ga     gradient     yes          zero

Shapes: O out, I in, R rank.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from veneer.errors import ConfigError
from veneer.names import did_you_mean
from veneer.ops.initialise_data import eva, lora_ga, redistribute_ranks
from veneer.ops.initialise_random import gaussian, kaiming, orthogonal
from veneer.ops.initialise_values import Factors, InitialRequest
from veneer.ops.initialise_weight import loftq, olora, pissa

__all__ = [
    "INITIALISATIONS",
    "Factors",
    "InitialRequest",
    "Initialisation",
    "eva",
    "gaussian",
    "initial_factors",
    "initialisation_named",
    "kaiming",
    "loftq",
    "lora_ga",
    "olora",
    "orthogonal",
    "pissa",
    "redistribute_ranks",
]

Needs = Literal["nothing", "weight", "inputs", "gradient", "full_weight"]

_NITER = re.compile(r"(?P<name>pissa)_niter_(?P<niter>\d+)")
_FIELDS: Mapping[Needs, tuple[tuple[str, str], ...]] = MappingProxyType(
    {
        "nothing": (),
        "weight": (("weight_OI", "the layer's weight"),),
        "inputs": (("inputs", "directions of the layer's inputs: attach(observed=veneer.observe(...)[1])"),),
        "gradient": (("gradient_OI", "gradient of the loss by the weight: attach(observed=veneer.observe(...)[1])"),),
        "full_weight": (
            ("weight_OI", "the weight in full precision: attach(observed={path: weight})"),
            ("quantise", "a function from it to what the quantised layer holds of it"),
        ),
    }
)


@dataclass(frozen=True)
class Initialisation:
    """One way to start.

    Args:
        name: What a configuration calls it.
        needs: What a request must bring.
        compensated: Whether its factors need a compensating pair.
        keeps_output: Whether the first output is the base's.
        build: Makes the factors.
        options: Names of the settings that it takes.
    """

    name: str
    needs: Needs
    compensated: bool
    keeps_output: bool
    build: Callable[[InitialRequest], Factors]
    options: tuple[str, ...] = ()


def _build_pissa(asked: InitialRequest) -> Factors:
    assert asked.weight_OI is not None  # initial_factors has asked; so below
    return pissa(asked.weight_OI, asked.rank, asked.scaling, generator=asked.generator, **asked.options)


def _build_olora(asked: InitialRequest) -> Factors:
    assert asked.weight_OI is not None
    return olora(asked.weight_OI, asked.rank)


def _build_loftq(asked: InitialRequest) -> Factors:
    assert asked.weight_OI is not None
    assert asked.quantise is not None
    return loftq(asked.weight_OI, asked.rank, asked.scaling, asked.quantise, **asked.options)


def _build_eva(asked: InitialRequest) -> Factors:
    assert asked.inputs is not None
    return eva(asked.inputs, asked.shape[0], asked.rank)


def _build_lora_ga(asked: InitialRequest) -> Factors:
    assert asked.gradient_OI is not None
    return lora_ga(asked.gradient_OI, asked.rank, generator=asked.generator, **asked.options)


_ROWS = (
    Initialisation("kaiming", "nothing", False, True, lambda asked: kaiming(asked.shape, asked.rank, asked.generator)),
    Initialisation(
        "gaussian", "nothing", False, True, lambda asked: gaussian(asked.shape, asked.rank, asked.generator)
    ),
    Initialisation(
        "orthogonal", "nothing", False, True, lambda asked: orthogonal(asked.shape, asked.rank, asked.generator)
    ),
    Initialisation("pissa", "weight", True, True, _build_pissa, ("niter",)),
    Initialisation("olora", "weight", True, True, _build_olora),
    Initialisation("loftq", "full_weight", False, False, _build_loftq, ("iterations",)),
    Initialisation("eva", "inputs", False, True, _build_eva),
    Initialisation("lora_ga", "gradient", True, True, _build_lora_ga, ("stable_gamma", "direction", "niter")),
)

INITIALISATIONS: Mapping[str, Initialisation] = MappingProxyType({row.name: row for row in _ROWS})
"""Every initialisation by its name; a new one is a function and a row."""


def initialisation_named(name: str) -> tuple[Initialisation, dict[str, Any]]:
    """Return an initialisation and the options that its name holds: `pissa_niter_16` is `pissa` with `niter` 16.

    Raises:
        ConfigError: If there is none of that name; with the nearest.

    Example:
        >>> row, options = initialisation_named("pissa_niter_16")
        >>> row.name, row.needs, options
        ('pissa', 'weight', {'niter': 16})
    """
    found = _NITER.fullmatch(name)
    row = INITIALISATIONS.get(found["name"] if found else name)
    if row is None:
        raise ConfigError(
            f"no initialisation {name!r}{did_you_mean(name.lower(), [*INITIALISATIONS, 'pissa_niter_16'])}; "
            f"there are {', '.join(INITIALISATIONS)}, pissa_niter_<count>"
        )
    return row, {"niter": int(found["niter"])} if found else {}


def initial_factors(name: str, request: InitialRequest) -> Factors:
    """Return the first factors of one layer.

    Args:
        name: A key of `INITIALISATIONS`, or `pissa_niter_<count>`.
        request: The layer, and what the initialisation needs of it.

    Raises:
        ConfigError: If the name or an option is unknown, what it needs is missing or of another shape, or the
            initialisation itself refuses.

    Example:
        >>> import torch
        >>> request = InitialRequest((3, 4), 2, 0.5, torch.Generator().manual_seed(0), weight_OI=torch.ones(3, 4))
        >>> initial_factors("pissa", request).lora_B.shape
        torch.Size([3, 2])
    """
    row, named = initialisation_named(name)
    problems = [
        f"unknown option {option!r}{did_you_mean(option, row.options)}; it takes {', '.join(row.options) or 'none'}"
        for option in request.options
        if option not in row.options
    ]
    problems += [
        f"option {option!r} is {request.options[option]!r}, the name says {value!r}"
        for option, value in named.items()
        if request.options.get(option, value) != value
    ]
    problems += _missing(row, request)
    if problems:
        raise ConfigError(f"initialisation {name!r} cannot start a layer of (out, in) = {request.shape}", problems)
    return row.build(replace(request, options={**request.options, **named}))


def _missing(row: Initialisation, request: InitialRequest) -> Iterator[str]:
    """Yield what an initialisation needs and a request lacks or has in another shape."""
    tensors = {"weight_OI": request.weight_OI, "gradient_OI": request.gradient_OI, "inputs": request.inputs}
    present: dict[str, object] = {**tensors, "quantise": request.quantise}
    for key, what in _FIELDS[row.needs]:
        values = tensors.get(key)
        if present[key] is None:
            yield f"request.{key} is missing: {what}"
        elif values is not None:
            # Of directions there may be any number.
            rows = values.shape[0] if key == "inputs" and values.dim() == 2 else request.shape[0]
            if tuple(values.shape) != (rows, request.shape[1]):
                yield f"request.{key} has shape {tuple(values.shape)}, expected {(rows, request.shape[1])}"
