"""What is taken out of two checkpoints is what was put in."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import tiny_config
from transformers import LlamaForCausalLM

from veneer.adapter import Adapter, LowRank
from veneer.config import LoRAConfig
from veneer.errors import AdapterError, BaseModelError, ConfigError
from veneer.files.peft import load_adapter, save_adapter
from veneer.files.shards import CONFIG, WEIGHTS
from veneer.nn.attach import attach, detach
from veneer.ops.initialise_svd import truncated_svd
from veneer.tools import extract as module
from veneer.tools.extract import extract
from veneer.tools.merge_checkpoint import merge_files


def saved(folder, tensors, **config):
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


@pytest.fixture
def pair(tmp_path):
    """Saves a base, and the base with other tensors."""

    def make(base, changed, **config):
        return saved(tmp_path / "base", base, **config), saved(tmp_path / "tuned", base | changed, **config)

    return make


@pytest.mark.parametrize("sizes", [(40, 60), (600, 700)], ids=["exactly", "by sketches"])
def test_a_lora_that_was_merged_comes_out_again(tmp_path, sizes):
    out, size = sizes
    lora = LowRank(torch.randn(6, size) / size**0.5, torch.randn(out, 6), 0.5)
    base = saved(tmp_path / "base", {"layers.0.q.weight": torch.randn(out, size) * 0.05, "norm.weight": torch.ones(3)})
    merge_files(base, [(Adapter({"layers.0.q": lora}, LoRAConfig(rank=6)), 1.0)], tmp_path / "tuned")
    found = extract(base, tmp_path / "tuned", rank=6)
    expected, got = lora.delta(), found.adapter.modules["layers.0.q"].delta()
    assert torch.linalg.vector_norm(got - expected) <= 1e-5 * torch.linalg.vector_norm(expected)
    assert found.error <= 1e-5
    assert found.unchanged == 1
    assert found.left_out == ()


def test_a_model_of_many_forms_comes_out_and_goes_in_again(tmp_path):
    model = LlamaForCausalLM(tiny_config(tie_word_embeddings=False)).eval()
    attachment = attach(model, LoRAConfig(rank=2, target_modules=["q_proj", "up_proj", "embed_tokens", "lm_head"]))
    for parameter in attachment.parameters().values():
        torch.nn.init.normal_(parameter, std=0.3)
    lora = detach(model)
    model.save_pretrained(tmp_path / "base")
    merge_files(tmp_path / "base", [(lora, 1.0)], tmp_path / "tuned")
    found = extract(tmp_path / "base", tmp_path / "tuned", energy=0.999999)
    assert {path: one.form for path, one in found.adapter.modules.items()} == {
        path: one.form for path, one in lora.modules.items()
    }
    assert {one.rank for one in found.modules} == {2}
    save_adapter(found.adapter, tmp_path / "adapter")
    merge_files(tmp_path / "base", [(load_adapter(tmp_path / "adapter"), 1.0)], tmp_path / "again")
    for name, expected in load_file(tmp_path / "tuned" / WEIGHTS).items():
        torch.testing.assert_close(load_file(tmp_path / "again" / WEIGHTS)[name], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("small", [8, 10_000], ids=["by sketches", "exactly"])
def test_the_nearest_of_a_rank_is_taken_and_its_error_measured(pair, monkeypatch, small):
    monkeypatch.setattr(module, "EXACT", small)
    U, _, Vh = torch.linalg.svd(torch.randn(64, 80, dtype=torch.float64), full_matrices=False)
    S = 0.5 ** torch.arange(64, dtype=torch.float64)
    delta = (U * S) @ Vh
    base = torch.randn(64, 80)
    found = extract(*pair({"q.weight": base}, {"q.weight": (base + delta).float()}), rank=4)
    one = found.modules[0]
    assert one.error == pytest.approx((S[4:].square().sum() / S.square().sum()).sqrt().item(), rel=1e-4)
    assert one.energy == pytest.approx(1 - one.error**2)
    left = delta - found.adapter.modules["q"].delta()
    assert one.error == pytest.approx((left.norm() / delta.norm()).item(), rel=1e-3)


@pytest.mark.parametrize("small", [8, 10_000], ids=["by sketches", "exactly"])
@pytest.mark.parametrize(("energy", "rank"), [(0.74, 1), (0.76, 2), (0.99, 4), (0.9999, 7)])
def test_the_smallest_rank_that_holds_the_energy_is_taken(pair, monkeypatch, small, energy, rank):
    monkeypatch.setattr(module, "EXACT", small)
    U, _, Vh = truncated_svd(torch.randn(64, 80), 64)
    delta = (U * 0.5 ** torch.arange(64)) @ Vh
    found = extract(*pair({"q.weight": torch.zeros(64, 80)}, {"q.weight": delta}), energy=energy)
    assert found.modules[0].rank == rank
    assert found.modules[0].energy >= energy


def test_ranks_that_differ_are_written_and_read_again(pair, tmp_path):
    base = {"a.weight": torch.zeros(6, 8), "b.weight": torch.zeros(6, 8)}
    low = torch.outer(torch.randn(6), torch.randn(8))
    found = extract(*pair(base, {"a.weight": low, "b.weight": torch.randn(6, 8)}), energy=0.9999)
    assert found.adapter.modules["a"].rank == 1 < found.adapter.modules["b"].rank
    save_adapter(found.adapter, tmp_path / "adapter")
    assert load_adapter(tmp_path / "adapter").digest == found.adapter.digest


def test_a_convolution_is_a_matrix_of_its_outputs(pair):
    delta = torch.einsum("or,rikl->oikl", torch.randn(6, 2), torch.randn(2, 3, 3, 3))
    found = extract(*pair({"c.weight": torch.zeros(6, 3, 3, 3)}, {"c.weight": delta}), rank=2)
    one = found.adapter.modules["c"]
    assert one.form == "conv"
    torch.testing.assert_close(one.delta().float(), delta)


def test_matrices_that_lie_the_other_way_round_are_told_by_their_biases(pair, tmp_path):
    base = {"a.weight": torch.zeros(4, 6), "a.bias": torch.zeros(6), "b.weight": torch.zeros(4, 4)}
    base |= {"b.bias": torch.zeros(4), "head.weight": torch.zeros(5, 4)}
    changed = {name: torch.randn_like(one) for name, one in base.items() if one.ndim == 2}
    found = extract(*pair(base, changed), rank=4)
    assert found.adapter.modules["a"].sizes == (6, 4)
    torch.testing.assert_close(found.adapter.modules["a"].delta().float(), changed["a.weight"])
    torch.testing.assert_close(found.adapter.modules["b"].delta().float(), changed["b.weight"])
    torch.testing.assert_close(found.adapter.modules["head"].delta().T.float(), changed["head.weight"])
    save_adapter(found.adapter, tmp_path / "adapter")


def test_what_no_factors_hold_is_listed_kept_or_refused(pair, tmp_path):
    base = {"q.weight": torch.zeros(3, 4), "q.bias": torch.zeros(3), "norm.weight": torch.ones(4)}
    base |= {"experts.stack": torch.zeros(2, 3, 4)}
    folders = pair(base, {name: one + torch.randn_like(one) for name, one in base.items()})
    listed = extract(*folders, rank=2)
    assert {one.name: one.reason for one in listed.left_out} == {
        "q.bias": "is a vector",
        "norm.weight": "is a vector",
        "experts.stack": "is no weight of a layer, but a stack of matrices of its own",
    }
    assert not listed.adapter.trained
    kept = extract(*folders, rank=2, others="keep")
    assert set(kept.adapter.trained) == {"q.bias", "norm.weight"}
    assert [one.name for one in kept.left_out] == ["experts.stack"]
    save_adapter(kept.adapter, tmp_path / "adapter")
    assert load_adapter(tmp_path / "adapter").digest == kept.adapter.digest
    with pytest.raises(AdapterError) as caught:
        extract(*folders, rank=2, others="refuse")
    assert len(caught.value.problems) == 3


def test_a_table_that_is_the_head_too_is_not_taken_for_a_table_alone(pair):
    base = {"model.embed_tokens.weight": torch.zeros(9, 4), "q.weight": torch.zeros(4, 4)}
    folders = pair(base, {name: torch.randn_like(one) for name, one in base.items()}, architectures=["XForCausalLM"])
    found = extract(*folders, rank=2)
    assert "tied to the head" in found.left_out[0].reason


def test_other_tensors_and_shapes_are_refused_all_at_once(pair, tmp_path):
    base = {"q.weight": torch.zeros(3, 4), "k.weight": torch.zeros(3, 4)}
    first = saved(tmp_path / "a", base)
    second = saved(tmp_path / "b", {"q.weight": torch.zeros(4, 4), "v.weight": torch.zeros(3, 4)})
    with pytest.raises(BaseModelError) as caught:
        extract(first, second, rank=1)
    assert len(caught.value.problems) == 3
    assert "'q.weight': (3, 4)" in caught.value.problems[2]


def test_nothing_to_take_and_values_that_are_not_finite_are_refused(pair):
    base = {"q.weight": torch.zeros(3, 4)}
    folders = pair(base, {"q.weight": torch.full((3, 4), torch.inf)})
    with pytest.raises(AdapterError, match=r"q\.weight: the difference is not finite"):
        extract(*folders, rank=1)
    with pytest.raises(AdapterError, match="nothing to extract"):
        extract(folders[0], folders[0], rank=1)


@pytest.mark.parametrize("asked", [{}, {"rank": 1, "energy": 0.5}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.5}])
def test_one_of_rank_and_energy_is_asked_for(tmp_path, asked):
    with pytest.raises(ConfigError, match=r"rank|energy"):
        extract(tmp_path, tmp_path, **asked)


def test_the_same_numbers_in_another_dtype_are_no_difference(pair, tmp_path):
    base = {"q.weight": torch.ones(3, 4), "k.weight": torch.ones(3, 4)}
    folders = pair(base, {"q.weight": torch.ones(3, 4).bfloat16(), "k.weight": torch.randn(3, 4)})
    assert extract(*folders, rank=1).unchanged == 1
