"""What is suspicious about an adapter that can be read: in its configuration, its names and its dtypes."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from veneer.adapter import Adapter
from veneer.errors import AdapterError, several
from veneer.files.doctor_codes import Finding
from veneer.files.doctor_files import Place, convert_command
from veneer.files.manifest import MANIFEST
from veneer.files.patterns import divisor, resolve
from veneer.files.peft_folder import CONFIG, TENSORS
from veneer.files.peft_layout import owner_of
from veneer.names import did_you_mean

USUAL_SCALING = (1 / 128, 16.0)
TIED = ("embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out", "tok_embeddings", "shared")
"""What bases call an input table or a head that can be tied to it."""
_LOCAL = re.compile(r"^(?:/|~|\.{1,2}/|[A-Za-z]:[\\/]|\\\\)")

Raw = Mapping[str, Any]


def patterns_without_module(adapter: Adapter, raw: Raw, place: Place) -> Iterator[Finding]:  # noqa: ARG001
    """Find keys of patterns that decide for no module: no path matches, or an earlier key comes first."""
    owners = {owner_of(path, pair.form) for path, pair in adapter.modules.items()}
    leaves = {path.rpartition(".")[2] for path in owners}
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = raw.get(name) or {}
        try:
            used = set(resolve(owners, {key: key for key in patterns}, "").values())
        except AdapterError:  # it takes too long; `load_adapter` took the same way, so it will not
            continue
        for key in sorted(set(patterns) - used):
            yield Finding("V210", f"{CONFIG}: {name}", f"{key!r} decides for no module{did_you_mean(key, leaves)}")


def targets_without_module(adapter: Adapter, raw: Raw, place: Place) -> Iterator[Finding]:  # noqa: ARG001
    """Find names in `target_modules` of which there are no factors."""
    targets = raw.get("target_modules")
    if not isinstance(targets, list) or not adapter.modules:
        return
    ends: set[str] = set()
    for path, pair in adapter.modules.items():
        parts = owner_of(path, pair.form).split(".")
        ends |= {".".join(parts[start:]) for start in range(len(parts))}
    for one in sorted({one for one in targets if isinstance(one, str)} - ends):
        yield Finding("V211", f"{CONFIG}: target_modules", f"{one!r}: the file has no factors of such a module")


def unusual_scaling(adapter: Adapter, raw: Raw, place: Place) -> Iterator[Finding]:  # noqa: ARG001
    """Find scalings far from what people use."""
    least, most = USUAL_SCALING
    far = {path: pair for path, pair in adapter.modules.items() if not least <= abs(pair.scaling) <= most}
    for scaling in dict.fromkeys(pair.scaling for pair in far.values()):
        alike = [path for path, pair in far.items() if pair.scaling == scaling]
        yield Finding("V212", several(alike), f"scaling {scaling:.4g}, usual is {least:.3g} to {most:g}")


def rank_stabilised(adapter: Adapter, raw: Raw, place: Place) -> Iterator[Finding]:  # noqa: ARG001
    """Find rsLoRA."""
    if raw.get("use_rslora") is True and adapter.modules:
        rank, alpha = adapter.config.rank, adapter.config.alpha
        yield Finding(
            "V213",
            CONFIG,
            f"use_rslora: scaling {alpha / divisor(rank, True):.4g}, alpha / rank would be {alpha / rank:.4g}",
        )


def base_said(adapter: Adapter, raw: Raw, place: Place) -> Iterator[Finding]:  # noqa: ARG001
    """Find that no base is named, or one that only another machine has."""
    base = adapter.metadata.base
    if not base:
        yield Finding("V214", CONFIG, "base_model_name_or_path is empty")
    elif _LOCAL.match(base):
        yield Finding("V215", CONFIG, f"base_model_name_or_path is {base!r}")


def several_dtypes(adapter: Adapter, raw: Raw, place: Place) -> Iterator[Finding]:  # noqa: ARG001
    """Find tensors of different dtypes."""
    dtypes = Counter(str(one.dtype).removeprefix("torch.") for one in adapter.tensors().values())
    if len(dtypes) > 1:
        yield Finding("V309", TENSORS, ", ".join(f"{count} of {dtype}" for dtype, count in dtypes.most_common()))


def carried_weights(adapter: Adapter, raw: Raw, place: Place) -> Iterator[Finding]:  # noqa: ARG001
    """Find base weights that PEFT saved along; of what we write only the manifest speaks of them, by their digests."""
    paths = [path for path, _ in adapter.metadata.base_weights]
    if paths and MANIFEST not in place.files:
        command = convert_command(place)
        yield Finding("V310", TENSORS, f"the base's own weights of {several(paths, 3)}", command)


def tables_and_heads(adapter: Adapter, raw: Raw, place: Place) -> Iterator[Finding]:  # noqa: ARG001
    """Find updates of input tables and heads, which a base may tie."""
    trained = {path.rpartition(".")[0] for path in adapter.trained}
    for paths, how in ((adapter.modules, "adapted"), (trained, "trained whole")):
        for path in sorted(path for path in paths if path.rpartition(".")[2] in TIED):
            yield Finding("V312", path, f"{how}; check it with --base, which shows whether that base ties it")


def old_experts(adapter: Adapter, raw: Raw, place: Place) -> Iterator[Finding]:  # noqa: ARG001
    """Find experts in the layout of PEFT before 0.19."""
    paths = [path for path, pair in adapter.modules.items() if pair.form == "experts_by_position"]
    if paths:
        version = raw.get("peft_version") or "before 0.18"
        yield Finding("V315", several(paths), f"written by PEFT {version}")


SUSPICIONS: tuple[Callable[[Adapter, Raw, Place], Iterator[Finding]], ...] = (
    patterns_without_module,
    targets_without_module,
    unusual_scaling,
    rank_stabilised,
    base_said,
    several_dtypes,
    carried_weights,
    tables_and_heads,
    old_experts,
)
"""What is looked for in an adapter that can be read; a new one is a function and its name here."""
