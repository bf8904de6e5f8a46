"""Adapters in PEFT's layout, against PEFT itself: what one writes the other loads, with the same effect."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from veneer.adapter import Adapter, AdapterMetadata, LowRank
from veneer.config import LoRAConfig
from veneer.errors import AdapterError, DamagedArtefactError, OutputError
from veneer.files.commit import read_manifest
from veneer.files.peft import adapter_from_files, adapter_to_files, load_adapter, save_adapter
from veneer.files.strict_json import dump_json
from veneer.files.tensors import dump_tensors, parse_tensors

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.norm = nn.Linear(6, 5), nn.Linear(5, 6, bias=False), nn.LayerNorm(6)

    def forward(self, x):
        return self.norm(self.k(self.q(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.score = nn.ModuleList([Block(), Block()]), nn.Linear(6, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.score(x)


def net(seed=0):
    torch.manual_seed(seed)
    return Net().eval().requires_grad_(False)


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def randomized(model, seed=1):
    """Give every trainable parameter a random value, so that a lost one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def adapter_for(model, config, paths, trained=(), seed=2, **metadata):
    """A random adapter of our own for some layers of a model."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator) * 0.3

    modules = {}
    for path in paths:
        layer, rank = model.get_submodule(path), config.rank_for(path)
        pair = draw(rank, layer.in_features), draw(layer.out_features, rank)
        modules[path] = LowRank(*pair, config.scaling_for(path))
    values = {path: draw(*model.get_parameter(path).shape) for path in trained}
    return Adapter(modules, config, values, AdapterMetadata(**metadata))


def applied(model, adapter):
    """Put an adapter into the weights by hand."""
    with torch.no_grad():
        for path, pair in adapter.modules.items():
            model.get_submodule(path).weight += pair.delta().float()
        for path, value in adapter.trained.items():
            model.get_parameter(path).copy_(value)
    return model


def peft_loads(model, folder):
    """Load a folder with PEFT; any warning, such as of missing keys, is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # PEFT's own
        return PeftModel.from_pretrained(model, str(folder)).eval()


OURS = [
    (LoRAConfig(rank=2, alpha=6, target_modules=["q", "k"]), ("q", "k"), ()),
    (LoRAConfig(rank=3, alpha=5, use_rslora=True, target_modules="all-linear"), ("q", "k"), ()),
    (LoRAConfig(rank=2, alpha=3, target_modules=r".*\.q"), ("q",), ()),
    (LoRAConfig(rank=2, rank_pattern={r"0\.q": 4}, alpha_pattern={"k": 1}, target_modules=["q", "k"]), ("q", "k"), ()),
    (LoRAConfig(rank=2, bias="lora_only", target_modules=["q"]), ("q",), ("layers.0.q.bias", "layers.1.q.bias")),
    (
        LoRAConfig(rank=2, bias="all", target_modules=["q"]),
        ("q",),
        ("layers.0.q.bias", "layers.1.q.bias", "layers.0.norm.bias", "layers.1.norm.bias", "score.bias"),
    ),
    (LoRAConfig(rank=2, modules_to_save=["score"], target_modules=["k"]), ("k",), ("score.weight", "score.bias")),
]


@pytest.mark.parametrize(("config", "names", "trained"), OURS)
def test_peft_loads_what_we_save_with_the_same_effect(tmp_path, config, names, trained):
    paths = [f"layers.{layer}.{name}" for layer in (0, 1) for name in names]
    adapter = adapter_for(net(), config, paths, trained)
    save_adapter(adapter, tmp_path / "a", card="# Mine\n")
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))
    theirs = peft_loads(net(), tmp_path / "a")
    expected = applied(net(), adapter)(x)
    torch.testing.assert_close(theirs(x), expected, atol=1e-5, rtol=1e-5)
    assert (expected - net()(x)).abs().max() > 1e-2
    adapted = {name.partition(".lora_A.")[0].removeprefix(PREFIX) for name in theirs.state_dict() if ".lora_A." in name}
    assert adapted == set(paths)


def test_peft_loads_a_language_model_s_adapter_with_the_same_logits(tmp_path):
    config = LoRAConfig(rank=4, alpha=32, target_modules="all-linear", rank_pattern={"q_proj": 2, "down_proj": 6})
    paths = [name for name, layer in llama().named_modules() if isinstance(layer, nn.Linear) and name != "lm_head"]
    adapter = adapter_for(llama(), config, paths, task_type="CAUSAL_LM", base="tiny")
    save_adapter(adapter, tmp_path / "a")
    ids = torch.tensor([[1, 5, 9, 2, 30]])
    theirs, expected = peft_loads(llama(), tmp_path / "a")(ids).logits, applied(llama(), adapter)(ids).logits
    torch.testing.assert_close(theirs, expected, atol=1e-5, rtol=1e-5)
    assert (expected - llama()(ids).logits).abs().max() > 1e-2


THEIRS = [
    {"r": 2, "lora_alpha": 6, "target_modules": ["q", "k"]},
    {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": "all-linear"},
    {"r": 2, "lora_alpha": 3, "target_modules": r".*\.[qk]"},
    {"r": 2, "target_modules": ["q", "k"], "rank_pattern": {r"0\.q": 4}, "alpha_pattern": {r".*1\..*": 1}},
    {"r": 2, "target_modules": ["q"], "bias": "lora_only"},
    {"r": 2, "target_modules": ["q"], "bias": "all"},
    {"r": 2, "target_modules": ["k"], "modules_to_save": ["score"]},
    {"r": 2, "target_modules": ["q", "k"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"r": 2, "target_modules": ["q", "k"], "exclude_modules": ["0.k"]},
    {"r": 2, "target_modules": ["k"], "task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]},
]


@pytest.mark.parametrize("raw", THEIRS)
def test_we_load_what_peft_saves_with_the_same_effect(tmp_path, raw):
    theirs = randomized(get_peft_model(net(), LoraConfig(**{k: v for k, v in raw.items() if k != "task_type"}))).eval()
    theirs.peft_config["default"].task_type = raw.get("task_type")
    theirs.save_pretrained(tmp_path / "theirs")
    adapter = load_adapter(tmp_path / "theirs")
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(applied(net(), adapter)(x), theirs(x), atol=1e-5, rtol=1e-5)
    layers = {name.removeprefix(PREFIX): layer for name, layer in theirs.named_modules()}
    for path, pair in adapter.modules.items():
        assert pair.scaling == layers[path].scaling["default"]
        torch.testing.assert_close(pair.delta().float(), layers[path].get_delta_weight("default"))
    files = adapter_to_files(adapter)
    assert files[TENSORS] == (tmp_path / "theirs" / TENSORS).read_bytes()
    save_adapter(adapter, tmp_path / "ours")
    again = peft_loads(net(), tmp_path / "ours").base_model  # its head for a task would ask for a language model
    torch.testing.assert_close(again(x), theirs(x), atol=1e-6, rtol=1e-6)


def test_copies_of_a_saved_module_s_bias_are_understood(tmp_path):
    config = LoraConfig(r=2, target_modules=["k"], bias="all", modules_to_save=["score"])
    theirs = randomized(get_peft_model(net(), config)).eval()
    theirs.save_pretrained(tmp_path)
    names = parse_tensors((tmp_path / TENSORS).read_bytes(), "x")
    assert f"{PREFIX}score.original_module.bias" in names
    adapter = load_adapter(tmp_path)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(applied(net(), adapter)(x), theirs(x), atol=1e-5, rtol=1e-5)
    names[f"{PREFIX}score.modules_to_save.bias"] += 1
    (tmp_path / TENSORS).write_bytes(dump_tensors(names))
    with pytest.raises(AdapterError, match=r"of which it should be a copy"):
        load_adapter(tmp_path)


NAMES = st.lists(st.sampled_from(["a", "q", "v_proj", "0", "10"]), min_size=1, max_size=3).map(".".join)
PAIRS = st.tuples(
    st.integers(1, 4),
    st.floats(1e-3, 1e3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)


@settings(max_examples=50)
@given(
    st.dictionaries(NAMES, PAIRS, min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from(["all-linear", ("q",), ".*"]),
    st.sampled_from([None, "base"]),
)
def test_save_and_load_keep_the_digest_and_every_byte(tmp_path_factory, pairs, rslora, targets, base):
    modules = {
        path: LowRank(torch.randn(rank, 3).to(dtype), torch.randn(2, rank).to(dtype), scaling)
        for path, (rank, scaling, dtype) in pairs.items()
    }
    metadata = AdapterMetadata(base, "fingerprint", "r1", "CAUSAL_LM", "chat", "digest")
    adapter = Adapter(modules, LoRAConfig(target_modules=targets, use_rslora=rslora), metadata=metadata)
    folder = tmp_path_factory.mktemp("round")
    save_adapter(adapter, folder / "one")
    loaded = load_adapter(folder / "one")
    assert (loaded.digest, loaded.metadata) == (adapter.digest, metadata)
    save_adapter(loaded, folder / "two")
    for name in (CONFIG, TENSORS, "MANIFEST.json"):
        assert (folder / "one" / name).read_bytes() == (folder / "two" / name).read_bytes()
    # Without our manifest, as after a trip through PEFT, a scaling may differ in its last digit.
    bare = adapter_from_files({name: (folder / "one" / name).read_bytes() for name in (CONFIG, TENSORS)}, "x")
    for path, pair in adapter.modules.items():
        assert abs(bare.modules[path].scaling - pair.scaling) <= 1e-15 * pair.scaling


def small(**changes):
    """An adapter of one layer as files, with changes to its tensors."""
    tensors = {f"{PREFIX}l.q.lora_A.weight": torch.ones(2, 3), f"{PREFIX}l.q.lora_B.weight": torch.ones(4, 2)}
    names = {name: name.replace("__", ".") if name.startswith("l__") else name for name in changes}
    return tensors | {PREFIX + names[name]: value for name, value in changes.items()}


def files_of(tensors, **config):
    raw = {"peft_type": "LORA", "target_modules": ["q"], "r": 2, **config}
    return {CONFIG: dump_json(raw), TENSORS: dump_tensors(tensors)}


def refused(tensors, **config):
    with pytest.raises(AdapterError) as caught:
        adapter_from_files(files_of(tensors, **config), "folder")
    assert "folder" in caught.value.message
    return str(caught.value)


def test_the_name_of_peft_s_default_adapter_may_stand_in_a_key():
    tensors = {key.replace(".weight", ".default.weight"): value for key, value in small().items()}
    plain = adapter_from_files(files_of(small()), "x")
    assert adapter_from_files(files_of(tensors), "x").digest == plain.digest
    assert "stands for the same factor" in refused({**tensors, **small()})


def test_an_adapter_that_was_never_trained_is_read():
    assert adapter_from_files(files_of(small(l__q__lora_B__weight=torch.zeros(4, 2))), "x").modules["l.q"].rank == 2


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("l.q.lora_embedding_A", (2, 3), "lora_A without lora_B"),
        ("l.q.lora_embedding_B.default", (2, 3), "lora_B without lora_A"),
        ("l.q.lora_magnitude_vector", (4,), "there is a magnitude (DoRA), but use_dora is not true"),
        ("l.q.lora_magnitude_vector.weight", (4,), "there is a magnitude (DoRA), but use_dora is not true"),
        ("l.k.lora_magnitude_vector", (4,), "a magnitude without factors"),
        ("l.q.lora_B.bias", (4,), "a bias of lora_B (lora_bias) is not supported"),
        ("l.q.lora_B.default.bias", (4,), "a bias of lora_B (lora_bias) is not supported"),
        ("e.token_adapter.trainable_tokens_delta", (1, 4), "trainable_token_indices names no such table"),
        ("e.experts.base_layer.lora_A.weight", (2, 3), "lora_A without lora_B"),
        ("m.base_layer.out_proj.lora_A.weight", (2, 3), "lora_A without lora_B"),
        ("l.k.base_layer.weight", (4, 3), "the weight of a layer that is not adapted"),
        ("l.q.hada_w1_a", (4, 3), "another method than LoRA"),
        ("c.lora_A.weight", (2, 3, 3), "lora_A without lora_B"),
        ("z.lora_A.weight", (0,), "were sharded weights (ZeRO-3, FSDP) not gathered"),
        ("z.lora_A.weight", (2, 0), "were sharded weights"),
        ("l.k.lora_A.weight", (2, 3), "lora_A without lora_B"),
        ("l.k.lora_B.weight", (4, 2), "lora_B without lora_A"),
        ("l.q.lora_a.weight", (2, 3), "trained whole, but neither bias='none' nor modules_to_save=[] says so"),
        ("l.q.lora_a.weight", (2, 3), "nearest: 'l.q.lora_A.weight'"),
        ("l.q.bias", (4,), "trained whole, but neither"),
        ("l.q.base_layer.bias", (4,), "'l.q.bias': trained whole, but neither"),
        ("l.v.base_layer.bias", (4,), "the bias of a layer that is not adapted"),
        ("lora_A.weight", (2, 3), "trained whole, but neither"),
        ("", (1,), "not the path of a parameter"),
        ("../../etc/passwd.lora_A.weight", (2, 3), "not the path of a parameter"),
        ("a..b.lora_A.weight", (2, 3), "not the path of a parameter"),
        ("a\n.lora_A.weight", (2, 3), "not the path of a parameter"),
        ("a\u202e.lora_A.weight", (2, 3), "not the path of a parameter"),
        ("x" * 300 + ".lora_A.weight", (2, 3), "not the path of a parameter"),
    ],
)
def test_a_key_that_stands_for_nothing_is_refused_by_name(name, shape, said):
    text = refused(small(**{name: torch.ones(*shape)}))
    assert said in text
    assert TENSORS in text


@pytest.mark.parametrize(
    "name", ["etc/passwd", "__class__.__init__", "a/b", "C:\\x", "%s%n", "é", "l.q.lora_A.weight.x"]
)
def test_hostile_names_are_never_more_than_names(name, tmp_path):
    refused(small(**{f"{name}.weight": torch.ones(1)}))
    adapter = adapter_from_files(
        files_of(small(**{f"{name}.lora_A.weight": torch.ones(2, 3), f"{name}.lora_B.weight": torch.ones(1, 2)})), "x"
    )
    save_adapter(adapter, tmp_path / "a")
    assert set(load_adapter(tmp_path / "a").modules) == {"l.q", name}
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["MANIFEST.json", CONFIG, TENSORS]


def test_the_prefix_is_needed():
    tensors = {key.removeprefix(PREFIX): value for key, value in small().items()}
    assert "PEFT would load nothing from it" in refused(tensors)
    assert "expected a key that begins with" in refused({**small(), "l.k.lora_A.weight": torch.ones(2, 3)})
    assert "it holds none" in refused({})


def test_ranks_are_checked_against_the_configuration_of_each_module():
    assert f"'{PREFIX}l.q.lora_A.weight': expected rank 4, as r or rank_pattern says, got 2" in refused(small(), r=4)
    assert f"'{PREFIX}l.q.lora_B.weight': expected rank 3" in refused(small(), rank_pattern={"q": 3})
    text = refused(small(l__q__lora_B__weight=torch.ones(4, 5)))
    assert f"'{PREFIX}l.q.lora_B.weight': expected rank 2, as r or rank_pattern says, got 5" in text
    assert adapter_from_files(files_of(small(), r=8, rank_pattern={"q": 2}), "x").modules["l.q"].scaling == 4.0


def test_factors_of_two_dtypes_are_refused():
    assert "l.q: lora_A and lora_B must share" in refused(small(l__q__lora_B__weight=torch.ones(4, 2).half()))
    integers = {name: value.int() for name, value in small().items()}
    assert "floating dtype" in refused(integers)


def test_biases_and_saved_modules_must_be_what_the_configuration_says():
    bias = {"l.q.base_layer.bias": torch.ones(4)}
    assert adapter_from_files(files_of(small(**bias), bias="lora_only"), "x").trained.keys() == {"l.q.bias"}
    assert "expected shape (4,), got (5,)" in refused(small(**{"l.q.base_layer.bias": torch.ones(5)}), bias="all")
    assert "stands for the same parameter" in refused(small(**bias, **{"l.q.bias": torch.ones(4)}), bias="all")
    assert "'n.bias': trained whole" in refused(small(**{"n.bias": torch.ones(4)}), bias="lora_only")
    assert "modules_to_save='score': no parameter" in refused(small(), modules_to_save=["score"])
    saved = {"h.score.weight": torch.ones(1)}
    both = ["classifier", "score"]
    assert "modules_to_save='classifier': no param" in refused(small(**saved), modules_to_save=both)
    files = files_of(small(**saved), modules_to_save=both, task_type="SEQ_CLS")
    assert adapter_from_files(files, "x").trained.keys() == {"h.score.weight"}
    overlap = refused(small(**{"l.n.weight": torch.ones(1)}), modules_to_save=["l"])
    assert "'l.q': adapted, and trained whole by modules_to_save='l'" in overlap


def test_all_problems_are_listed_at_once():
    text = refused(
        small(l__k__lora_A__weight=torch.ones(2, 3), stray=torch.ones(1), l__v__lora_B__bias=torch.ones(1)), r=3
    )
    for part in ("l.k.lora_A.weight", "stray", "l.v.lora_B.bias", "l.q.lora_A.weight"):
        assert part in text


def test_settings_that_disagree_with_what_trained_are_not_written():
    pair = LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0)
    cases = [
        (LoRAConfig(rank=1), {"q.bias": torch.ones(2)}),
        (LoRAConfig(rank=1, bias="lora_only"), {"n.bias": torch.ones(2)}),
        (LoRAConfig(rank=1, modules_to_save=["score"]), {}),
        (LoRAConfig(rank=1, modules_to_save=["head"]), {"score.weight": torch.ones(2)}),
    ]
    for config, trained in cases:
        with pytest.raises(AdapterError, match=r"settings do not say what it holds"):
            adapter_to_files(Adapter({"q": pair}, config, trained))


@pytest.mark.parametrize("path", ["", "a..b", "a\n", "x" * 300, "base_layer.q"])
def test_what_could_not_be_read_back_is_not_written(path):
    pair = LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0)
    with pytest.raises(AdapterError):
        adapter_to_files(Adapter({path: pair}, LoRAConfig(rank=1)))


def test_a_weight_that_is_not_finite_is_not_written():
    pair = LowRank(torch.ones(1, 2), torch.full((2, 1), float("nan")), 1.0)
    with pytest.raises(AdapterError, match=r"'base_model.model.q.lora_B.weight': 2 NaN"):
        adapter_to_files(Adapter({"q": pair}, LoRAConfig(rank=1)))


def test_a_folder_that_holds_no_adapter_says_what_it_holds(tmp_path):
    with pytest.raises(AdapterError, match=r"found nothing"):
        load_adapter(tmp_path / "none")
    with pytest.raises(AdapterError, match=r"adapter_config\.json: missing"):
        load_adapter(tmp_path)
    (tmp_path / CONFIG).write_bytes(files_of(small())[CONFIG])
    (tmp_path / "adapter_model.safetensor").write_bytes(b"")
    with pytest.raises(AdapterError, match=r"missing; nearest: 'adapter_model\.safetensor'"):
        load_adapter(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(AdapterError, match=r"a pickle can run any code, so it is not read"):
        load_adapter(tmp_path)
    (tmp_path / TENSORS).mkdir()
    with pytest.raises(AdapterError, match=r"not a regular file"):
        load_adapter(tmp_path)


def test_the_files_must_be_what_the_manifest_vouches_for(tmp_path):
    adapter = adapter_from_files(files_of(small()), "x")
    save_adapter(adapter, tmp_path / "a", card="# Card\n")
    (tmp_path / "a" / "README.md").write_text("edited by hand, as is fine")
    assert load_adapter(tmp_path / "a").digest == adapter.digest
    changed = files_of(small(l__q__lora_A__weight=torch.zeros(2, 3)))[TENSORS]
    (tmp_path / "a" / TENSORS).write_bytes(changed)
    with pytest.raises(DamagedArtefactError, match=r"adapter_model\.safetensors: expected SHA-256"):
        load_adapter(tmp_path / "a")
    (tmp_path / "a" / "MANIFEST.json").unlink()
    assert load_adapter(tmp_path / "a").digest != adapter.digest


def test_a_folder_that_exists_is_kept_unless_it_is_to_be_replaced(tmp_path):
    first, second = (adapter_from_files(files_of(small(), lora_alpha=alpha), "x") for alpha in (2, 4))
    save_adapter(first, tmp_path / "a")
    with pytest.raises(OutputError, match=r"exists already"):
        save_adapter(second, tmp_path / "a")
    assert load_adapter(tmp_path / "a").digest == first.digest
    save_adapter(second, tmp_path / "a", replace=True)
    assert load_adapter(tmp_path / "a").digest == second.digest


def test_the_notes_are_ours_and_peft_s_files_hold_nothing_of_them(tmp_path):
    metadata = AdapterMetadata("base", "FINGERPRINT", "r", "CAUSAL_LM", "chat", "TEMPLATE")
    pair = LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0)
    adapter = Adapter({"q": pair}, LoRAConfig(rank=1, alpha=1), metadata=metadata)
    save_adapter(adapter, tmp_path / "a")
    notes = read_manifest(tmp_path / "a").notes
    assert notes["digest"] == adapter.digest
    assert notes["metadata"] == {"base_fingerprint": "FINGERPRINT", "row_format": "chat", "template_digest": "TEMPLATE"}
    both = (tmp_path / "a" / CONFIG).read_bytes() + (tmp_path / "a" / TENSORS).read_bytes()
    assert b"FINGERPRINT" not in both
    assert b"TEMPLATE" not in both


@pytest.mark.parametrize(
    ("notes", "said"),
    [
        ({"digest": "0" * 64}, "expected digest 0000"),
        ({"digest": 1}, "as strings"),
        ({"metadata": []}, "as strings"),
        ({"metadata": {"base": "x"}}, "as strings"),
        ({"metadata": {"row_format": 1}}, "as strings"),
        ({"scalings": {"l.q": 1.0}}, "must be hexadecimal floats"),
        ({"scalings": ["l.q"]}, "must be hexadecimal floats"),
        ({"scalings": {"l.q": (5.0).hex()}}, "scaling 5.0 is not the configuration's 4.0"),
        ({"scalings": {"l.q": "nan"}}, "scaling nan is not the configuration's 4.0"),
    ],
)
def test_notes_that_disagree_with_the_files_are_refused(notes, said):
    with pytest.raises((AdapterError, DamagedArtefactError)) as caught:
        adapter_from_files(files_of(small()), "folder", notes)
    assert said in str(caught.value)


def test_a_pattern_from_a_file_cannot_stop_the_reader():
    keys = {
        f"{PREFIX}{'a' * 60}.{side}.weight": value
        for side, value in zip(("lora_A", "lora_B"), small().values(), strict=True)
    }
    assert "can take for ever" in refused({**small(), **keys}, alpha_pattern={"(a+)+b": 2})
    hung = files_of({**small(), **keys}, target_modules="(a+)+b")  # kept, never run
    assert json.loads(hung[CONFIG])["target_modules"] == "(a+)+b"
    assert adapter_from_files(hung, "x").config.target_modules == "(a+)+b"
    assert adapter_to_files(adapter_from_files(hung, "x"))[TENSORS] == hung[TENSORS]


def test_linear_and_transposed_layers_in_one_adapter_are_refused_by_name(tmp_path):
    pair = LowRank(torch.ones(1, 2), torch.ones(3, 1), 1.0)
    both = {"head": pair, "h.0.c_attn": replace(pair, form="transposed")}
    with pytest.raises(AdapterError, match="cannot be written in PEFT's layout") as caught:
        save_adapter(Adapter(both, LoRAConfig(rank=1, alpha=1.0)), tmp_path / "a")
    assert caught.value.problems == (
        "head is linear and h.0.c_attn transposed (Conv1D); PEFT says one of them for all matrices",
    )
    assert not (tmp_path / "a").exists()


def test_what_is_no_folder_of_peft_is_told_with_what_to_do(tmp_path):
    (tmp_path / "tickets").mkdir()
    with pytest.raises(AdapterError, match=r"found nothing; nearest: .*tickets'"):
        load_adapter(tmp_path / "tickts")
    (tmp_path / "tickets" / "adapters.safetensors").write_bytes(b"")
    with pytest.raises(AdapterError, match="`veneer convert` reads other programs' files"):
        load_adapter(tmp_path / "tickets")
    with pytest.raises(AdapterError, match="found a file"):
        load_adapter(tmp_path / "tickets" / "adapters.safetensors")
    (tmp_path / "tickets" / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(AdapterError, match="--allow-pickle"):
        load_adapter(tmp_path / "tickets")
