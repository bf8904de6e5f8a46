"""The proof of an exported GGUF file: transformers reads it, and its logits are those of the checkpoint."""

import gc
from pathlib import Path

import torch

from veneer.base.gguf import load_gguf
from veneer.base.load import load_model
from veneer.base.source import Source
from veneer.errors import AdapterError, BaseModelError
from veneer.files.memory import free_memory_bytes
from veneer.files.shards import read_checkpoint
from veneer.files.tensors import DTYPES
from veneer.scoring.merge_checkpoint import SPARE
from veneer.tools.merge_gguf import Prove
from veneer.tools.merge_probe import TOLERANCES, ask, default_probe
from veneer.tools.merge_record import ProbeResult


def gguf_proof(folder: str | Path, dtype: torch.dtype | None = None) -> Prove | ProbeResult:
    """Ask a checkpoint for the logits of fixed tokens; return what asks a GGUF file of it, for `export_gguf`.

    Args:
        folder: The checkpoint.
        dtype: What the file's matrices are rounded to, where that is coarser than the checkpoint's.

    Returns:
        A function that loads the file's weights with transformers, into the checkpoint's configuration, and raises
        AdapterError where its logits are others; or, where there is none, why: memory is short, or the checkpoint is no
        causal language model. Of a family that transformers cannot read from GGUF the function says so, and proves
        nothing.

    Cost:
        Both models in float32, one after the other.

    Example:
        export_gguf("models/llama-a", "llama.gguf", "llama-a.gguf", prove=gguf_proof("models/llama-a")).probe.difference
    """
    folder = str(folder)
    places = read_checkpoint(folder).tensors.values()
    kinds = {DTYPES[place.dtype] for place in places} | ({dtype} if dtype is not None else set())
    tolerance = max(TOLERANCES.get(kind, 0.0) for kind in kinds)
    size = sum(place.size // DTYPES[place.dtype].itemsize * 4 for place in places)
    if size * SPARE > (free := free_memory_bytes()):
        return ProbeResult(False, f"the model takes {size / 1e9:.1f} GB in float32, {free / 1e9:.1f} GB are free")
    try:
        model = load_model(Source(folder, folder, is_local=True), dtype=torch.float32)
    except BaseModelError as error:
        return ProbeResult(False, f"the checkpoint is not loaded as a causal language model: {error.message}")
    probe, reason = default_probe(model)
    if probe is None:
        return ProbeResult(False, reason)
    expected, asked, config = ask(model, probe), probe, model.config
    del model
    gc.collect()

    def prove(path: Path) -> ProbeResult:
        try:
            found = ask(load_gguf(path, config), asked)
        except BaseModelError as error:
            return ProbeResult(False, f"transformers does not read it: {error.message}")
        difference = (found - expected).abs().max().item()
        share = difference / (expected.abs().max().item() or 1.0)
        if not share <= tolerance:
            raise AdapterError(
                f"the GGUF file does not compute what {folder} does: logits differ by {difference:.3g}, {share:.3g} of"
                f" the largest, at most {tolerance:g} is let pass (it was removed)"
            )
        return ProbeResult(True, None, None, difference, None, share, tolerance)

    return prove
