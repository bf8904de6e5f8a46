"""Parity with PEFT on the real model: what one saves, the other loads to the same logits."""

import warnings
from pathlib import Path

import pytest
import torch

import veneer
from veneer.base.ragged import RaggedBatch, ragged_attention
from veneer.nn.attach import attachment_of
from veneer.scoring.loss import summed_loss

pytestmark = [
    pytest.mark.model,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),  # PEFT asks the hub, offline
]
peft = pytest.importorskip("peft")

SETTINGS = {
    "all linear": ({"rank": 8, "alpha": 16}, {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}),
    "patterns and rslora": (
        {
            "rank": 4,
            "alpha": 6,
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {r"layers\.3\.mlp\.down_proj": 2},
            "alpha_pattern": {"q_proj": 10},
            "use_rslora": True,
        },
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {r"layers\.3\.mlp\.down_proj": 2},
            "alpha_pattern": {"q_proj": 10},
            "use_rslora": True,
        },
    ),
    "dora": (
        {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "down_proj"], "use_dora": True},
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "use_dora": True},
    ),
    "some layers and a whole module": (
        {"rank": 2, "target_modules": ["v_proj"], "layers_to_transform": [0, 29], "modules_to_save": ["norm"]},
        {
            "r": 2,
            "lora_alpha": 16,
            "target_modules": ["v_proj"],
            "layers_to_transform": [0, 29],
            "modules_to_save": ["norm"],
        },
    ),
}
IDS = torch.arange(48).reshape(2, 24) * 991 % 49_000


@pytest.fixture
def model(smollm2):
    """A model of the test's own: PEFT leaves traces in the one that it wrapped."""
    return veneer.load_base("smollm2")[0]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, as a share of the largest logit."""
    return ((one - other).abs().max() / other.abs().max()).item()


def fill(parameters, seed: int = 0) -> None:
    """Give an adapter numbers that change the model by much more than rounding."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)


def saved_by_peft(model, folder: Path, settings: dict) -> torch.Tensor:
    """Save a filled PEFT adapter and return its logits."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings, task_type="CAUSAL_LM")).eval()
    fill(parameter for parameter in wrapped.parameters() if parameter.requires_grad)
    wrapped.save_pretrained(folder)
    return logits(wrapped)


@pytest.mark.parametrize("name", SETTINGS)
def test_what_we_save_peft_loads(name, model, tmp_path):
    base = logits(model)
    veneer.attach(model, veneer.LoRAConfig(**SETTINGS[name][0]))
    fill(attachment_of(model).parameters().values())
    ours = logits(model)
    veneer.save_adapter(veneer.detach(model), tmp_path / "adapter")
    assert torch.equal(logits(model), base)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a missing or unexpected key is a warning there
        loaded = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    theirs = logits(loaded)
    assert difference(ours, theirs) <= 1e-5
    assert difference(ours, base) > 1e-2


@pytest.mark.parametrize("name", SETTINGS)
def test_what_peft_saves_we_load(name, model, tmp_path):
    theirs = saved_by_peft(model, tmp_path / "peft", SETTINGS[name][1])
    adapter = veneer.load_adapter(tmp_path / "peft")
    model, _ = veneer.load_base("smollm2")
    veneer.attach(model, adapter)
    ours = logits(model)
    assert veneer.detach(model).digest == adapter.digest
    assert difference(ours, theirs) <= 1e-5
    veneer.save_adapter(adapter, tmp_path / "again")
    weights = "adapter_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (tmp_path / "peft" / weights).read_bytes()


def test_gradients_equal_pefts(model, tmp_path):
    """The same adapter, the same tokens: loss and every gradient agree."""
    settings = SETTINGS["all linear"][1]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings, task_type="CAUSAL_LM")).eval()
    fill(parameter for parameter in wrapped.parameters() if parameter.requires_grad)
    wrapped.save_pretrained(tmp_path / "peft")
    loss = wrapped(input_ids=IDS[:1], labels=IDS[:1]).loss
    loss.backward()
    theirs = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): parameter.grad.clone()
        for name, parameter in wrapped.named_parameters()
        if parameter.grad is not None
    }
    model, _ = veneer.load_base("smollm2")

    attachment = veneer.attach(model, veneer.load_adapter(tmp_path / "peft"))
    supervised = torch.ones(24, dtype=torch.bool)
    supervised[0] = False
    with ragged_attention(model):
        ours = summed_loss(model, RaggedBatch(IDS[0], supervised, (24,))) / 23
        ours.backward()
    grads = {name: parameter.grad for name, parameter in attachment.parameters().items()}
    veneer.detach(model)
    assert ours.item() == pytest.approx(loss.item(), rel=1e-5)
    assert grads.keys() == theirs.keys()
    for name, grad in theirs.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-3 * grad.abs().max().item())


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT says that the head is tied, and that it saves the table
@pytest.mark.parametrize("targets", [["lm_head"], ["lm_head", "q_proj"]])
def test_a_head_adapted_by_peft_loads_with_the_base_weight_beside_it(targets, model, tmp_path):
    """PEFT writes the head's own weight, and the tied table's, into the file."""
    theirs = saved_by_peft(model, tmp_path / "peft", {"r": 2, "target_modules": targets})
    adapter = veneer.load_adapter(tmp_path / "peft")
    assert "lm_head" in dict(adapter.metadata.base_weights)
    model, _ = veneer.load_base("smollm2")
    veneer.attach(model, adapter)
    assert difference(logits(model), theirs) <= 1e-5
    veneer.detach(model)
    veneer.save_adapter(adapter, tmp_path / "again")
    assert veneer.load_adapter(tmp_path / "again").metadata == adapter.metadata
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 0] += 1
    with pytest.raises(veneer.VeneerError, match="the adapter's file carries other values"):
        veneer.attach(model, adapter)


REAL = Path(__file__).parents[3] / "shared" / "data" / "adapters" / "smollm2-random-r4"


@pytest.mark.skipif(not REAL.is_dir(), reason="the real adapters of ../shared/data are not here")
def test_an_adapter_made_by_others_gives_pefts_logits(model):
    theirs = logits(peft.PeftModel.from_pretrained(model, REAL).eval())
    model, _ = veneer.load_base("smollm2")
    before = logits(model)
    veneer.attach(model, veneer.load_adapter(REAL))
    assert difference(logits(model), theirs) <= 1e-5
    assert difference(before, theirs) > 1e-4
