"""Put an adapter's layers into a model, take them out again, switch them off for a while.

While attached, the model carries one `Attachment`, which knows what was there before. After `detach`
the model is as it was, bit for bit: weights, `requires_grad` flags, training modes, module tree.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from veneer.adapter import Adapter, AdapterMetadata, LowRank
from veneer.config import LoRAConfig
from veneer.errors import AdapterError, AttachError, ConfigError
from veneer.names import did_you_mean
from veneer.nn.fingerprint import fingerprint
from veneer.nn.fitting import fitted, targets_of
from veneer.nn.heads import output_heads
from veneer.nn.initial import fresh_pair, norm_axes, weight_of
from veneer.nn.layer import LoRALayer
from veneer.nn.routing import Routing
from veneer.nn.slots import Slot
from veneer.nn.targets import Target, find_targets
from veneer.nn.tokens import TokenSlot, TokenTable, install_tokens, token_targets
from veneer.nn.trained import TrainedParameter, swap_in, swap_out, trained_parameters
from veneer.ops.dora import weight_norm2
from veneer.ops.sample import sample_digest
from veneer.storage.registry import storage_of

_ATTRIBUTE = "_veneer_attachment"
_ACTIVATED = (
    "the adapter acts from its invocation_tokens on, and a plain call does not say where that is: use veneer.generate, "
    "veneer.evaluate or veneer.finetune, or call the model within attachment.routing.using(segments)"
)


@dataclass
class Attachment:
    """What an attached model carries: its adapter's layers, and how the model was before.

    Args:
        config: What was asked for.
        metadata: What the adapter was made for.
        routing: Which rows go through which slot.
        targets: The adapted layers, in the model's order.
        layers: Path of a wrapped module to the layer now standing there.
        trained: Parameters that train whole, each with the frozen one it stands in for.
        tokens: Path of a table of which rows train, to the layer now standing there.
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
    tokens: dict[str, TokenTable] = field(default_factory=dict)
    requires_grad: dict[str, bool] = field(default_factory=dict)
    training: dict[str, bool] = field(default_factory=dict)
    disabled: int = 0

    def slot(self, target: Target, index: int = 0) -> Slot:
        """Return the slot of a target in the bank of its layer."""
        return self.layers[target.owner].slot(index, target.member)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the adapter's parameters by the flat names of `Adapter.tensors`; a frozen `lora_A` is among them."""
        flat: dict[str, nn.Parameter] = {}
        for target in self.targets:
            flat |= {f"{target.path}.{name}": one for name, one in self.slot(target).trainable().items()}
        flat |= {path: one.trained for path, one in self.trained.items()}
        return flat | {f"{path}.token_rows": self.token_slot(path).rows for path in self.tokens}

    def token_slot(self, path: str) -> TokenSlot:
        """Return the slot of a table of which rows train."""
        return cast(TokenSlot, self.tokens[path].slots[0])


def attach(
    model: nn.Module,
    what: LoRAConfig | Adapter,
    *,
    seed: int = 0,
    metadata: AdapterMetadata | None = None,
    any_base: bool = False,
    observed: Mapping[str, Tensor] | None = None,
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
        observed: What a fresh adapter's initialisation needs beside the weights, by path: see `nn.observe`.

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
            check_base(model, what, base_fingerprint)
        targets = targets_of(model, what)
        trained = trained_parameters(model, [target.owner for target in targets], config, what.trained)
        pairs = {
            target.path: fitted(what.modules[target.path], target, model.get_submodule(target.owner))
            for target in targets
        }
    else:
        config, metadata = what, replace(metadata or AdapterMetadata(), base_fingerprint=base_fingerprint)
        targets = find_targets(model, config, skip=output_heads(model))
        trained = trained_parameters(model, [target.owner for target in targets], config, None)
        seen = observed or {}
        known = [target.path for target in targets]
        if strange := [f"{path}: no adapted layer{did_you_mean(path, known)}" for path in seen if path not in known]:
            raise ConfigError("observed names layers that are not adapted (nothing was touched)", strange)
        pairs = {
            target.path: fresh_pair(model.get_submodule(target.owner), target, config, seed, seen.get(target.path))
            for target in targets
        }
    adapted = {target.owner for target in targets}
    rows = what.tokens if isinstance(what, Adapter) else None
    tokens = token_targets(model, config.token_rows, adapted, rows, whole=trained)
    routing = Routing(needs_segments=_ACTIVATED if config.invocation_tokens else None)
    attachment = Attachment(config, metadata, routing, tuple(targets))
    attachment.requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    attachment.training = {name: module.training for name, module in model.named_modules()}
    model.requires_grad_(False)
    for table in tokens:
        layers = install_tokens(model, table, attachment.routing)
        attachment.layers |= layers
        attachment.tokens[table.path] = cast(TokenTable, layers[table.path])
    _install(model, attachment, pairs)
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
    for path, layer in reversed(attachment.layers.items()):
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
    attachment = find_attachment(model)
    if attachment is None:
        raise AttachError("no adapter is attached to the model; call attach(model, config) first")
    return attachment


def find_attachment(model: nn.Module) -> Attachment | None:
    """Return the attachment of a model, or None where no adapter is attached."""
    return vars(model).get(_ATTRIBUTE)


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
    modules = {target.path: attachment.slot(target).pair() for target in attachment.targets}
    trained: dict[str, Tensor] = {path: one.trained for path, one in attachment.trained.items()}
    tokens = {path: attachment.token_slot(path).value() for path in attachment.tokens}
    return Adapter(modules, attachment.config, trained, attachment.metadata, tokens)


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


def check_base(model: nn.Module, adapter: Adapter, base_fingerprint: str) -> None:
    """Raise where the model's weights are not those that the adapter was made for.

    Raises:
        AdapterError: Then, with what differs.
    """
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
        stored = sorted({one.name for module in model.modules() if (one := storage_of(module)) is not None} - {"plain"})
        raise AdapterError(
            f"the adapter was made for other weights of {adapter.metadata.base or 'its base'} (another model or "
            f"revision, or stored otherwise: here as {', '.join(stored) or 'plain'}, which storage= of load_base, or "
            "--storage, sets; nothing was touched); any_base=True, or --any-base, puts it in all the same",
            problems,
        )


def _install(model: nn.Module, attachment: Attachment, pairs: Mapping[str, LowRank]) -> None:
    """Put a layer with one adapter's slots in the place of each module that targets name."""
    by_owner: dict[str, list[Target]] = {}
    for target in attachment.targets:
        by_owner.setdefault(target.owner, []).append(target)
    # The deepest first: wrapping a module moves what lies in it to another path.
    for owner, targets in sorted(by_owner.items(), key=lambda item: -item[0].count(".")):
        parent_path, _, name = owner.rpartition(".")
        parent = model.get_submodule(parent_path)
        base = getattr(parent, name)
        layer = targets[0].kind.build(base, attachment.routing)
        device = next(chain(base.parameters(), base.buffers())).device
        slots = {one.member: _slot(base, one, pairs[one.path], attachment.config) for one in targets}
        layer.put({member: slot.to(device) for member, slot in slots.items()})
        layer.train(base.training)
        setattr(parent, name, layer)
        attachment.layers[owner] = layer


def _slot(base: nn.Module, target: Target, pair: LowRank, config: LoRAConfig) -> Slot:
    """Return a slot with an adapter's factors, at least float32: training needs it, and no 16-bit value is lost."""
    dtype = torch.promote_types(pair.lora_A.dtype, torch.float32)
    slot = Slot(pair, dropout=config.dropout, parts=target.parts, freeze_A=config.freeze_A, dtype=dtype)
    if pair.magnitude is not None and not target.member:
        weight = weight_of(base, target.member)
        slot.weight_norm2 = weight_norm2(weight, norm_axes(target, weight.ndim))
    return slot
