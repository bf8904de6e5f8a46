"""Merging on files: the tensors that merging in memory gives, every other byte as it was, and nothing half-done."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import tiny_config, tiny_tokenizer
from tests.files.faulty import Faulty, KilledError
from torch import nn
from transformers import AutoModel, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from veneer.adapter import Adapter, AdapterMetadata, LowRank, TokenRows
from veneer.config import LoRAConfig
from veneer.errors import AdapterError, BaseModelError, ConfigError, OutputError, TargetError, VeneerError
from veneer.files.commit import verify_folder
from veneer.files.filesystem import FileSystem
from veneer.files.peft import load_adapter, save_adapter
from veneer.files.shards import CONFIG, INDEX, WEIGHTS, read_checkpoint
from veneer.nn.attach import attach, detach
from veneer.tools.merge import merge
from veneer.tools.merge_checkpoint import Order, carry_out, merge_files
from veneer.tools.merge_checkpoint_plan import sum_adapters
from veneer.tools.merge_checkpoint_record import RECORD
from veneer.tools.merge_weights import round_once

BF16 = torch.bfloat16


def made(model: nn.Module, config: LoRAConfig, seed: int = 0) -> Adapter:
    """A trained-looking adapter of a model."""
    torch.manual_seed(seed)
    attachment = attach(model, config)
    for parameter in attachment.parameters().values():
        nn.init.normal_(parameter, std=0.2)
    return detach(model)


def held(folder) -> dict[str, torch.Tensor]:
    return {name: one for file in folder.glob("*.safetensors") for name, one in load_file(file).items()}


def factors(out: int, size: int, rank: int = 2) -> LowRank:
    return LowRank(torch.randn(rank, size), torch.randn(out, rank), 0.5)


def adapter_of(modules=None, **rest) -> Adapter:
    return Adapter(modules or {}, LoRAConfig(rank=2), **rest)


@pytest.fixture
def sharded(tmp_path):
    """An untied tiny Llama in bfloat16, in two shards, with files beside it."""

    def make(**changes):
        torch.manual_seed(0)
        model = LlamaForCausalLM(tiny_config(**({"tie_word_embeddings": False} | changes))).to(BF16).eval()
        folder = tmp_path / "base"
        model.save_pretrained(folder, max_shard_size="40KB")
        tiny_tokenizer().save_pretrained(folder)
        (folder / "extra").mkdir()
        (folder / "extra" / "notes.txt").write_text("hello")
        (folder / "pytorch_model.bin").write_bytes(b"old weights")
        return model, folder

    return make


def small(folder, tensors, **config):
    """A base of a few tensors."""
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_files_hold_what_merging_in_memory_gives(sharded, tmp_path, tied, use_dora):
    model, base = sharded(tie_word_embeddings=tied)
    names = ["q_proj", "down_proj", *(["lm_head"] if tied else ["embed_tokens"])]
    adapter = made(model, LoRAConfig(rank=3, target_modules=names, use_dora=use_dora))
    record = merge_files(base, [(adapter, 1.0)], tmp_path / "out")
    merge(model, adapter, tied="untie")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=BF16)
    for name, expected in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], expected), name
    assert loaded.config.tie_word_embeddings is False
    assert record.untied == (("lm_head.weight",) if tied else ())
    assert len(record.modules) == len(adapter.modules)


def test_all_that_is_not_adapted_is_as_it_was_byte_for_byte(sharded, tmp_path):
    model, base = sharded()
    adapter = made(model, LoRAConfig(rank=2, target_modules=["layers.1.mlp.down_proj"]))
    record = merge_files(base, [(adapter, 1.0)], tmp_path / "out")
    before, after = read_checkpoint(base), read_checkpoint(tmp_path / "out")
    assert before.tensors == after.tensors  # files, places, dtypes
    merged = {"model.layers.1.mlp.down_proj.weight"}
    assert {name for name, one in held(base).items() if not torch.equal(one, held(tmp_path / "out")[name])} == merged
    changed = {after.tensors[name].file for name in merged}
    for path in base.rglob("*"):
        name = path.relative_to(base).as_posix()
        if path.is_file() and name not in changed and name != "pytorch_model.bin":
            assert (tmp_path / "out" / name).read_bytes() == path.read_bytes(), name
    assert record.left_out == ("pytorch_model.bin",)
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    assert record.untouched == len(before.tensors) - 1


def test_the_record_lies_beside_the_weights_and_the_manifest_vouches_for_all(sharded, tmp_path):
    model, base = sharded()
    adapter = made(model, LoRAConfig(rank=2))
    record = merge_files(base, [(adapter, 1.0)], tmp_path / "out")
    manifest = verify_folder(tmp_path / "out")
    assert manifest is not None
    assert manifest.kind == "merged"
    assert manifest.notes["adapters"] == [[adapter.digest, 1.0]]
    for file, one in record.outputs.items():
        assert manifest.files[file] == one
        assert record.inputs[file].sha256 == FileSystem().measure(base / file)[1]
    assert json.loads((tmp_path / "out" / RECORD).read_text()) == json.loads(json.dumps(record.to_json()))


def test_a_folder_whose_manifest_would_not_know_it_takes_no_merge(sharded, tmp_path):
    """What was merged, or converted, is a base of its own: a second merge into it would damage it."""
    model, base = sharded()
    adapter = made(model, LoRAConfig(rank=2))
    merge_files(base, [(adapter, 1.0)], base / "first")
    with pytest.raises(OutputError, match="lies in the base's own folder"):
        merge_files(base / "first", [(adapter, 1.0)], base / "first" / "second")
    assert verify_folder(base / "first") is not None


def test_several_adapters_are_added_exactly_before_one_rounding(sharded, tmp_path):
    model, base = sharded()
    parts = [(made(model, LoRAConfig(rank=rank, alpha=4, target_modules=["q_proj"]), rank), w) for rank, w in
             ((2, 0.7), (3, -0.4), (1, 1.0))]  # fmt: skip
    merge_files(base, parts, tmp_path / "out")
    before, after = held(base), held(tmp_path / "out")
    for layer in range(2):
        path = f"model.layers.{layer}.self_attn.q_proj"
        exact = before[f"{path}.weight"].double() + sum(w * one.modules[path].delta() for one, w in parts)
        assert torch.equal(after[f"{path}.weight"], round_once(exact, BF16))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_a_dtype_is_that_of_every_floating_tensor_of_index_and_configuration(sharded, tmp_path, dtype):
    model, base = sharded()
    adapter = made(model, LoRAConfig(rank=2, target_modules=["up_proj"]))
    merge_files(base, [(adapter, 1.0)], tmp_path / "out", dtype=dtype)
    kind = getattr(torch, dtype)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == kind
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["dtype"] == dtype
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(one.nbytes for one in held(tmp_path / "out").values())
    path = "model.layers.0.mlp.up_proj"
    exact = held(base)[f"{path}.weight"].double() + adapter.modules[path].delta()
    assert torch.equal(held(tmp_path / "out")[f"{path}.weight"], round_once(exact, kind))


def test_integers_stay_in_a_new_dtype_and_every_tensor_begins_where_it_may(tmp_path):
    tensors = {"a.weight": torch.randn(3, 3), "b.ids": torch.arange(3), "c.flag": torch.tensor([True])}
    base = small(tmp_path / "base", tensors)
    merge_files(base, [(adapter_of({"a": factors(3, 3)}), 1.0)], tmp_path / "out", dtype="float16")
    after = load_file(tmp_path / "out" / WEIGHTS)
    assert after["a.weight"].dtype == torch.float16
    assert torch.equal(after["b.ids"], tensors["b.ids"])
    assert torch.equal(after["c.flag"], tensors["c.flag"])


FORMS = {  # form: shapes of A and B, name and shape of the tensor
    "linear": ((2, 5), (7, 2), "x.weight", (7, 5)),
    "transposed": ((2, 5), (7, 2), "x.weight", (5, 7)),
    "embedding": ((2, 9), (4, 2), "x.weight", (9, 4)),
    "conv": ((4, 3, 3, 3), (8, 2, 1, 1), "x.weight", (8, 3, 3, 3)),
    "conv_transpose": ((4, 3, 2), (8, 2, 1), "x.weight", (6, 4, 2)),
    "attention_in": ((2, 4), (12, 2), "x.in_proj_weight", (12, 4)),
    "attention_out": ((2, 4), (4, 2), "x.out_proj.weight", (4, 4)),
    "parameter": ((2, 5), (7, 2), "x.matrix", (7, 5)),
    "experts": ((3, 2, 4), (3, 6, 2), "x.gate_up_proj", (3, 6, 4)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_lands_in_its_tensor(tmp_path, form):
    shape_A, shape_B, name, shape = FORMS[form]
    pair = LowRank(torch.randn(shape_A), torch.randn(shape_B), 0.3, form)
    weight = torch.randn(shape).to(BF16)
    base = small(tmp_path / "base", {name: weight})
    merge_files(base, [(adapter_of({name.removesuffix(".weight") if form != "attention_out" else name: pair}), 1.0)],
                tmp_path / "out")  # fmt: skip
    found = load_file(tmp_path / "out" / WEIGHTS)[name]
    assert torch.equal(found, round_once(weight.double() + pair.delta(), BF16))


@pytest.mark.parametrize("swapped", [False, True])
def test_square_experts_lie_as_their_sibling_does(tmp_path, swapped):
    pair = LowRank(torch.randn(2, 1, 4), torch.randn(2, 4, 1), 1.0, "experts")
    tensors = {"e.down_proj": torch.randn(2, 4, 4), "e.gate_up_proj": torch.randn(2, 4, 8)}
    if not swapped:
        tensors["e.gate_up_proj"] = torch.randn(2, 8, 4)
    base = small(tmp_path / "base", tensors)
    merge_files(base, [(adapter_of({"e.down_proj": pair}), 1.0)], tmp_path / "out")
    delta = pair.delta().mT if swapped else pair.delta()
    found = load_file(tmp_path / "out" / WEIGHTS)["e.down_proj"]
    assert torch.equal(found, (tensors["e.down_proj"].double() + delta).float())
    del tensors["e.gate_up_proj"]
    save_file(tensors, base / WEIGHTS)
    with pytest.raises(AdapterError) as caught:
        merge_files(base, [(adapter_of({"e.down_proj": pair}), 1.0)], tmp_path / "other")
    assert "cannot be told from files" in str(caught.value)


def test_experts_by_position_run_over_the_first_axis_of_what_is_stored(tmp_path):
    pair = LowRank(torch.randn(2, 1, 4), torch.randn(2, 6, 1), 1.0, "experts_by_position")
    weight = torch.randn(2, 4, 6)
    base = small(tmp_path / "base", {"e.down_proj": weight})
    merge_files(base, [(adapter_of({"e.down_proj": pair}), 1.0)], tmp_path / "out")
    found = load_file(tmp_path / "out" / WEIGHTS)["e.down_proj"]
    assert torch.equal(found, (weight.double() + pair.delta()).float())


def test_stacked_updates_go_into_files_that_hold_a_matrix_for_each_expert(tmp_path):
    config = Qwen3MoeConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, num_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).eval()
    names = ("experts.gate_up_proj", "experts.down_proj")
    adapter = made(model, LoRAConfig(rank=2, target_modules=["q_proj"], target_parameters=names))
    model.save_pretrained(tmp_path / "base")
    assert "model.layers.0.mlp.experts.2.gate_proj.weight" in held(tmp_path / "base")
    merge_files(tmp_path / "base", [(adapter, 1.0)], tmp_path / "out")
    loaded = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "out")
    merge(model, adapter)
    for name, expected in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], expected), name


def test_a_gpt2_of_files_without_its_prefix_lies_transposed_square_or_not(tmp_path):
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=30, n_positions=32, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    ).eval()
    adapter = made(model, LoRAConfig(rank=2, target_modules=["c_attn", "c_proj"]))
    save_adapter(adapter, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "base")
    tensors = {name.removeprefix("transformer."): one for name, one in held(tmp_path / "base").items()}
    save_file(tensors, tmp_path / "base" / WEIGHTS, {"format": "pt"})
    merge_files(tmp_path / "base", [(load_adapter(tmp_path / "adapter"), 1.0)], tmp_path / "out")
    merge(model, adapter)
    after = held(tmp_path / "out")
    for name in tensors:
        assert torch.equal(after[name], model.state_dict()[f"transformer.{name}"]), name


def test_a_square_matrix_that_may_lie_either_way_round_is_refused(tmp_path):
    base = small(tmp_path / "base", {"a.weight": torch.randn(4, 6), "b.weight": torch.randn(4, 4)})
    adapter = adapter_of({"a": factors(6, 4), "b": factors(4, 4)})  # said to be linear, and `a` is stored turned
    with pytest.raises(AdapterError) as caught:
        merge_files(base, [(adapter, 1.0)], tmp_path / "out")
    assert caught.value.problems[0].startswith("b: is square")


def test_files_saved_from_the_model_without_its_head(sharded, tmp_path):
    model, base = sharded()
    adapter = made(model, LoRAConfig(rank=2))
    AutoModel.from_pretrained(base).save_pretrained(tmp_path / "bare")
    record = merge_files(tmp_path / "bare", [(adapter, 1.0)], tmp_path / "out")
    assert len(record.modules) == len(adapter.modules)
    merge_files(base, [(adapter, 1.0)], tmp_path / "whole")
    whole = held(tmp_path / "whole")
    for name, one in held(tmp_path / "out").items():
        assert torch.equal(one, whole[f"model.{name}"])


def tied_base(tmp_path, **config):
    tensors = {"model.embed_tokens.weight": torch.randn(9, 4), "model.layers.0.q.weight": torch.randn(4, 4)}
    tensors["norm.weight"] = torch.ones(4)
    settings = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True} | config
    return small(tmp_path / "base", tensors, **settings), tensors


TABLE = "model.embed_tokens"


@pytest.mark.parametrize("touched", ["head", "table", "both", "head trained", "table trained"])
def test_a_tied_head_and_its_table_become_two(tmp_path, touched):
    base, tensors = tied_base(tmp_path, text_config={"tie_word_embeddings": True})
    table = LowRank(torch.randn(2, 9), torch.randn(4, 2), 0.5, "embedding")
    modules = {"lm_head": factors(9, 4), TABLE: table}
    whole = {"head trained": "lm_head.weight", "table trained": f"{TABLE}.weight"}.get(touched)
    kept = {"head": ["lm_head"], "table": [TABLE], "both": list(modules)}.get(touched, [])
    trained = {whole: torch.randn(9, 4)} if whole else {}
    adapter = adapter_of({path: modules[path] for path in kept}, trained=trained)
    record = merge_files(base, [(adapter, 1.0)], tmp_path / "out")
    found, weight = load_file(tmp_path / "out" / WEIGHTS), tensors[f"{TABLE}.weight"]
    for name, path in (("lm_head.weight", "lm_head"), (f"{TABLE}.weight", TABLE)):
        expected = trained.get(name, weight)
        if path in kept:
            expected = (weight.double() + modules[path].delta()).float()
        assert torch.equal(found[name], expected), name
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False
    assert record.untied == ("lm_head.weight",)


def test_a_head_stored_beside_its_table_is_untied_by_the_configuration_alone(tmp_path):
    base, tensors = tied_base(tmp_path)
    save_file(tensors | {"lm_head.weight": tensors[f"{TABLE}.weight"].clone()}, base / WEIGHTS)
    merge_files(base, [(adapter_of({"lm_head": factors(9, 4)}), 1.0)], tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / WEIGHTS)[f"{TABLE}.weight"], tensors[f"{TABLE}.weight"])
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["tie_word_embeddings"] is False


def test_an_index_whose_metadata_is_nothing_we_know_is_no_traceback(sharded, tmp_path):
    model, base = sharded()
    index = json.loads((base / INDEX).read_text())
    (base / INDEX).write_text(json.dumps(index | {"metadata": ["odd"]}))
    merge_files(base, [(made(model, LoRAConfig(rank=2)), 1.0)], tmp_path / "out", dtype="float32")
    assert json.loads((tmp_path / "out" / INDEX).read_text())["metadata"] == {}


def test_a_new_head_stands_in_the_index(sharded, tmp_path):
    model, base = sharded(tie_word_embeddings=True)
    adapter = made(model, LoRAConfig(rank=2, target_modules=["lm_head"]))
    merge_files(base, [(adapter, 1.0)], tmp_path / "out")
    before, after = (json.loads((one / INDEX).read_text()) for one in (base, tmp_path / "out"))
    assert after["weight_map"]["lm_head.weight"] == before["weight_map"]["model.embed_tokens.weight"]
    assert after["metadata"]["total_size"] == sum(one.nbytes for one in held(tmp_path / "out").values())
    assert after["metadata"]["total_parameters"] == before["metadata"]["total_parameters"] + 259 * 32


def test_rows_of_tokens_stay_tied(tmp_path):
    base, tensors = tied_base(tmp_path)
    rows = TokenRows((3, 7), torch.randn(2, 4))
    record = merge_files(base, [(adapter_of(tokens={TABLE: rows}), 1.0)], tmp_path / "out")
    found = load_file(tmp_path / "out" / WEIGHTS)
    expected = tensors[f"{TABLE}.weight"].clone()
    expected[[3, 7]] = rows.rows
    assert torch.equal(found[f"{TABLE}.weight"], expected)
    assert "lm_head.weight" not in found
    assert record.trained == (f"{TABLE}.weight",)
    both = adapter_of({"lm_head": factors(9, 4)}, tokens={TABLE: rows})
    with pytest.raises(AdapterError, match="choose one"):
        merge_files(base, [(both, 1.0)], tmp_path / "other")


def test_a_table_of_positions_is_tied_to_nothing(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=32, n_embd=8, n_layer=1, n_head=2, bos_token_id=0,
                                       eos_token_id=0)).eval()  # fmt: skip
    adapter = made(model, LoRAConfig(rank=2, target_modules=["wpe"]))
    model.save_pretrained(tmp_path / "base")
    record = merge_files(tmp_path / "base", [(adapter, 1.0)], tmp_path / "base" / "inside")
    assert record.untied == record.left_out == ()
    assert set(held(tmp_path / "base" / "inside")) == set(held(tmp_path / "base"))


def test_a_folder_of_links_is_read_through_them(sharded, tmp_path):
    model, base = sharded()
    (tmp_path / "links").mkdir()
    for path in base.iterdir():
        if path.is_file():
            (tmp_path / "links" / path.name).symlink_to(path)
    parts = [(made(model, LoRAConfig(rank=2)), 1.0)]
    merge_files(base, parts, tmp_path / "a")
    merge_files(tmp_path / "links", parts, tmp_path / "b")
    for name, one in held(tmp_path / "a").items():
        assert torch.equal(held(tmp_path / "b")[name], one)


def test_a_tie_that_no_configuration_undoes_is_refused(tmp_path):
    base, _ = tied_base(tmp_path, architectures=["BertForMaskedLM"])
    table = LowRank(torch.randn(2, 9), torch.randn(4, 2), 0.5, "embedding")
    with pytest.raises(TargetError, match="only a head and its table can be untied"):
        merge_files(base, [(adapter_of({TABLE: table}), 1.0)], tmp_path / "out")


def test_what_trained_whole_is_put_in(tmp_path):
    tensors = {"q.weight": torch.randn(3, 4).to(BF16), "q.bias": torch.zeros(3, dtype=BF16)}
    base = small(tmp_path / "base", tensors)
    value = torch.randn(3)
    merge_files(base, [(adapter_of({"q": factors(3, 4)}, trained={"q.bias": value}), 1.0)], tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / WEIGHTS)["q.bias"], value.to(BF16))


REFUSED = {
    "a module that is nowhere": (adapter_of({"model.layers.0.qq": factors(4, 4)}), "'model.layers.0.q.weight'"),
    "another shape": (adapter_of({"model.layers.0.q": factors(5, 4)}), r"hold \(4, 4\), the adapter is .* \(5, 4\)"),
    "a bias that is nowhere": (adapter_of(trained={"model.layers.0.q.bias": torch.ones(4)}), "no such tensor"),
    "values that are not finite": (
        adapter_of({"model.layers.0.q": LowRank(torch.full((1, 4), torch.nan), torch.ones(4, 1), 1.0)}),
        "not finite",
    ),
    "an activated adapter": (
        Adapter({"model.layers.0.q": factors(4, 4)}, LoRAConfig(rank=2, invocation_tokens=(1,))),
        "invocation_tokens",
    ),
    "two for one tensor": (
        adapter_of({"model.layers.0.q": factors(4, 4), "model.layers.0.q.weight": LowRank(
            torch.ones(1, 4), torch.ones(4, 1), 1.0, "parameter")}),
        "one of them would be lost",
    ),
    "an update of what trained whole": (
        adapter_of({"model.layers.0.q": factors(4, 4)}, trained={"model.layers.0.q.weight": torch.ones(4, 4)}),
        "one of them would be lost",
    ),
    "rows of what is no table": (adapter_of(tokens={"norm": TokenRows((0,), torch.ones(1, 4))}), "is no table"),
    "rows outside": (adapter_of(tokens={TABLE: TokenRows((9,), torch.ones(1, 4))}), r"rows \[9\] lie outside"),
    "another base": (
        adapter_of({"model.layers.0.q": factors(4, 4)}, metadata=AdapterMetadata(base_weights=((TABLE, "0" * 64),))),
        "made for another base",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused_by_name_before_anything_is_written(tmp_path, what):
    adapter, words = REFUSED[what]
    base, _ = tied_base(tmp_path)
    with pytest.raises(AdapterError) as caught:
        merge_files(base, [(adapter, 1.0)], tmp_path / "out")
    assert re.search(words, str(caught.value)), caught.value
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_what_has_no_weight_is_not_weighted():
    pair = factors(3, 4)
    dora = adapter_of({"q": LowRank(pair.lora_A, pair.lora_B, 1.0, magnitude=torch.ones(3))})
    with pytest.raises(AdapterError, match=r"adapter 1: q: has a magnitude \(DoRA\)"):
        sum_adapters([(dora, 0.5)])
    whole = adapter_of({"q": pair}, trained={"q.bias": torch.ones(3)})
    with pytest.raises(AdapterError, match=r"adapter 2: q.bias: was trained whole"):
        sum_adapters([(adapter_of({"q": pair}), 1.0), (whole, 1.0)])
    assert sum_adapters([(dora, 1.0)]) is dora


def test_quantised_bases_are_refused_with_what_to_do(tmp_path):
    adapter = adapter_of({"q": factors(3, 4)})
    base = small(tmp_path / "a", {"q.weight": torch.ones(3, 4)}, quantization_config={"quant_method": "fp8"})
    with pytest.raises(BaseModelError, match=r"quantised \(fp8\); merge into the base in full precision"):
        merge_files(base, [(adapter, 1.0)], tmp_path / "out")
    base = small(tmp_path / "b", {"q.weight": torch.ones(3, 4, dtype=torch.int8)})
    with pytest.raises(BaseModelError, match=r"q.weight: is stored as I8"):
        merge_files(base, [(adapter, 1.0)], tmp_path / "out")


def test_an_unknown_dtype_names_the_nearest(tmp_path):
    base = small(tmp_path / "base", {"q.weight": torch.ones(3, 4)})
    with pytest.raises(ConfigError, match="nearest: 'bfloat16'"):
        merge_files(base, [(adapter_of({"q": factors(3, 4)}), 1.0)], tmp_path / "out", dtype="bfloat")


def test_a_value_out_of_range_leaves_nothing_behind(tmp_path):
    base = small(tmp_path / "base", {"q.weight": torch.ones(3, 4).half()})
    pair = LowRank(torch.full((1, 4), 300.0), torch.full((3, 1), 300.0), 1.0)
    with pytest.raises(AdapterError, match="q: the merged weight reaches"):
        merge_files(base, [(adapter_of({"q": pair}), 1.0)], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_a_folder_that_exists_and_a_disk_without_room_are_told_before_any_work(tmp_path):
    base = small(tmp_path / "base", {"q.weight": torch.ones(3, 4)})
    parts = [(adapter_of({"q": factors(3, 4)}), 1.0)]
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        merge_files(base, parts, tmp_path / "out")

    class Full(FileSystem):
        def free_bytes(self, folder):
            return 10

    with pytest.raises(OutputError, match=r"it takes 0.0 MB, 0.0 MB are free there; make room"):
        carry_out(Order(base, parts, tmp_path / "new"), Full())


@pytest.mark.parametrize("mode", ["kill", "EIO", "ENOSPC", "short write"])
def test_at_whatever_operation_it_fails_nothing_is_there_or_all_of_it(tmp_path, mode):
    base = small(tmp_path / "base", {"q.weight": torch.ones(3, 4), "k.weight": torch.ones(2)}, model_type="x")
    parts = [(adapter_of({"q": factors(3, 4)}), 1.0)]
    at, failed = 0, 0
    while True:
        home = tmp_path / f"home{at}"
        home.mkdir()
        fs = Faulty(tmp_path, at, mode)
        try:
            carry_out(Order(base, parts, home / "out"), fs)
        except (VeneerError, OSError, KilledError):
            failed += 1
            if (home / "out").exists():
                verify_folder(home / "out")
            elif mode != "kill":
                assert list(home.iterdir()) == []
        if not fs.hit:
            break
        shutil.rmtree(home)
        at += 1
    assert failed > 15 or mode in ("short write", "ENOSPC")
    assert verify_folder(home / "out") is not None
