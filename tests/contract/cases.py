"""The layers under test: for each kind some small modules, what goes in, and what of them is adapted.

A new row of `veneer.nn.kinds.KINDS` needs a case here; `test_grid.py` says so where it has none.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.pytorch_utils import Conv1D

FLOATS = ("float32", "float64", "bfloat16", "float16")
QUANTISED = ("int8", "nf4")

WHOLE: Mapping[str, Any] = {"target_modules": ("layer",)}


def by_name(*names: str) -> Mapping[str, Any]:
    """Settings that adapt parameters of the layer and no module."""
    return {"target_modules": (), "target_parameters": tuple(f"layer.{name}" for name in names)}


@dataclass(frozen=True)
class Case:
    """One module under test.

    Args:
        name: What test ids call it.
        kind: Name of its row in `KINDS`.
        build: Makes the module.
        inputs: Makes its arguments; floating tensors are cast to the cell's dtype.
        target: Settings that say what of it is adapted.
        rank: Of the factors.
        storages: How its weight can be held.
        rows: Whether rows of one call can be routed apart.
        in_order: Whether it adds in the base's order, so that what adds nothing changes no bit.
        in_file: What the error says where PEFT's layout has no place for it; None where it has.
    """

    name: str
    kind: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    target: Mapping[str, Any] = field(default_factory=lambda: WHOLE)
    rank: int = 2
    storages: tuple[str, ...] = FLOATS
    rows: bool = True
    in_order: bool = True
    in_file: str | None = None

    def __str__(self) -> str:
        return self.name


class Holder(nn.Module):
    """A model of one layer; of several outputs it returns the first."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Any) -> Tensor:
        out = self.layer(*inputs)
        return out[0] if isinstance(out, tuple) else out


class Mixing(nn.Module):
    """A module of no known kind that holds two matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.randn(6, 5))
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.offset = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.mixing.T + self.offset) @ self.weight.T


def _hooked() -> nn.Module:
    """A linear layer with a hook: it must be called, its product cannot be fused."""
    layer = nn.Linear(5, 6)
    layer.register_forward_hook(_same)
    return layer


def _same(module: nn.Module, inputs: tuple[Any, ...], out: Tensor) -> Tensor:
    return out.clone()


def _experts(kind: type[nn.Module], **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        sizes = {"num_local_experts": 4, "n_routed_experts": 4, "hidden_size": 4, "moe_hidden_size": 4}
        widths = {"intermediate_size": 3, "moe_intermediate_size": 3, "moe_latent_size": None, "post_norm_eps": 1e-6}
        acts = {"hidden_act": "silu", "mlp_hidden_act": "relu2", "swiglu_alpha": 1.702, "swiglu_limit": 7.0}
        config = SimpleNamespace(**{**sizes, **widths, **acts, "_experts_implementation": "eager"}, **settings)
        experts = kind(config)
        for parameter in experts.parameters():
            nn.init.normal_(parameter)
        return experts

    return build


def _tokens() -> tuple[Any, ...]:
    """Five tokens with two experts each; the last expert has none."""
    index = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2], [1, 0]])
    return torch.randn(5, 4), index, torch.rand(5, 2)


def _normal(*size: int) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randn(*size),)


def _ids() -> tuple[Any, ...]:
    return (torch.tensor([[0, 3, 1, 3], [6, 1, 2, 5]]),)


def _query_key_value() -> tuple[Any, ...]:
    """Batch second; keys and values of other sizes than queries."""
    return torch.randn(3, 2, 4), torch.randn(5, 2, 3), torch.randn(5, 2, 6)


def _masked() -> tuple[Any, ...]:
    """Batch first, with padding and a causal mask: (query, key, value, key_padding_mask, need_weights, attn_mask)."""
    x = torch.randn(2, 3, 4)
    padding = torch.tensor([[False, False, False], [False, False, True]])
    return x, x.clone(), x.clone(), padding, False, torch.triu(torch.ones(3, 3, dtype=torch.bool), 1)


# What the errors say where PEFT's layout has no place for an adapter.
_APART = "PEFT's layout holds a packed input and an output projection of one rank"
_NESTED = "PEFT nests mixing, weight in the order of the module, which only it knows"
_UP_DOWN = by_name("gate_up_proj", "down_proj")
_NO_PLACE = "no place for a transposed convolution"


def _linear(name: str, build: Callable[[], nn.Module], *size: int, storages: tuple[str, ...] = FLOATS) -> Case:
    return Case(name, "linear", build, _normal(*size), storages=storages)


def _conv(name: str, build: Callable[[], nn.Module], *size: int, rank: int = 2) -> Case:
    return Case(name, "conv", build, _normal(*size), rank=rank)


def _conv_transpose(name: str, build: Callable[[], nn.Module], *size: int, rank: int = 2) -> Case:
    return Case(name, "conv transpose", build, _normal(*size), rank=rank, in_file=_NO_PLACE)


def _of_experts(name: str, build: Callable[[], nn.Module], target: Mapping[str, Any]) -> Case:
    return Case(name, "experts", build, _tokens, target, in_order=False)


CASES: tuple[Case, ...] = (
    _linear("linear", lambda: nn.Linear(5, 6), 4, 5, storages=(*FLOATS, *QUANTISED)),
    _linear("linear-no-bias", lambda: nn.Linear(5, 6, bias=False), 2, 3, 5, storages=(*FLOATS, *QUANTISED)),
    _linear("linear-hooked", _hooked, 2, 3, 5),
    Case("transposed", "conv1d (transposed linear)", lambda: Conv1D(6, 5), _normal(2, 3, 5)),
    Case("embedding", "embedding", lambda: nn.Embedding(7, 6), _ids),
    Case("embedding-padded", "embedding", lambda: nn.Embedding(7, 6, padding_idx=1), _ids),
    Case("embedding-gemma", "embedding", lambda: Gemma3TextScaledWordEmbedding(7, 6, 0, embed_scale=2.5), _ids),
    Case("embedding-bart", "embedding", lambda: BartScaledWordEmbedding(7, 6, 1, embed_scale=1.5), _ids),
    _conv("conv1d-strided", lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), 2, 3, 9),
    _conv("conv1d-same-dilated", lambda: nn.Conv1d(3, 4, 3, padding="same", dilation=2, bias=False), 2, 3, 9),
    _conv("conv1d-same-even-reflect", lambda: nn.Conv1d(3, 4, 4, padding="same", padding_mode="reflect"), 2, 3, 9),
    _conv("conv1d-valid", lambda: nn.Conv1d(3, 4, 3, padding="valid"), 2, 3, 9),
    _conv(
        "conv2d-grouped",
        lambda: nn.Conv2d(4, 6, 3, stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2),
        2, 4, 6, 7, rank=4,
    ),
    _conv("conv2d-depthwise", lambda: nn.Conv2d(4, 8, 3, groups=4), 2, 4, 5, 5, rank=4),
    _conv("conv2d-reflect", lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="reflect"), 2, 2, 5, 6),
    _conv("conv2d-replicate", lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="replicate"), 2, 2, 5, 6),
    _conv("conv2d-circular", lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular"), 2, 2, 5, 6),
    _conv("conv3d", lambda: nn.Conv3d(2, 3, (1, 2, 3), padding=(0, 1, 1)), 2, 2, 3, 4, 4),
    _conv_transpose("conv1d-transpose", lambda: nn.ConvTranspose1d(3, 4, 3, stride=2, output_padding=1), 2, 3, 5),
    _conv_transpose(
        "conv2d-transpose-grouped",
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2),
        2, 4, 4, 5, rank=4,
    ),
    Case(
        "conv2d-transpose-sized",
        "conv transpose",
        lambda: nn.ConvTranspose2d(2, 3, 3, stride=2, bias=False),
        lambda: (torch.randn(2, 2, 4, 4), [10, 9]),
        in_file=_NO_PLACE,
    ),
    _conv_transpose("conv3d-transpose", lambda: nn.ConvTranspose3d(2, 3, 2, stride=(1, 2, 1)), 2, 2, 3, 3, 3),
    Case(
        "attention-in", "attention in", lambda: nn.MultiheadAttention(4, 2), lambda: _masked()[:3],
        by_name("in_proj_weight"), rows=False,
    ),
    Case(
        "attention-in-separate", "attention in", lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=6), _query_key_value,
        by_name("q_proj_weight", "k_proj_weight", "v_proj_weight"), rows=False, in_file=_APART,
    ),
    Case(
        "attention-out", "attention out", lambda: nn.MultiheadAttention(6, 2, bias=False),
        lambda: (torch.randn(3, 2, 6),) * 3, by_name("out_proj.weight"), rows=False,
    ),
    Case(
        "attention-whole", "attention in", lambda: nn.MultiheadAttention(4, 2, batch_first=True), _masked, rows=False,
    ),
    _of_experts("experts-gated", _experts(MixtralExperts), _UP_DOWN),
    _of_experts("experts-transposed-bias", _experts(GptOssExperts), _UP_DOWN),
    _of_experts("experts-no-gate", _experts(NemotronHExperts), by_name("up_proj", "down_proj")),
    _of_experts("experts-normed", _experts(MuseSparkExperts), by_name("down_proj")),
    Case("parameter", "parameter", Mixing, _normal(2, 3, 5), by_name("mixing"), rows=False),
    Case(
        "parameters-two", "parameter", Mixing, _normal(2, 3, 5), by_name("mixing", "weight"), rows=False,
        in_file=_NESTED,
    ),
)  # fmt: skip
"""Every module under test; the first of a kind stands for it where one is enough."""


def representatives() -> list[Case]:
    """Return one case of each kind."""
    first: dict[str, Case] = {}
    for case in CASES:
        first.setdefault(case.kind, case)
    return list(first.values())
