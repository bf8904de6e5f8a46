"""Why layers cannot be adapted, or not as asked: one line for each reason, before anything is touched."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from veneer.config import LoRAConfig
from veneer.names import pattern_matches
from veneer.nn.kinds import why_not
from veneer.ops.initialise import initialisation_named

if TYPE_CHECKING:
    from veneer.nn.targets import Target

_NEEDS = {"nothing": None, "weight": "weight", "full_weight": "weight", "inputs": "data", "gradient": "data"}


def unfit_layers(modules: Mapping[str, nn.Module], wanted: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Yield a line for each reason why targets cannot be adapted, with the first path and the count.

    Args:
        modules: The model's modules by path.
        wanted: Path of the module and name of the parameter in it, or an empty name.
    """
    by_reason: dict[str, list[str]] = {}
    bypassed = bypassed_layers(modules)
    for owner, member in wanted:
        reason = why_not(modules[owner], member)
        if not owner:
            reason = "belongs to the model itself; only what lies in a module of the model can be adapted"
        if owner in bypassed:
            reason = "is read by the fused kernel of nn.TransformerEncoderLayer, which never calls it in evaluation"
        if reason is not None:
            by_reason.setdefault(reason, []).append(f"{owner}.{member}".strip("."))
    for reason, paths in by_reason.items():
        more = f" (and {len(paths) - 1} more like it)" if len(paths) > 1 else ""
        yield f"{paths[0]} {reason}{more}"


def shared_layers(model: nn.Module, wanted: set[str]) -> Iterator[str]:
    """Yield a line for each wanted layer that stands at two places: swapping one would leave the other as it was."""
    first: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        before = first.setdefault(id(module), path)
        if before != path and {before, path} & wanted:
            yield f"{path} is the same module as {before}; a layer that stands at two places cannot be adapted"


def tied_tables(modules: Mapping[str, nn.Module], wanted: Iterable[str]) -> Iterator[str]:
    """Yield a line for each wanted table whose rows another table looks up too: that one would go on as before."""
    tables = {path: module for path, module in modules.items() if isinstance(module, nn.Embedding)}
    for path in wanted:
        own = tables.get(path)
        others = [
            name for name, one in tables.items() if own is not None and one is not own and one.weight is own.weight
        ]
        if others:
            yield f"{path}: its rows are also those of {', '.join(others)}, which would not follow; untie them first"


def unsaved(targets: "Sequence[Target]", config: LoRAConfig) -> Iterator[str]:
    """Yield a line for each target whose factors PEFT's layout, in which adapters are saved, has no place for."""
    for target in targets:
        form = target.kind.form
        if form == "conv_transpose" or (config.use_dora and form in ("attention_in", "attention_out", "parameter")):
            what = "a transposed convolution" if form == "conv_transpose" else f"a magnitude of form {form!r}"
            yield f"{target.path}: PEFT's layout has no place for {what}; it trains and merges, save_adapter refuses it"


def bypassed_layers(modules: Mapping[str, nn.Module]) -> set[str]:
    """Return the layers of torch's encoder that its fused kernel reads in evaluation instead of calling them."""
    encoders = [path for path, module in modules.items() if isinstance(module, nn.TransformerEncoderLayer)]
    return {f"{path}.{name}" for path in encoders for name in ("linear1", "linear2")}


def oversized(module: nn.Module, target: "Target") -> Iterator[str]:
    """Yield a line where the rank is above what the layer's own update can have: the rest is without effect."""
    groups: int = module.groups if target.kind.form in ("conv", "conv_transpose") else 1  # type: ignore[assignment]
    most = min(target.out_features // groups, target.in_features) * groups
    if target.rank > most:
        yield f"{target.path}: rank {target.rank} is above the layer's own rank of {most}; more has no effect"


def ambiguous(targets: "Sequence[Target]", config: LoRAConfig) -> Iterator[str]:
    """Yield a line for each pair of patterns that both stand for a layer and say different things: the first wins."""
    tables: dict[str, Mapping[str, object]] = {
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "parts": config.parts,
    }
    for name, patterns in tables.items():
        said = set()
        for target in targets:
            hits = [pattern for pattern in patterns if pattern_matches(target.path, pattern)]
            for other in hits[1:]:
                if patterns[other] != patterns[hits[0]] and (hits[0], other) not in said:
                    said.add((hits[0], other))
                    yield f"{name}: {hits[0]!r} and {other!r} both stand for {target.path}; the first counts"


def uncalled(model: nn.Module, targets: "Sequence[Target]", probe: Callable[[], object]) -> Iterator[str]:
    """Yield a line for each target whose module is never called while a probe runs."""
    called: set[str] = set()

    def note(owner: str) -> Callable[..., None]:
        return lambda *_: called.add(owner)

    owners = dict.fromkeys(target.owner for target in targets)
    hooks = [model.get_submodule(owner).register_forward_pre_hook(note(owner)) for owner in owners]
    try:
        probe()
    finally:
        for hook in hooks:
            hook.remove()
    yield from (
        f"{owner}: never called in the probe run; an adapter would have no effect there"
        for owner in owners
        if owner not in called
    )


def misfits(module: nn.Module, target: "Target", config: LoRAConfig) -> Iterator[str]:
    """Yield a line for each thing that a configuration asks of a layer and that its kind cannot take."""
    kind, path = target.kind, target.path
    groups: int = module.groups if kind.form in ("conv", "conv_transpose") else 1  # type: ignore[assignment]
    row, _ = initialisation_named(config.init)
    # The factors of `orthogonal` are both of the layer's shape, as those taken from its weight are.
    need = _NEEDS[row.needs] or ("weight" if row.name == "orthogonal" else None)
    asked = {
        "use_dora": ("dora", config.use_dora),
        "dropout": ("dropout", config.dropout > 0),
        "freeze_A": ("freeze_A", config.freeze_A),
        "parts": ("parts", bool(target.parts)),
        f"init={config.init!r}": (need or "", need is not None),
    }
    for name, (variant, wanted) in asked.items():
        if wanted and variant not in kind.variants:
            yield f"{path}: {name} is not for layers of kind {kind.name!r}"
    if target.parts and target.parts[-1][1] > target.out_features:
        yield f"{path}: parts end at row {target.parts[-1][1]}, the layer has {target.out_features} output rows"
    if target.parts and need is not None:
        yield f"{path}: init={config.init!r} looks at the whole layer, and parts divide it; choose kaiming with parts"
    if target.rank % groups:
        yield f"{path}: rank {target.rank} must be a multiple of the convolution's {groups} groups"
