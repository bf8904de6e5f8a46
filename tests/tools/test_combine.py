"""Adapters of adapters: against the plain sum of full updates, for every form, and what is refused."""

import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from tests.peft_methods import net
from tests.tools.algebra import FORM_SHAPES, adapter_of, pair_of, relative

import veneer
from veneer.adapter import Adapter, AdapterMetadata, LowRank, TokenRows
from veneer.config import LoRAConfig
from veneer.errors import AdapterError, ConfigError
from veneer.tools.combine import combine


def meant(adapters, weights, path):
    """The method `linear` by its definition."""
    return sum(w * one.modules[path].delta() for one, w in zip(adapters, weights, strict=True) if path in one.modules)


@given(
    form=st.sampled_from(sorted(FORM_SHAPES)),
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    data=st.data(),
)
def test_linear_is_the_weighted_sum_of_the_updates_whatever_the_form(form, ranks, data):
    weights = [data.draw(st.sampled_from([1.0, -1.0, 0.3, -2.5, 0.0])) for _ in ranks]
    scalings = [data.draw(st.sampled_from([1.0, 2.0, 0.37])) for _ in ranks]
    pairs = [pair_of(form, rank, seed, scalings[seed]) for seed, rank in enumerate(ranks)]
    adapters = [adapter_of(at=pair) for pair in pairs]
    found = combine(adapters, weights)
    expected = meant(adapters, weights, "at")
    assert relative(found.adapter.modules["at"].delta(), expected) < 1e-6
    one = found.modules["at"]
    assert one.norm == pytest.approx(torch.linalg.vector_norm(expected).item(), rel=1e-9, abs=1e-12)
    assert one.error < 1e-6
    assert found.adapter.modules["at"].form == form


@given(form=st.sampled_from(sorted(FORM_SHAPES)), rank=st.integers(1, 6), seed=st.integers(0, 99))
def test_a_rank_gives_the_best_approximation_with_its_error(form, rank, seed):
    adapters = [adapter_of(at=pair_of(form, 3, seed)), adapter_of(at=pair_of(form, 2, seed + 100, 0.5))]
    weights = [0.7, -1.2]
    found = combine(adapters, weights, rank=rank)
    delta, expected = found.adapter.modules["at"].delta(), meant(adapters, weights, "at")
    assert found.modules["at"].error == pytest.approx(relative(delta, expected), rel=1e-5, abs=2e-7)
    assert found.modules["at"].kept == pytest.approx(1 - relative(delta, expected) ** 2, abs=1e-6)
    if form in ("linear", "transposed", "embedding", "parameter", "attention_in", "attention_out"):
        values = torch.linalg.svdvals(expected)
        least = (torch.linalg.vector_norm(values[rank:]) / torch.linalg.vector_norm(values)).item()
        assert found.modules["at"].error == pytest.approx(least, rel=1e-5, abs=2e-7)


def test_one_adapter_with_weight_one_is_itself_to_the_last_bit():
    for form in FORM_SHAPES:
        if form.startswith("attention"):
            continue  # its two projections share one factor, so that each is rounded
        pair = pair_of(form, 2, 0, 0.37)
        found = combine([adapter_of(at=pair)], [1.0])
        assert found.adapter.modules["at"].delta().equal(pair.delta()), form
        assert found.total.error == 0.0


def test_combination_is_linear_in_its_weights_and_nests():
    a, b, c = (adapter_of(at=pair_of("linear", rank, rank)) for rank in (1, 2, 3))
    flat = combine([a, b, c], [0.5, 0.25, 0.25]).adapter
    nested = combine([a, combine([b, c]).adapter], [0.5, 0.5]).adapter
    assert relative(nested.modules["at"].delta(), flat.modules["at"].delta()) < 1e-6
    nothing = combine([flat, flat], [1.0, -1.0], rank=4)
    assert nothing.adapter.modules["at"].rank == 1
    assert not nothing.adapter.modules["at"].delta().any()
    assert (nothing.total.norm, nothing.total.error) == (0.0, 0.0)


def test_modules_that_only_some_have_and_weights_by_module():
    a = adapter_of(q=pair_of("linear", 2, 0), v=pair_of("linear", 1, 1))
    b = adapter_of(v=pair_of("linear", 3, 2), o=pair_of("linear", 2, 3))
    found = combine([a, b], [1.0, 2.0], module_weights={"v": [0.0, -1.0]}).adapter
    assert sorted(found.modules) == ["o", "q", "v"]
    assert relative(found.modules["o"].delta(), 2 * b.modules["o"].delta()) < 1e-7
    assert relative(found.modules["v"].delta(), -b.modules["v"].delta()) < 1e-7
    assert found.modules["v"].rank == 3  # what counts for nothing takes no room


def test_the_default_weights_average_what_is_added():
    a, b = adapter_of(at=pair_of("linear", 1, 0)), adapter_of(at=pair_of("linear", 2, 1))
    assert [weight for _, weight in combine([a, b]).sources] == [0.5, 0.5]
    assert [weight for _, weight in combine([a, b], method="ties", space="core").sources] == [1.0, 1.0]


def test_pefts_linear_has_cross_terms_and_ours_does_not():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q = torch.nn.Linear(6, 8, bias=False)

        def forward(self, x):
            return self.q(x)

    a, b = pair_of("linear", 2, 0, 2.0), pair_of("linear", 2, 1, 2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(Model(), LoraConfig(r=2, lora_alpha=4, target_modules=["q"]), "a")
        model.add_adapter("b", LoraConfig(r=2, lora_alpha=4, target_modules=["q"]))
        layer = model.base_model.model.q
        for name, pair in (("a", a), ("b", b)):
            layer.lora_A[name].weight.data = pair.lora_A.clone()
            layer.lora_B[name].weight.data = pair.lora_B.clone()
        model.add_weighted_adapter(["a", "b"], [0.5, 0.25], "theirs", combination_type="linear")
        model.add_weighted_adapter(["a", "b"], [0.5, 0.25], "exact", combination_type="cat")
    expected = 0.5 * a.delta() + 0.25 * b.delta()
    ours = combine([adapter_of(q=a), adapter_of(q=b)], [0.5, 0.25]).adapter.modules["q"].delta()
    assert relative(ours, expected) < 1e-7
    assert relative(layer.get_delta_weight("exact"), expected) < 1e-6
    assert relative(layer.get_delta_weight("theirs"), expected) > 0.3


def test_rslora_and_frozen_starts_count_as_what_they_do(tmp_path):
    a = Adapter(
        {"q": pair_of("linear", 4, 0, 8 / 2)}, LoRAConfig(rank=4, alpha=8, use_rslora=True, target_modules=["q"])
    )
    start = replace(pair_of("linear", 4, 1, 0.5), frozen_rank=2)
    b = Adapter({"q": start}, LoRAConfig(rank=2, alpha=1, init="pissa", target_modules=["q"]))
    made = combine([a, b], [1.0, -1.0]).adapter
    assert relative(made.modules["q"].delta(), a.modules["q"].delta() - start.delta()) < 1e-7
    assert (made.config.use_rslora, made.config.init, made.modules["q"].frozen_rank) == (False, "kaiming", 0)
    veneer.save_adapter(made, tmp_path / "made")
    assert veneer.load_adapter(tmp_path / "made").digest == made.digest


@pytest.mark.parametrize("rank", [None, 2])
def test_what_is_made_is_written_read_and_attached(tiny, tmp_path, rank):
    model = tiny()
    adapters = []
    for seed, targets in ((0, ["q_proj", "v_proj"]), (1, "all-linear")):
        veneer.attach(model, LoRAConfig(rank=4, target_modules=targets), seed=seed)
        fresh = veneer.detach(model)
        generator = torch.Generator().manual_seed(seed)
        trained = {
            path: replace(pair, lora_B=torch.randn(pair.lora_B.shape, generator=generator))
            for path, pair in fresh.modules.items()
        }
        adapters.append(replace(fresh, modules=trained))
    made = combine(adapters, [0.5, -0.25], rank=rank).adapter
    veneer.save_adapter(made, tmp_path / "made")
    again = veneer.load_adapter(tmp_path / "made")
    assert again.digest == made.digest
    assert again.metadata.base_fingerprint == adapters[0].metadata.base_fingerprint
    ids = torch.arange(12).reshape(1, 12)
    veneer.attach(model, again)
    found = model(ids).logits
    veneer.detach(model)
    with torch.no_grad():
        for path, pair in made.modules.items():
            model.get_submodule(path).weight += pair.delta().float()
    assert torch.allclose(found, model(ids).logits, atol=1e-4)


def test_peft_loads_what_is_made_and_does_the_same(tmp_path):
    paths = ["layers.0.q", "layers.0.v", "layers.1.k"]
    base = net()
    shapes = {path: base.get_submodule(path).weight.shape for path in paths}
    generator = torch.Generator().manual_seed(0)

    def drawn(path, rank, scaling):
        out, inputs = shapes[path]
        A, B = torch.randn(rank, inputs, generator=generator), torch.randn(out, rank, generator=generator)
        return LowRank(A, B, scaling)

    a = adapter_of(**{path: drawn(path, 2, 0.5) for path in paths[:2]})
    b = adapter_of(**{path: drawn(path, 3, 2.0) for path in paths[1:]})
    for name, arguments in (("exact", {}), ("cut", {"rank": 2}), ("ties", {"method": "ties", "rank": 3})):
        made = combine([a, b], [1.0, -0.3], **arguments).adapter
        veneer.save_adapter(made, tmp_path / name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = PeftModel.from_pretrained(net(), str(tmp_path / name))
        for path in paths:
            theirs = loaded.base_model.model.get_submodule(path).get_delta_weight("default")
            assert relative(theirs, made.modules[path].delta()) < 1e-6


def test_attention_projections_of_different_ranks_are_written_together(tmp_path):
    attention = torch.nn.MultiheadAttention(6, 2)
    a = adapter_of(**{"attn.in_proj_weight": pair_of("attention_in", 2, 0, 2.0)})
    b = adapter_of(
        **{
            "attn.in_proj_weight": pair_of("attention_in", 3, 1, 0.5),
            "attn.out_proj.weight": pair_of("attention_out", 3, 2, 0.5),
        }
    )
    made = combine([a, b], [1.0, 0.5]).adapter
    assert {pair.rank for pair in made.modules.values()} == {5}
    veneer.save_adapter(made, tmp_path / "made")
    again = veneer.load_adapter(tmp_path / "made")
    assert again.digest == made.digest
    for path in made.modules:
        assert relative(again.modules[path].delta(), meant([a, b], [1.0, 0.5], path)) < 1e-6
    assert attention.in_proj_weight.shape == made.modules["attn.in_proj_weight"].delta().shape


def test_what_does_not_fit_is_refused_all_at_once():
    magnitude = replace(pair_of("linear", 1, 0), magnitude=torch.ones(8))
    a = Adapter(
        {"q": magnitude, "v": pair_of("linear", 1, 0)},
        LoRAConfig(rank=1, use_dora=True),
        metadata=AdapterMetadata(base="one", base_fingerprint="x"),
    )
    b = Adapter(
        {"v": pair_of("transposed", 1, 0), "q": pair_of("linear", 1, 0)},
        LoRAConfig(rank=1, invocation_tokens=(7,)),
        metadata=AdapterMetadata(base="one", base_fingerprint="y"),
    )
    with pytest.raises(AdapterError) as caught:
        combine([a, b], names=["runs/a", "runs/b"])
    text = "\n".join(caught.value.problems)
    assert "runs/a: 1 of 2 modules have magnitudes (DoRA), such as q" in text
    assert "veneer convert runs/a --to lora --base BASE --rank 2 --out DIR" in text
    assert "activated LoRA" in text
    assert "runs/b: [7]" in text
    assert "different bases; any_base=True" in text
    assert "v: made for different layers: runs/a: linear (8, 6); runs/b: transposed (8, 6)" in text
    assert len(caught.value.problems) == 4


def test_other_bases_and_tasks_need_a_word():
    pair = pair_of("linear", 1, 0)

    def made_for(**said):
        return Adapter({"q": pair}, LoRAConfig(rank=1, target_modules=["q"]), metadata=AdapterMetadata(**said))

    for one, other in (
        ({"base_fingerprint": "x"}, {"base_fingerprint": "y"}),
        ({"base": "a"}, {"base": "b"}),
        ({"base": "a", "task_type": "CAUSAL_LM"}, {"base": "a", "task_type": "SEQ_CLS"}),
    ):
        with pytest.raises(AdapterError, match=r"different (bases|tasks)"):
            combine([made_for(**one), made_for(**other)])
        metadata = combine([made_for(**one), made_for(**other)], any_base=True).adapter.metadata
        assert metadata.base_fingerprint is None
        assert metadata.task_type is None
    # Two names of weights that are the same, and one that says nothing.
    same = [{"base": "a", "base_fingerprint": "x"}, {"base": "b", "base_fingerprint": "x"}]
    assert combine([made_for(**one) for one in same]).adapter.metadata == AdapterMetadata(base_fingerprint="x")
    assert combine([made_for(base="a"), made_for()]).adapter.metadata.base == "a"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"method": "tie"}, r"method: expected one of linear, .*got 'tie'; nearest: 'ties'"),
        ({"rank": 0}, "rank: expected a whole number"),
        ({"rank": True}, "rank: expected a whole number"),
        ({"weights": [1.0]}, "weights: expected a number for each adapter, 2 in all; got 1"),
        ({"weights": [1.0, float("nan")]}, "weights: nan is no finite number"),
        ({"weights": [1.0, "2"]}, "weights: '2' is no finite number"),
        ({"module_weights": {"qq": [1.0, 1.0]}}, "stands for none of 1 modules; nearest: 'q'"),
        ({"module_weights": {"(a+)+$": [1.0, 1.0]}}, "can take for ever"),
        ({"module_weights": {"q": [1.0]}}, r"module_weights\['q'\]: expected a number for each adapter, 2 in all"),
        ({"density": 0.5}, "density: linear adds whole updates"),
        ({"method": "ties", "density": 0}, "density: expected a number above 0"),
        ({"method": "ties", "density": 1.5}, "density: expected a number above 0"),
        ({"method": "ties", "space": "cor"}, "space: expected one of full, core, knots, got 'cor'; nearest: 'core'"),
        ({"trained": "mean"}, "trained: expected one of exact, first, drop"),
        ({"densty": 0.5}, "densty: unknown option; nearest: 'density'"),
        ({"seed": -1}, "seed: expected a whole number"),
    ],
)
def test_settings_that_cannot_be_used(arguments, text):
    one = adapter_of(q=pair_of("linear", 1, 0))
    with pytest.raises(ConfigError, match=text):
        combine([one, one], **arguments)


def test_all_wrong_settings_at_once_and_no_adapters():
    with pytest.raises(ConfigError) as caught:
        combine([], method="x", rank=-1, densty=1)
    assert len(caught.value.problems) == 4


def with_head(value, seed, *, rank=1, bias=True):
    trained = {"score.weight": torch.full((2, 3), value)} | ({"q.bias": torch.full((8,), value)} if bias else {})
    config = LoRAConfig(
        rank=rank, target_modules=["q"], modules_to_save=["score"], bias="lora_only" if bias else "none"
    )
    return Adapter({"q": pair_of("linear", rank, seed)}, config, trained)


def test_what_trained_whole_is_combined_where_that_needs_no_base(tmp_path):
    a, b = with_head(1.0, 0), with_head(3.0, 1)
    made = combine([a, b], [0.25, 0.75]).adapter
    assert made.trained["score.weight"].unique().tolist() == [2.5]
    assert made.trained["q.bias"].unique().tolist() == [2.5]
    veneer.save_adapter(made, tmp_path / "made")
    assert veneer.load_adapter(tmp_path / "made").digest == made.digest
    by_module = combine([a, b], [0.25, 0.75], module_weights={"score.weight": [0.5, 0.5]}).adapter
    assert by_module.trained["score.weight"].unique().tolist() == [2.0]
    assert combine([a, a], [0.7, 0.7]).adapter.trained["q.bias"].unique().tolist() == [1.0]  # all agree


@pytest.mark.parametrize(
    ("others", "weights", "why"),
    [
        ([with_head(3.0, 1)], [1.0, 1.0], "score.weight: their values differ"),
        ([adapter_of(q=pair_of("linear", 1, 3))], [0.5, 0.5], "score.weight: only adapters.0. have it"),
    ],
)
def test_what_trained_whole_is_refused_by_name_or_told_what_to_do(tmp_path, others, weights, why):
    adapters = [with_head(1.0, 0), *others]
    with pytest.raises(AdapterError, match=why) as caught:
        combine(adapters, weights)
    assert len(caught.value.problems) == 2
    assert "trained='first'" in caught.value.message
    first = combine(adapters, weights, trained="first").adapter
    assert first.trained["score.weight"].unique().tolist() == [1.0]
    dropped = combine(adapters, weights, trained="drop").adapter
    assert (dict(dropped.trained), dropped.config.bias, dropped.config.modules_to_save) == ({}, "none", ())
    for name, made in (("first", first), ("dropped", dropped)):
        veneer.save_adapter(made, tmp_path / name)
        assert veneer.load_adapter(tmp_path / name).digest == made.digest


def with_rows(value, ids=(5, 7), **modules):
    config = LoRAConfig(rank=1, target_modules=["q"] if modules else (), token_rows={"embed": ids})
    return Adapter(modules, config, tokens={"embed": TokenRows(ids, torch.full((len(ids), 3), value))})


def test_rows_of_tokens_likewise_and_alone(tmp_path):
    made = combine([with_rows(1.0), with_rows(2.0)], [0.5, 0.5]).adapter
    assert made.tokens["embed"].rows.unique().tolist() == [1.5]
    veneer.save_adapter(made, tmp_path / "rows")
    assert veneer.load_adapter(tmp_path / "rows").digest == made.digest
    with pytest.raises(AdapterError, match="embed: their tokens or shapes differ"):
        combine([with_rows(1.0), with_rows(1.0, ids=(5, 8))])
    pair = pair_of("linear", 1, 0)
    both = combine([with_rows(1.0, q=pair), with_rows(1.0, ids=(5, 8), q=pair)], trained="first").adapter
    assert both.tokens["embed"].indices == (5, 7)
    veneer.save_adapter(both, tmp_path / "both")
    assert veneer.load_adapter(tmp_path / "both").digest == both.digest


def test_values_that_are_not_finite_are_named():
    bad = adapter_of(q=LowRank(torch.full((1, 2), torch.inf), torch.ones(3, 1), 1.0), v=pair_of("linear", 1, 0))
    for arguments in ({}, {"rank": 1}):
        with pytest.raises(AdapterError, match="q: its"):
            combine([bad, bad], **arguments)
    huge = adapter_of(q=LowRank(torch.ones(1, 2), torch.full((3, 1), 3e38), 1.0))
    small = adapter_of(q=LowRank(torch.ones(1, 2), torch.ones(3, 1), 1.0))
    with pytest.raises(AdapterError, match="q: its update leaves the range of float32"):
        combine([huge, small], [1e50, 1.0], rank=1)


def test_sixteen_bits_become_thirty_two_and_lose_nothing():
    pair = pair_of("linear", 2, 0)
    half = LowRank(pair.lora_A.bfloat16(), pair.lora_B.bfloat16(), 2.0)
    made = combine([adapter_of(q=half), adapter_of(q=half)], [1.0, -0.5]).adapter.modules["q"]
    assert made.lora_A.dtype == torch.float32
    assert made.delta().equal(0.5 * half.delta())


def test_the_record_says_from_what():
    a, b = adapter_of(q=pair_of("linear", 1, 0)), adapter_of(q=pair_of("linear", 2, 1))
    made = combine([a, b], [0.7, 0.3], method="dare_ties", rank=2, seed=5, density=0.5)
    told = made.to_json()
    assert told["of"] == [{"digest": a.digest, "weight": 0.7}, {"digest": b.digest, "weight": 0.3}]
    assert told["options"] == {"rank": 2, "trained": "exact", "density": 0.5, "space": "full", "seed": 5}
    card = made.card(["runs/a", "runs/b"])
    assert f"| runs/a | `{a.digest}` | 0.7 |" in card
    assert 'method: "dare_ties"' in card
