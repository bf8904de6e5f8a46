"""What gates compute is found out by asking them, never by their names."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from veneer.nn.gates import activation_of, split_gate_of


@pytest.mark.parametrize(
    ("name", "found"),
    [("silu", "silu"), ("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("relu", "relu"), ("tanh", None)],
)
def test_activations_of_transformers_are_known_by_their_values(name, found):
    assert activation_of(ACT2FN[name]) == found


def test_one_that_writes_into_its_input_is_known_too():
    assert activation_of(nn.SiLU(inplace=True)) == "silu"


def clipped(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, -1)
    return F.silu(gate.clamp(max=7)) * up.clamp(-7, 7)


def interleaved(both: Tensor) -> Tensor:
    return F.silu(both[..., ::2]) * both[..., 1::2]


def swapped(both: Tensor) -> Tensor:
    up, gate = both.chunk(2, -1)
    return F.silu(gate) * up


def raised(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, -1)
    return F.silu(gate) * (up + 1)


def of_one_size(both: Tensor) -> Tensor:
    return swapped(both) * torch.ones(3)


@pytest.mark.parametrize("other", [clipped, interleaved, swapped, raised, of_one_size, F.silu])
def test_other_gates_are_left_alone(other):
    assert split_gate_of(other) is None
