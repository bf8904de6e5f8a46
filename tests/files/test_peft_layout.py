"""What PEFT's keys stand for, kind by kind; `tests/parity/test_peft_kinds.py` compares with PEFT itself."""

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralModel

import veneer
from veneer.adapter import Adapter, LowRank
from veneer.config import LoRAConfig
from veneer.errors import AdapterError
from veneer.files.peft import adapter_from_files, adapter_to_files, load_adapter, save_adapter
from veneer.files.peft_folder import CONFIG, TENSORS
from veneer.files.peft_layout import place_factors, write_factors
from veneer.files.strict_json import dump_json
from veneer.files.tensors import dump_tensors, parse_tensors

P = "base_model.model."


def pair(*shapes: tuple[int, ...], seed: int = 0, **changes) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(shape, generator=generator) for shape in shapes)
    return LowRank(A, B, 2.0, **changes)


def files_of(tensors, **config) -> dict[str, bytes]:
    return {
        CONFIG: dump_json({"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}),
        TENSORS: dump_tensors({P + name: tensor for name, tensor in tensors.items()}),
    }


def test_grouped_kernels_are_written_across_groups_and_read_back_within_them():
    one = pair((4, 3, 3, 3), (6, 2, 1, 1), form="conv")
    named = write_factors({"c": one})
    assert named["c.lora_A.weight"].shape == (4, 6, 3, 3)
    assert named["c.lora_A.weight"][:2, 3:].eq(0).all()
    adapter = Adapter({"c": one}, LoRAConfig(rank=4, alpha=8, target_modules=["c"]))
    assert adapter_from_files(adapter_to_files(adapter), "x").digest == adapter.digest


def test_kernels_that_look_across_groups_stay_as_they_are():
    adapter = Adapter({"c": pair((4, 6, 3), (6, 2, 1), form="conv_across")}, LoRAConfig(rank=4, target_modules=["c"]))
    again = adapter_from_files(adapter_to_files(adapter), "x")
    assert (again.modules["c"].form, again.modules["c"].rank) == ("conv_across", 4)


@pytest.mark.parametrize("only", ["in_proj_weight", "out_proj.weight"])
def test_a_projection_of_an_attention_that_is_not_adapted_stands_in_the_file_as_zeros(only, tmp_path):
    shape = (12, 2) if only == "in_proj_weight" else (4, 2)
    form = "attention_in" if only == "in_proj_weight" else "attention_out"
    adapter = Adapter({f"a.{only}": pair((2, 4), shape, form=form)}, LoRAConfig(rank=2, alpha=4, target_modules=["a"]))
    save_adapter(adapter, tmp_path / "a")
    names = parse_tensors((tmp_path / "a" / TENSORS).read_bytes(), "x")
    assert {name.removeprefix(P) for name in names} == {
        *(f"a.lora_{side}.weight" for side in "AB"),
        *(f"a.base_layer.out_proj.lora_{side}.weight" for side in "AB"),
    }
    assert load_adapter(tmp_path / "a").digest == adapter.digest


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = MixtralConfig(vocab_size=20, intermediate_size=8, num_local_experts=3, **sizes)
    return MixtralModel(config).eval().requires_grad_(False)


@pytest.mark.parametrize("version", [None, "0.17.1", "0.18.1", "0.19.0", "0.19.1", "0.21.2"])
def test_experts_of_every_version_of_peft_give_the_delta_that_they_were_trained_for(version):
    """The parameter is square (16, 16): only the version tells which axis lora_A runs over."""
    model = mixtral()
    experts, rank = 3, 2
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(experts * rank, 16, generator=generator)
    B = torch.randn(16, rank * experts, generator=generator)
    name = "layers.0.mlp.experts"
    raw = {"target_parameters": ["experts.gate_up_proj"]} | ({"peft_version": version} if version else {})
    adapter = adapter_from_files(files_of({f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}, **raw), "x")
    veneer.attach(model, adapter)
    (got,) = veneer.detach(model).modules.values()
    expected = torch.zeros(experts, 16, 16)
    for e in range(experts):
        for j in range(rank):
            expected[e] += 2.0 * torch.outer(B[:, j * experts + e], A[e * rank + j])
    if version not in ("0.19.1", "0.21.2"):
        expected = expected.transpose(1, 2)  # inputs and outputs were exchanged
    torch.testing.assert_close(got.delta().float(), expected)


def test_experts_whose_axes_only_the_model_tells_are_written_once_it_has():
    A, B = torch.ones(6, 16), torch.ones(16, 6)
    name = "layers.0.mlp.experts"
    old = files_of(
        {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B},
        target_parameters=["experts.gate_up_proj"],
        peft_version="0.18.0",
    )
    adapter = adapter_from_files(old, "x")
    with pytest.raises(AdapterError, match="only the model tells"):
        adapter_to_files(adapter)
    model = mixtral()
    veneer.attach(model, adapter)
    again = veneer.detach(model)
    assert adapter_from_files(adapter_to_files(again), "x").digest == again.digest


def test_parameters_whose_order_cannot_be_told_are_refused_both_ways():
    both = {f"m.{name}": pair((2, 3), (4, 2), form="parameter") for name in ("one", "two")}
    with pytest.raises(AdapterError, match="the order of the module"):
        write_factors(both)
    tensors = {
        f"m{nest}.lora_{side}.weight": torch.ones(2, 3) if side == "A" else torch.ones(4, 2)
        for nest in ("", ".base_layer")
        for side in "AB"
    }
    with pytest.raises(AdapterError, match="which is which cannot be told"):
        adapter_from_files(files_of(tensors, target_parameters=["m.one", "m.two"]), "x")
    with pytest.raises(AdapterError, match="2 pairs of factors for its parameters"):
        adapter_from_files(files_of(tensors, target_parameters=["m.one"]), "x")


@pytest.mark.parametrize(
    ("form", "shapes", "changes", "said"),
    [
        ("conv_transpose", ((2, 3, 3), (4, 2, 1)), {}, "no place for a transposed convolution"),
        ("parameter", ((2, 3), (4, 2)), {"magnitude": torch.ones(4)}, "PEFT has magnitudes"),
        ("attention_in", ((2, 4), (10, 2)), {}, None),
    ],
)
def test_what_the_layout_cannot_hold_is_refused_by_name(form, shapes, changes, said):
    one = {"a.in_proj_weight" if form.startswith("attention") else "a": pair(*shapes, form=form, **changes)}
    if said is None:
        write_factors(one)
        return
    with pytest.raises(AdapterError, match=said):
        write_factors(one)


def test_a_compensated_start_and_parts_come_back_from_our_own_files(tmp_path):
    config = LoRAConfig(rank=2, alpha=4, init="pissa", target_modules=["0"])
    model = nn.Sequential(nn.Linear(6, 5))
    veneer.attach(model, config)
    adapter = veneer.detach(model)
    assert (adapter.modules["0"].rank, adapter.modules["0"].frozen_rank) == (4, 2)
    save_adapter(adapter, tmp_path / "a")
    again = load_adapter(tmp_path / "a")
    assert again.config == config
    assert again.modules["0"].frozen_rank == 2
    attachment = veneer.attach(model, again)
    assert attachment.parameters()["0.lora_A"].shape == (2, 6)

    veneer.detach(model)
    config = LoRAConfig(rank=2, alpha=4, target_modules=["0"], parts={"0": [[0, 2], [3, 5]]})
    veneer.attach(model, config)
    adapter = veneer.detach(model)
    save_adapter(adapter, tmp_path / "b")
    attachment = veneer.attach(model, load_adapter(tmp_path / "b"))
    assert attachment.parameters()["0.lora_B"].shape == (4, 2)


def test_a_path_that_still_holds_peft_s_own_words_is_no_module():
    keys = {f"x.base_layer.y.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    with pytest.raises(AdapterError, match="nested factors"):
        adapter_from_files(files_of(keys, target_modules=["y"]), "x")
    assert place_factors({}, {}, LoRAConfig(), transposed=False) == ({}, [])
