"""The ways to compute a run: fast and plain agree, layers computed again give the same, all is put back."""

import logging
from pathlib import Path

import pytest
import torch
from tests.train.test_run import lines

from veneer.base.blocks import Block
from veneer.base.load import load_tokenizer
from veneer.base.ragged import ATTENTION
from veneer.base.source import find_source
from veneer.config import LoRAConfig, TrainConfig
from veneer.errors import ConfigError
from veneer.nn.attach import attach
from veneer.train import ways
from veneer.train.prepare import prepare_data, read_data
from veneer.train.run import run
from veneer.train.ways import checkpointed, computing


def losses(out: str) -> list[float]:
    return [line["loss"] for line in lines(Path(out)) if "loss" in line]


def messages(caplog) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.name == "veneer")


def test_fast_and_plain_train_the_same_adapter(make_run, caplog):
    caplog.set_level(logging.INFO, logger="veneer")
    fast, plain = run(make_run("fast")), run(make_run("plain", fast=False))
    assert "2 decoder layers and 1 more norms are computed the fast way" in messages(caplog)
    assert "computed by the plain reference" in messages(caplog)
    assert losses(fast.folder) == pytest.approx(losses(plain.folder), rel=1e-4)
    assert fast.eval_loss == pytest.approx(plain.eval_loss, rel=1e-4)
    for name, tensor in plain.adapter.tensors().items():
        torch.testing.assert_close(fast.adapter.tensors()[name], tensor, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_layers_computed_again_give_the_same_bytes(make_run, caplog, monkeypatch, dropout):
    calls = []
    own = Block._mlp
    monkeypatch.setattr(Block, "_mlp", lambda self, *x: calls.append(torch.is_grad_enabled()) or own(self, *x))
    caplog.set_level(logging.INFO, logger="veneer")
    adapter = {"target_modules": ["q_proj", "up_proj"], "dropout": dropout}
    once = run(make_run("once", adapter, checkpoint_activations=False))
    calls_once, calls[:] = sum(calls), []
    again = run(make_run("again", adapter, checkpoint_activations=True))
    assert sum(calls) == 2 * calls_once  # calls that record for a backward
    assert "activations of 2 layers are computed again" in messages(caplog)
    assert once.adapter.digest == again.adapter.digest


@pytest.mark.parametrize("adapter", [{}, {"dropout": 0.2}, {"use_dora": True}], ids=str)
def test_gates_computed_again_give_the_same_bytes(make_run, caplog, adapter):
    adapter = {"target_modules": ["q_proj", "up_proj", "down_proj"], **adapter}
    caplog.set_level(logging.INFO, logger="veneer")
    once = run(make_run("once", adapter, checkpoint_activations=False))
    assert "computed again" not in messages(caplog)
    again = run(make_run("again", adapter, checkpoint_activations="gates"))
    assert "from 0 tokens on gates of 2 layers are computed again" in messages(caplog)
    assert once.adapter.digest == again.adapter.digest


@pytest.mark.parametrize("tiles", [True, False])
def test_by_itself_gates_are_computed_again_where_tiles_are(tiny, monkeypatch, caplog, tiles):
    monkeypatch.setattr(ways, "has_tiles", lambda: tiles)
    caplog.set_level(logging.INFO, logger="veneer")
    model = tiny()
    attach(model, LoRAConfig(rank=2))
    with computing(model, TrainConfig()):
        assert ("from 1024 tokens on gates of 2 layers are computed again" in messages(caplog)) is tiles
    caplog.clear()
    with computing(model.bfloat16(), TrainConfig()):
        assert "computed again" not in messages(caplog)


@pytest.mark.parametrize("reason", ["plain", "other layers"])
def test_gates_that_are_not_known_are_an_error(tiny, monkeypatch, reason):
    model = tiny()
    attach(model, LoRAConfig(rank=2))
    if reason == "other layers":
        model.get_decoder().layers[0].register_forward_hook(lambda *_: None)
        model.get_decoder().layers[1].register_forward_hook(lambda *_: None)
    settings = TrainConfig(checkpoint_activations="gates", fast=reason != "plain")
    with (
        pytest.raises(ConfigError, match="no layer of LlamaForCausalLM is; `true` computes"),
        computing(model, settings),
    ):
        pass
    assert not any("forward" in vars(module) for module in model.modules())


def invocation_of(config) -> list[int]:
    """The two tokens before the first answer."""
    tokenizer = load_tokenizer(find_source(config.base))
    row = prepare_data(config.data, read_data(config.data), tokenizer, 1024).train.rows[0]
    first = int(row.supervised.nonzero()[0])
    return row.token_ids[first - 2 : first].tolist()


def test_an_activated_adapter_is_routed_in_layers_computed_again(make_run):
    """Where it acts must be known in the backward too."""
    adapter = {"target_modules": ["q_proj", "up_proj"], "invocation_tokens": invocation_of(make_run("rows"))}
    once, again = run(make_run("once", adapter)), run(make_run("again", adapter, checkpoint_activations=True))
    assert not once.never_trained
    assert once.adapter.digest == again.adapter.digest


def test_all_is_put_back(tiny):
    model = tiny()
    attach(model, LoRAConfig(rank=2))
    model.train()
    before = model.config._attn_implementation
    with computing(model, TrainConfig(checkpoint_activations=True)):
        assert model.is_gradient_checkpointing
        assert model.config._attn_implementation == ATTENTION
    assert not model.is_gradient_checkpointing
    assert model.config._attn_implementation == before
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_model_that_cannot_compute_its_layers_again_is_refused(tiny):
    model = tiny()
    model.supports_gradient_checkpointing = False
    with pytest.raises(ConfigError, match="checkpoint_activations: LlamaForCausalLM cannot"), checkpointed(model):
        pass
