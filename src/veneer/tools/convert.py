"""An adapter's files in another format, with the proof that they do the same.

What was written is read again by the format's own reader, and each module's effective delta is compared with the
source's. Nothing stands under the target's name before that.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from veneer.adapter import Adapter
from veneer.errors import AdapterError, OutputError, shortened
from veneer.files.commit import commit_file, commit_folder, discard
from veneer.files.components import COMPONENTS, component_of, components_in, likely_component, paths_of, select
from veneer.files.diffusers_keys import STYLES
from veneer.files.filesystem import REAL, Content, FileSystem
from veneer.files.format import Format, Hints
from veneer.files.formats import FORMATS, find_format, recognise
from veneer.files.kohya_originals import FAMILIES
from veneer.files.peft import save_adapter
from veneer.files.peft_other import OtherAdapter
from veneer.files.shards import Checkpoint, read_tensor
from veneer.files.translate import at_scaling
from veneer.names import did_you_mean
from veneer.tools.compare import Difference, compare_deltas
from veneer.tools.made_card import made_card
from veneer.tools.merge_checkpoint_names import find_renaming
from veneer.tools.to_lora import dora_to_lora, to_lora

LIMIT = 1e-6
"""The largest relative error of a module that passes for the same."""
TO_LORA = "lora"
"""The target that makes plain LoRA, in PEFT's layout, of another method."""
KIND = "converted"

_SHOWN = 50


@dataclass(frozen=True)
class Converted:
    """What a conversion did.

    Args:
        source: The format that was read.
        target: The format that was written.
        out: The file or folder that was written.
        adapter: What it holds.
        proof: The files as written, read again, against what was to be written.
        made: Module path to the error that making LoRA of another method brought; empty where nothing was made.
        notes: What was done besides, a line each.
    """

    source: str
    target: str
    out: Path
    adapter: Adapter
    proof: Difference
    made: Mapping[str, float]
    notes: tuple[str, ...]


def convert(
    path: str | Path,
    to: str,
    out: str | Path,
    *,
    source: str | None = None,
    hints: Hints | None = None,
    rank: int | None = None,
    allow_pickle: bool = False,
    overwrite: bool = False,
) -> Converted:
    """Read an adapter in one format and write it in another, whole or not at all.

    Args:
        path: The file or folder to read.
        to: The format to write, see `files.formats.FORMATS`; or `lora`, which makes plain LoRA of LoHa, LoKr, VeRA and
            AdaLoRA, and of DoRA given the base and a rank, and writes it as PEFT does.
        out: The file or folder to write.
        source: The format to read; None recognises it.
        hints: What the files leave out.
        rank: With `to="lora"`, the highest rank of a module.
        allow_pickle: Open pickles, in a process of their own.
        overwrite: Put the result in the place of what is there.

    Raises:
        AdapterError: If the source cannot be read, the target cannot carry what it holds, or what was written would
            not do the same; every problem is listed, and nothing is left.
        OutputError: If the target exists, or cannot be written.

    Cost:
        Both adapters in memory; no delta is formed. The result is written twice, once to be read.

    Example:
        >>> import tempfile, torch
        >>> from veneer.adapter import LowRank
        >>> from veneer.config import LoRAConfig
        >>> pair = LowRank(torch.ones(2, 3), torch.ones(3, 2), scaling=2.0)
        >>> adapter = Adapter({"model.layers.0.self_attn.q_proj": pair}, LoRAConfig(rank=2, alpha=4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save_adapter(adapter, Path(folder) / "mine")
        ...     done = convert(Path(folder) / "mine", "kohya", Path(folder) / "mine.safetensors")
        >>> done.source, done.proof.worst
        ('peft', 0.0)
    """
    path, out, hints = Path(path), Path(out), hints or Hints()
    target = find_format("peft" if to == TO_LORA else to)
    if target.write is None:
        raise AdapterError(f"{to}: is only read; formats that are written: {', '.join(writable())}")
    if rank is not None and to != TO_LORA:
        raise AdapterError(f"rank: only --to {TO_LORA} makes other factors; to change a rank, use `veneer resize`")
    _check_hints(hints)
    _check_out(out, target, overwrite)
    origin = find_format(source) if source else recognise(path)
    if origin.is_pickle and not allow_pickle:
        raise AdapterError(
            f"{path}: a pickle can run any code; where you trust it, say --allow-pickle: it is opened in a process of"
            " its own that may do nothing but make tensors"
        )
    notes: list[str] = []
    adapter, made = _plain(origin.read(path, hints), to, rank, path, hints)
    adapter, hints = _placed(adapter, origin, target, hints, notes, path)
    adapter = _writable(adapter, notes)
    of = [{"file or folder": str(path), "format": origin.name}]
    proof = _write(adapter, target, out, hints, overwrite, lambda proof: _card(adapter, of, proof, made))
    return Converted(origin.name, target.name, out, adapter, proof, made, tuple(notes))


def _check_hints(hints: Hints) -> None:
    """Raise for hints that are misspelt, before any file is read."""
    choices = {"component": COMPONENTS, "fused": ("part", "whole"), "style": (*STYLES, *FAMILIES)}
    given = {"component": hints.component, "fused": hints.fused, "style": hints.style}
    problems = [
        f"{name}: expected one of {', '.join(choices[name])}, got {value!r}{did_you_mean(value, choices[name])}"
        for name, value in given.items()
        if value is not None and value not in choices[name]
    ]
    if problems:
        raise AdapterError("what is said of the adapter means nothing", problems)


def writable() -> list[str]:
    """Return the names of the formats that are written.

    Example:
        >>> "peft" in writable()
        True
    """
    return [one.name for one in FORMATS.values() if one.write is not None]


def _plain(
    read: Adapter | OtherAdapter, to: str, rank: int | None, path: Path, hints: Hints
) -> tuple[Adapter, Mapping[str, float]]:
    """Return what is to be written, plain LoRA where that was asked for, and what it cost to make it."""
    if isinstance(read, OtherAdapter):
        if to != TO_LORA:
            raise AdapterError(
                f"{path}: is {read.method}, which only its own format carries; make LoRA of it first: --to {TO_LORA}"
                " [--rank N]"
            )
        made = to_lora(read, rank=rank)
        return made.adapter, made.errors
    dora = [name for name, pair in read.modules.items() if pair.magnitude is not None]
    if to != TO_LORA or not dora:
        if rank is not None:
            raise AdapterError(f"{path}: is LoRA already; to change its rank, use `veneer resize`")
        return read, {}
    if hints.base is None or rank is None:
        raise AdapterError(
            f"{path}: has magnitudes (DoRA) in {len(dora)} modules: what they do depends on the base's weights and has"
            f" full rank; give --base DIR and --rank N"
        )
    made = dora_to_lora(read, _weights_of(hints.base, dora), rank=rank)
    return made.adapter, made.errors


def _weights_of(base: Checkpoint, paths: Sequence[str]) -> Callable[[str], Tensor]:
    """Return what reads the weight of a module from a base's files, under the names that they have there."""
    renamed = find_renaming([f"{path}.weight" for path in paths], base.tensors)
    return lambda path: read_tensor(base, renamed(f"{path}.weight"))


def _placed(
    adapter: Adapter, origin: Format, target: Format, hints: Hints, notes: list[str], path: Path
) -> tuple[Adapter, Hints]:
    """Return the adapter with the paths that the target needs: of one model, or of the parts of a pipeline."""
    paths = paths_of(adapter)
    components = components_in(paths)
    # Only a format that has parts means one by the first name; a model of its own may well call a module `prior`.
    inside = bool(components) and origin.has_components and all(component_of(one) for one in paths)
    if target.has_components:
        if not inside and hints.component is None and (found := likely_component(paths)):
            notes.append(f"component: {found}, by its paths")
            hints = replace(hints, component=found)
        return adapter, hints
    if not inside or hints.component is not None:
        return adapter, replace(hints, component=None)
    if len(components) > 1:
        raise AdapterError(
            f"{path}: holds parts of {', '.join(components)}, and {target.name} holds one model; say which: --component"
        )
    notes.append(f"component: {components[0]}, the only one; its paths are those of that model")
    return select(adapter, components[0], path), hints


def _writable(adapter: Adapter, notes: list[str]) -> Adapter:
    """Return the adapter with positive scalings: a sign, or a zero, goes into lora_B."""
    bad = [path for path, pair in adapter.modules.items() if pair.scaling <= 0]
    if not bad:
        return adapter
    notes.append(f"{len(bad)} scalings that were not positive are folded into lora_B")
    modules = {path: at_scaling(pair, 1.0) if path in bad else pair for path, pair in adapter.modules.items()}
    return replace(adapter, modules=modules)


def _check_out(out: Path, target: Format, overwrite: bool, fs: FileSystem = REAL) -> None:
    suffix = Path(target.file or "").suffix
    if suffix and out.suffix != suffix:
        raise OutputError(f"{out}: {target.name} is one file; expected a name that ends in {suffix}, as {target.file}")
    if not fs.exists(out):
        return
    if fs.is_folder(out) is (target.file is not None):
        raise OutputError(
            f"{out}: {target.name} is a {'file' if target.file else 'folder'}, and a"
            f" {'folder' if target.file else 'file'} is there; choose another name"
        )
    if not overwrite:
        raise OutputError(f"{out}: exists already; choose another name, or say --overwrite")


def _card(adapter: Adapter, of: Sequence[Mapping[str, object]], proof: Difference, made: Mapping[str, float]) -> str:
    """Return the README of what is written in PEFT's layout."""
    title = "Converted from another format; no module is further off than is said below."
    return made_card(adapter, title, of, {}, max(proof.worst, *made.values(), 0.0))


def _write(
    adapter: Adapter,
    target: Format,
    out: Path,
    hints: Hints,
    overwrite: bool,
    card: Callable[[Difference], str],
) -> Difference:
    """Write what reads back the same, and return the proof."""
    if target.write is None:
        raise AdapterError(f"{target.name}: is only read")
    files = target.write(adapter, hints)
    proof = _prove(adapter, target, files, out, hints)
    if problems := [
        *proof.problems,
        *(f"{path}: {error:.2e}" for path, error in proof.errors.items() if error > LIMIT),
    ]:
        raise AdapterError(
            f"{target.name}: the files would not do what the adapter does (relative errors above {LIMIT:g}, or more);"
            " nothing was written",
            shortened(problems, _SHOWN),
        )
    if target.name == "peft":
        save_adapter(adapter, out, card=card(proof), replace=overwrite)
    elif target.file is None:
        notes = {"format": target.name, "adapter": adapter.digest, "worst_error": proof.worst}
        commit_folder(out, files, kind=KIND, notes=notes, replace=overwrite)
    else:
        REAL.make_parents(out.absolute().parent)
        commit_file(out, files[target.file])
    return proof


def _prove(adapter: Adapter, target: Format, files: Mapping[str, Content], out: Path, hints: Hints) -> Difference:
    """Return how far the files, written beside the target and read by the format's reader, are from the adapter."""
    # By this name the next writer of the target removes it, should this one die.
    aside = out.absolute().parent / f".{out.name}.tmp-{secrets.token_hex(8)}"
    commit_folder(aside, files, kind=KIND)
    try:
        again = target.read(aside if target.file is None else aside / target.file, hints)
    except AdapterError as error:
        raise AdapterError(
            f"{target.name}: what was written could not be read again, so nothing is left: {error.message}",
            error.problems,
        ) from error
    finally:
        discard(aside)
    if not isinstance(again, Adapter):
        raise AdapterError(f"{target.name}: what was written reads as {again.method}")
    return compare_deltas(adapter, again)
