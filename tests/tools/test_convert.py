"""Conversions: every pair of formats there and back, what is refused, and that nothing half-done is left."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from veneer.adapter import Adapter, LowRank, TokenRows
from veneer.config import LoRAConfig
from veneer.errors import AdapterError, OutputError
from veneer.files.foreign import settings_for
from veneer.files.format import Hints
from veneer.files.formats import FORMATS
from veneer.files.peft import load_adapter, save_adapter
from veneer.files.shards import Checkpoint, StoredTensor, read_checkpoint
from veneer.files.tensors import dump_tensors
from veneer.tools import convert as module
from veneer.tools.compare import compare_deltas
from veneer.tools.convert import LIMIT, convert, writable

GOLDEN = Path(__file__).parents[1] / "golden"
ADAPTERS = Path(__file__).parents[3] / "shared" / "data" / "adapters"
UNET = "mid_block.attentions.0.transformer_blocks.0.attn1"
LANGUAGE = "model.layers.0.self_attn"


@dataclass(frozen=True)
class Case:
    """What the tests know of a format: what it carries, the models that its names fit, what it must be told.

    `sizes` are (out, in) of the layers of its base, by name, where its files depend on one.
    """

    forms: tuple[str, ...] = ("linear",)
    models: tuple[str, ...] = (UNET, LANGUAGE)
    magnitudes: tuple[str, ...] = ("linear", "transposed", "conv")
    hints: Hints = field(default_factory=Hints)
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)


SIZES = {"q_proj": (8, 6), "k_proj": (4, 6), "v_proj": (4, 6)}
LLAMA = Checkpoint(
    Path("llama"),
    {
        f"{LANGUAGE}.{leaf}.weight": StoredTensor("model.safetensors", "F32", shape, 0, 4 * shape[0] * shape[1])
        for leaf, shape in SIZES.items()
    },
    {},
    {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 6,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "num_hidden_layers": 1,
        "vocab_size": 16,
    },
)
"""A base of one layer, for formats that need one."""

CASES: Mapping[str, Case] = {
    "peft": Case(
        ("linear", "transposed", "embedding", "conv", "experts"),
        magnitudes=("linear", "transposed", "embedding", "conv"),
    ),
    "kohya": Case(("linear", "transposed", "conv")),
    "diffusers": Case(("linear", "transposed", "conv"), (UNET,)),
    "mlx": Case(("linear", "embedding", "experts"), (LANGUAGE,)),
    "loralib": Case(("linear",), (LANGUAGE, UNET), (), Hints(alpha=8.0)),
    "torchtune": Case(("linear",), (LANGUAGE,), ("linear",), Hints(base=LLAMA, alpha=8.0), SIZES),
    "gguf": Case(("linear",), (LANGUAGE,), (), Hints(base=LLAMA), SIZES),
}
"""A row for each format that is written; a format without one fails the first test."""

PAIRS = [
    (one, other, model)
    for one, other in product(CASES, CASES)
    for model in CASES[one].models
    if model in CASES[other].models
]


def test_every_format_that_is_written_goes_through_the_round_trips():
    assert sorted(CASES) == sorted(writable())


@st.composite
def adapters(draw, forms, model, magnitudes, sizes):
    """An adapter of one to three modules, each of its own form, rank and scaling."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
    with_magnitudes, transposed = bool(magnitudes) and draw(st.booleans()), draw(st.booleans())
    forms = [form for form in forms if form in magnitudes] if with_magnitudes else forms
    # A matrix is a plain layer's or a Conv1D's, and one configuration says which for all.
    matrix = "transposed" if transposed and "transposed" in forms else "linear"
    modules = {}
    for leaf in draw(st.lists(st.sampled_from(["q_proj", "k_proj", "v_proj"]), min_size=1, max_size=3, unique=True)):
        others = [one for one in forms if one not in ("linear", "transposed", "experts")]
        form = draw(st.sampled_from([*others, matrix]))
        rank, out, inputs = (draw(st.integers(1, 6)) for _ in range(3))
        out, inputs = sizes.get(leaf, (out, inputs))
        kernel = draw(st.sampled_from([(1, 1), (3, 3), (3,), (2, 1, 2)])) if form == "conv" else ()
        A = torch.randn(rank, inputs, *kernel).to(dtype)
        B = torch.randn(out, rank, *(1,) * len(kernel)).to(dtype)
        scaling = draw(st.sampled_from([1.0, 2.0, 0.125, 1 / 3, 16 / 3**0.5, 1e-3]))
        magnitude = torch.rand(out).to(dtype) + 0.5 if with_magnitudes else None
        path = f"{model.partition('.')[0]}.embed_tokens" if form == "embedding" else f"{model}.{leaf}"
        modules[path] = LowRank(A, B, scaling, form, magnitude)
    if "experts" in forms and draw(st.booleans()):
        count, rank, out, inputs = (draw(st.integers(low, 4)) for low in (2, 1, 1, 1))
        A, B = torch.randn(count, rank, inputs).to(dtype), torch.randn(count, out, rank).to(dtype)
        modules[f"{model.rpartition('.')[0]}.mlp.experts.down_proj"] = LowRank(A, B, 0.5, "experts")
    return Adapter(modules, settings_for(modules))


def target(folder, name, which):
    """Where a format's file or folder is written."""
    return folder / f"{which}{Path(FORMATS[name].file or '').suffix}"


@pytest.mark.parametrize(("one", "other", "model"), PAIRS)
@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_there_and_back_the_deltas_are_the_same(one, other, model, data, tmp_path_factory):
    first, second = CASES[one], CASES[other]
    forms = [form for form in first.forms if form in second.forms]
    adapter = data.draw(
        adapters(
            forms,
            model,
            [form for form in first.magnitudes if form in second.magnitudes],
            dict(first.sizes) | dict(second.sizes),
        )
    )
    folder = tmp_path_factory.mktemp("there")
    save_adapter(adapter, folder / "start")
    convert(folder / "start", one, target(folder, one, "a"), hints=first.hints)
    names = [one.name for one in fields(Hints)]
    both = Hints(**{name: getattr(first.hints, name) or getattr(second.hints, name) for name in names})
    there = convert(target(folder, one, "a"), other, target(folder, other, "b"), hints=both)
    assert there.source == one
    assert there.proof.worst <= LIMIT
    back = convert(target(folder, other, "b"), "peft", folder / "end", hints=second.hints)
    assert back.source == other
    assert compare_deltas(adapter, load_adapter(folder / "end")).worst <= LIMIT


@pytest.mark.parametrize("name", [name for name in CASES if name != "peft"])
def test_what_a_format_cannot_carry_is_refused_and_nothing_is_left(name, tmp_path):
    pair = LowRank(torch.ones(1, 2), torch.ones(3, 1), 1.0)
    modules = {f"{CASES[name].models[0]}.q_proj": pair}
    rows = {"table": TokenRows((1,), torch.ones(1, 2))}
    config = settings_for(modules, saved=["head"]).model_copy(update={"token_rows": {"table": (1,)}})
    adapter = Adapter(modules, config, {"head.weight": torch.ones(2)}, tokens=rows)
    save_adapter(adapter, tmp_path / "start")
    with pytest.raises(AdapterError) as error:
        convert(tmp_path / "start", name, target(tmp_path, name, "a"), hints=CASES[name].hints)
    told = "\n".join(error.value.problems)
    assert "head" in told
    assert "table" in told
    assert [one.name for one in tmp_path.iterdir()] == ["start"]


def start(tmp_path, name="diffusers"):
    """A folder of PEFT's with one adapted layer, of a model that a format's names fit."""
    case = CASES[name]
    path = f"{case.models[0]}.{'to_q' if case.models[0] == UNET else 'q_proj'}"
    out, inputs = case.sizes.get("q_proj", (4, 3))
    modules = {path: LowRank(torch.randn(2, inputs), torch.randn(out, 2), 1.0)}
    save_adapter(Adapter(modules, settings_for(modules)), tmp_path / "start")
    return tmp_path / "start"


@pytest.mark.parametrize("name", list(CASES))
def test_a_writer_that_lies_is_found_out(name, tmp_path, monkeypatch):
    real = FORMATS[name]

    def lying(adapter, hints):
        modules = {path: replace(pair, lora_A=pair.lora_A * (1 + 1e-4)) for path, pair in adapter.modules.items()}
        return real.write(replace(adapter, modules=modules), hints)

    monkeypatch.setattr(module, "find_format", lambda one: replace(real, write=lying) if one == name else FORMATS[one])
    with pytest.raises(AdapterError, match=r"nothing was written\n  - .*(to_q|q_proj): 1\.0.e-04"):
        convert(start(tmp_path, name), name, target(tmp_path, name, "a"), source="peft", hints=CASES[name].hints)
    assert [one.name for one in tmp_path.iterdir()] == ["start"]


def test_what_cannot_be_read_again_is_not_left(tmp_path, monkeypatch):
    def broken(adapter, hints):
        return {FORMATS["kohya"].file: b"not safetensors at all"}

    row = replace(FORMATS["kohya"], write=broken)
    monkeypatch.setattr(module, "find_format", lambda one: row if one == "kohya" else FORMATS[one])
    with pytest.raises(AdapterError, match="could not be read again, so nothing is left"):
        convert(start(tmp_path), "kohya", tmp_path / "a.safetensors", source="peft")
    assert [one.name for one in tmp_path.iterdir()] == ["start"]


@pytest.mark.parametrize("name", list(CASES))
def test_what_is_there_stays_unless_it_may_go(name, tmp_path):
    source, out, hints = start(tmp_path, name), target(tmp_path, name, "a"), CASES[name].hints
    convert(source, name, out, hints=hints)
    before = out.stat().st_ino
    with pytest.raises(OutputError, match="exists already"):
        convert(source, name, out, hints=hints)
    assert out.stat().st_ino == before
    convert(source, name, out, overwrite=True, hints=hints)
    assert out.stat().st_ino != before


def test_a_name_that_does_not_fit_the_format_is_refused(tmp_path):
    source = start(tmp_path)
    with pytest.raises(OutputError, match=r"expected a name that ends in \.safetensors"):
        convert(source, "kohya", tmp_path / "a")
    (tmp_path / "b.safetensors").mkdir()
    with pytest.raises(OutputError, match="kohya is a file, and a folder is there"):
        convert(source, "kohya", tmp_path / "b.safetensors", overwrite=True)
    with pytest.raises(AdapterError, match="no such format; nearest: 'kohya'"):
        convert(source, "koya", tmp_path / "c.safetensors")
    with pytest.raises(AdapterError, match="use `veneer resize`"):
        convert(source, "kohya", tmp_path / "c.safetensors", rank=2)


def test_parents_are_made_and_the_component_is_found(tmp_path):
    done = convert(start(tmp_path), "diffusers", tmp_path / "deep" / "er" / "a.safetensors")
    assert done.notes == ("component: unet, by its paths",)
    assert all(key.startswith("unet.") for key in load_file(done.out))


def several(tmp_path):
    pair = LowRank(torch.randn(2, 3), torch.randn(4, 2), 1.0)
    modules = {f"unet.{UNET}.to_q": pair, "text_encoder.text_model.encoder.layers.0.mlp.fc1": pair}
    path = tmp_path / "both.safetensors"
    path.write_bytes(
        b"".join(FORMATS["kohya"].write(Adapter(modules, settings_for(modules)), Hints())["lora.safetensors"])
    )
    return path


def test_of_several_components_one_must_be_named_for_one_model(tmp_path):
    path = several(tmp_path)
    with pytest.raises(AdapterError, match="holds parts of text_encoder, unet, and peft holds one model"):
        convert(path, "peft", tmp_path / "a")
    done = convert(path, "peft", tmp_path / "a", hints=Hints(component="unet"))
    assert list(done.adapter.modules) == [f"{UNET}.to_q"]
    both = convert(path, "diffusers", tmp_path / "b.safetensors")
    assert len(both.adapter.modules) == 2
    one = convert(tmp_path / "b.safetensors", "peft", tmp_path / "c", hints=Hints(component="text_encoder"))
    assert list(one.adapter.modules) == ["text_model.encoder.layers.0.mlp.fc1"]


def test_of_one_component_the_paths_are_those_of_its_model(tmp_path):
    convert(start(tmp_path), "kohya", tmp_path / "a.safetensors")
    done = convert(tmp_path / "a.safetensors", "peft", tmp_path / "b")
    assert list(done.adapter.modules) == [f"{UNET}.to_q"]
    assert done.notes == ("component: unet, the only one; its paths are those of that model",)


def test_a_scaling_that_is_not_positive_is_folded_in(tmp_path):
    tensors = {f"lora_unet_{UNET.replace('.', '_')}_to_q.{leaf}": one for leaf, one in (
        ("lora_down.weight", torch.ones(1, 2)), ("lora_up.weight", torch.ones(3, 1)), ("alpha", torch.tensor(-2.0)),
    )}  # fmt: skip
    from_kohya = tmp_path / "a.safetensors"
    from_kohya.write_bytes(dump_tensors(tensors))
    done = convert(from_kohya, "peft", tmp_path / "b")
    assert any("folded into lora_B" in note for note in done.notes)
    torch.testing.assert_close(
        load_adapter(tmp_path / "b").modules[f"{UNET}.to_q"].delta(), -2 * torch.ones(3, 2).double()
    )


@pytest.mark.parametrize("rank", [None, 1])
def test_other_methods_become_lora_with_the_measured_error(rank, tmp_path):
    path = tmp_path / "loha.safetensors"
    tensors = {key: one for key, one in load_file(GOLDEN / "lycoris_loha.safetensors").items() if "self_attn" in key}
    path.write_bytes(dump_tensors(tensors))
    with pytest.raises(AdapterError, match=r"is loha, which only its own format carries.*--to lora"):
        convert(path, "kohya", tmp_path / "a.safetensors")
    done = convert(path, "lora", tmp_path / "b", rank=rank)
    assert (done.source, done.target) == ("kohya", "peft")
    assert done.proof.worst <= LIMIT
    worst = max(done.made.values())
    assert worst < 1e-6 if rank is None else worst > 0.1
    expected = load_file(GOLDEN / "lycoris_expected.safetensors")
    for name, pair in load_adapter(tmp_path / "b").modules.items():
        delta = (expected[f"loha/{name}.weight"] - expected[f"base/{name}.weight"]).double()
        error = torch.linalg.vector_norm(pair.delta() - delta) / torch.linalg.vector_norm(delta)
        assert error == pytest.approx(done.made[name], abs=1e-6)


def test_a_pickle_is_not_opened_without_the_word(tmp_path, monkeypatch):
    row = replace(FORMATS["peft"], name="pickle", is_pickle=True)
    monkeypatch.setattr(module, "find_format", lambda one: row if one == "pickle" else FORMATS[one])
    with pytest.raises(AdapterError, match="--allow-pickle"):
        convert(start(tmp_path), "kohya", tmp_path / "a.safetensors", source="pickle")
    convert(start(tmp_path / "x"), "kohya", tmp_path / "a.safetensors", source="pickle", allow_pickle=True)


def test_an_activated_adapter_is_peft_s_alone(tmp_path):
    pair = LowRank(torch.ones(1, 2), torch.ones(3, 1), 1.0)
    config = LoRAConfig(rank=1, alpha=1.0, target_modules=("q_proj",), invocation_tokens=(5, 6))
    save_adapter(Adapter({f"{LANGUAGE}.q_proj": pair}, config), tmp_path / "start")
    with pytest.raises(AdapterError, match="activated LoRA"):
        convert(tmp_path / "start", "kohya", tmp_path / "a.safetensors")


REAL = [
    ("sd-pokemon-wellCh4n", 128),
    ("sd-timohavdk", 128),
    ("sd15-unet-difusor-peft", 64),
    ("gpt2-lazyy", 12),
    ("gemma3-270m-zouhe0", 72),
    ("justbautista-emotion", 44),
    ("opencalm1b-r1-f16", 24),
    ("smollm2-random-r4", 120),
]


@pytest.mark.skipif(not ADAPTERS.is_dir(), reason="the real adapters of ../shared/data are not here")
@pytest.mark.parametrize(("name", "count"), REAL)
def test_real_adapters_there_and_back(name, count, tmp_path):
    first = convert(ADAPTERS / name, "peft", tmp_path / "start")
    assert len(first.adapter.modules) == count
    for other in ("kohya", "diffusers"):
        if other == "diffusers" and not (name.startswith("sd")):
            continue
        there = convert(ADAPTERS / name, other, target(tmp_path, other, other))
        back = convert(there.out, "peft", tmp_path / f"{other}-back")
        assert max(first.proof.worst, there.proof.worst, back.proof.worst) <= LIMIT
        assert compare_deltas(first.adapter, load_adapter(back.out)).worst <= LIMIT


@pytest.mark.skipif(not ADAPTERS.is_dir(), reason="the real adapters of ../shared/data are not here")
@pytest.mark.parametrize("name", ["age-whyiswmm", "distilbert-imdb"])
def test_real_heads_are_refused_by_name(name, tmp_path):
    with pytest.raises(AdapterError, match=r"classifier\.weight: trained whole"):
        convert(ADAPTERS / name, "kohya", tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_dora_becomes_lora_on_the_weights_of_a_base(tmp_path):
    """Of full rank it does what the magnitudes do, under whatever first names the base's files have."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 5, generator=draw)
    pair = LowRank(torch.randn(2, 5, generator=draw), torch.randn(6, 2, generator=draw), 1.0, magnitude=torch.rand(6))
    plain = replace(pair, magnitude=None)
    paths = f"{LANGUAGE}.q_proj", f"{LANGUAGE}.v_proj"
    config = LoRAConfig(rank=2, alpha=2, use_dora=True, target_modules=["q_proj", "v_proj"])
    dora = Adapter(dict.fromkeys(paths, pair), config)
    save_adapter(dora, tmp_path / "dora")
    (tmp_path / "base").mkdir()
    stored = {path.removeprefix("model.") + ".weight": weight for path in paths}
    (tmp_path / "base" / "model.safetensors").write_bytes(dump_tensors(stored))
    hints = Hints(base=read_checkpoint(tmp_path / "base"))
    done = convert(tmp_path / "dora", "lora", tmp_path / "lora", hints=hints, rank=5)
    total = weight.double() + plain.delta()
    meant = total * (pair.magnitude.double() / total.norm(dim=1))[:, None] - weight.double()
    for path in paths:
        torch.testing.assert_close(load_adapter(tmp_path / "lora").modules[path].delta(), meant, rtol=1e-5, atol=1e-6)
    assert max(done.made.values()) < 1e-6
    smaller = convert(tmp_path / "dora", "lora", tmp_path / "smaller", hints=hints, rank=1)
    assert all(0.01 < error < 1 for error in smaller.made.values())
    for lacking in ({"hints": hints}, {"rank": 4}):
        with pytest.raises(AdapterError, match=r"DoRA.* in 2 modules.*give --base DIR and --rank N"):
            convert(tmp_path / "dora", "lora", tmp_path / "no", **lacking)
    assert not (tmp_path / "no").exists()
