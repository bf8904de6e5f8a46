"""What can be asked of a layer beside plain LoRA: each variant, each initialisation, and some of them together."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.contract.cases import Case
from veneer.config import LoRAConfig
from veneer.nn.targets import Target
from veneer.ops.initialise import INITIALISATIONS

PARTS = ((0, 2), (3, 4))

Observe = Callable[[Target, torch.Generator], Tensor]


@dataclass(frozen=True)
class Variant:
    """One way of adapting.

    Args:
        name: What test ids and the grid call it.
        settings: What it sets in `LoRAConfig`.
        asks: The single variants that it is made of.
        observe: Makes what its initialisation has to see of a target.
        starts_exact: Whether the first output is the base's bit for bit, and not only up to rounding.
        starts_as_base: Whether it is the base's at all.
    """

    name: str
    settings: Mapping[str, Any]
    asks: tuple[str, ...] = ()
    observe: Observe | None = None
    starts_exact: bool = True
    starts_as_base: bool = True

    def __str__(self) -> str:
        return self.name

    def config(self, case: Case, **changes: Any) -> LoRAConfig:
        """Return the settings of a cell."""
        settings = {"rank": case.rank, "alpha": 1.5 * case.rank, **case.target, **self.settings, **changes}
        return LoRAConfig(**settings)


def _directions(target: Target, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(target.in_features, target.in_features, generator=generator)).Q


def _matrix(target: Target, generator: torch.Generator) -> Tensor:
    return torch.randn(target.out_features, target.in_features, generator=generator)


_OBSERVE: Mapping[str, Observe] = {"inputs": _directions, "gradient": _matrix, "full_weight": _matrix}
# The factors of `orthogonal`, and the two halves of a compensated start, cancel up to rounding.
_ROUNDS = ("orthogonal",)


def _initialisation(name: str) -> Variant:
    row = INITIALISATIONS[name]
    exact = not row.compensated and name not in _ROUNDS
    return Variant(f"init={name}", {"init": name}, (f"init={name}",), _OBSERVE.get(row.needs), exact, row.keeps_output)


PLAIN = Variant("plain", {})
# The norm is taken from the factors, the bias put back behind the magnitude: both round.
DORA = Variant("dora", {"use_dora": True}, ("dora",), starts_exact=False)

SINGLE: tuple[Variant, ...] = (
    PLAIN,
    Variant("rslora", {"use_rslora": True}),
    DORA,
    Variant("freeze_A", {"freeze_A": True}, ("freeze_A",)),
    Variant("dropout", {"dropout": 0.4}, ("dropout",)),
    Variant("parts", {"parts": {".*": PARTS}}, ("parts",)),
    *(_initialisation(name) for name in INITIALISATIONS if name != LoRAConfig().init),
)

TOGETHER: tuple[Variant, ...] = (
    Variant("dora, dropout", {"use_dora": True, "dropout": 0.4}, ("dora", "dropout"), starts_exact=False),
    Variant("dora, parts", {"use_dora": True, "parts": {".*": PARTS}}, ("dora", "parts"), starts_exact=False),
    Variant("dora, init=pissa", {"use_dora": True, "init": "pissa"}, ("dora", "init=pissa"), starts_exact=False),
    Variant("freeze_A, init=olora", {"freeze_A": True, "init": "olora"}, ("init=olora",), starts_exact=False),
    Variant("dropout, parts", {"dropout": 0.4, "parts": {".*": PARTS}}, ("dropout", "parts")),
    Variant("freeze_A, parts, rslora", {"freeze_A": True, "parts": {".*": PARTS}, "use_rslora": True}, ("parts",)),
)

VARIANTS: tuple[Variant, ...] = (*SINGLE, *TOGETHER)
