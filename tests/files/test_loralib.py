"""State dicts of loralib and minLoRA: loralib's own files, round trips, and everything that is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors.torch import load_file
from tests.files.drawn import adapters, error_between, pair_of
from tests.files.test_translate import base_of

from veneer.errors import AdapterError
from veneer.files.foreign import foreign_adapter
from veneer.files.format import Hints, Sight
from veneer.files.loralib import (
    FILE,
    FORMAT,
    PICKLE,
    adapter_from_loralib,
    read_loralib,
    read_loralib_pickle,
    write_loralib,
)
from veneer.files.shards import read_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden" / "loralib"
LAYERS = {
    "layers.0.q_proj": {"sizes": (4, 5)},
    "layers.0.up_proj": {"sizes": (6, 3)},
    "embed_tokens": {"form": "embedding", "sizes": (4, 7)},
    "layers.0.conv": {"form": "conv", "sizes": (4, 3)},
    "layers.1.conv": {"form": "conv", "sizes": (2, 5), "kernel": 1},
}
BASE = base_of(
    {
        "layers.0.q_proj.weight": (4, 5), "layers.0.up_proj.weight": (6, 3), "embed_tokens.weight": (7, 4),
        "layers.0.conv.weight": (4, 3, 3, 3), "layers.1.conv.weight": (2, 5, 1, 1),
    }
)  # fmt: skip


def test_what_loralib_wrote_is_read_as_it_merges_it():
    hints = Hints(base=read_checkpoint(GOLDEN / "base"), alpha=8)
    adapter = read_loralib_pickle(GOLDEN / "lora.pt", replace(hints, enabled=(True, False, True)))
    expected = load_file(GOLDEN / "expected.safetensors")
    assert {f"{path}.weight" for path in adapter.modules} == set(expected)
    for path, pair in adapter.modules.items():
        assert torch.allclose(pair.delta().float(), expected[f"{path}.weight"], rtol=1e-5, atol=1e-5), path
    assert {path: pair.rank for path, pair in adapter.modules.items()} == {
        "conv": 18, "embed_tokens": 2, "proj": 2, "qkv": 6, "qv": 4,
    }  # fmt: skip
    assert adapter.config.bias == "lora_only"
    assert set(adapter.trained) == {"conv.bias", "proj.bias", "qkv.bias", "qv.bias"}


def test_which_parts_of_a_fused_layer_is_asked_for():
    hints = Hints(base=read_checkpoint(GOLDEN / "base"), alpha=8)
    with pytest.raises(AdapterError, match=r"qv: its 2 parts .* --enabled yes,no,yes"):
        read_loralib_pickle(GOLDEN / "lora.pt", hints)
    with pytest.raises(AdapterError, match="qkv: 3 parts of a fused layer"):
        read_loralib_pickle(GOLDEN / "lora.pt", Hints(alpha=8))


def test_without_alpha_nothing_is_guessed(tmp_path):
    with pytest.raises(AdapterError, match=r"stores no alpha.*--alpha"):
        read_loralib_pickle(GOLDEN / "lora.pt")
    with pytest.raises(AdapterError, match="stores no alpha"):
        write_loralib(foreign_adapter({"q": pair_of(4, 5, 2, 0.5, 0)}))
    with pytest.raises(AdapterError, match="positive and finite"):
        read_loralib_pickle(GOLDEN / "lora.pt", Hints(alpha=-1))
    with pytest.raises(AdapterError, match="--from loralib-pt"):
        read_loralib(GOLDEN / "lora.pt", Hints(alpha=8))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(adapter=adapters(LAYERS))
def test_round_trip(adapter, tmp_path):
    hints = Hints(base=BASE, alpha=24.0)
    (tmp_path / FILE).write_bytes(write_loralib(adapter, hints)[FILE])
    assert error_between(read_loralib(tmp_path / FILE, hints), adapter) < 1e-6


def test_biases_go_along(tmp_path):
    adapter = foreign_adapter(
        {"a": pair_of(4, 5, 2, 0.5, 0), "conv": pair_of(4, 3, 2, 0.5, 0, form="conv")},
        trained={"a.bias": torch.ones(4), "conv.bias": torch.ones(4), "c.bias": torch.ones(2)},
    )
    hints = Hints(alpha=1, base=base_of({"a.weight": (4, 5), "conv.weight": (4, 3, 3, 3)}))
    (tmp_path / FILE).write_bytes(write_loralib(adapter, hints)[FILE])
    again = read_loralib(tmp_path / FILE, hints)
    assert set(again.trained) == {"a.bias", "conv.bias", "c.bias"}
    assert again.config.bias == "all"


def minimal(path: str, A: torch.Tensor, B: torch.Tensor) -> dict[str, torch.Tensor]:
    key = f"{path}.parametrizations.weight.0"
    return {f"{key}.lora_A": A, f"{key}.lora_B": B, f"{key}.lora_dropout_mask": torch.ones(1, A.shape[1])}


def test_minlora_is_read_by_its_own_shapes():
    A, B = torch.randn(2, 27), torch.randn(4, 2)
    tensors = minimal("lin", torch.randn(2, 5), torch.randn(4, 2)) | minimal(
        "emb", torch.randn(9, 2), torch.randn(2, 3)
    )
    base = base_of({"lin.weight": (4, 5), "emb.weight": (9, 3), "conv.weight": (4, 3, 3, 3)})
    adapter = adapter_from_loralib(tensors | minimal("conv", A, B), Hints(alpha=3, base=base), "a")
    assert {path: pair.form for path, pair in adapter.modules.items()} == {
        "conv": "conv", "emb": "embedding", "lin": "linear",
    }  # fmt: skip
    assert torch.allclose(adapter.modules["conv"].delta(), 1.5 * (B.double() @ A.double()).view(4, 3, 3, 3))
    emb = tensors["emb.parametrizations.weight.0.lora_A"] @ tensors["emb.parametrizations.weight.0.lora_B"]
    assert torch.allclose(adapter.modules["emb"].delta().float(), 1.5 * emb, rtol=1e-5)


HOSTILE = [
    ({"q.lora_A": torch.ones(2, 3)}, "lora_A without the other factor"),
    ({"q.lora_A": torch.ones(2, 3), "q.lora_B": torch.ones(4, 0)}, "none of them empty"),
    ({"q.lora_A": torch.ones(2, 3), "q.lora_B": torch.ones(4, 3)}, "no multiple of lora_B's 3"),
    ({"q.lora_A": torch.ones(2, 3), "q.lora_B": torch.ones(4, 2, 2)}, "two tensors of 2 axes"),
    ({"q.lora_A": torch.ones(2, 3).int(), "q.lora_B": torch.ones(4, 2).int()}, "one floating dtype"),
    ({"q..lora_A": torch.ones(2, 3), "q..lora_B": torch.ones(4, 2)}, "not the path of a module"),
    ({"q.weight": torch.ones(2, 3)}, "'q.weight': expected .lora_A, .lora_B or a bias"),
    (
        {"q.lora_A": torch.ones(2, 3), "q.lora_B": torch.ones(4, 2), "q.bias": torch.ones(3)},
        r"shape \(4,\), got \(3,\)",
    ),
    ({"q.parametrizations.weight.1.lora_A": torch.ones(2, 3)}, "second adapter stacked"),
    ({"q.lora_A": torch.ones(2, 3), "q.parametrizations.weight.0.lora_B": torch.ones(4, 2)}, "one of minLoRA"),
    ({"q.lora_A": torch.ones(4, 3), "q.lora_B": torch.ones(4, 2)}, "2 parts of a fused layer"),
    ({}, "no key ends in"),
]


@pytest.mark.parametrize(("tensors", "message"), HOSTILE)
def test_malformed_state_dicts_are_typed_errors(tensors, message):
    with pytest.raises(AdapterError, match=message):
        adapter_from_loralib(tensors, Hints(alpha=1), "a.safetensors")


def test_kernels_that_do_not_fit_the_base_are_refused():
    tensors = {"c.lora_A": torch.ones(6, 9), "c.lora_B": torch.ones(12, 6)}
    assert adapter_from_loralib(tensors, Hints(alpha=1, base=base_of({"c.weight": (4, 3, 3, 3)})), "a").modules
    for shape in ((4, 3, 3, 1), (4, 2, 3, 3), (5, 3, 3, 3)):
        with pytest.raises(AdapterError, match="for a square kernel without groups"):
            adapter_from_loralib(tensors, Hints(alpha=1, base=base_of({"c.weight": shape})), "a")


def test_what_loralib_cannot_carry_is_refused_all_at_once():
    modules = {
        "a": pair_of(4, 5, 2, 0.5, 0, dora=True),
        "e": pair_of(4, 5, 2, 0.5, 0, form="experts", experts=2),
    }
    adapter = foreign_adapter(modules, trained={"head.weight": torch.ones(2, 2)})
    with pytest.raises(AdapterError) as caught:
        write_loralib(adapter, Hints(alpha=1))
    for expected in ("a: loralib has no magnitudes", "e: loralib has no factors of form 'experts'", "head.weight:"):
        assert expected in str(caught.value)


def test_it_is_recognised_by_its_keys_and_pickles_never_are():
    assert FORMAT.recognise(Sight(Path("a.safetensors"), ("a.safetensors",), ("q.lora_A", "q.lora_B")))
    assert not FORMAT.recognise(Sight(Path("a.safetensors"), ("a.safetensors",), ("q.lora_A.weight",)))
    assert not FORMAT.recognise(Sight(Path("a"), (), ("q.lora_A", "q.lora_B", "q.lora_E")))
    assert PICKLE.is_pickle
    assert not PICKLE.recognise(Sight(Path("a.pt"), ("a.pt",)))
