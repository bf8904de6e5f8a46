"""What we write, diffusers reads as what it is: its own format in each style, and kohya's."""

import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from veneer.adapter import Adapter, LowRank
from veneer.files.foreign import settings_for
from veneer.files.format import Hints
from veneer.files.formats import FORMATS
from veneer.files.kohya_originals import FAMILIES

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


def original_of(outs: int, ins: int, rank: int = 2, scaling: float = 0.5) -> LowRank:
    return LowRank(torch.randn(rank, ins), torch.randn(outs, rank), scaling)


@pytest.mark.filterwarnings("ignore")
def test_flux_by_its_own_names_is_what_diffusers_makes_of_it(tmp_path):
    """diffusers knows the sizes of the real model alone: one block of each kind, of rank 1 and 2."""
    loaders = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    width = 3072
    shared, other = torch.randn(2, width), original_of(width, width, 1)
    start, modules = "transformer.transformer_blocks.0.", {}
    modules |= {f"{start}attn.to_{one}": LowRank(shared, torch.randn(width, 2), 0.5) for one in "qkv"}
    modules |= {f"{start}attn.add_{one}_proj": original_of(width, width, 2) for one in "qkv"}
    modules |= {f"{start}attn.to_out.0": other, f"{start}norm1_context.linear": original_of(6 * width, width)}
    single = "transformer.single_transformer_blocks.0."
    modules |= {f"{single}attn.to_{one}": original_of(width, width, 1, 2.0) for one in "qkv"}
    modules |= {f"{single}proj_mlp": original_of(4 * width, width, 1, 2.0), f"{single}proj_out": original_of(8, 16)}
    modules |= {"transformer.norm_out.linear": original_of(2 * width, width), "transformer.x_embedder": other}
    kohya = FORMATS["kohya"]
    path = tmp_path / kohya.file
    path.write_bytes(b"".join(kohya.write(Adapter(modules, settings_for(modules)), Hints(style="flux"))[kohya.file]))
    found = loaders._convert_kohya_flux_lora_to_diffusers(load_file(path))
    paths = {key.partition(".lora_")[0] for key in found}
    assert {path if path.startswith("transformer.") else f"transformer.{path}" for path in paths} == set(modules)
    again = kohya.read(path, Hints())
    for name in paths:
        key = name if name.startswith("transformer.") else f"transformer.{name}"
        delta = found[f"{name}.lora_B.weight"].double() @ found[f"{name}.lora_A.weight"].double()
        if key in ("transformer.norm_out.linear", "transformer.proj_out"):
            delta = delta * modules[key].scaling  # diffusers leaves the alpha of the last layer out
        expected = modules[key].delta()
        assert torch.linalg.vector_norm(delta - expected) <= 1e-6 * torch.linalg.vector_norm(expected), key
        assert torch.linalg.vector_norm(again.modules[key].delta() - expected) <= 1e-6 * torch.linalg.vector_norm(
            expected
        )


class Checkpoint(dict):
    """An original checkpoint that has whatever it is asked for: of what no test compares, a zero."""

    def pop(self, key, *default):
        return super().pop(key, *(default or [torch.zeros(3)]))


def original_outputs(path: str, width: int) -> int:
    if path.endswith("qkv"):
        return 3 * width
    if path.endswith("linear1"):
        return 7 * width
    if path.endswith("adaLN_modulation.1"):
        return 2 * width if path.startswith(("final_layer", "joint_blocks.1.context")) else 6 * width
    return width


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "width"), [("flux", 3072), ("sd3", 8)])
def test_outputs_go_where_diffusers_own_converter_puts_them(family, width, tmp_path):
    """Its converter of whole checkpoints is given lora_B for weights: what it makes of them must be our lora_B."""
    converters = pytest.importorskip("diffusers.loaders.single_file_utils")
    paths = dict.fromkeys(layer.at(block).original for layer in FAMILIES[family] for block in "01")
    last = "joint_blocks.1.context_block."  # of which nothing is left but keys and values
    paths = [path for path in paths if not path.startswith((f"{last}attn.proj", f"{last}mlp"))]
    state, tensors = Checkpoint(), {}
    for path in paths:
        outputs, name = original_outputs(path, width), f"lora_unet_{path.replace('.', '_')}"
        B = torch.randn(outputs, 1)
        state |= {f"{path}.weight": B, f"{path}.bias": torch.zeros(outputs)}
        tensors |= {f"{name}.lora_down.weight": torch.ones(1, width), f"{name}.lora_up.weight": B}
    kohya = FORMATS["kohya"]
    save_file(tensors, tmp_path / kohya.file)
    found = kohya.read(tmp_path / kohya.file, Hints()).modules
    theirs = getattr(converters, f"convert_{family}_transformer_checkpoint_to_diffusers")(state)
    assert len(found) > len(paths)
    for path, pair in found.items():
        assert pair.lora_B.equal(theirs[f"{path.removeprefix('transformer.')}.weight"]), path
