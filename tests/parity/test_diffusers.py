"""What we write, diffusers reads as what it is: its own format in each style, and kohya's."""

import runpy
from pathlib import Path

import pytest
import torch

from veneer.adapter import Adapter, LowRank
from veneer.files.foreign import settings_for
from veneer.files.format import Hints
from veneer.files.formats import FORMATS

pytest.importorskip("diffusers", reason="diffusers is not here (pip install diffusers==0.42.1)")
make_diffusers = runpy.run_path(str(Path(__file__).parents[1] / "golden" / "make_diffusers.py"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "style"), [("diffusers", "new"), ("diffusers", "old"), ("diffusers", "oldest"), ("kohya", None)]
)
def test_diffusers_reads_what_we_write(name, style, tmp_path):
    loaders = pytest.importorskip("diffusers.loaders")
    model = make_diffusers["unet"]()
    ends = ("to_q", "to_out.0") if style in ("old", "oldest") else ("to_q", "to_out.0", "proj_in", "conv1")
    modules = {}
    for count, (path, one) in enumerate(model.named_modules()):
        if path.endswith(ends):
            rank, scaling = 2 + count % 2, (1.0, 0.5, 1 / 3)[count % 3]
            A = torch.randn(rank, *one.weight.shape[1:])
            B = torch.randn(one.weight.shape[0], rank, *(1,) * (one.weight.ndim - 2))
            modules[path] = LowRank(A, B, scaling, "linear" if one.weight.ndim == 2 else "conv")
    file = FORMATS[name].file
    files = FORMATS[name].write(Adapter(modules, settings_for(modules)), Hints(component="unet", style=style))
    (tmp_path / file).write_bytes(b"".join(files[file]))
    mixin = loaders.StableDiffusionLoraLoaderMixin
    state, alphas, metadata = mixin.lora_state_dict(
        tmp_path / file, unet_config=model.config, return_lora_metadata=True
    )
    mixin.load_lora_into_unet(state, alphas, model, metadata=metadata)
    found = make_diffusers["deltas"](model)
    assert found.keys() == modules.keys()
    for path, delta in found.items():
        expected = modules[path].delta()
        assert torch.linalg.vector_norm(delta - expected) <= 1e-6 * torch.linalg.vector_norm(expected)
