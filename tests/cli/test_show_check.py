"""`show` and `check` as people and machines see them."""

import json
import os
import subprocess
import sys

import torch
from tests.files.hostile import write_variants

from veneer.adapter import Adapter, AdapterMetadata, LowRank
from veneer.config import LoRAConfig
from veneer.files.doctor_codes import CODES
from veneer.files.peft import save_adapter

Q = "model.layers.{}.self_attn.{}_proj"


def save(folder, seed=0, *, zero=False, names="qv", base="org/model"):
    generator = torch.Generator().manual_seed(seed)
    modules = {
        Q.format(layer, name): LowRank(
            torch.randn(2, 32, generator=generator),
            torch.randn(32 if name == "q" else 16, 2, generator=generator) * (not zero),
            2.0,
        )
        for layer in range(2)
        for name in names
    }
    save_adapter(Adapter(modules, LoRAConfig(rank=2, alpha=4.0), metadata=AdapterMetadata(base=base)), folder)
    return folder


def test_show_says_what_changes_most_by_target_and_by_module(call, tmp_path, tiny_base):
    folder = save(tmp_path / "a")
    code, out, _ = call("show", folder)
    assert code == 0
    assert "changes most" in out
    assert "effective" in out
    assert "layers.1.self_attn" not in out.split("target")[1]
    out = call("show", folder, "--modules")[1]
    assert all(Q.format(layer, name) in out for layer in range(2) for name in "qv")
    shown = json.loads(call("show", folder, "--json")[1])
    assert len(shown["modules"]) == 4
    assert all(len(one["singular_values"]) == 2 and one["relative"] is None for one in shown["modules"])
    code, out, _ = call("show", folder, "--base", tiny_base, "--json")
    assert (code, all(one["relative"] > 0 for one in json.loads(out)["modules"])) == (0, True)
    assert "of weight" in call("show", folder, "--base", tiny_base)[1]


def test_show_draws(call, tmp_path):
    folder = save(tmp_path / "a")
    assert call("show", folder, "--plot", tmp_path / "a.png")[0] == 0
    assert (tmp_path / "a.png").read_bytes()[1:4] == b"PNG"
    code, _, err = call("show", folder, "--plot", tmp_path / "a.jpg")
    assert (code, "ends in .png" in err) == (2, True)


def test_show_of_two_says_how_they_relate_with_chance_beside_it(call, tmp_path):
    one, two = save(tmp_path / "a"), save(tmp_path / "b", 1, names="q")
    code, out, _ = call("show", one, two)
    assert code == 0
    assert "at random" in out
    assert "only in the first" in out
    assert Q.format(1, "q") in call("show", one, two, "--modules")[1]
    found = json.loads(call("show", one, two, "--json")[1])
    assert abs(found["cosine"]) < 0.3
    assert found["only_second"] == []
    assert "yes, every value" in call("show", one, one)[1]
    code, _, err = call("show", one, two, "--plot", "x.png")
    assert (code, "one adapter" in err) == (2, True)


def test_check_has_exit_code_0_without_errors_and_1_with_errors(call, tmp_path):
    folder = save(tmp_path / "a")
    assert call("check", folder)[:2][0] == 0
    assert "nothing" in call("check", folder)[1]
    warned = save(tmp_path / "b", zero=True)
    code, out, _ = call("check", warned)
    assert (code, "V401" in out, CODES["V401"].title in out) == (0, True, True)
    code, out, err = call("check", tmp_path / "none")
    assert (code, "V101" in out, err) == (1, True, "")
    code, out, _ = call("check", tmp_path / "none", "--json")
    found = json.loads(out)
    assert (code, found["num_errors"], found["findings"][0]["code"]) == (1, 1, "V101")
    assert set(found["findings"][0]) == {"code", "severity", "title", "where", "what", "meaning", "command"}
    code, _, err = call("check")
    assert (code, "expected an adapter" in err) == (2, True)


def test_check_asks_the_base(call, tmp_path, tiny_base):
    folder = save(tmp_path / "a")
    code, out, _ = call("check", folder, "--base", tiny_base, "--json")
    found = json.loads(out)
    assert (code, found["num_errors"]) == (0, 0)
    assert found["effect"]["largest"] > 0
    assert found["effect"]["positions"] > 20
    out = call("check", folder, "--base", tiny_base)[1]
    assert "another likeliest token" in out
    code, out, _ = call("check", save(tmp_path / "b", zero=True), "--base", tiny_base)
    assert (code, "V509" in out) == (1, True)
    code, out, _ = call("check", save(tmp_path / "c", names="qx"), "--base", tiny_base, "--no-probe")
    assert (code, "V501" in out) == (1, True)


def test_all_codes_are_listed(call):
    code, out, _ = call("check", "--codes", "--json")
    assert code == 0
    assert [row["code"] for row in json.loads(out)["codes"]] == list(CODES)
    assert "V509" in call("check", "--codes")[1]


def test_neither_imports_transformers_and_show_draws_nothing_unasked(tmp_path):
    folder = save(tmp_path / "a")
    code = (
        "import sys; sys.argv = ['veneer', *sys.argv[1:]]\n"
        "from veneer.cli.main import main\n"
        "try:\n    main()\n"
        "finally:\n    print([name for name in ('transformers', 'matplotlib') if name in sys.modules], file=sys.stderr)"
    )
    for verb in (("show",), ("show", str(folder)), ("check",)):
        command = [sys.executable, "-c", code, *verb, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stderr.strip() == "[]"


def test_names_from_files_do_not_command_the_terminal(call, tmp_path):
    folder = save(tmp_path / "a", base="\x1b[2Jorg/model")
    for out in (call("show", folder)[1], call("check", folder)[1]):
        assert "\x1b" not in out
    strange = tmp_path / "b"
    strange.mkdir()
    (strange / "\x1b[31madapter_model.bin").write_bytes(b"\x80\x02.")
    assert "\x1b" not in call("check", strange)[1]
    (strange / os.fsdecode(b"\xff.bin")).write_bytes(b"\x80\x02.")  # a name without UTF-8
    assert r"\udcff.bin" in call("check", strange)[1]
    assert len(json.loads(call("check", strange, "--json")[1])["findings"]) == 3


def test_malformed_files_end_in_one_message_and_no_traceback(call, tmp_path):
    for _, _, path in write_variants(tmp_path, 5, 25):
        for verb in ("show", "check"):
            code, out, err = call(verb, path)
            assert code in (0, 1, 2)
            assert "Traceback" not in out + err
            assert (code != 2) or (err.startswith("error: ") and not out)


def test_layers_stand_in_the_order_of_their_numbers(call, tmp_path):
    modules = {Q.format(layer, "q"): LowRank(torch.randn(2, 4), torch.randn(4, 2), 1.0) for layer in range(11)}
    save_adapter(Adapter(modules, LoRAConfig(rank=2, alpha=2.0)), tmp_path / "a")
    for more in ((), (tmp_path / "a",)):
        _, shown, _ = call("show", tmp_path / "a", *more, "--modules")
        lines = [line.split()[0] for line in shown.splitlines() if line.strip().startswith("model.layers.")]
        assert lines == [Q.format(layer, "q") for layer in range(11)]


def test_findings_beyond_those_that_are_listed_are_counted(call, tmp_path, tiny_base):
    modules = {Q.format(layer, "q"): LowRank(torch.randn(2, 4), torch.randn(4, 2), 1.0) for layer in range(30)}
    save_adapter(Adapter(modules, LoRAConfig(rank=2, alpha=2.0)), tmp_path / "a")
    code, shown, _ = call("check", tmp_path / "a", "--base", tiny_base, "--no-probe")
    assert code == 1
    assert "30 errors" in shown
    _, shown, _ = call("check", tmp_path / "a", "--base", tiny_base, "--no-probe", "--json")
    assert json.loads(shown)["num_errors"] == 30
