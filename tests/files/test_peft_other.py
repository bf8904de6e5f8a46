"""Adapters of PEFT's other methods, against PEFT itself: the same updates, and nothing else taken."""

import json
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import AdaLoraConfig, LoHaConfig, PeftModel, VeraConfig, get_peft_model
from peft.tuners.lokr.layer import factorization as peft_factorization
from tests.peft_methods import CONVOLUTIONS, LINEAR, Convolutions, deltas, net, randomized, saved, shapes

from veneer.errors import AdapterError
from veneer.files.peft_folder import CONFIG, TENSORS
from veneer.files.peft_lokr import LOKR, factorization
from veneer.files.peft_method import ModuleUpdate
from veneer.files.peft_other import METHODS, read_other
from veneer.files.strict_json import dump_json
from veneer.files.tensors import dump_tensors, parse_tensors
from veneer.ops.low_rank import balanced, khatri_rao, svd, svd_of_product

PREFIX = "base_model.model."


def relative(one, other):
    return (torch.linalg.vector_norm(one - other) / torch.linalg.vector_norm(other).clamp_min(1e-30)).item()


def changed(folder, config=(), tensors=(), without=()):
    """Change a saved adapter's files by hand."""
    path = folder / CONFIG
    path.write_bytes(dump_json(json.loads(path.read_text()) | dict(config)))
    path = folder / TENSORS
    found = parse_tensors(path.read_bytes(), "test") | dict(tensors)
    path.write_bytes(dump_tensors({key: one for key, one in found.items() if key not in without}))


def refusal(folder, **options):
    with pytest.raises(AdapterError) as caught:
        read_other(folder, **options)
    return str(caught.value)


@pytest.mark.parametrize("name", LINEAR)
def test_linear_updates_are_those_of_peft(tmp_path, name):
    model = saved(LINEAR[name], tmp_path)
    other = read_other(tmp_path, shapes=shapes())
    expected = deltas(model)
    assert set(other.modules) == set(expected)
    assert other.method == name.split()[0].rstrip(",")
    for path, update in other.modules.items():
        if name == "adalora, pruned":
            continue  # the model still has what the file has not: see the test of masks
        assert update.delta().shape == expected[path].shape == update.shape
        assert relative(update.delta(), expected[path]) < 1e-6, path
        factors = update.factors()
        if factors is not None:
            assert relative(factors.B_OR @ factors.A_RI, update.delta()) < 1e-12
            assert factors.dropped == 0


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_updates_of_convolutions_are_those_of_peft(tmp_path, name):
    expected = deltas(saved(CONVOLUTIONS[name], tmp_path, Convolutions))
    other, bare = read_other(tmp_path, shapes=shapes(Convolutions)), read_other(tmp_path)
    assert set(other.modules) == set(expected)
    for path, update in other.modules.items():
        assert relative(update.delta(), expected[path]) < 1e-6, path
        assert update.delta().shape == expected[path].shape
        assert relative(bare.modules[path].delta().reshape(update.shape), expected[path]) < 1e-6, path
        factors = update.factors()
        if factors is not None:
            assert relative((factors.B_OR @ factors.A_RI).reshape(update.shape), expected[path]) < 1e-6


def test_masks_of_adalora_mean_what_peft_makes_of_them(tmp_path):
    saved(LINEAR["adalora, pruned"], tmp_path)
    with pytest.warns(RuntimeWarning, match="keys did not match any targeted module"):  # a false alarm of PEFT's
        expected = deltas(PeftModel.from_pretrained(net(), str(tmp_path)))
    other = read_other(tmp_path)
    ranks = {path: update.parts["lora_A"].shape[0] for path, update in other.modules.items()}
    assert ranks == {"layers.0.q": 2, "layers.0.v": 4, "layers.1.q": 0, "layers.1.v": 4}
    for path, update in other.modules.items():
        assert relative(update.delta(), expected[path]) < 1e-6, path
    assert not other.modules["layers.1.q"].delta().any()
    assert other.config.bias == "lora_only"
    assert set(other.trained) == {"layers.0.q.bias", "layers.1.q.bias"}


def test_a_schedule_that_prunes_writes_masks_that_are_read(tmp_path):
    model = get_peft_model(net(), AdaLoraConfig(init_r=4, target_r=1, target_modules=["q"], total_step=3, tfinal=1))
    randomized(model)
    model(torch.randn(2, 6)).square().sum().backward()
    model.base_model.update_and_allocate(1)
    model.base_model.update_and_allocate(2)
    with pytest.warns(UserWarning, match="invalid shape"):  # a false alarm: the rank of one layer is nothing now
        model.save_pretrained(tmp_path)
    other, expected = read_other(tmp_path), deltas(model)
    assert sum(update.factors().rank for update in other.modules.values()) == 2
    for path, update in other.modules.items():
        assert relative(update.delta(), expected[path]) < 1e-6


def test_projections_are_drawn_again_where_the_shapes_are_known(tmp_path):
    with pytest.warns(UserWarning, match="PRNG key"):
        config = VeraConfig(r=3, target_modules=["q", "v"], save_projection=False, projection_prng_key=11)
    model = saved(config, tmp_path)
    other, expected = read_other(tmp_path, shapes=shapes()), deltas(model)
    A = model.base_model.vera_A["default"]
    assert torch.equal(other.modules["layers.0.v"].parts["vera_A"], A)
    for path, update in other.modules.items():
        assert relative(update.delta(), expected[path]) < 1e-6
    assert "save_projection=True" in refusal(tmp_path)


def test_vera_asks_for_shapes_where_the_file_does_not_tell(tmp_path):
    saved(LINEAR["vera"], tmp_path / "many")
    assert "how wide the inputs of its 6 layers are" in refusal(tmp_path / "many")
    model = saved(VeraConfig(r=3, target_modules=["layers.1.k"]), tmp_path / "one")
    other, expected = read_other(tmp_path / "one"), deltas(model)
    assert relative(other.modules["layers.1.k"].delta(), expected["layers.1.k"]) < 1e-6
    wrong = {"layers.1.k": (12, 7)}
    assert "vera_A: expected shape (3, 7)" in refusal(tmp_path / "one", shapes=wrong)


def test_what_trained_whole_and_what_it_was_made_for_are_kept(tmp_path):
    config = LoHaConfig(
        r=1, target_modules=["k"], modules_to_save=["score"], base_model_name_or_path="org/base", revision="abc"
    )
    model = saved(config, tmp_path)
    changed(tmp_path, {"base_model_name_or_path": "org/base"})
    other = read_other(tmp_path)
    assert set(other.trained) == {"score.weight", "score.bias"}
    score = model.base_model.model.score.modules_to_save["default"]
    assert torch.equal(other.trained["score.weight"], score.weight)
    assert (other.metadata.base, other.metadata.revision) == ("org/base", "abc")
    assert other.config.modules_to_save == ("score",)
    assert other.settings["r"] == 1


STRICT = {
    "unknown key": ("loha", {"config": {"use_scalar": True}}, "use_scalar: with LoHa, a value here has no meaning"),
    "near key": ("loha", {"config": {"module_dropot": 0.1}}, "nearest: 'module_dropout'"),
    "rank of another type": ("loha", {"config": {"r": "2"}}, "r: expected a whole number"),
    "giant rank": ("loha", {"config": {"r": 10**9}}, "r: expected a whole number from 1 to"),
    "rank of another file": ("loha", {"config": {"r": 4}}, "hada_w1_a: expected shape (out, r=4), got (8, 2)"),
    "alpha": ("lokr", {"config": {"alpha": 0}}, "alpha: expected a positive, finite number"),
    "cut": ("lokr", {"config": {"decompose_factor": 4}}, "layers.0.q: is cut into 2 rows of blocks"),
    "cut, type": ("lokr", {"config": {"decompose_factor": 2.0}}, "decompose_factor: expected a whole number"),
    "both": ("lokr", {"config": {"decompose_both": True, "r": 1}}, "w1 is full, not as decompose_both=True says"),
    "w2": ("lokr of full halves", {"config": {"r": 1}}, "w2 is full, which rank 1 does not give"),
    "slow pattern": ("loha", {"config": {"rank_pattern": {"(a+)+$": 1}}}, "a group that repeats"),
    "transposed": ("vera", {"config": {"fan_in_fan_out": True}}, "weights stored transposed (Conv1D)"),
    "bias": ("vera", {"config": {"bias": "lora_only"}}, "expected one of 'none', 'all', 'vera_only'"),
    "key": ("vera", {"config": {"projection_prng_key": 2**70}}, "projection_prng_key: expected a 64-bit"),
    "no projection": ("vera", {"without": ["base_model.vera_A"]}, "'base_model.vera_A': missing"),
    "unsaid projection": ("vera", {"config": {"save_projection": False}}, "PEFT would not use them"),
    "narrow projection": ("vera", {"tensors": {"base_model.vera_A": torch.ones(3, 11)}}, "expected shape (3, 12)"),
    "flat projection": ("vera", {"tensors": {"base_model.vera_B": torch.ones(3)}}, "vera_B: expected a matrix"),
    "long vector": (
        "vera",
        {"tensors": {PREFIX + "layers.0.q.vera_lambda_d": torch.ones(4)}},
        "vera_lambda_d: expected shape (r=3), got (4,)",
    ),
    "half of a module": ("vera", {"without": [PREFIX + "layers.0.q.vera_lambda_b"]}, "q: vera_lambda_b is missing"),
    "dora": ("adalora", {"config": {"use_dora": True}}, "use_dora: with AdaLoRA, a value here has no meaning"),
    "mask, type": ("adalora", {"config": {"rank_pattern": {"layers.0.q.lora_E": [1, 0]}}}, "a list of booleans"),
    "mask, length": ("adalora", {"config": {"rank_pattern": {"layers.0.q.lora_E": [True]}}}, "expected 4 booleans"),
    "mask, module": ("adalora", {"config": {"rank_pattern": {"layers.0.z.lora_E": [True] * 4}}}, "no such module"),
    "mask, key": ("adalora", {"config": {"rank_pattern": {"layers.0.q": [True] * 4}}}, "the path of a module and"),
    "mask, rank": (
        "adalora",
        {"config": {"rank_pattern": {"layers.0.q.lora_E": [True] * 3 + [False]}}},
        "layers.0.q: lora_A: expected shape (r=3, in), got (4, 6)",
    ),
    "alpha 0 and masks": (
        "adalora, pruned",
        {"config": {"lora_alpha": 0}},
        "PEFT trains with init_r and loads with the pruned rank",
    ),
    "missing tensor": ("loha", {"without": [PREFIX + "layers.0.q.hada_w2_a"]}, "layers.0.q: hada_w2_a is missing"),
    "extra tensor": ("lokr", {"tensors": {PREFIX + "layers.0.q.lokr_w2": torch.ones(4, 3)}}, "cannot stand beside"),
    "tensor of another method": (
        "loha",
        {"tensors": {PREFIX + "layers.0.q.lora_E": torch.ones(4, 1)}},
        "not a tensor that LoHa has",
    ),
    "misspelt tensor": (
        "loha",
        {"tensors": {PREFIX + "z.hada_w1_c": torch.ones(2, 2)}},
        "nearest: 'hada_w1_b', 'hada_w1_a'",
    ),
    "stray tensor": ("lokr", {"tensors": {PREFIX + "norm.weight": torch.ones(2)}}, "trained whole, but neither"),
    "no prefix": ("lokr", {"tensors": {"layers.0.q.lokr_w1": torch.ones(2, 2)}}, "not a tensor that LoKr has"),
    "twice": ("lokr", {"tensors": {PREFIX + "layers.0.q.lokr_w1.default": torch.ones(2, 2)}}, "'.default'"),
    "wrong shape": ("loha", {"tensors": {PREFIX + "layers.0.q.hada_w2_b": torch.ones(2, 5)}}, "got (2, 5)"),
    "wrong dimensions": ("loha", {"tensors": {PREFIX + "layers.0.q.hada_w2_b": torch.ones(2)}}, "got (2,)"),
    "gathered not": ("loha", {"tensors": {PREFIX + "layers.0.q.hada_w2_b": torch.ones(0)}}, "sharded weights"),
    "integers": (
        "loha",
        {"tensors": {PREFIX + "layers.0.q.hada_w2_b": torch.ones(2, 6, dtype=torch.int32)}},
        "expected floating numbers, got torch.int32",
    ),
    "not a number": ("loha", {"tensors": {PREFIX + "layers.0.q.hada_w2_b": torch.full((2, 6), torch.nan)}}, "12 NaN"),
    "method": ("loha", {"config": {"peft_type": "LOHAA"}}, "expected peft_type 'LOHA', 'LOKR', 'VERA', 'ADALORA'"),
    "lora": ("loha", {"config": {"peft_type": "LORA"}}, "LoRA is read by load_adapter"),
    "other method's file": ("lokr", {"config": {"peft_type": "LOHA"}}, "decompose_factor: with LoHa"),
    "no targets": ("loha", {"config": {"target_modules": None}}, "target_modules: expected suffixes"),
}


@pytest.mark.parametrize("name", STRICT)
def test_what_is_not_understood_is_refused_by_name(tmp_path, name):
    case, change, message = STRICT[name]
    saved(LINEAR[case], tmp_path)
    known = shapes()
    assert read_other(tmp_path, shapes=known).modules
    changed(tmp_path, **change)
    assert message in refusal(tmp_path, shapes=known)


def test_effective_convolutions_need_the_setting_that_makes_them(tmp_path):
    for name in ("loha", "lokr"):
        saved(CONVOLUTIONS[f"{name}, effective"], tmp_path / name, Convolutions)
        changed(tmp_path / name, {"use_effective_conv2d": False})
        assert "which use_effective_conv2d=False has not" in refusal(tmp_path / name)


def test_the_base_has_the_last_word_on_shapes(tmp_path):
    saved(LINEAR["loha"], tmp_path)
    known = shapes()
    assert "`shapes` has no such module" in refusal(tmp_path, shapes={})
    assert "layers.0.q: expected an update for the base's weight of shape (8, 7)" in refusal(
        tmp_path, shapes=known | {"layers.0.q": (8, 7)}
    )


def test_folders_that_hold_no_adapter_are_refused(tmp_path):
    assert "found nothing" in refusal(tmp_path / "nowhere")
    assert "adapter_config.json: missing" in refusal(tmp_path)
    saved(LINEAR["loha"], tmp_path)
    changed(tmp_path, without=list(parse_tensors((tmp_path / TENSORS).read_bytes(), "test")))
    assert "it holds none" in refusal(tmp_path)
    (tmp_path / TENSORS).write_bytes(b"")
    assert "8-byte length" in refusal(tmp_path)
    (tmp_path / TENSORS).unlink()
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps({}))
    assert "a pickle can run any code" in refusal(tmp_path)
    (tmp_path / CONFIG).write_bytes(b"[]")
    (tmp_path / TENSORS).write_bytes(dump_tensors({"x": torch.ones(1)}))
    assert "expected a JSON object" in refusal(tmp_path)
    assert "longer than the limit" in refusal(tmp_path, max_bytes=1)


def test_small_files_do_not_stand_for_huge_updates(tmp_path):
    size = 1 << 9
    config = {"peft_type": "LOKR", "target_modules": ["q"], "r": 1 << 9, "decompose_factor": size}
    (tmp_path / CONFIG).write_bytes(dump_json(config))
    halves = {f"{PREFIX}q.lokr_w{which}": torch.ones(size, size) for which in (1, 2)}
    (tmp_path / TENSORS).write_bytes(dump_tensors(halves))
    assert "at most 4294967296 values are read" in refusal(tmp_path)
    vera = {"peft_type": "VERA", "target_modules": ["q"], "r": 32768, "save_projection": False}
    (tmp_path / CONFIG).write_bytes(dump_json(vera))
    vectors = {f"{PREFIX}q.vera_lambda_b": torch.ones(70_000), f"{PREFIX}q.vera_lambda_d": torch.ones(32768)}
    (tmp_path / TENSORS).write_bytes(dump_tensors(vectors))
    with pytest.raises(AdapterError, match="hold 2294") as caught:
        read_other(tmp_path, shapes={"q": (70_000, 8)})
    assert caught.value


ODD = (
    None,
    True,
    -1,
    0,
    3,
    2**40,
    0.5,
    "x",
    "none",
    [],
    ["q"],
    [True],
    {},
    {"q": 2},
    {"q": None},
    {"layers.0.q.lora_E": []},
)
SHAPES = ((), (0,), (1,), (0, 2), (2, 2), (1, 1, 1), (2, 2, 3, 1))


@pytest.mark.parametrize("name", ["loha", "lokr", "vera", "adalora"])
def test_whatever_stands_in_a_file_it_is_read_or_our_error(tmp_path, name):
    saved(LINEAR[name], tmp_path)
    config, tensors, known = tmp_path / CONFIG, tmp_path / TENSORS, shapes()
    raw, whole, refused = json.loads(config.read_text()), parse_tensors(tensors.read_bytes(), "test"), 0
    for key in raw:
        for value in ODD:
            config.write_bytes(dump_json(raw | {key: value}))
            refused += attempt(tmp_path, known)
    config.write_bytes(dump_json(raw))
    for key in list(whole)[:4] + list(whole)[-4:]:
        for shape in SHAPES:
            tensors.write_bytes(dump_tensors(whole | {key: torch.ones(shape)}))
            refused += attempt(tmp_path, known if sum(shape) else None)
    assert refused > 50


def attempt(folder, known):
    try:
        for update in read_other(folder, shapes=known).modules.values():
            assert update.delta().shape == update.shape
            update.factors(1)
    except AdapterError:
        return 1
    return 0


def test_every_method_names_what_it_is():
    for name, method in METHODS.items():
        assert method.name.upper() == name
        assert set(method.tensors).isdisjoint(method.shared)
        assert set(method.keys).isdisjoint(method.ignored)


@given(st.integers(1, 400), st.sampled_from([-1, 0, 1, 2, 3, 4, 5, 8, 16, 400]))
def test_dimensions_are_cut_as_peft_cuts_them(size, factor):
    assert factorization(size, factor) == peft_factorization(size, factor)


def draw(seed, *shapes_):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes_]


sizes = st.integers(1, 6)


@given(sizes, sizes, st.integers(1, 3), st.integers(1, 3), st.integers(0, 999))
def test_an_elementwise_product_of_products_is_a_product(outputs, inputs, r, s, seed):
    B1, A1, B2, A2 = draw(seed, (outputs, r), (r, inputs), (outputs, s), (s, inputs))
    B, A = khatri_rao(B1, A1, B2, A2)
    assert B.shape == (outputs, r * s)
    assert torch.allclose(B @ A, (B1 @ A1) * (B2 @ A2), rtol=1e-10, atol=1e-12)


@given(sizes, sizes, sizes, sizes, st.integers(1, 3), st.integers(1, 9), st.integers(0, 999))
def test_factors_of_a_kronecker_product_are_the_best(a, c, b, d, rank, most, seed):
    w1, w2_a, w2_b = draw(seed, (a, c), (b, rank), (rank, d))
    update = ModuleUpdate(LOKR, {"lokr_w1": w1, "lokr_w2_a": w2_a, "lokr_w2_b": w2_b}, 0.5, (a * b, c * d))
    whole = update.factors()
    assert whole.rank <= min(a, c) * rank
    assert torch.allclose(whole.B_OR @ whole.A_RI, update.delta(), rtol=1e-9, atol=1e-10)
    found, values = update.factors(most), torch.linalg.svdvals(update.delta())
    assert found.rank <= most
    lost = torch.linalg.vector_norm(found.B_OR @ found.A_RI - update.delta()).item()
    assert lost == pytest.approx(torch.linalg.vector_norm(values[most:]).item(), rel=1e-7, abs=1e-9)
    assert found.dropped == pytest.approx(lost, rel=1e-7, abs=1e-9)


@given(sizes, sizes, st.integers(1, 8), st.integers(0, 999))
def test_the_singular_values_of_a_product_need_no_product(outputs, inputs, rank, seed):
    B, A = draw(seed, (outputs, rank), (rank, inputs))
    U, S, V = svd_of_product(B, A)
    dense = svd(B @ A)[1]
    assert torch.allclose(S, dense[: len(S)], rtol=1e-9, atol=1e-12)
    assert torch.allclose(U * S @ V, B @ A, rtol=1e-9, atol=1e-11)
    half = balanced(U, S, V, 1)
    assert half.dropped == pytest.approx(torch.linalg.vector_norm(dense[1:]).item(), rel=1e-9, abs=1e-12)


def test_values_outside_the_range_of_numbers_are_our_error():
    for call in (
        lambda: svd(torch.full((2, 2), torch.inf)),
        lambda: svd_of_product(*[torch.full((2, 2), torch.nan)] * 2),
    ):
        with pytest.raises(AdapterError, match="not finite"):
            call()
    assert svd(torch.zeros(3, 2))[1].numel() == 0
