"""A merge on files with its proof: the base with the adapter attached, and the merged files loaded, asked the same."""

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from veneer.adapter import Adapter
from veneer.base.load import load_model
from veneer.base.source import Source
from veneer.errors import BaseModelError, ConfigError, TargetError
from veneer.files.memory import free_memory_bytes
from veneer.files.peft import load_adapter
from veneer.files.pieces import OnBytes
from veneer.files.shards import read_checkpoint
from veneer.files.tensors import DTYPES
from veneer.nn.attach import check_base
from veneer.nn.fingerprint import fingerprint
from veneer.tools.merge_checkpoint import Prove, merge_files
from veneer.tools.merge_checkpoint_plan import sum_adapters
from veneer.tools.merge_checkpoint_record import CheckpointMerge
from veneer.tools.merge_probe import TOLERANCES, Probe, ask, ask_attached, compare, default_probe
from veneer.tools.merge_record import ProbeResult

Part = str | Path | Adapter

SPARE = 1.5
"""Memory that must be free for a proof, as a multiple of a model's float32 weights."""


def merge_checkpoint(
    base: str | Path,
    adapter: Part | Sequence[tuple[Part, float]],
    out: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    probe: Literal["auto"] | Probe | None = "auto",
    any_base: bool = False,
    on_bytes: OnBytes | None = None,
    replace: bool = False,
) -> CheckpointMerge:
    """Write a checkpoint with adapters merged into its weights, shard by shard, and prove what was written.

    For each weight W that the adapters change, whatever its form:

        W = round_once(W + Σ weight · scaling · lora_B @ lora_A)      # float64's result, one rounding

    All other tensors and files are copied byte for byte. The proof: logits of the base with the adapter attached, and
    of the merged files as they will be loaded. Where something fails, nothing is left behind.

    Args:
        base: Folder of a base model, with safetensors files.
        adapter: An adapter, a value or its folder; or several, each with its weight.
        out: The folder to make.
        dtype: What all floating weights are stored in; None leaves them as they are.
        probe: "auto" asks causal language models for the logits of fixed tokens where memory allows; a function from a
            model to a tensor is asked instead; None leaves the proof out.
        any_base: Merge even where the base's weights are not those that the adapter was made for.
        on_bytes: Told how many bytes of weights were written, as they are.
        replace: Put the new folder in the place of one that exists.

    Returns:
        What was done; the same is in `veneer_merge.json` beside the weights.

    Raises:
        AdapterError: If an adapter does not fit, was made for another base, cannot be weighted, leaves the range of the
            dtype, or the merged files do not compute what it did.
        BaseModelError: If the base's files are not what they say, or quantised.
        TargetError: If a tie cannot be undone in a saved configuration.
        OutputError: If the folder exists, or the disk refuses.

    Cost:
        One pass over the files, each piece read back; for the proof, loading the model twice. Memory: the adapters
        and some MB, the largest tensor a few times where it cannot be changed a piece at a time; the proof takes that
        of the model.

    Example:
        merge_checkpoint("models/llama", "runs/a/adapter", "models/llama-a").probe.difference

    Source:
        Hu et al. 2021, arXiv:2106.09685, section 4.1. Differs from PEFT's `merge_and_unload` and `save_pretrained`: no
        model is built, float64's sum is rounded once, and several adapters are added before that.
    """
    given = [(adapter, 1.0)] if isinstance(adapter, str | Path | Adapter) else list(adapter)
    if not given:
        raise ConfigError("no adapter is given to be merged")
    parts = [(one if isinstance(one, Adapter) else load_adapter(one), float(weight)) for one, weight in given]
    reason: str | None = "not asked for"
    prove: Prove | None = None
    if probe is not None:
        prove, reason = begin_proof(Path(base), parts, None if probe == "auto" else probe, any_base=any_base)
    answer: Prove | ProbeResult = ProbeResult(False, reason) if prove is None else prove
    return merge_files(
        base, parts, out, dtype=dtype, any_base=any_base, prove=answer, on_bytes=on_bytes, replace=replace
    )


def begin_proof(
    base: Path, parts: Sequence[tuple[Adapter, float]], probe: Probe | None, *, any_base: bool
) -> tuple[Prove | None, str | None]:
    """Ask the base, and the base with the adapters attached; return what asks the merged files, or why there is none.

    Raises:
        AdapterError: If the adapter does not fit the base, or was made for another one.
    """
    checkpoint = read_checkpoint(base)
    size = sum(place.size // DTYPES[place.dtype].itemsize * 4 for place in checkpoint.tensors.values())
    free = free_memory_bytes()
    if size * SPARE > free:
        return None, f"the model takes {size / 1e9:.1f} GB in float32, {free / 1e9:.1f} GB are free"
    try:
        model = load_model(Source(str(base), str(base), is_local=True), dtype=torch.float32)
    except BaseModelError as error:
        return None, f"the base is not loaded as a causal language model: {error.message}"
    found, reason = (probe, None) if probe is not None else default_probe(model)
    if found is None:
        return None, reason
    adapter = sum_adapters(parts)
    if not any_base:
        own = fingerprint(model)
        for one, _ in parts:
            check_base(model, one, own)
    answers = _ask_both(model, adapter, found)
    del model
    gc.collect()
    if answers is None:
        return None, "the adapter trained a tied parameter whole, which cannot be attached to compare with"
    asked: Probe = found

    def prove(folder: Path) -> ProbeResult:
        stored = {DTYPES[place.dtype] for place in read_checkpoint(folder).tensors.values()}
        tolerance = max(TOLERANCES.get(dtype, 0.0) for dtype in stored)
        merged = load_model(Source(str(folder), str(folder), is_local=True), dtype=torch.float32)
        return compare(*answers, ask(merged, asked), tolerance)

    return prove, None


def _ask_both(model: nn.Module, adapter: Adapter, probe: Probe) -> tuple[Tensor, Tensor] | None:
    base = ask(model, probe)
    try:
        attached = ask_attached(model, adapter, probe)
    except TargetError:
        if adapter.trained:
            return None
        raise
    assert attached is not None
    return base, attached
