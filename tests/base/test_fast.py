"""Decoders computed the fast way give what they give by themselves, gradients included, and are left as they were."""

import copy

import pytest
import torch
import transformers
from tests.conftest import SIZES
from torch import nn

from veneer.base import fast as fast_ways
from veneer.base.fast import fast_modules
from veneer.base.load import quantise_base
from veneer.base.ragged import RaggedBatch, hidden_states, ragged_attention
from veneer.base.stack import ALIGNMENT
from veneer.config import LoRAConfig
from veneer.nn.attach import attach, detach
from veneer.scoring.loss import summed_loss

LENGTHS = (3, 7, 7, 1, 12)
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8}
FAMILIES = {
    "llama": ("Llama", {}),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral, window": ("Mistral", {"sliding_window": 4}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "gemma": ("Gemma", {"head_dim": 8}),
    "gemma3": ("Gemma3", {**GEMMA, "sliding_window": 4}),
    "smollm3": ("SmolLM3", {"pad_token_id": 0}),
}
"""Families of which every layer is computed the fast way."""

GPT2_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
OTHERS = {
    "granite": ("Granite", {"residual_multiplier": 0.5}),
    "olmo2": ("Olmo2", {}),
    "cohere": ("Cohere", {}),
    "phi3": ("Phi3", {"pad_token_id": 0}),
    "gpt2": (
        "GPT2",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
}
"""Families whose layers are built in another way: their own code computes them."""


def model_of(name: str, changes: dict) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    suffix = "TextConfig" if name == "Gemma3" else "Config"
    sizes = {"vocab_size": 259} if name == "GPT2" else SIZES
    config = getattr(transformers, f"{name}{suffix}")(**{**sizes, **changes})
    model_class = f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    model = getattr(transformers, model_class)(config)
    for parameter in model.parameters():  # norms at their start would hide a gain that is forgotten
        nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(False)


def batch(seed: int = 0) -> RaggedBatch:
    ids = torch.randint(3, 200, (sum(LENGTHS),), generator=torch.Generator().manual_seed(seed))
    supervised = torch.ones_like(ids, dtype=torch.bool)
    supervised[[0, 3, 10, 17, 18]] = False
    return RaggedBatch(ids, supervised, LENGTHS)


def attached(model, **changes):
    attachment = attach(model, LoRAConfig(**{"rank": 4, "alpha": 8, **changes}))
    torch.manual_seed(1)
    for name, parameter in attachment.parameters().items():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def loss_and_gradients(model) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = summed_loss(model, batch())
    loss.backward()
    return loss.item(), {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def assert_same(expected, got, tolerance: float = 1e-4) -> None:
    assert got[0] == pytest.approx(expected[0], rel=tolerance)
    assert got[1].keys() == expected[1].keys()
    largest = max(one.abs().max() for one in expected[1].values())
    assert largest > 0
    for name, one in expected[1].items():
        assert (got[1][name] - one).abs().max() <= tolerance * max(one.abs().max(), largest * 1e-3), name


def both_ways(model):
    with ragged_attention(model):
        expected = loss_and_gradients(model)
        with fast_modules(model) as fast:
            return fast, expected, loss_and_gradients(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_the_fast_way(family):
    model = attached(model_of(*FAMILIES[family]))
    fast, expected, got = both_ways(model)
    assert len(fast.blocks) == 2, str(fast)
    assert len(fast.norms) == 1
    assert_same(expected, got)


@pytest.mark.parametrize("family", OTHERS)
def test_other_layers_stay_their_own(family):
    model = attached(model_of(*OTHERS[family]))
    fast, expected, got = both_ways(model)
    assert not fast.blocks, str(fast)
    assert len(fast.left) == 2
    assert "computed by transformers" in str(fast)
    assert_same(expected, got)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["down_proj"]},
        {"use_dora": True},
        {"bias": "all"},
        {"freeze_A": True},
        {"modules_to_save": ("lm_head", "input_layernorm"), "target_modules": ["q_proj", "k_proj"]},
        {"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]},
        {"init": "pissa"},
    ],
    ids=str,
)
def test_every_kind_of_adapter(changes):
    model = attached(model_of("Llama", {}), **changes)
    _, expected, got = both_ways(model)
    assert_same(expected, got)


@pytest.mark.parametrize("storage", ["int8", "nf4"])
@pytest.mark.parametrize("changes", [{}, {"use_dora": True}], ids=str)
def test_quantised_layers(storage, changes):
    model = model_of("Llama", {"hidden_size": 64, "intermediate_size": 128})
    quantise_base(model, storage)
    fast, expected, got = both_ways(attached(model, **changes))
    assert len(fast.blocks) == 2
    assert_same(expected, got)


def test_sixteen_bits():
    model = attached(model_of("Qwen3", {"head_dim": 8}).bfloat16())
    fast, expected, got = both_ways(model)
    assert len(fast.blocks) == 2
    assert_same(expected, got, tolerance=0.1)


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}], ids=str)
def test_dropout_of_the_adapter_draws_what_it_draws(changes):
    model = attached(model_of("Llama", {}), dropout=0.5, **changes)
    found = []
    with ragged_attention(model):
        torch.manual_seed(3)
        found.append(loss_and_gradients(model))
        with fast_modules(model):
            torch.manual_seed(3)
            found.append(loss_and_gradients(model))
    assert_same(*found)


def bytes_kept(**changes) -> int:
    model, kept = attached(model_of("Llama", {}), **changes), {}
    weights = {one.untyped_storage().data_ptr() for one in model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[:1] == (sum(LENGTHS),) and tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor
        return tensor

    with ragged_attention(model), fast_modules(model):
        with torch.autograd.graph.saved_tensors_hooks(note, lambda one: one):
            loss = summed_loss(model, batch())
        loss.backward()
    return sum(one.nbytes for one in kept.values())


def test_what_drops_or_scales_keeps_little_more():
    """Dropout nothing; a magnitude the outputs that nothing else keeps: queries, keys, and what each half adds."""
    plain, config = bytes_kept(), model_of("Llama", {}).config
    keys = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    outputs = config.num_hidden_layers * sum(LENGTHS) * 4 * (3 * config.hidden_size + keys)
    assert bytes_kept(dropout=0.5) == plain
    assert bytes_kept(use_dora=True) == plain + outputs
    assert bytes_kept(use_dora=True, dropout=0.5) == plain + outputs


def test_dropout_of_the_base_is_left_to_it():
    model = attached(model_of("Llama", {"attention_dropout": 0.5}))
    with ragged_attention(model), fast_modules(model) as fast:
        assert not fast.blocks
        assert "something else" in str(fast)


def test_checkpointing_within():
    model = attached(model_of("Llama", {}))
    with ragged_attention(model):
        expected = loss_and_gradients(model)
        model.activation_checkpointing_enable({"use_reentrant": False})
        with fast_modules(model):
            got = loss_and_gradients(model)
    assert_same(expected, got)


def test_the_model_is_as_it_was():
    model = attached(model_of("Gemma3", {**GEMMA, "sliding_window": 4}))
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    with fast_modules(model):
        assert any("forward" in vars(module) for module in model.modules())
        assert model.state_dict().keys() == state.keys()
    with pytest.raises(RuntimeError, match="inside"), fast_modules(model):
        raise RuntimeError("inside")
    assert torch.equal(torch.get_rng_state(), random_state)
    after = {name: dict(vars(module)) for name, module in model.named_modules()}
    assert {name: set(one) for name, one in after.items()} == {name: set(one) for name, one in before.items()}
    assert all(one["training"] == before[name]["training"] for name, one in after.items())
    detach(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_calls_that_are_not_ragged_are_the_models_own():
    model = attached(model_of("Llama", {})).eval()
    ids = torch.arange(3, 15)[None]
    expected = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    with fast_modules(model):
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0), expected)


def test_a_watched_layer_is_left_alone():
    model = attached(model_of("Llama", {}))
    seen = []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    with ragged_attention(model), fast_modules(model) as fast:
        seen.clear()
        summed_loss(model, batch())
    assert list(fast.left) == ["model.layers.0"]
    assert seen == [1]


def test_a_layer_that_is_named_alike_and_computes_something_else_is_left_alone():
    model = attached(model_of("Llama", {}))
    kind = type(model.model.layers[0].mlp)

    class Doubled(kind):
        def forward(self, x):
            return 2 * super().forward(x)

    model.model.layers[0].mlp.__class__ = Doubled
    fast, expected, got = both_ways(model)
    assert fast.blocks == ("model.layers.1",)
    assert "something else" in fast.left["model.layers.0"]
    assert_same(expected, got)


def test_sequences_never_see_each_other():
    """One changed token changes no number of another sequence, bit for bit."""
    model = attached(model_of("Llama", {})).eval()
    first = batch()
    ids = first.token_ids.clone()
    ids[5] += 1
    second = RaggedBatch(ids, first.supervised, LENGTHS)
    with ragged_attention(model), fast_modules(model), torch.no_grad():
        before, after = hidden_states(model, first), hidden_states(model, second)
    same = (before == after).all(dim=1)
    assert same[:3].all()
    assert same[10:].all()
    assert not same[5:10].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_in_16_bits_are_known_beside_large_hidden_states(family):
    """Some channels of real models are a thousand times the others: rounding them is more than what a layer adds."""
    model = model_of(*FAMILIES[family])
    model.get_input_embeddings().weight.data[:, 3] *= 1000
    with fast_modules(model.bfloat16()) as found:
        assert len(found.blocks) == 2, str(found)


@pytest.mark.parametrize("family", OTHERS)
def test_other_layers_are_not_taken_for_known_ones_in_16_bits(family):
    with fast_modules(model_of(*OTHERS[family]).bfloat16()) as found:
        assert not found.blocks, str(found)


def gradients_of(model, loss) -> dict[str, torch.Tensor]:
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, trained.values()), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_forwards_that_wait_for_their_backward_keep_their_activations(family):
    model = attached(model_of(*FAMILIES[family])).train()
    batches = [batch(seed) for seed in range(3)]
    with ragged_attention(model), fast_modules(model):
        alone = [gradients_of(model, summed_loss(model, one)) for one in batches]
        losses = [summed_loss(model, one) for one in batches]
        with torch.no_grad():
            summed_loss(model, batch(9))
        together = [gradients_of(model, loss) for loss in losses]
        after = gradients_of(model, summed_loss(model, batches[0]))
    for expected, got in zip([*alone, alone[0]], [*together, after], strict=True):
        assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_what_layers_keep_lies_in_a_stack_that_each_forward_takes_anew(monkeypatch):
    taken = []

    class Watched(fast_ways.ActivationStack):
        def reset(self) -> None:
            taken.append(self._taken)
            super().reset()

    monkeypatch.setattr(fast_ways, "ActivationStack", Watched)
    model = attached(model_of(*FAMILIES["llama"])).train()
    with ragged_attention(model), fast_modules(model):
        for _ in range(3):
            summed_loss(model, batch()).backward()
        with torch.no_grad():
            hidden_states(model, batch())
        summed_loss(model, batch()).backward()
    assert taken[0] == 0
    assert taken[1] > 4 * sum(LENGTHS) * SIZES["hidden_size"] * 4
    assert len(taken) == 4
    assert set(taken[1:]) == {taken[1]}


def test_layers_computed_again_share_one_room_and_keep_their_outputs(monkeypatch):
    stacks = []

    class Watched(fast_ways.ActivationStack):
        def __init__(self) -> None:
            super().__init__()
            self.addresses, self.resets = set(), 0
            stacks.append(self)

        def reset(self) -> None:
            self.resets += 1
            super().reset()
            self.addresses.add(self.empty((1,), torch.float32).data_ptr())

    monkeypatch.setattr(fast_ways, "ActivationStack", Watched)
    model = attached(model_of(*FAMILIES["llama"])).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    with ragged_attention(model), fast_modules(model) as fast:
        loss = summed_loss(model, batch())
        kept, again = stacks
        layers = len(fast.blocks)
        output = sum(LENGTHS) * SIZES["hidden_size"] * 4
        assert layers * output <= kept._taken <= layers * (output + 2 * ALIGNMENT)
        loss.backward()
    assert (kept.resets, again.resets) == (1, 2 * layers)
    assert len(again.addresses) == 1  # nothing of a layer is in use when the next one is computed


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("changes", [{}, {"dropout": 0.3}, {"use_dora": True}], ids=str)
def test_gates_computed_again_are_the_same_and_not_kept(family, changes):
    model = attached(model_of(*FAMILIES[family]), **changes).train()
    found, sizes = [], []
    for again_from in (sum(LENGTHS) + 1, sum(LENGTHS)):
        kept = {}
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda one, kept=kept: kept.setdefault((one.data_ptr(), one.shape), one), lambda one: one
        )
        with ragged_attention(model), fast_modules(model, again_from=again_from) as fast:
            torch.manual_seed(7)
            with hooks:  # a checkpoint's own come before these
                loss = summed_loss(model, batch())
            sizes.append(sum(one.nbytes for one in kept.values()))
            found.append(gradients_of(model, loss))
    assert all(torch.equal(*pair) for pair in zip(*(one.values() for one in found), strict=True))
    gates = len(fast.blocks) * 2 * sum(LENGTHS) * SIZES["intermediate_size"] * 4
    assert sizes[0] - sizes[1] >= 0.95 * gates


def test_gates_that_train_whole_are_kept():
    model = attached(model_of(*FAMILIES["llama"]), target_modules=["q_proj"]).train()
    model.get_decoder().layers[0].mlp.down_proj.weight.requires_grad_()
    found = []
    for again_from in (None, 0):
        with ragged_attention(model), fast_modules(model, again_from=again_from):
            found.append(gradients_of(model, summed_loss(model, batch())))
    assert all(torch.equal(*pair) for pair in zip(*(one.values() for one in found), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("storage", ["plain", "int8", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_computes_the_same(family, storage):
    model = model_of(*FAMILIES[family])
    quantise_base(model, storage)
    model = attached(model)
    _, _, expected = both_ways(model)
    fast, reference, got = both_ways(model.to("cuda"))
    assert len(fast.blocks) == 2, str(fast)
    for found in (reference, got):
        assert_same(expected, (found[0], {name: one.cpu() for name, one in found[1].items()}), 1e-3)
