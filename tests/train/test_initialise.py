"""What initialisations are shown: the right rows, gradients, directions and weights; the model as it was afterwards."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import veneer
from veneer.base.load import quantise_base
from veneer.base.ragged import hidden_states, ragged_attention
from veneer.config import LoRAConfig
from veneer.data.batches import make_batch, row_order
from veneer.data.encode import EncodedRow
from veneer.errors import BaseModelError, ConfigError, TargetError
from veneer.scoring.loss import summed_loss
from veneer.train.initialise import check_initialisation, first_batches, observe, with_ranks
from veneer.train.run import run

PLACE = "model.layers.1.mlp.up_proj"


def rows_of(count: int = 12) -> list[EncodedRow]:
    generator = torch.Generator().manual_seed(3)
    lengths = [3 + index % 5 for index in range(count)]
    rows = [torch.randint(259, (length,), generator=generator, dtype=torch.int32) for length in lengths]
    return [EncodedRow(f"rows:{n}", row, torch.arange(len(row)) > 0) for n, row in enumerate(rows)]


def batches_of(rows: list[EncodedRow], count: int, budget: int, seed: int = 0):
    chosen = first_batches([len(row.token_ids) for row in rows], seed=seed, budget=budget, count=count)
    return [make_batch([rows[index] for index in batch]) for batch in chosen]


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=20), budget=st.integers(1, 20), count=st.integers(1, 6))
def test_batches_are_the_first_rows_of_the_first_epoch_within_the_budget(lengths, budget, count):
    batches = first_batches(lengths, seed=1, budget=budget, count=count)
    taken = [row for batch in batches for row in batch]
    assert 1 <= len(batches) <= count
    assert sorted(taken) == sorted(row_order(len(lengths), 1, 0)[: len(taken)])
    assert all(sum(lengths[row] for row in batch) <= budget or len(batch) == 1 for batch in batches)
    assert len(batches) == count or len(taken) == len(lengths)


def test_nothing_is_looked_at_where_nothing_is_needed(tiny):
    config = LoRAConfig(init="pissa", init_options={"niter": 2})
    assert observe(tiny(), config, []) == (config, {})


def test_eva_starts_where_the_inputs_are_and_leaves_the_model_as_it_was(tiny):
    model, rows = tiny(attention_dropout=0.5).train(), rows_of()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    config, seen = observe(
        model, LoRAConfig(rank=4, init="eva", init_options={"batches": 1}), rows, tokens_per_batch=30
    )
    assert config.init_options == {}
    assert config.rank_pattern == {}
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config._attn_implementation == "sdpa"
    inputs = []
    hook = model.get_submodule(PLACE).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    (batch,) = batches_of(rows, 1, 30)
    with torch.no_grad(), ragged_attention(model.eval()):
        hidden_states(model, batch)
    hook.remove()
    expected = torch.linalg.svd(inputs[0][0], full_matrices=False).Vh[:4]
    torch.testing.assert_close((seen[PLACE] * expected).sum(1).abs(), torch.ones(4), atol=1e-3, rtol=0)
    tokens = rows[0].token_ids.long()[None]
    before = model(input_ids=tokens).logits
    attachment = veneer.attach(model, config, observed=seen)
    A = attachment.layers[PLACE].slot(0).lora_A
    torch.testing.assert_close(A, seen[PLACE][:4], atol=1e-6, rtol=0)
    assert torch.equal(model(input_ids=tokens).logits, before)


def test_eva_shares_ranks_out_and_keeps_the_scaling(tiny):
    model, rows = tiny(), rows_of()
    asked = LoRAConfig(
        rank=2, alpha=3.0, use_rslora=True, alpha_pattern={"q_proj": 5.0}, init="eva", init_options={"rho": 3.0}
    )
    config, seen = observe(model, asked, rows)
    attachment = veneer.attach(model, config, observed=seen)
    ranks = {target.path: target.rank for target in attachment.targets}
    assert sum(ranks.values()) == 14 * 2
    assert 2 < max(ranks.values()) <= 6
    assert len(set(ranks.values())) > 1
    for target in attachment.targets:
        assert target.scaling == pytest.approx(asked.scaling_for(target.path), rel=1e-14)


def test_a_rank_of_zero_leaves_exactly_that_layer_out(tiny):
    ranks = {f"model.layers.{number}.self_attn.{name}": 2 for number in (0, 1) for name in ("q_proj", "v_proj")}
    ranks |= {"model.layers.0.self_attn.q_proj": 0, "model.layers.0.self_attn.v_proj": 5}
    asked = LoRAConfig(rank=2, target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 1], dropout=0.1)
    targets = veneer.attach(tiny(), with_ranks(asked, ranks)).targets
    assert {target.path: target.rank for target in targets} == {path: rank for path, rank in ranks.items() if rank}
    assert {target.scaling for target in targets} == {8.0}


def test_a_path_that_is_the_end_of_another_keeps_its_own_rank():
    config = with_ranks(LoRAConfig(rank=2, alpha=2.0), {"q": 1, "a.q": 3, "b.a.q": 2})
    assert [config.rank_for(path) for path in ("q", "a.q", "b.a.q")] == [1, 3, 2]
    assert [config.scaling_for(path) for path in ("q", "a.q", "b.a.q")] == [1.0, 1.0, 1.0]


def test_lora_ga_sees_the_mean_gradient_of_the_loss(tiny):
    model, rows = tiny(), rows_of()
    config = LoRAConfig(rank=2, init="lora_ga", init_options={"batches": 3, "stable_gamma": 32})
    left, seen = observe(model, config, rows, tokens_per_batch=12)
    assert left.init_options == {"stable_gamma": 32}
    weight = model.get_submodule(PLACE).weight.requires_grad_()
    batches = batches_of(rows, 3, 12)
    with ragged_attention(model):
        for batch in batches:
            (summed_loss(model, batch) / batch.supervised.sum() / len(batches)).backward()
    torch.testing.assert_close(seen[PLACE], weight.grad)
    weight.requires_grad_(False)
    tokens = rows[0].token_ids.long()[None]
    before = model(input_ids=tokens).logits
    attachment = veneer.attach(model, left, observed=seen)
    assert attachment.layers[PLACE].slot(0).frozen_A is not None
    torch.testing.assert_close(model(input_ids=tokens).logits, before)


def test_an_adapted_head_is_seen_too(tiny):
    config = LoRAConfig(rank=2, target_modules=["lm_head", "q_proj"], init="eva")
    assert observe(tiny(tie_word_embeddings=False), config, rows_of())[1]["lm_head"].shape == (2, 32)


@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_loftq_sees_the_weights_without_copying_and_repairs_the_base(tiny, storage):
    model = tiny(hidden_size=64, intermediate_size=128, initializer_range=0.2)
    tokens = torch.arange(20)[None]
    full = model(input_ids=tokens).logits
    config, seen = observe(model, LoRAConfig(rank=16, init="loftq"), [])
    assert seen[PLACE].data_ptr() == model.get_submodule(PLACE).weight.data_ptr()
    quantise_base(model, storage)
    quantised = model(input_ids=tokens).logits
    veneer.attach(model, config, observed=seen)
    repaired = model(input_ids=tokens).logits
    assert (repaired - full).norm() < 0.9 * (quantised - full).norm()


@pytest.mark.parametrize(
    ("changes", "storage", "expected"),
    [
        ({"init": "evaa"}, "plain", "nearest: 'eva'"),
        ({"init": "eva", "init_options": {"batchs": 2}}, "plain", "nearest: 'batches'"),
        ({"init": "eva", "init_options": {"batches": 0}}, "plain", "batches must be"),
        ({"init": "lora_ga", "init_options": {"batches": 1.5}}, "plain", "batches must be"),
        ({"init": "lora_ga", "init_options": {"rho": 2}}, "plain", "unknown option 'rho'"),
        ({"init": "eva", "init_options": {"rho": 0.5}}, "plain", "rho must be"),
        ({"init": "eva", "init_options": {"rho": "2"}}, "plain", "rho must be"),
        ({"init": "eva", "init_options": {"rho": 2.0}, "rank_pattern": {"q_proj": 2}}, "plain", "choose one"),
        ({"init_options": {"niter": 2}}, "plain", "it takes none"),
        ({"init": "loftq"}, "plain", "set storage to nf4 or int8"),
    ],
)
def test_what_cannot_be_had_is_refused_before_anything_is_read(make_run, monkeypatch, changes, storage, expected):
    config = make_run("run", changes).model_copy(update={"storage": storage})
    monkeypatch.setattr("veneer.train.run.read_data", lambda *_: pytest.fail("the rows were read"))
    with pytest.raises(ConfigError) as error:
        run(config)
    assert expected in str(error.value)


def test_all_options_are_checked_at_once():
    with pytest.raises(ConfigError) as error:
        check_initialisation(LoRAConfig(init="eva", init_options={"batches": 0, "rho": 0, "x": 1}), "plain")
    assert len(error.value.problems) == 3


def test_what_cannot_be_observed_is_refused(tiny):
    with pytest.raises(TargetError, match="not for layers of kind 'embedding'"):
        observe(tiny(), LoRAConfig(init="eva", target_modules=["embed_tokens"]), rows_of())
    model = tiny()
    model.config.layer_types = ["chunked_attention"] * 2
    with pytest.raises(BaseModelError, match="ragged"):
        observe(model, LoRAConfig(init="eva"), rows_of())
