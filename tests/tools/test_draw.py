"""The picture of an adapter."""

import struct

import pytest
import torch

from veneer.adapter import Adapter, AdapterMetadata, LowRank
from veneer.config import LoRAConfig
from veneer.errors import AdapterError, OutputError
from veneer.tools.draw import MAX_ROWS, _cells, draw_summary
from veneer.tools.summarize import summarize


def adapter(names, layers, base=None):
    pairs = {
        f"model.layers.{layer}.{name}": LowRank(torch.randn(2, 5), torch.randn(4, 2), 1.0)
        for layer in range(layers)
        for name in names
    }
    return Adapter(pairs, LoRAConfig(rank=2), metadata=AdapterMetadata(base=base))


def test_a_large_and_a_strange_adapter_are_drawn(tmp_path):
    path = tmp_path / "a.png"
    draw_summary(summarize(adapter(("attn.q", "attn.$v$", "mlp.绘"), 40, base="绘图 $x^ \x1b[2J")), path)
    data = path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert 800 < width < 3000
    assert 500 < height < 3000


def test_zero_updates_and_modules_outside_of_layers_are_drawn(tmp_path):
    pairs = {"head": LowRank(torch.ones(1, 2), torch.zeros(3, 1), 1.0)}
    draw_summary(summarize(Adapter(pairs, LoRAConfig(rank=1))), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_blocks_of_two_stacks_have_rows_of_their_own_and_rows_are_bounded():
    pairs = {path: LowRank(torch.ones(1, 2), torch.ones(3, 1), 1.0) for path in ("down.0.q", "up.0.q", "down.1.q")}
    cells = _cells(summarize(Adapter(pairs, LoRAConfig(rank=1))).modules)
    assert {name: sorted(row) for name, row in cells.items()} == {"q, down": [0, 1], "q, up": [0]}
    many = adapter([f"m{count}" for count in range(MAX_ROWS + 9)], 1)
    assert len(_cells(summarize(many).modules)) == MAX_ROWS


def test_what_cannot_be_drawn_is_refused(tmp_path):
    summary = summarize(adapter(("q",), 1))
    with pytest.raises(OutputError, match=r"ends in \.png"):
        draw_summary(summary, tmp_path / "a.jpg")
    whole = summarize(Adapter({}, LoRAConfig(modules_to_save=("head",)), {"head.bias": torch.ones(2)}))
    with pytest.raises(AdapterError, match="no modules"):
        draw_summary(whole, tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []
