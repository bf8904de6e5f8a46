"""What `show` says of an adapter, from its numbers alone."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veneer.adapter import Adapter, AdapterMetadata, LowRank, TokenRows
from veneer.config import LoRAConfig
from veneer.errors import AdapterError
from veneer.tools.spectrum import spectrum
from veneer.tools.summarize import summarize


def pair(outputs: int, inputs: int, rank: int, scaling: float = 2.0, seed: int = 0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator), scaling
    )


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.floats(-3, 3), st.integers(0, 99))
def test_the_norm_is_that_of_the_delta(outputs, inputs, rank, scaling, seed):
    one = pair(outputs, inputs, rank, scaling, seed)
    assert spectrum(one).norm == pytest.approx(torch.linalg.norm(one.delta()).item(), rel=1e-9, abs=1e-12)


def test_modules_alike_are_counted_together():
    untrained = LowRank(torch.ones(2, 4), torch.zeros(4, 2), 2.0)
    adapter = Adapter(
        {"a.0.q": pair(4, 4, 2, seed=1), "a.1.q": untrained, "a.0.v": pair(3, 4, 5)},
        LoRAConfig(rank=2),
        {"head.bias": torch.zeros(3)},
        AdapterMetadata(base="org/model", base_fingerprint="f", row_format="chat"),
    )
    found = summarize(adapter)
    by_name = {target.name: target for target in found.targets}
    assert (by_name["q"].count, by_name["q"].untrained, by_name["q"].num_parameters) == (2, 1, 32)
    assert (by_name["v"].shape, by_name["v"].rank) == ((3, 4), 5)
    assert found.ranks == (2, 5)
    assert found.num_parameters == 32 + 5 * 7 + 3
    assert found.num_bytes == 4 * found.num_parameters
    deltas = torch.cat([one.delta().reshape(-1) for one in adapter.modules.values()])
    assert found.norm == pytest.approx(torch.linalg.norm(deltas).item())
    assert found.trained == (("head.bias", (3,)),)
    assert json.loads(json.dumps(found.to_json()))["digest"] == adapter.digest


@pytest.mark.parametrize(
    ("form", "shapes"),
    [
        ("embedding", ((2, 9), (4, 2))),
        ("conv", ((4, 3, 3, 3), (6, 2, 1, 1))),
        ("conv_across", ((4, 6, 3), (6, 2, 1))),
        ("conv_transpose", ((2, 3, 3), (4, 2, 1))),
        ("experts", ((3, 2, 5), (3, 4, 2))),
    ],
)
def test_norms_and_sizes_of_every_form(form, shapes):
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(shape, generator=generator) for shape in shapes)
    pair = LowRank(A, B, 0.5, form)
    assert spectrum(pair).norm == pytest.approx(pair.delta().norm().item(), rel=1e-9)
    tokens = {"embed": TokenRows((3, 5), torch.ones(2, 4))}
    summary = summarize(Adapter({"m": pair}, LoRAConfig(rank=2), tokens=tokens))
    assert (summary.targets[0].shape, summary.targets[0].form) == (pair.sizes, form)
    assert summary.trained == (("embed (rows of 2 tokens)", (2, 4)),)
    assert summary.num_parameters == summary.targets[0].num_parameters + 8


def test_modules_have_spectra_shares_and_norms_relative_to_the_base():
    adapter = Adapter({"a.0.q": pair(6, 4, 2, seed=1), "a.1.q": pair(6, 4, 2, seed=2)}, LoRAConfig(rank=2))
    norms = {"a.0.q": 2.0, "a.1.q": 50.0}
    found = summarize(adapter, norms)
    for one in found.modules:
        delta = adapter.modules[one.path].delta()
        assert one.norm == pytest.approx(delta.norm().item())
        assert one.relative == pytest.approx(one.norm / norms[one.path])
        assert list(one.singular_values) == pytest.approx(torch.linalg.svdvals(delta)[:2].tolist())
        assert 1 <= one.stable_rank <= one.effective_rank <= 2
    assert sum(one.share for one in found.modules) == pytest.approx(1)
    assert [one.path for one in found.changed_most()] == ["a.0.q", "a.1.q"]
    assert found.targets[0].relative == pytest.approx(found.norm / (2.0**2 + 50.0**2) ** 0.5)
    assert summarize(adapter).targets[0].relative is None


def test_a_module_out_of_range_is_named():
    huge = torch.full((1, 2), 1e300, dtype=torch.float64)
    adapter = Adapter({"deep.q": LowRank(huge, huge.T.contiguous(), 1.0)}, LoRAConfig(rank=1))
    with pytest.raises(AdapterError, match=r"deep\.q: its update is not finite"):
        summarize(adapter)
