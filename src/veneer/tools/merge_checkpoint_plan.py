"""What a merge on files will do to which tensor, checked against the headers before anything is written."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from veneer.adapter import Adapter, LowRank, TokenRows
from veneer.config import LoRAConfig
from veneer.errors import AdapterError, BaseModelError, ConfigError
from veneer.factors import cat_ranks, conv_groups
from veneer.files.shards import Checkpoint, read_tensor
from veneer.files.tensors import DTYPE_NAMES
from veneer.names import did_you_mean
from veneer.nn.fitting import nonfinite
from veneer.ops.sample import sample_digest
from veneer.storage.plain import DTYPES as PLAIN
from veneer.tools.merge import check_mergeable
from veneer.tools.merge_checkpoint_names import find_renaming, split_names
from veneer.tools.merge_checkpoint_ties import Untied, find_untied, stored_twin

Shape = tuple[int, ...]

_BY_NAME = ("parameter", "experts", "experts_by_position", "attention_in", "attention_out")
_MATRIX = ("linear", "transposed", "parameter")


@dataclass(frozen=True, eq=False)
class Work:
    """What is done to one tensor of the files: one of an update, rows, a whole new value, or a copy of another one.

    Args:
        path: What the adapter calls it.
        source: The stored tensor that it is made from.
        pair: The update, in the form that fits what is stored.
        swapped: Whether stacked experts are stored (E, I, O).
        rows: Rows that are put in.
        whole: Its new value.
    """

    path: str
    source: str
    pair: LowRank | None = None
    swapped: bool = False
    rows: TokenRows | None = None
    whole: Tensor | None = None


@dataclass(frozen=True)
class Plan:
    """What a merge on files will do.

    Args:
        works: By the name of the tensor that is written.
        untied: The head that gets a tensor of its own, or whose configuration said that it has none.
    """

    works: Mapping[str, Work]
    untied: Untied | None


def sum_adapters(parts: Sequence[tuple[Adapter, float]]) -> Adapter:
    """Return the one adapter whose update is the weighted sum of several: `Σ weight · scaling · B A`, exactly.

    Ranks are put side by side, scaling and weight go into lora_B in float64. `combine` gives an adapter to keep,
    rounded to the dtype of its factors; here nothing is rounded before the merge rounds once.

    Raises:
        AdapterError: If an adapter to be weighted or added has a magnitude (DoRA), or what trained whole: there is no
            sum of those; or two adapt one module in unlike forms.

    Example:
        >>> pair = LowRank(torch.ones(1, 2), torch.ones(3, 1), 2.0)
        >>> one = Adapter({"q": pair}, LoRAConfig(rank=1))
        >>> both = sum_adapters([(one, 1.0), (one, -0.5)])
        >>> both.modules["q"].rank, torch.equal(both.modules["q"].delta(), 0.5 * pair.delta())
        (2, True)
    """
    if len(parts) == 1 and parts[0][1] == 1.0:
        return parts[0][0]
    problems = [line for number, (one, _) in enumerate(parts, 1) for line in _no_sum(one, number)]
    forms: dict[str, str] = {}
    for adapter, _ in parts:
        for path, pair in adapter.modules.items():
            if forms.setdefault(path, pair.form) != pair.form:
                problems.append(f"{path}: is of form {forms[path]!r} in one adapter and {pair.form!r} in another")
    if problems:
        raise AdapterError("these adapters cannot be weighted and added (nothing was written)", problems)
    modules = {}
    for path, form in forms.items():
        found = [(one.modules[path], weight) for one, weight in parts if path in one.modules]
        factors = [(pair.lora_A.double(), weight * pair.scaling * pair.lora_B.double()) for pair, weight in found]
        modules[path] = LowRank(*cat_ranks(form, factors), 1.0, form)
    carried = dict.fromkeys(pair for one, _ in parts for pair in one.metadata.base_weights)
    metadata = replace(parts[0][0].metadata, base_weights=tuple(carried))
    return Adapter(modules, LoRAConfig(rank=max(one.rank for one in modules.values())), metadata=metadata)


def _no_sum(adapter: Adapter, number: int) -> Iterator[str]:
    if adapter.config.invocation_tokens:
        yield f"adapter {number}: invocation_tokens: it acts from its invocation on only"
    for path, pair in adapter.modules.items():
        if pair.magnitude is not None:
            yield f"adapter {number}: {path}: has a magnitude (DoRA); convert it to plain LoRA first"
    for path in [*adapter.trained, *adapter.tokens]:
        yield f"adapter {number}: {path}: was trained whole, which has no weight; merge this adapter alone"


def make_plan(checkpoint: Checkpoint, adapter: Adapter, *, any_base: bool) -> Plan:
    """Return what a merge will do; nothing is written.

    Raises:
        AdapterError: If something of the adapter has no place in the files, or does not fit it; everything at once.
        BaseModelError: If the files hold quantised weights.
        TargetError: If a tie cannot be undone in a saved configuration.
    """
    check_mergeable(adapter)
    if problems := nonfinite(adapter):
        raise AdapterError("the adapter is not finite (nothing was written)", problems)
    names = checkpoint.tensors
    untied = find_untied(checkpoint, adapter)
    head = untied.head if untied is not None else None
    wanted = {path: _wanted(path, pair, names) for path, pair in adapter.modules.items()}
    every = [*(name for one in wanted.values() for name in one), *adapter.trained]
    every += [f"{path}.weight" for path in adapter.tokens]
    rule = find_renaming([name for name in every if name != head], list(names))

    def place(name: str) -> str:
        return name if name in names or name == head else rule(name)

    works: dict[str, Work] = {}
    problems = []
    turned = _turned(adapter, wanted, place, names, untied)
    for path, tensors in wanted.items():
        pair, sources = adapter.modules[path], [_source(place(name), untied) for name in tensors]
        if tensors[0] not in (path, f"{path}.weight"):
            problems += _split(path, pair, [place(name) for name in tensors], checkpoint, works)
            continue
        fitted = _fitted(path, pair, names[sources[0]].shape, place, names, turned)
        if isinstance(fitted, str):
            problems.append(fitted)
        else:
            problems += _put(works, place(tensors[0]), Work(path, sources[0], *fitted))
    problems += _add_trained(adapter, place, checkpoint, works, untied)
    if problems := problems or _other_base(checkpoint, adapter, place, any_base):
        raise AdapterError("the adapter does not fit the files (nothing was written)", problems)
    if untied is not None and not untied.stored and untied.head not in works:
        works[untied.head] = Work(untied.head, _source(untied.head, untied))
    _refuse_quantised(checkpoint, works)
    return Plan(works, untied)


def _wanted(path: str, pair: LowRank, names: Mapping[str, Any]) -> list[str]:
    """Return the names of the tensors that a module's update belongs to, as the model would call them."""
    if pair.form not in _BY_NAME:
        return [f"{path}.weight"]
    split = split_names(path, len(pair.lora_A)) if pair.form.startswith("experts") else []
    tails = {".".join(name.split(".")[-4:]) for name in names}
    # Older files hold a matrix for each expert.
    return split if split and ".".join(split[0].split(".")[-4:]) in tails else [path]


def _put(works: dict[str, Work], name: str, work: Work) -> Iterator[str]:
    """Add a tensor's work; yield a line where it has some already: of two only one would land."""
    if name in works:
        yield f"{work.path}: changes {name}, as {works[name].path} does; one of them would be lost"
    works[name] = work


def _source(name: str, untied: Untied | None) -> str:
    return untied.table if untied is not None and name == untied.head and not untied.stored else name


def _turned(
    adapter: Adapter, wanted: Mapping[str, list[str]], place: Any, names: Mapping[str, Any], untied: Untied | None
) -> set[str]:
    """Return the forms among those of matrices of which some are stored the other way round than they say."""
    found = set()
    for path, pair in adapter.modules.items():
        if pair.form in _MATRIX and pair.sizes[0] != pair.sizes[1]:
            shape = names[_source(place(wanted[path][0]), untied)].shape
            if shape == (pair.sizes[:: 1 if pair.form == "transposed" else -1]):
                found.add(pair.form)
    return found


def _fitted(
    path: str, pair: LowRank, shape: Shape, place: Any, names: Mapping[str, Any], turned: set[str]
) -> tuple[LowRank, bool] | str:
    """Return a pair in the form that fits a stored shape, and whether experts are stored (E, I, O); or why not."""
    out, size = pair.sizes
    misfit = f"{path}: the files hold {shape}, the adapter is for (out, in) = {(out, size)}"
    form = pair.form
    if form in _MATRIX:
        ways = [one for one, fits in (("linear", (out, size)), ("transposed", (size, out))) if shape == fits]
        if len(ways) == 2:
            if form in turned:
                return (
                    f"{path}: is square, and other modules of this adapter are stored the other way round than it says "
                    f"({form}); which way round this one is cannot be told from files: merge it into the loaded model"
                )
            ways = [form if form != "parameter" else "linear"]
        return (replace(pair, form=ways[0]), False) if ways else misfit
    if form.startswith("attention"):
        return (replace(pair, form="linear"), False) if shape == (out, size) else misfit
    if form == "embedding":
        return (pair, False) if shape == (size, out) else misfit
    if form == "conv":
        return (pair, False) if shape == (out, *pair.lora_A.shape[1:]) else misfit
    if form == "conv_transpose":
        groups = conv_groups(pair.lora_A, pair.lora_B)
        inputs = pair.lora_A.shape[1] * groups
        return (pair, False) if shape == (inputs, out // groups, *pair.lora_A.shape[2:]) else misfit
    return _fitted_experts(path, pair, shape, place, names) or misfit


def _fitted_experts(
    path: str, pair: LowRank, shape: Shape, place: Any, names: Mapping[str, Any]
) -> tuple[LowRank, bool] | str | None:
    count, (out, size) = len(pair.lora_A), pair.sizes
    if pair.form == "experts_by_position":  # A runs over the first axis of what is stored, whichever that is
        first, second = pair.lora_A.shape[2], pair.lora_B.shape[1]
        return (replace(pair, form="experts"), True) if shape == (count, first, second) else None
    ways = [swapped for swapped in (False, True) if shape == (count, *((size, out) if swapped else (out, size)))]
    if len(ways) == 2:
        beside = names.get(place(f"{path.rpartition('.')[0]}.gate_up_proj"))
        if beside is None or beside.shape[1] == beside.shape[2]:
            return f"{path}: its matrices are square; which way round they are stored cannot be told from files"
        ways = [beside.shape[1] < beside.shape[2]]
    return (pair, ways[0]) if ways else None


def _split(
    path: str, pair: LowRank, tensors: Sequence[str], checkpoint: Checkpoint, works: dict[str, Work]
) -> Iterator[str]:
    """Add the work on the matrices of single experts that a stacked parameter's update belongs to."""
    if pair.form == "experts_by_position":
        yield (
            f"{path}: its factors are by position (PEFT before 0.19), and the files hold a matrix for each expert; "
            "attach it to its model, detach, save that"
        )
        return
    each = len(tensors) // len(pair.lora_A)
    rows = pair.sizes[0] // each
    for number, name in enumerate(tensors):
        expert, part = divmod(number, each)
        B = pair.lora_B[expert, part * rows : (part + 1) * rows]
        shape = checkpoint.tensors[name].shape
        if pair.sizes[0] % each or shape != (rows, pair.sizes[1]):
            yield f"{path}: the files hold {name} {shape}, the adapter is for {(rows, pair.sizes[1])} of each expert"
        yield from _put(works, name, Work(path, name, LowRank(pair.lora_A[expert], B, pair.scaling)))


def _add_trained(
    adapter: Adapter, place: Any, checkpoint: Checkpoint, works: dict[str, Work], untied: Untied | None
) -> Iterator[str]:
    """Add the work on what trained whole, and on rows of tokens."""
    for path, value in adapter.trained.items():
        name = place(path)
        source = _source(name, untied)
        shape = checkpoint.tensors[source].shape
        if shape != tuple(value.shape):
            yield f"{path}: the files hold {shape}, the adapter {tuple(value.shape)}"
        yield from _put(works, name, Work(path, source, whole=value))
    for path, tokens in adapter.tokens.items():
        name = place(f"{path}.weight")
        shape = checkpoint.tensors[name].shape
        if len(shape) != 2:
            yield f"{path}: the files hold {shape}, which is no table"
            continue
        rows, size = shape
        if tokens.rows.shape[1] != size:
            yield f"{path}: the table's rows have {size} values, the adapter's {tokens.rows.shape[1]}"
        if outside := [index for index in tokens.indices if index >= rows]:
            yield f"{path}: rows {outside[:5]} lie outside of the table's {rows}"
        if name in works or (untied is not None and untied.table == name):
            yield f"{path}: it, or the head tied to it, is adapted by factors too; choose one"
        for one in (name, *stored_twin(checkpoint, name)):
            works[one] = Work(path, one, rows=tokens)


def _other_base(checkpoint: Checkpoint, adapter: Adapter, place: Any, any_base: bool) -> list[str]:
    """Return where the files hold other values than the base weights that the adapter's file carries along."""
    if any_base:
        return []
    problems = []
    for path, digest in adapter.metadata.base_weights:
        name = place(f"{path}.weight")
        if name in checkpoint.tensors and sample_digest(read_tensor(checkpoint, name)) != digest:
            problems.append(
                f"{name}: the adapter's file carries other values: it was made for another base (any_base=True, or "
                "--any-base, merges all the same)"
            )
    return problems


def _refuse_quantised(checkpoint: Checkpoint, works: Mapping[str, Work]) -> None:
    plain = {DTYPE_NAMES[dtype] for dtype in PLAIN}
    problems = [
        f"{one.source}: is stored as {checkpoint.tensors[one.source].dtype}"
        for one in works.values()
        if checkpoint.tensors[one.source].dtype not in plain
    ]
    if problems:
        raise BaseModelError(
            f"{checkpoint.folder}: holds quantised weights, which a merge would round (nothing was written); merge "
            "into the base in full precision and quantise that",
            problems[:20],
        )


def refuse_quantised_config(folder: str, config: Mapping[str, Any]) -> None:
    """Raise where a configuration says that the weights are quantised.

    Raises:
        BaseModelError: Then.

    Example:
        >>> refuse_quantised_config("base", {"model_type": "llama"})
    """
    found = config.get("quantization_config")
    if found:
        method = found.get("quant_method", "some method") if isinstance(found, Mapping) else "some method"
        raise BaseModelError(
            f"{folder}: its weights are quantised ({method}); merge into the base in full precision and quantise that, "
            "or load it and use merge(model, adapter, quantised=…)"
        )


def dtype_of(name: str | torch.dtype | None) -> torch.dtype | None:
    """Return a plain floating dtype by its name; None stays None.

    Raises:
        ConfigError: If it is none.

    Example:
        >>> dtype_of("bfloat16")
        torch.bfloat16
    """
    known = {str(dtype).removeprefix("torch."): dtype for dtype in PLAIN}
    if name is None:
        return None
    word = str(name).removeprefix("torch.")
    if word not in known:
        raise ConfigError(f"dtype must be one of {', '.join(known)}, got {word!r}{did_you_mean(word, known)}")
    return known[word]
