"""Single rows of a table that train: what they do, what they leave alone, what PEFT makes of them."""

import pytest
import torch
from tests.conftest import tiny_config
from torch import nn
from transformers import LlamaForCausalLM

import veneer
from veneer.config import LoRAConfig
from veneer.errors import TargetError
from veneer.nn.attach import attach, attachment_of, current_adapter, detach, disabled
from veneer.nn.plan import plan, plan_of

IDS = torch.tensor([[5, 9, 7, 5, 200]])
CONFIG = LoRAConfig(rank=2, target_modules=["q_proj"], token_rows={"embed_tokens": [5, 200]})


def filled(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attachment_of(model).parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("tied", [True, False])
def test_rows_stand_in_for_the_base_s_in_the_table_and_in_a_tied_head(tiny, tied):
    model = tiny(tie_word_embeddings=tied)
    before, modules = logits(model), dict(model.named_modules())
    attach(model, CONFIG)
    # A tied head computes the rows' logits by a product of their own: equal but for rounding.
    torch.testing.assert_close(logits(model), before, rtol=1e-6, atol=1e-6 if tied else 0.0)
    filled(model)
    got = logits(model)
    with disabled(model):
        assert torch.equal(logits(model), before)
    adapter = detach(model)
    assert dict(model.named_modules()) == modules
    assert torch.equal(logits(model), before)

    expected = tiny(tie_word_embeddings=tied)
    with torch.no_grad():
        for path, pair in adapter.modules.items():
            expected.get_submodule(path).weight.add_(pair.delta().float())
        one = adapter.tokens["model.embed_tokens"]
        expected.model.embed_tokens.weight[list(one.indices)] = one.rows
    torch.testing.assert_close(got, logits(expected))
    attach(model, adapter)
    assert torch.equal(logits(model), got)
    assert detach(model).digest == adapter.digest


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_equal_those_of_the_whole_table_s_rows(tiny, tied):
    model = tiny(tie_word_embeddings=tied)
    attachment = attach(model, LoRAConfig(rank=2, target_modules=["q_proj"], token_rows={"embed_tokens": [5, 200]}))
    model(input_ids=IDS, labels=IDS).loss.backward()
    got = attachment.parameters()["model.embed_tokens.token_rows"].grad
    plain = tiny(tie_word_embeddings=tied)
    plain.model.embed_tokens.weight.requires_grad_(True)
    plain(input_ids=IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(got, plain.model.embed_tokens.weight.grad[[5, 200]])


def test_digest_and_plan_know_the_rows(tiny):
    model = tiny()
    planned = plan(model, CONFIG)
    assert [(one.path, one.shape) for one in planned.trained] == [("model.embed_tokens", (2, 32))]
    attach(model, CONFIG)
    assert plan_of(model) == planned
    digest = current_adapter(model).digest
    with torch.no_grad():
        attachment_of(model).parameters()["model.embed_tokens.token_rows"][0, 0] += 1
    assert detach(model).digest != digest


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"token_rows": {"embed_token": [1]}}, "matches 0 tables; nearest|matches 0 tables"),
        ({"token_rows": {"embed_tokens": [1, 259]}}, r"rows \[259\] lie outside of the table's 259"),
        ({"token_rows": {"embed_tokens": [1]}, "target_modules": ["embed_tokens"]}, "adapted by factors too"),
        ({"token_rows": {"embed_tokens": [1]}, "target_modules": ["lm_head"]}, "adapted by factors too"),
        ({"token_rows": {"embed_token": [1]}, "target_modules": []}, "matches 0 tables"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_touched(tiny, changes, said):
    model = tiny()
    modules = dict(model.named_modules())
    with pytest.raises(TargetError, match=said):
        attach(model, LoRAConfig(**{"rank": 2, "target_modules": ["q_proj"], **changes}))
    assert dict(model.named_modules()) == modules


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("tied", [True, False])
def test_peft_means_the_same_both_ways(tiny, tied, tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny(tie_word_embeddings=tied)
    attach(model, CONFIG)
    filled(model)
    ours = logits(model)
    veneer.save_adapter(detach(model), tmp_path / "ours")
    theirs = logits(peft.PeftModel.from_pretrained(model, tmp_path / "ours").eval())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)

    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(tie_word_embeddings=tied)).eval()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [7, 5]})
    wrapped = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in (one for one in wrapped.parameters() if one.requires_grad):
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    theirs = logits(wrapped)
    wrapped.save_pretrained(tmp_path / "theirs")
    adapter = veneer.load_adapter(tmp_path / "theirs")
    model = tiny(tie_word_embeddings=tied)
    attach(model, adapter)
    torch.testing.assert_close(logits(model), theirs, rtol=1e-5, atol=1e-5)
    assert detach(model).tokens["model.embed_tokens"].indices == (7, 5)


def test_rows_train_alone(tiny):
    model = tiny()
    config = LoRAConfig(target_modules=(), token_rows={"embed_tokens": [5, 200]})
    before, modules = logits(model), dict(model.named_modules())
    planned = plan(model, config)
    assert (planned.modules, planned.num_parameters) == ((), 64)
    assert "model.embed_tokens" in str(planned)
    attachment = attach(model, config)
    assert plan_of(model) == planned
    assert list(attachment.parameters()) == ["model.embed_tokens.token_rows"]
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert attachment.parameters()["model.embed_tokens.token_rows"].grad.any()
    filled(model)
    got = logits(model)
    adapter = detach(model)
    assert dict(model.named_modules()) == modules
    assert torch.equal(logits(model), before)
    attach(model, adapter)
    assert torch.equal(logits(model), got)
    assert detach(model).digest == adapter.digest
    record = veneer.merge(model, adapter)
    torch.testing.assert_close(logits(model), got)
    veneer.unmerge(model, record)
    assert torch.equal(logits(model), before)


def test_a_table_that_trains_whole_has_no_rows_of_its_own(tiny):
    """Named by a module around it, which the settings alone cannot tell."""
    model = tiny(tie_word_embeddings=False)
    modules = dict(model.named_modules())
    config = LoRAConfig(rank=2, target_modules=["lm_head"], modules_to_save=["model"], token_rows={"embed_tokens": [1]})
    for ask in (plan, attach):
        with pytest.raises(TargetError, match="the whole table trains by modules_to_save, its rows with it"):
            ask(model, config)
    assert dict(model.named_modules()) == modules


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_peft_means_the_same_by_rows_alone_both_ways(tiny, tied, named, tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny(tie_word_embeddings=tied)
    attach(model, LoRAConfig(target_modules=(), token_rows={"embed_tokens": [5, 200]}))
    filled(model)
    ours = logits(model)
    veneer.save_adapter(detach(model), tmp_path / "ours")
    theirs = logits(peft.PeftModel.from_pretrained(model, tmp_path / "ours").eval())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)

    table = {"target_modules": ["embed_tokens"]} if named else {}
    config = peft.TrainableTokensConfig(token_indices=[7, 5], **table)
    wrapped = peft.get_peft_model(tiny(tie_word_embeddings=tied), config).eval()
    with torch.no_grad():
        for parameter in (one for one in wrapped.parameters() if one.requires_grad):
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    theirs = logits(wrapped)
    wrapped.save_pretrained(tmp_path / "theirs")
    model = tiny(tie_word_embeddings=tied)
    attach(model, veneer.load_adapter(tmp_path / "theirs"))
    torch.testing.assert_close(logits(model), theirs, rtol=1e-5, atol=1e-5)
    assert detach(model).tokens["model.embed_tokens"].indices == (7, 5)
