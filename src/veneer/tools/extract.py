"""A LoRA taken out of two checkpoints: what a fine-tuned one has more than its base, tensor by tensor.

Shapes: O out, I in, R rank.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from veneer.adapter import Adapter, AdapterMetadata, LowRank
from veneer.config import LoRAConfig
from veneer.errors import AdapterError, BaseModelError, ConfigError, shortened
from veneer.files.filesystem import REAL, FileSystem
from veneer.files.peft_values import MAX_RANK
from veneer.files.pieces import OnBytes
from veneer.files.shards import Checkpoint, read_checkpoint, read_tensor
from veneer.names import did_you_mean
from veneer.ops.initialise_svd import truncated_svd
from veneer.storage.plain import DTYPES as PLAIN
from veneer.tools.made_card import made_card
from veneer.tools.merge_checkpoint_plan import refuse_quantised_config

Others = Literal["list", "keep", "refuse"]

EXACT = 512
"""Up to this smaller side a matrix is decomposed exactly, in float64."""
_ITERATIONS = 4
_FIRST = 8
_SHOWN = 20
_TABLE = re.compile(r"(embed(?!_out)|wte|wpe|word_emb|position_emb|shared$)", re.IGNORECASE)


@dataclass(frozen=True)
class ExtractedModule:
    """What was taken of one weight.

    Args:
        path: Path of the module.
        form: Form of its factors.
        shape: (out, in).
        rank: Of the factors.
        change: ‖tuned − base‖ / ‖base‖, Frobenius norms.
        energy: Share of ‖tuned − base‖² that the factors hold.
        error: ‖tuned − base − update‖ / ‖tuned − base‖, measured with the factors as they are stored.
    """

    path: str
    form: str
    shape: tuple[int, int]
    rank: int
    change: float
    energy: float
    error: float


@dataclass(frozen=True)
class LeftOut:
    """A tensor that differs and that no factors hold.

    Args:
        name: Its name in the files.
        shape: Its shape.
        reason: Why.
    """

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Extraction:
    """An adapter, and what it holds of the difference of two checkpoints.

    Args:
        adapter: The adapter.
        modules: What was taken of each weight.
        left_out: Tensors that differ and are not in the adapter.
        unchanged: How many tensors are the same.
        error: ‖difference − updates‖ / ‖difference‖ over all weights that were factored.
    """

    adapter: Adapter
    modules: tuple[ExtractedModule, ...]
    left_out: tuple[LeftOut, ...]
    unchanged: int
    error: float

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values, the adapter by its digest."""
        return {
            "digest": self.adapter.digest,
            "num_bytes": self.adapter.num_bytes,
            "relative_error": self.error,
            "modules": [_module_json(one) for one in self.modules],
            "trained": list(self.adapter.trained),
            "left_out": [asdict(one) for one in self.left_out],
            "num_unchanged": self.unchanged,
        }

    def card(self, base: str, tuned: str) -> str:
        """Return the README of the adapter, by the names that the two checkpoints go by."""
        rows = [{"role": "base", "checkpoint": base}, {"role": "fine-tuned", "checkpoint": tuned}]
        return made_card(self.adapter, "Extracted from a fine-tuned model.", rows, {}, self.error)


def _module_json(one: ExtractedModule) -> dict[str, Any]:
    told = asdict(one)
    figures = {"kept": told.pop("energy"), "relative_error": told.pop("error")}
    return told | figures


@dataclass
class _Found:
    """What was taken so far."""

    pairs: dict[str, LowRank] = field(default_factory=dict)
    modules: list[ExtractedModule] = field(default_factory=list)
    trained: dict[str, Tensor] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)
    unchanged: int = 0
    total2: float = 0.0
    error2: float = 0.0


def extract(
    base: str | Path,
    tuned: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    others: Others = "list",
    base_name: str | None = None,
    on_bytes: OnBytes | None = None,
    fs: FileSystem = REAL,
) -> Extraction:
    """Return the adapter that is nearest to what a fine-tuned checkpoint has more than its base.

    For each matrix that differs, with U S V the leading singular triples of `tuned - base`:

        lora_B, lora_A = U * sqrt(S), sqrt(S)[:, None] * V      # scaling 1

    which is the nearest of that rank. Convolutions are taken as matrices of their outputs; tables (named `embed…`,
    `wte` or `wpe`) in the form of an embedding. Matrices whose bias has the size of the second axis are stored the
    other way round (transformers' Conv1D).

    Args:
        base: Folder of the base.
        tuned: Folder of the fine-tuned model: the same tensors in the same shapes.
        rank: Of each module's factors, at most what its shape allows.
        energy: Instead of a rank: the smallest for each module that holds this share of ‖tuned − base‖².
        others: What is done with tensors that differ and are no matrices (norms, biases): "list" leaves them out and
            says so, "keep" puts them in whole, "refuse" raises.
        base_name: What the adapter calls its base; None is the folder.
        on_bytes: Told how many bytes of the base were read, as they are.
        fs: Where both lie.

    Raises:
        ConfigError: If not exactly one of rank and energy is given, or it is out of range.
        BaseModelError: If one checkpoint has tensors or shapes that the other has not, or is quantised.
        AdapterError: If a difference is not finite, nothing differs, or `others` says so.

    Cost:
        Memory: the factors, and some copies of the largest tensor in float32. Time: reading both; for each large matrix
        some 40·O·I·(2·R + 10) operations, for one whose smaller side is at most 512 an exact decomposition.

    Example:
        extract("models/llama", "models/llama-tuned", rank=16).error

    Source:
        Eckart and Young 1936 for the nearest; Halko, Martinsson, Tropp 2011, arXiv:0909.4061, for large matrices.
    """
    choose = _choice(rank, energy)
    if others not in get_args(Others):
        raise ConfigError(f"others must be one of {', '.join(get_args(Others))}, got {others!r}")
    first, second = (_read(Path(folder), fs) for folder in (base, tuned))
    _check_alike(first, second)
    turned = _are_turned(first)
    found = _Found()
    for name, place in first.tensors.items():
        before, after = (read_tensor(one, name, fs=fs) for one in (first, second))
        if on_bytes is not None:
            on_bytes(place.size)
        if before.dtype == after.dtype and torch.equal(before, after):
            found.unchanged += 1
        else:
            _take(name, before, after, first, turned, choose, found)
    return _extraction(found, others, base_name or str(base))


@dataclass(frozen=True)
class _Choice:
    """How many singular triples are taken: a number, or as many as hold a share of the energy."""

    rank: int | None
    energy: float | None

    def __call__(self, S: Tensor, total: float) -> int | None:
        """Return the rank for the leading singular values and ‖delta‖²; None where more of them are needed."""
        if self.rank is not None:
            return self.rank if len(S) >= self.rank else None
        share = self.energy or 0.0
        enough = (S.double().square().cumsum(0) >= share * total * (1 - 1e-7)).nonzero()
        return int(enough[0]) + 1 if len(enough) else None


def _choice(rank: int | None, energy: float | None) -> _Choice:
    if (rank is None) == (energy is None):
        raise ConfigError("give rank or energy, one of them")
    if rank is not None and not 1 <= rank <= MAX_RANK:
        raise ConfigError(f"rank: expected a whole number from 1 to {MAX_RANK}, got {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"energy: expected a number above 0 and at most 1, got {energy}")
    return _Choice(rank, energy)


def _read(folder: Path, fs: FileSystem) -> Checkpoint:
    checkpoint = read_checkpoint(folder, fs=fs)
    refuse_quantised_config(str(folder), checkpoint.config)
    return checkpoint


def _check_alike(first: Checkpoint, second: Checkpoint) -> None:
    problems = [
        f"{name!r}: only in {one.folder}{did_you_mean(name, other.tensors)}"
        for one, other in ((first, second), (second, first))
        for name in one.tensors
        if name not in other.tensors
    ]
    problems += [
        f"{name!r}: {place.shape} in {first.folder}, {second.tensors[name].shape} in {second.folder}"
        for name, place in first.tensors.items()
        if name in second.tensors and second.tensors[name].shape != place.shape
    ]
    if problems:
        raise BaseModelError("these are no two states of one model; a LoRA cannot say that", shortened(problems, 20))


def _are_turned(checkpoint: Checkpoint) -> bool:
    """Tell whether matrices are stored (I, O): some bias has the size of the second axis alone."""
    shapes = checkpoint.shapes
    for name, shape in shapes.items():
        bias = shapes.get(f"{name.removesuffix('.weight')}.bias")
        if len(shape) == 2 and bias is not None and bias == shape[1:] and shape[0] != shape[1]:
            return True
    return False


def _take(
    name: str,
    before: Tensor,
    after: Tensor,
    checkpoint: Checkpoint,
    turned: bool,
    choose: _Choice,
    found: _Found,
) -> None:
    """Take what one tensor has more: factors, or a line that says why not."""
    form = _form(name, checkpoint, turned)
    if before.dtype not in PLAIN or after.dtype not in PLAIN:
        found.left_out.append(LeftOut(name, tuple(before.shape), f"is stored as {before.dtype}"))
        return
    if form is None:
        found.left_out.append(LeftOut(name, tuple(before.shape), _why_not(name, checkpoint)))
        found.trained[name] = after
        return
    wide = torch.promote_types(torch.promote_types(before.dtype, after.dtype), torch.float32)
    weight = torch.linalg.vector_norm(before, dtype=torch.float64).item()
    delta = after.to(wide) - before.to(wide)
    if not bool(torch.isfinite(delta).all()):
        raise AdapterError(f"{name}: the difference is not finite: check both checkpoints")
    total = torch.linalg.vector_norm(delta, dtype=torch.float64).item() ** 2
    if not total:  # the same numbers in another dtype
        found.unchanged += 1
        return
    path = name.removesuffix(".weight")
    matrix_OI = delta.T if form in ("transposed", "embedding") else delta.flatten(1)
    U, S, Vh = _decompose(matrix_OI, total, choose)
    A, B = (S.sqrt()[:, None] * Vh).float(), (U * S.sqrt()).float()
    error2 = _distance2(matrix_OI, A, B)
    found.total2, found.error2 = found.total2 + total, found.error2 + error2
    if form == "conv":
        A, B = A.unflatten(1, delta.shape[1:]), B.reshape(*B.shape, *(1,) * (delta.ndim - 2))
    found.pairs[path] = LowRank(A, B, 1.0, form)
    sizes = (matrix_OI.shape[0], matrix_OI.shape[1])
    change = math.sqrt(total) / weight if weight else math.inf
    found.modules.append(
        ExtractedModule(path, form, sizes, len(S), change, max(0.0, 1 - error2 / total), math.sqrt(error2 / total))
    )


def _form(name: str, checkpoint: Checkpoint, turned: bool) -> str | None:
    shape, path = checkpoint.tensors[name].shape, name.removesuffix(".weight")
    if path == name or 0 in shape or not 2 <= len(shape) <= 5:
        return None
    if len(shape) > 2:
        return "conv"
    if _TABLE.search(path.rpartition(".")[2]):
        return None if _is_tied_table(name, checkpoint) else "embedding"
    bias = checkpoint.shapes.get(f"{path}.bias")
    return "transposed" if turned and bias is not None and bias == shape[1:] else "linear"


def _is_tied_table(name: str, checkpoint: Checkpoint) -> bool:
    """Tell whether a table is a head too: the configuration does not deny it, and no other tensor has its shape."""
    config, shape = checkpoint.config, checkpoint.tensors[name].shape
    text = config.get("text_config")
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings") if isinstance(text, dict) else None)
    alone = sum(place.shape == shape for place in checkpoint.tensors.values()) == 1
    heads = any(str(one).endswith(("LM", "LMHeadModel", "ForConditionalGeneration")) for one in _classes(config))
    return alone and heads and tied is not False and shape[0] == config.get("vocab_size", shape[0])


def _classes(config: Mapping[str, Any]) -> Sequence[object]:
    found = config.get("architectures")
    return found if isinstance(found, list) else []


def _why_not(name: str, checkpoint: Checkpoint) -> str:
    shape = checkpoint.tensors[name].shape
    if len(shape) == 1:
        return "is a vector"
    if len(shape) == 2 and name.endswith(".weight"):
        return "is a table tied to the head, which factors of the table alone would not change"
    return f"is no weight of a layer, but {'a stack of matrices' if len(shape) > 2 else 'a parameter'} of its own"


def _decompose(matrix_OI: Tensor, total: float, choose: _Choice) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular triples that are asked for: exactly of a small matrix, else by random sketches."""
    small = min(matrix_OI.shape)
    count = choose.rank or _FIRST
    while small > EXACT and count <= small // 4:
        U, S, Vh = truncated_svd(matrix_OI, count, niter=_ITERATIONS)
        rank = choose(S, total)
        if rank is not None:
            return U[:, :rank], S[:rank], Vh[:rank]
        count *= 2
    U, S, Vh = truncated_svd(matrix_OI.double() if small <= EXACT else matrix_OI, small)
    rank = choose(S, total) or small
    return U[:, :rank], S[:rank], Vh[:rank]


def _distance2(matrix_OI: Tensor, A_RI: Tensor, B_OR: Tensor) -> float:
    """Return ‖M − B A‖², a few rows at a time."""
    step, found = max(1, (1 << 20) // matrix_OI.shape[1]), 0.0
    A = A_RI.double()
    for start in range(0, len(matrix_OI), step):
        rows = slice(start, start + step)
        found += torch.linalg.vector_norm(matrix_OI[rows].double() - B_OR[rows].double() @ A).item() ** 2
    return found


def _extraction(found: _Found, others: Others, base: str) -> Extraction:
    if not found.pairs:
        lines = [f"{one.name}: {one.reason}" for one in found.left_out]
        raise AdapterError(
            "no matrix differs between the two checkpoints: there is nothing to extract", shortened(lines, _SHOWN)
        )
    left_out, trained, config = found.left_out, {}, {}
    if others == "refuse" and left_out:
        raise AdapterError(
            "tensors differ that factors cannot hold; others='keep' puts them in whole, 'list' leaves them out",
            shortened([f"{one.name}: {one.reason}" for one in left_out], _SHOWN),
        )
    if others == "keep":
        trained = {name: value for name, value in found.trained.items() if value.ndim == 1}
        left_out = [one for one in left_out if one.name not in trained]
        config = _settings(trained, found.pairs)
    ranks = {path: pair.rank for path, pair in found.pairs.items()}
    most = max(ranks.values())
    odd = {re.escape(path): rank for path, rank in ranks.items() if rank != most}
    if any(pair.form == "transposed" for pair in found.pairs.values()):
        # PEFT's file says it for all matrices at once; layers take both words for the same function.
        for path, pair in found.pairs.items():
            if pair.form == "linear":
                found.pairs[path] = LowRank(pair.lora_A, pair.lora_B, 1.0, "transposed")
    settings = LoRAConfig(
        rank=most,
        alpha=float(most),
        rank_pattern=odd,
        alpha_pattern={path: float(rank) for path, rank in odd.items()},
        target_modules=tuple(found.pairs),
        **config,
    )
    adapter = Adapter(found.pairs, settings, trained, AdapterMetadata(base=base))
    error = math.sqrt(found.error2 / found.total2)
    return Extraction(adapter, tuple(found.modules), tuple(left_out), found.unchanged, error)


def _settings(trained: Mapping[str, Tensor], pairs: Mapping[str, LowRank]) -> dict[str, Any]:
    """Return what a configuration says of parameters that are put in whole."""
    own = [path for path in trained if path.endswith(".bias") and path.removesuffix(".bias") in pairs]
    modules = tuple(dict.fromkeys(path.rpartition(".")[0] for path in trained if path not in own))
    return {"bias": "lora_only" if own else "none", "modules_to_save": modules}
