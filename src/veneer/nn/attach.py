"""Put an adapter's layers into a model, take them out again, switch them off for a while.

While attached, the model carries one `Attachment`, which knows what was there before. After `detach`
the model is as it was, bit for bit: weights, `requires_grad` flags, training modes, module tree.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter import Adapter, AdapterMetadata, LowRank
from veneer.config import LoRAConfig
from veneer.errors import AdapterError, AttachError
from veneer.names import did_you_mean
from veneer.nn.fingerprint import fingerprint
from veneer.nn.heads import output_heads
from veneer.nn.kinds import LoRALayer, kind_of
from veneer.nn.routing import Routing
from veneer.nn.slots import Slot, kaiming_uniform
from veneer.nn.targets import Target, find_targets, shared_layers, unfit_layers
from veneer.nn.trained import TrainedParameter, swap_in, swap_out, trained_parameters
from veneer.ops.sample import sample_digest

_ATTRIBUTE = "_veneer_attachment"


@dataclass
class Attachment:
    """What an attached model carries: its adapter's layers, and how the model was before.

    Args:
        config: What was asked for.
        metadata: What the adapter was made for.
        routing: Which rows go through which slot.
        targets: The adapted layers, in the model's order.
        layers: Module path to the layer now standing there.
        trained: Parameters that train whole, each with the frozen one it stands in for.
        requires_grad: Flag of every parameter as it was.
        training: Mode of every module as it was.
        disabled: How many `disabled` blocks it is in.
    """

    config: LoRAConfig
    metadata: AdapterMetadata
    routing: Routing
    targets: tuple[Target, ...] = ()
    layers: dict[str, LoRALayer] = field(default_factory=dict)
    trained: dict[str, TrainedParameter] = field(default_factory=dict)
    requires_grad: dict[str, bool] = field(default_factory=dict)
    training: dict[str, bool] = field(default_factory=dict)
    disabled: int = 0

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what trains, by the flat names of `Adapter.tensors`."""
        flat: dict[str, nn.Parameter] = {}
        for path, layer in self.layers.items():
            slot = layer.slot(0)
            flat |= {f"{path}.lora_A": slot.lora_A, f"{path}.lora_B": slot.lora_B}
        return flat | {path: one.trained for path, one in self.trained.items()}


def attach(
    model: nn.Module,
    what: LoRAConfig | Adapter,
    *,
    seed: int = 0,
    metadata: AdapterMetadata | None = None,
    any_base: bool = False,
) -> Attachment:
    """Put low-rank layers into a model, in place: fresh ones from a configuration, or those of an adapter.

    A fresh `lora_A` is drawn from the seed and the module's path alone, `lora_B` is zero, so that the model computes
    what it did before. Every base parameter is frozen; only the adapter's ask for gradients.

    Args:
        model: Any module; changed in place.
        what: Which layers to adapt, or an adapter to put in.
        seed: Fixes a fresh `lora_A`.
        metadata: What a fresh adapter is made for; an adapter brings its own.
        any_base: Put an adapter in even where the base's weights are not those that it was made for.

    Returns:
        The attachment; the model holds it too.

    Raises:
        AttachError: If the model has an adapter already.
        TargetError: If a pattern matches nothing or a layer cannot be adapted.
        AdapterError: If the adapter's modules, shapes or base are not those of the model.
        Each before anything is touched.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        >>> x, before = torch.ones(1, 3), model(torch.ones(1, 3))
        >>> _ = attach(model, LoRAConfig(rank=1, target_modules=["0"]))
        >>> torch.equal(model(x), before), sum(p.numel() for p in model.parameters() if p.requires_grad)
        (True, 7)
        >>> detach(model).num_parameters
        7
    """
    require_bare(model)
    base_fingerprint = fingerprint(model)
    if isinstance(what, Adapter):
        config, metadata = what.config, what.metadata
        if not any_base:
            _check_base(model, what, base_fingerprint)
        targets = _targets_of(model, what)
        trained = trained_parameters(model, list(targets), config, what.trained)
    else:
        config, metadata = what, replace(metadata or AdapterMetadata(), base_fingerprint=base_fingerprint)
        targets = {target.path: target for target in find_targets(model, config, skip=output_heads(model))}
        trained = trained_parameters(model, list(targets), config, None)
    attachment = Attachment(config, metadata, Routing(), tuple(targets.values()))
    attachment.requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    attachment.training = {name: module.training for name, module in model.named_modules()}
    model.requires_grad_(False)
    for path, target in targets.items():
        slot = _slot_of(what.modules[path], config) if isinstance(what, Adapter) else _fresh(target, config, seed)
        attachment.layers[path] = _install(model, target, slot, attachment.routing)
    for path, one in trained.items():
        swap_in(one)
        attachment.trained[path] = one
    setattr(model, _ATTRIBUTE, attachment)
    return attachment


def require_bare(model: nn.Module) -> None:
    """Raise where an adapter is attached to a model.

    Raises:
        AttachError: Then.
    """
    if _ATTRIBUTE in vars(model):
        raise AttachError("the model has an adapter attached; call detach(model) first")


def detach(model: nn.Module) -> Adapter:
    """Take the adapter's layers out and return them as a value; the model is as it was, bit for bit.

    Raises:
        AttachError: If no adapter is attached, or within `disabled`.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4))
        >>> _ = attach(model, LoRAConfig(rank=2))
        >>> detach(model).modules["0"].rank, type(model[0]).__name__
        (2, 'Linear')
    """
    attachment = attachment_of(model)
    if attachment.disabled:
        raise AttachError("the adapter is disabled; call detach(model) after the block")
    adapter = current_adapter(model)
    for one in attachment.trained.values():
        swap_out(one)
    for path, layer in attachment.layers.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer.base)
    delattr(model, _ATTRIBUTE)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(attachment.requires_grad.get(name, parameter.requires_grad))
    for name, module in model.named_modules():
        module.training = attachment.training.get(name, module.training)
    return adapter


def attachment_of(model: nn.Module) -> Attachment:
    """Return the attachment of a model.

    Raises:
        AttachError: If no adapter is attached.
    """
    attachment = vars(model).get(_ATTRIBUTE)
    if attachment is None:
        raise AttachError("no adapter is attached to the model; call attach(model, config) first")
    return attachment


def current_adapter(model: nn.Module) -> Adapter:
    """Return a copy of the attached adapter as it is now; the model is not touched.

    Raises:
        AttachError: If no adapter is attached.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4))
        >>> _ = attach(model, LoRAConfig(rank=2))
        >>> current_adapter(model).digest == detach(model).digest
        True
    """
    attachment = attachment_of(model)
    modules = {}
    for path, layer in attachment.layers.items():
        slot = layer.slot(0)
        modules[path] = LowRank(slot.lora_A, slot.lora_B, slot.scaling)
    trained: dict[str, Tensor] = {path: one.trained for path, one in attachment.trained.items()}
    return Adapter(modules, attachment.config, trained, attachment.metadata)


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Compute with the base alone within the block; the adapter stays attached, its numbers untouched.

    Raises:
        AttachError: If no adapter is attached.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4))
        >>> _ = attach(model, LoRAConfig(rank=2))
        >>> with disabled(model) as base:
        ...     base(torch.ones(1, 3)).shape
        torch.Size([1, 4])
    """
    attachment = attachment_of(model)
    if not attachment.disabled:
        for one in attachment.trained.values():
            swap_out(one)
    attachment.disabled += 1
    try:
        with attachment.routing.everywhere(None):
            yield model
    finally:
        attachment.disabled -= 1
        if not attachment.disabled:
            for one in attachment.trained.values():
                swap_in(one)


def set_metadata(model: nn.Module, **changes: Any) -> None:
    """Change what the attached adapter says it was made for, see `AdapterMetadata`."""
    attachment = attachment_of(model)
    attachment.metadata = replace(attachment.metadata, **changes)


def _check_base(model: nn.Module, adapter: Adapter, base_fingerprint: str) -> None:
    """Raise where the model's weights are not those that the adapter was made for."""
    made_for, known = adapter.metadata.base_fingerprint, dict(model.named_parameters(remove_duplicate=False))
    problems = []
    if made_for is not None and made_for != base_fingerprint:
        problems.append(f"fingerprint: the adapter's is {made_for[:16]}, the model's {base_fingerprint[:16]}")
    for path, digest in adapter.metadata.base_weights:
        weight = known.get(f"{path}.weight")
        if weight is None:
            problems.append(
                f"{path}.weight: the adapter's file carries it, the model has none{did_you_mean(path, known)}"
            )
        elif sample_digest(weight) != digest:
            problems.append(f"{path}.weight: the adapter's file carries other values")
    if problems:
        raise AdapterError(
            f"the adapter was made for other weights of {adapter.metadata.base or 'its base'} (another model, "
            "revision or quantisation; nothing was touched); any_base=True, or --any-base, puts it in all the same",
            problems,
        )


def _install(model: nn.Module, target: Target, slot: Slot, routing: Routing) -> LoRALayer:
    parent_path, _, name = target.path.rpartition(".")
    parent = model.get_submodule(parent_path)
    base = getattr(parent, name)
    layer = target.kind.build(base, routing)
    layer.slots.append(slot.to(base.weight.device))
    layer.train(base.training)
    setattr(parent, name, layer)
    return layer


def _fresh(target: Target, config: LoRAConfig, seed: int) -> Slot:
    """Return a new slot whose `lora_A` depends on the seed and the module's path alone."""
    key = hashlib.sha256(f"{seed}\0{target.path}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    A = kaiming_uniform(target.rank, target.in_features, generator)
    return Slot(A, torch.zeros(target.out_features, target.rank), target.scaling, config.dropout)


def _slot_of(pair: LowRank, config: LoRAConfig) -> Slot:
    """Return a slot with an adapter's factors, in float32: training needs it, and no 16-bit value is lost."""
    dtype = torch.promote_types(pair.lora_A.dtype, torch.float32)
    return Slot(pair.lora_A.to(dtype, copy=True), pair.lora_B.to(dtype, copy=True), pair.scaling, config.dropout)


def _targets_of(model: nn.Module, adapter: Adapter) -> dict[str, Target]:
    """Return the layers that an adapter's modules name.

    Raises:
        AdapterError: For every module that the model lacks or whose shape differs, all at once.
    """
    known = dict(model.named_modules())
    problems = [
        f"{path}: the model has no such module{did_you_mean(path, known)}"
        for path in adapter.modules
        if path not in known
    ]
    if problems:
        raise AdapterError("the adapter does not fit the model (nothing was touched)", problems)
    problems += [*shared_layers(model, set(adapter.modules)), *unfit_layers(known, list(adapter.modules))]
    if problems:
        raise AdapterError("the adapter does not fit the model (nothing was touched)", problems)
    targets = {}
    for path, pair in adapter.modules.items():
        kind = kind_of(known[path])
        assert kind is not None  # unfit_layers has asked
        expected, found = kind.shape(known[path]), (pair.lora_B.shape[0], pair.lora_A.shape[1])
        if found != expected:
            problems.append(f"{path}: the layer is (out, in) = {expected}, the adapter is for {found}")
        targets[path] = Target(path, kind, *expected, pair.rank, pair.scaling)
    if problems:
        raise AdapterError("the adapter does not fit the model (nothing was touched)", problems)
    return targets
