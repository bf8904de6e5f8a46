"""Drawn shapes: for each kind, what starts as the base and computes what the merged layer does, does so in any size."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.contract.cases import Case, Mixing, by_name, representatives
from tests.contract.support import (
    assert_near,
    attach_variant,
    cast,
    make_inputs,
    make_model,
    merged,
    randomise,
)
from tests.contract.variants import DORA, PLAIN
from veneer.nn.attach import current_adapter
from veneer.nn.kinds import KINDS

SIZE = st.integers(1, 6)
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CONVS_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
CASES = {case.kind: case for case in representatives()}


def _case(kind, build, inputs, **changes) -> Case:
    return replace(CASES[kind], name="drawn", build=build, inputs=inputs, **changes)


def _normal(*size):
    return lambda: (torch.randn(*size),)


@st.composite
def linear(draw, kind):
    inputs, outputs, rank = draw(SIZE), draw(SIZE), draw(SIZE)
    bias, lead = draw(st.booleans()), draw(st.lists(st.integers(0, 3), max_size=3))
    build = (lambda: Conv1D(outputs, inputs)) if "transposed" in kind else lambda: nn.Linear(inputs, outputs, bias)
    return _case(kind, build, _normal(*lead, inputs), rank=rank)


@st.composite
def embedding(draw, kind):
    rows, size, rank = draw(SIZE), draw(SIZE), draw(SIZE)
    padding = draw(st.none() | st.integers(0, rows - 1))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    return _case(
        kind,
        lambda: nn.Embedding(rows, size, padding_idx=padding),
        lambda: (torch.randint(rows, shape),),
        rank=rank,
    )


@st.composite
def conv(draw, kind):
    axes, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    inputs, outputs = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    kernel = [draw(st.integers(1, 3)) for _ in range(axes)]
    options = {
        "stride": [draw(st.integers(1, 2)) for _ in range(axes)],
        "dilation": [draw(st.integers(1, 2)) for _ in range(axes)],
        "padding": [draw(st.integers(0, 2)) for _ in range(axes)],
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    if "transpose" in kind:
        options["output_padding"] = [draw(st.integers(0, one - 1)) for one in options["stride"]]
        options["padding"] = [min(one, size - 1) for one, size in zip(options["padding"], kernel, strict=True)]
        layer = CONVS_TRANSPOSED[axes]
    else:
        options["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        layer = CONVS[axes]
    lead = draw(st.sampled_from([(), (1,), (3,)]))  # without a batch, too
    sizes = [draw(st.integers(5, 6)) for _ in range(axes)]
    rank = groups * draw(st.integers(1, 2))
    return _case(kind, lambda: layer(inputs, outputs, kernel, **options), _normal(*lead, inputs, *sizes), rank=rank)


@st.composite
def attention(draw, kind):
    heads, batch_first, packed = draw(st.integers(1, 3)), draw(st.booleans()), draw(st.booleans())
    size, batch, rank = heads * draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(SIZE)
    queries, keys = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    options = {"bias": draw(st.booleans()), "batch_first": batch_first, "add_bias_kv": draw(st.booleans())}
    others = {} if packed else {"kdim": size + 1, "vdim": size + 2}

    def inputs():
        lengths = (queries, keys, keys)
        widths = (size, others.get("kdim", size), others.get("vdim", size))
        return tuple(
            torch.randn(batch, length, width) if batch_first else torch.randn(length, batch, width)
            for length, width in zip(lengths, widths, strict=True)
        )

    names = ("in_proj_weight",) if packed else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    target = by_name(*(names if kind == "attention in" else ("out_proj.weight",)))
    return _case(
        kind, lambda: nn.MultiheadAttention(size, heads, **options, **others), inputs, target=target, rank=rank
    )


@st.composite
def experts(draw, kind):
    tokens, chosen, rank = draw(st.integers(0, 6)), draw(st.integers(1, 4)), draw(SIZE)

    def inputs():
        index = torch.stack([torch.randperm(4)[:chosen] for _ in range(tokens)]) if tokens else torch.empty(0, chosen)
        return torch.randn(tokens, 4), index.long(), torch.rand(tokens, chosen)

    return _case(kind, CASES[kind].build, inputs, rank=rank)


@st.composite
def parameter(draw, kind):
    lead, rank = draw(st.lists(st.integers(0, 3), max_size=3)), draw(SIZE)
    return _case(kind, Mixing, _normal(*lead, 5), rank=rank)


DRAWN = {
    "linear": linear,
    "conv1d (transposed linear)": linear,
    "embedding": embedding,
    "conv": conv,
    "conv transpose": conv,
    "attention in": attention,
    "attention out": attention,
    "experts": experts,
    "parameter": parameter,
}


@pytest.mark.parametrize("kind", [kind.name for kind in KINDS])
@settings(max_examples=15)
@given(data=st.data())
@torch.no_grad()
def test_in_any_shape_it_starts_as_the_base_and_computes_what_the_merged_layer_does(kind, data):
    case = data.draw(DRAWN[kind](kind))
    variant = data.draw(st.sampled_from([PLAIN] if kind == "experts" else [PLAIN, DORA]))
    model, inputs = make_model(case, "float64"), make_inputs(case, "float64")
    base = model(*inputs)
    attachment = attach_variant(model, case, variant)
    start = model(*inputs)
    assert start.shape == base.shape
    assert_near(start, base, 1e-6 if variant is DORA else 1e-12)
    randomise(attachment)
    adapter = current_adapter(model)
    pairs = {one: adapter.modules[one.path] for one in attachment.targets}
    expected = merged(attachment.layers["layer"].base, pairs)(*cast(inputs, torch.float64))
    # DoRA's norm is a sum that loses digits where the update cancels the weight, as it can in a row of one number.
    assert_near(model(*inputs), expected, 1e-8 if variant is DORA else 1e-11)
