"""The doctor of values, and of values on a base."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from veneer.adapter import Adapter, AdapterMetadata, LowRank, TokenRows
from veneer.config import LoRAConfig
from veneer.errors import AttachError, BaseModelError, ConfigError
from veneer.files.commit import commit_folder
from veneer.files.peft import save_adapter
from veneer.files.shards import read_checkpoint
from veneer.files.tensors import dump_tensors
from veneer.nn.attach import attach, detach
from veneer.nn.fingerprint import fingerprint
from veneer.ops.sample import sample_digest
from veneer.tools.check import check, check_adapter
from veneer.tools.check_base import weight_norms
from veneer.tools.check_effect import compare_outputs

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj"


def pair(outs, ins, rank=2, scaling=1.0, **changes):
    return LowRank(torch.randn(rank, ins), torch.randn(outs, rank), scaling, **changes)


def adapter(modules, base="org/model", **changes):
    metadata = AdapterMetadata(base=base, **{key: changes.pop(key) for key in list(changes) if key.startswith("base")})
    return Adapter(modules, LoRAConfig(rank=2), metadata=metadata, **changes)


def codes(report):
    return [one.code for one in report.findings]


def zero(outs, ins):
    return LowRank(torch.ones(2, ins), torch.zeros(outs, 2), 1.0)


def test_values():
    assert codes(check_adapter(adapter({"q": pair(5, 6)}))) == []
    assert codes(check_adapter(adapter({"q": zero(5, 6), "v": zero(5, 6)}))) == ["V401"]
    assert codes(check_adapter(adapter({"q": zero(5, 6), "v": pair(5, 6)}))) == ["V402"]
    flat = LowRank(torch.zeros(2, 6), torch.ones(5, 2), 1.0)
    assert codes(check_adapter(adapter({"q": flat, "v": pair(5, 6)}))) == ["V403"]
    lower = LowRank(torch.ones(2, 6), torch.ones(5, 2), 1.0)
    found = check_adapter(adapter({"q": lower}), name="my a").findings
    assert [one.code for one in found] == ["V404"]
    assert found[0].command == "veneer resize 'my a' --out 'my a-r1' --rank 1"
    huge = torch.full((1, 2), 1e300, dtype=torch.float64)
    report = check_adapter(adapter({"q": LowRank(huge, huge.T.contiguous(), 1.0)}))
    assert (codes(report), report.errors) == (["V405"], ())
    dora = pair(5, 6, magnitude=torch.tensor([1.0, 0.0, -1.0, 1.0, 1.0]))
    assert codes(check_adapter(adapter({"q": dora}))) == ["V406"]
    rows = Adapter(
        {}, LoRAConfig(target_modules=(), token_rows={"e": (1,)}), tokens={"e": TokenRows((1,), torch.ones(1, 2))}
    )
    assert codes(check_adapter(rows)) == []


def test_a_base_of_other_modules_or_sizes_is_told_with_all_that_differs(tiny):
    model = tiny()
    assert codes(check_adapter(adapter({Q: pair(32, 32)}), model)) == []
    report = check_adapter(adapter({Q: pair(64, 32), "model.layers.0.self_attn.q_prj": pair(32, 32)}), model)
    assert codes(report) == ["V501", "V502"]
    assert "q_proj" in report.errors[0].what
    assert report.effect is None
    table = adapter({"model.embed_tokens": LowRank(torch.ones(2, 259), torch.ones(32, 2), 1.0, "linear")})
    assert "V505" in codes(check_adapter(table, model))


def test_the_effect_is_measured_and_none_is_an_error(tiny):
    model = tiny()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    report = check_adapter(adapter({Q: pair(32, 32)}), model)
    assert report.effect is not None
    assert report.effect.largest > 0
    assert report.effect.positions == 32
    assert 0 <= report.effect.top_changed <= 32
    assert report.effect.divergence >= 0
    report = check_adapter(adapter({Q: zero(32, 32)}), model)
    assert codes(report) == ["V509", "V401"]
    assert report.effect.largest == 0
    faint = check_adapter(adapter({Q: pair(32, 32, scaling=1e-6)}), model)
    assert codes(faint) == ["V511"]
    wild = LowRank(torch.full((2, 32), 3e38), torch.full((32, 2), 3e38), 1.0)
    assert "V508" in codes(check_adapter(adapter({Q: wild}), model))
    assert all(one.equal(before[name]) for name, one in model.state_dict().items())
    json.dumps(report.to_json())


def test_probes_of_the_callers_own(tiny):
    plain = nn.Sequential(nn.Linear(3, 4))
    one = adapter({"0": pair(4, 3)})
    assert codes(check_adapter(one, plain)) == ["V510"]
    report = check_adapter(one, plain, probe=lambda model: model(torch.ones(2, 3)))
    assert (codes(report), report.effect.positions) == ([], 2)
    with pytest.raises(ConfigError, match="must return a tensor"):
        check_adapter(one, plain, probe=lambda model: 3)
    broken = nn.Sequential(nn.Linear(3, 4))
    nn.init.constant_(broken[0].weight, torch.nan)
    assert codes(check_adapter(one, broken, probe=lambda model: model(torch.ones(2, 3)))) == ["V510"]
    attach(plain, one, any_base=True)
    with pytest.raises(AttachError):
        check_adapter(one, plain)
    detach(plain)


def test_fingerprints_ties_and_what_was_carried_along(tiny):
    model, other = tiny(0), tiny(1)
    one = adapter({Q: pair(32, 32)}, base_fingerprint=fingerprint(model))
    assert codes(check_adapter(one, model)) == []
    assert codes(check_adapter(one, other)) == ["V503"]
    table = LowRank(torch.randn(2, 259), torch.randn(32, 2), 1.0, "embedding")
    assert "V506" in codes(check_adapter(adapter({"model.embed_tokens": table}), model))
    untied = tiny(0, tie_word_embeddings=False)
    assert codes(check_adapter(adapter({"model.embed_tokens": table}), untied)) == []
    norm = "model.norm.weight"
    whole = replace(
        adapter({Q: pair(32, 32)}),
        config=LoRAConfig(rank=2, modules_to_save=("norm",)),
        trained={norm: dict(model.named_parameters())[norm]},
    )
    assert codes(check_adapter(whole, model)) == ["V507"]
    short = replace(whole, trained={norm: torch.ones(3)})
    assert codes(check_adapter(short, model)) == ["V502"]


@pytest.fixture
def checkpoint(tmp_path, tiny):
    named = {name: one.detach() for name, one in tiny().named_parameters()}
    files = {"model.safetensors": dump_tensors(named), "config.json": b'{"tie_word_embeddings": true}'}
    commit_folder(tmp_path / "base", files, kind="example")
    return read_checkpoint(tmp_path / "base")


def test_headers_alone(checkpoint, tiny):
    assert codes(check_adapter(adapter({Q: pair(32, 32)}), checkpoint)) == []
    assert codes(check_adapter(adapter({Q: pair(32, 33), "model.layers.9.x": pair(2, 2)}), checkpoint)) == [
        "V501",
        "V502",
    ]
    table = LowRank(torch.randn(2, 259), torch.randn(32, 2), 1.0, "embedding")
    assert codes(check_adapter(adapter({"model.embed_tokens": table}), checkpoint)) == ["V506"]
    short = Q.removeprefix("model.")  # as a base without its head calls it
    assert codes(check_adapter(adapter({short: pair(32, 32)}), checkpoint)) == []
    assert codes(check_adapter(adapter({f"wrapped.{Q}": pair(32, 32)}), checkpoint)) == []


def test_norms_of_the_bases_weights(checkpoint, tiny):
    weight = dict(tiny().named_parameters())[f"{Q}.weight"]
    assert weight_norms(checkpoint, adapter({Q: pair(32, 32)})) == {Q: pytest.approx(weight.norm().item())}
    with pytest.raises(BaseModelError, match=r"nearest: 'model\.layers"):
        weight_norms(checkpoint, adapter({Q + "x": pair(32, 32)}))


def test_files_and_values_are_checked_together(tmp_path, tiny):
    save_adapter(adapter({Q: zero(32, 32), K: pair(16, 32)}, base=None), tmp_path / "a")
    assert codes(check(tmp_path / "a")) == ["V402", "V214"]
    report = check(tmp_path / "a", base=tiny())
    assert codes(report) == ["V402", "V214"]
    assert report.effect.largest > 0
    assert codes(check(tmp_path / "none", base=tiny())) == ["V101"]


def test_the_comparison_is_that_of_the_distributions():
    before, after = torch.randn(3, 5, 7).double(), torch.randn(3, 5, 7).double()
    found = compare_outputs(before, after)
    P, Q_ = torch.softmax(before, -1), torch.softmax(after, -1)
    expected = torch.nn.functional.kl_div(P.log().flatten(0, 1), Q_.flatten(0, 1), reduction="batchmean")
    assert found.divergence == pytest.approx(expected.item())
    assert found.top_changed == int((before.argmax(-1) != after.argmax(-1)).sum())
    assert found.largest == (after - before).abs().max().item()


def test_base_weights_in_the_file_are_compared_with_the_bases(tiny):
    model = tiny()
    table = dict(model.named_parameters())["model.embed_tokens.weight"]
    carried = (("model.embed_tokens", sample_digest(table)),)
    one = adapter({Q: pair(32, 32)}, base_weights=carried)
    assert codes(check_adapter(one, model)) == ["V311"]
    assert codes(check_adapter(one, tiny(1))) == ["V504"]
