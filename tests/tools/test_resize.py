"""Adapters at other ranks: the least error that a rank allows, the least rank that an energy allows."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.tools.algebra import FORM_SHAPES, adapter_of, pair_of, relative

import veneer
from veneer.adapter import Adapter, LowRank, TokenRows
from veneer.config import LoRAConfig
from veneer.errors import AdapterError, ConfigError
from veneer.factors import as_matrices
from veneer.tools.resize import resize


def energies(pair):
    """σ² of each matrix of a module, a row each, by the plain way."""
    A, B = as_matrices(pair.form, pair.lora_A.double(), pair.lora_B.double())
    return torch.linalg.svdvals(pair.scaling * B @ A)[:, : A.shape[1]].square()


@given(form=st.sampled_from(sorted(FORM_SHAPES)), rank=st.integers(1, 5), seed=st.integers(0, 99))
def test_the_error_is_the_least_that_a_rank_allows(form, rank, seed):
    pair = pair_of(form, 5, seed, 0.37)
    found = resize(adapter_of(at=pair), rank=rank)
    one, new = found.modules["at"], found.adapter.modules["at"]
    each = max(1, rank // 2) if form.startswith("conv") else rank
    sigma = energies(pair)
    least = (sigma[:, each:].sum() / sigma.sum()).sqrt().item()
    assert one.error == pytest.approx(least, rel=1e-5, abs=2e-7)
    assert one.error == pytest.approx(relative(new.delta(), pair.delta()), rel=1e-5, abs=2e-7)
    assert one.norm == pytest.approx(torch.linalg.vector_norm(pair.delta()).item(), rel=1e-9)
    assert (new.form, one.rank_before) == (form, pair.rank)
    assert new.rank <= max(rank, 2 if form.startswith("conv") else 1)


@given(form=st.sampled_from(sorted(FORM_SHAPES)), energy=st.floats(0.05, 1), seed=st.integers(0, 99))
def test_an_energy_takes_the_least_rank_that_keeps_it(form, energy, seed):
    pair = pair_of(form, 4, seed)
    found = resize(adapter_of(at=pair), energy=energy)
    levels = energies(pair).sum(0)
    shares = levels.cumsum(0) / levels.sum()
    least = next(place for place, share in enumerate(shares.tolist(), 1) if share >= energy * (1 - 1e-9))
    groups = 2 if form.startswith("conv") else 1
    assert found.adapter.modules["at"].rank == least * groups
    assert found.modules["at"].kept >= energy - 1e-6


def test_a_rank_that_is_there_already_changes_no_bit():
    adapter = adapter_of(q=pair_of("linear", 2, 0, 0.37), v=pair_of("linear", 4, 1))
    found = resize(adapter, rank=2)
    assert found.adapter.modules["q"].delta().equal(adapter.modules["q"].delta())
    assert found.modules["q"].error == 0.0
    assert found.adapter.modules["v"].rank == 2
    assert resize(adapter, rank=9).adapter.digest == adapter.digest


def test_ranks_that_nothing_needs_are_dropped_and_zero_keeps_one():
    pair = pair_of("linear", 2, 0)
    doubled = LowRank(torch.cat([pair.lora_A, pair.lora_A]), torch.cat([pair.lora_B, pair.lora_B], 1), 1.0)
    zero = LowRank(pair.lora_A, pair.lora_B * 0, 1.0)
    found = resize(adapter_of(q=doubled, v=zero), energy=1.0)
    assert {path: one.rank for path, one in found.adapter.modules.items()} == {"q": 2, "v": 1}
    assert relative(found.adapter.modules["q"].delta(), doubled.delta()) < 1e-6
    assert (found.modules["v"].error, found.modules["v"].kept) == (0.0, 1.0)


def test_a_start_that_cancels_is_taken_out(tmp_path):
    """A compensated initialisation is a pair of twice the rank, whose halves nearly cancel."""
    first, now = pair_of("linear", 2, 0), pair_of("linear", 2, 1)
    pair = LowRank(torch.cat([now.lora_A, first.lora_A]), torch.cat([now.lora_B, -first.lora_B], 1), 1.0, frozen_rank=2)
    adapter = Adapter({"q": pair}, LoRAConfig(rank=2, alpha=2, init="pissa", target_modules=["q"]))
    found = resize(adapter, energy=1.0).adapter
    assert (found.modules["q"].frozen_rank, found.config.init) == (0, "kaiming")
    assert relative(found.modules["q"].delta(), pair.delta()) < 1e-6
    veneer.save_adapter(found, tmp_path / "found")
    assert veneer.load_adapter(tmp_path / "found").digest == found.digest


def of_values(*sigma):
    size = len(sigma)
    return LowRank(torch.diag(torch.tensor(sigma)), torch.eye(size), 1.0)


def test_ranks_are_spread_by_need():
    adapter = adapter_of(q=of_values(9.0, 8.0, 7.0), v=of_values(3.0, 2.0, 1.0), o=of_values(0.1, 0.1, 0.1))
    even, spread = resize(adapter, rank=1), resize(adapter, rank=1, spread=True)
    assert {path: one.rank for path, one in spread.adapter.modules.items()} == {"o": 1, "q": 3, "v": 1}
    assert spread.total.error < even.total.error
    found = resize(adapter, energy=0.98, spread=True)
    assert {path: one.rank for path, one in found.adapter.modules.items()} == {"o": 1, "q": 3, "v": 2}
    assert found.total.kept >= 0.98


@given(seed=st.integers(0, 99), rank=st.integers(1, 4))
def test_spread_over_every_form_never_loses_more(seed, rank):
    modules = {form: pair_of(form, 4, seed + place, 0.5 + place) for place, form in enumerate(sorted(FORM_SHAPES))}
    adapter = Adapter(modules, LoRAConfig(rank=4, target_modules=sorted(modules)))
    found = resize(adapter, rank=rank, spread=True)
    assert all(pair.form == path for path, pair in found.adapter.modules.items())
    for path, one in found.modules.items():
        delta = found.adapter.modules[path].delta()
        assert one.error == pytest.approx(relative(delta, modules[path].delta()), rel=1e-4, abs=1e-6)


def test_attention_projections_keep_one_rank(tmp_path):
    inward = pair_of("attention_in", 4, 0)
    outward = LowRank(torch.ones(4, 6), torch.ones(6, 4), 1.0, "attention_out")
    adapter = adapter_of(**{"attn.in_proj_weight": inward, "attn.out_proj.weight": outward})
    found = resize(adapter, energy=0.95)
    assert found.modules["attn.out_proj.weight"].rank == 1
    assert len({pair.rank for pair in found.adapter.modules.values()}) == 1
    veneer.save_adapter(found.adapter, tmp_path / "found")
    assert veneer.load_adapter(tmp_path / "found").digest == found.adapter.digest


def test_what_trained_whole_goes_along():
    config = LoRAConfig(rank=3, target_modules=["q"], modules_to_save=["score"], token_rows={"embed": (1,)})
    rows = {"embed": TokenRows((1,), torch.ones(1, 2))}
    adapter = Adapter({"q": pair_of("linear", 3, 0)}, config, {"score.weight": torch.ones(2, 2)}, tokens=rows)
    found = resize(adapter, rank=1).adapter
    assert found.trained["score.weight"].equal(torch.ones(2, 2))
    assert found.tokens == adapter.tokens
    assert (found.config.modules_to_save, found.config.rank) == (("score",), 1)


def test_what_cannot_be_resized():
    adapter = adapter_of(q=pair_of("linear", 2, 0))
    for arguments, text in (
        ({}, "give rank or energy, one of them"),
        ({"rank": 1, "energy": 0.5}, "give rank or energy, one of them"),
        ({"rank": 0}, "rank: expected"),
        ({"rank": 1.5}, "rank: expected"),
        ({"energy": 0.0}, "energy: expected"),
        ({"energy": 1.1}, "energy: expected"),
    ):
        with pytest.raises(ConfigError, match=text):
            resize(adapter, **arguments)
    dora = adapter_of(q=replace(pair_of("linear", 2, 0), magnitude=torch.ones(8)))
    with pytest.raises(AdapterError, match="veneer convert ADAPTER --to lora"):
        resize(dora, rank=1)
    with pytest.raises(AdapterError, match="no factors"):
        resize(Adapter({}, LoRAConfig(), {"score.weight": torch.ones(1, 1)}), rank=1)
    bad = adapter_of(q=LowRank(torch.full((2, 2), torch.nan), torch.ones(3, 2), 1.0), v=pair_of("linear", 2, 0))
    for spread in (False, True):
        with pytest.raises(AdapterError, match="q: its factors are not finite"):
            resize(bad, rank=1, spread=spread)


def test_the_record_says_from_what():
    adapter = adapter_of(q=pair_of("linear", 3, 0))
    found = resize(adapter, rank=1)
    told = found.to_json()
    assert told["of"] == [{"digest": adapter.digest}]
    assert told["options"] == {"rank": 1, "energy": None, "spread": False}
    assert f"| runs/a | `{adapter.digest}` |" in found.card("runs/a")
