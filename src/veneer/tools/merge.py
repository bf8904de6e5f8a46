"""An adapter merged into its base, proved by a probe, and taken out again bit for bit."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from veneer.adapter import Adapter, LowRank
from veneer.errors import AdapterError, AttachError, BaseModelError, ConfigError
from veneer.factors import cut_ranks
from veneer.nn.attach import check_base, require_bare
from veneer.nn.fingerprint import fingerprint
from veneer.nn.fitting import targets_of
from veneer.nn.targets import Target
from veneer.tools.merge_probe import TOLERANCES, Probe, ask, ask_attached, compare, default_probe
from veneer.tools.merge_record import Kept, KeptModule, KeptTie, MergedModule, MergeRecord, ProbeResult
from veneer.tools.merge_stored import (
    FullWeights,
    Quantised,
    check_choice,
    common_dtype,
    dequantised,
    quantised_layers,
    requantise,
    stored_as,
    unwritable,
    weight_path,
)
from veneer.tools.merge_ties import Tie, check_ties, find_ties, untie
from veneer.tools.merge_undo import altered, digests, keep_bits, keep_stored, put, undo
from veneer.tools.merge_weights import Change, merge_weight, round_once

Tied = Literal["refuse", "untie"]

_ATTRIBUTE = "_veneer_merges"
_FRESH = 2.0**-20
"""Relative change up to which a magnitude is the norm that it began as, rounded to float32."""


@dataclass
class _Plan:
    """What a merge will do, checked; and what it has done so far."""

    adapter: Adapter
    targets: list[Target]
    ties: list[Tie]
    quantised: dict[str, nn.Module]
    requantise: bool
    full_weights: FullWeights | None
    probe: Probe | None
    reason: str | None
    kept: list[Kept] = field(default_factory=list)


def merge(
    model: nn.Module,
    adapter: Adapter,
    *,
    any_base: bool = False,
    on_top: bool = False,
    tied: Tied = "refuse",
    quantised: Quantised = "refuse",
    full_weights: FullWeights | None = None,
    probe: Probe | None = None,
) -> MergeRecord:
    """Add an adapter's updates to the weights of its base, in place; `unmerge` takes them out bit for bit.

    For each weight W of the adapter's modules, in the form that fits it:

        W = round_once(W + scaling * lora_B @ lora_A)      # in float64, one rounding to the stored dtype

    with a magnitude (DoRA) the sum is first scaled to it; what trained whole is copied in. The model then computes what
    it did with the adapter attached, which a probe proves: the same input before, attached, and after.

    Args:
        model: The bare base model; changed in place, or not at all where an error is raised.
        adapter: What to merge.
        any_base: Merge even where the base's weights are not those that the adapter was made for.
        on_top: Merge into a model that another adapter was merged into before.
        tied: What to do where a weight to be written stands at other places too (a tied head): "refuse", or "untie",
            which gives the other places a copy of the weight, and says so in the model's configuration.
        quantised: What to do with quantised layers: "refuse"; "requantise", which rounds the sum into the stored form
            again; "dequantise", which puts a plain linear layer there, in the dtype that the model computes in.
        full_weights: Weights in full precision to take instead of the quantised ones, by the parameter's name or from a
            function of it; the layers become plain.
        probe: From the model to a tensor of outputs to compare. Causal language models of transformers' protocol need
            none: they are asked for the logits of 2×16 fixed tokens.

    Returns:
        What was done, what was lost to rounding, what the probe found.

    Raises:
        AttachError: If an adapter is attached, or was merged before and `on_top` is not asked for.
        AdapterError: If the adapter does not fit the model or is not finite, a merged weight leaves the range of its
            dtype, or the merged model does not compute what the adapter did.
        TargetError: If a weight is tied and may not, or cannot, be untied.
        ConfigError: If layers are quantised and no choice was made, or one that cannot be done.
        BaseModelError: If a weight is stored in a way that cannot be written.

    Cost:
        2·O·I·R operations for each weight, three calls of the probe, a digest of what was written. Memory: a copy of
        the written weights on the CPU, kept by the record; beside it 10 MiB, for quantised layers three times the
        float32 weight of one. Replaced layers stay where they are.

    Example:
        >>> from veneer.nn.attach import attach, detach
        >>> from veneer.config import LoRAConfig
        >>> model = nn.Sequential(nn.Linear(3, 4))
        >>> slot = attach(model, LoRAConfig(rank=1)).parameters()["0.lora_B"]
        >>> adapter = (nn.init.ones_(slot), detach(model))[1]
        >>> before = model[0].weight.clone()
        >>> record = merge(model, adapter, probe=lambda one: one(torch.ones(1, 3)))
        >>> torch.equal(model[0].weight, before), record.probe.difference < 1e-6
        (False, True)
        >>> unmerge(model, record)
        >>> torch.equal(model[0].weight, before)
        True

    Source:
        Hu et al. 2021, arXiv:2106.09685, section 4.1. Differs from PEFT's `merge_and_unload`: float64 and one rounding,
        where it adds in the dtype of the factors; the bits come back, where it subtracts.
    """
    merged_before = _require_mergeable(model, on_top)
    _check_words(tied, quantised)
    targets = targets_of(model, adapter)
    layers = quantised_layers(model, targets)
    if problems := unwritable(model, targets, adapter, layers):
        raise BaseModelError("weights cannot be merged into (nothing was touched)", problems)
    before = fingerprint(model)
    if not any_base:
        check_base(model, adapter, before)
    check_mergeable(adapter)
    check_choice(quantised, layers, targets, full_weights)
    written = [weight_path(target) for target in targets if target.owner not in layers]
    ties = find_ties(model, [*written, *adapter.trained])
    check_ties(model, ties, layers, untie=tied == "untie")
    found, reason = (probe, None) if probe is not None else default_probe(model)
    plan = _Plan(adapter, targets, ties, layers, quantised == "requantise", full_weights, found, reason)
    try:
        record = _carry_out(model, plan, before, merged_before)
    except BaseException:
        undo(model, plan.kept)
        raise
    setattr(model, _ATTRIBUTE, (*merged_before, record.key))
    return record


def unmerge(model: nn.Module, record: MergeRecord, *, force: bool = False) -> None:
    """Take a merge back: the weights bit for bit, the modules and tied parameters as the objects that they were.

    Args:
        model: The merged model, no adapter attached.
        record: What `merge` returned; of several merges the last one comes first.
        force: Put the original numbers back even where the merged weights were changed since.

    Raises:
        AttachError: If an adapter is attached, this is not the last merge, or the weights are no longer what it wrote.

    Example:
        >>> from veneer.adapter import LowRank
        >>> from veneer.config import LoRAConfig
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> pair = LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0)
        >>> record = merge(model, Adapter({"0": pair}, LoRAConfig(rank=1)))
        >>> unmerge(model, record)
        >>> fingerprint(model) == record.fingerprint_before
        True
    """
    require_bare(model)
    merges = _merges(model)
    if record.key not in merges:
        raise AttachError(
            f"adapter {record.adapter[:16]} is not merged into this model (merged: {_names(merges) or 'none'}); "
            "unmerge takes the record of the last merge, once"
        )
    if record.key != merges[-1]:
        raise AttachError(
            f"adapter {record.adapter[:16]} lies under others (merged, the last one at the end: {_names(merges)}); "
            "unmerge those first"
        )
    problems = [] if force else list(altered(model, record.kept, record.written))
    if problems:
        raise AttachError(
            "the weights are no longer what the merge wrote (nothing was touched); unmerge would lose what changed "
            "them: force=True does it all the same",
            problems,
        )
    undo(model, record.kept)
    if merges[:-1]:
        setattr(model, _ATTRIBUTE, merges[:-1])
    else:
        delattr(model, _ATTRIBUTE)


def _merges(model: nn.Module) -> tuple[tuple[str, str, str], ...]:
    """Return the keys of the records of what was merged into a model, the first one first."""
    return vars(model).get(_ATTRIBUTE, ())


def _names(merges: Sequence[tuple[str, str, str]]) -> str:
    return ", ".join(digest[:16] for digest, _, _ in merges)


def _require_mergeable(model: nn.Module, on_top: bool) -> tuple[tuple[str, str, str], ...]:
    require_bare(model)
    merges = _merges(model)
    if merges and not on_top:
        raise AttachError(
            f"the model has merged adapters already ({_names(merges)}); unmerge(model, record) first, or say "
            "on_top=True to merge another one over them"
        )
    return merges


def _check_words(tied: str, quantised: str) -> None:
    for name, value, known in (("tied", tied, get_args(Tied)), ("quantised", quantised, get_args(Quantised))):
        if value not in known:
            raise ConfigError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def check_mergeable(adapter: Adapter) -> None:
    """Raise for what no weight can do alone.

    Raises:
        AdapterError: Then, by name.
    """
    problems = [
        f"{path}: its ranks look across the groups of the convolution, whose weight has no place for that"
        for path, pair in adapter.modules.items()
        if pair.form == "conv_across"
    ]
    if adapter.config.invocation_tokens:
        problems.append("invocation_tokens: it acts from its invocation on only; a weight would act everywhere")
    if problems:
        raise AdapterError("the adapter cannot be merged (nothing was touched); attach it instead", problems)


def _carry_out(
    model: nn.Module, plan: _Plan, before: str, merged_before: tuple[tuple[str, str, str], ...]
) -> MergeRecord:
    """Do it, step by step, each one kept for being undone."""
    adapter, probe = plan.adapter, plan.probe
    untie(model, plan.ties, plan.kept)
    base_output = None if probe is None else ask(model, probe)
    attached_output = ask_attached(model, adapter, probe)
    for path, value in adapter.trained.items():
        _copy_in(model, path, value, plan.kept)
    for path, tokens in adapter.tokens.items():
        # A tied head reads the same rows, as it does while the adapter is attached.
        _copy_in(model, f"{path}.weight", tokens.rows, plan.kept, tokens.indices)
    tolerance = _tolerance(model, plan)
    dtype = common_dtype(model)
    modules = [_merge_one(model, target, plan, dtype) for target in plan.targets]
    result = ProbeResult(probed=False, reason=plan.reason)
    if probe is not None and base_output is not None and attached_output is not None:
        result = compare(base_output, attached_output, ask(model, probe), tolerance)
    fresh = (
        not adapter.trained and not adapter.tokens and all(_is_fresh(adapter.modules[one.path], one) for one in modules)
    )
    return MergeRecord(
        adapter=adapter.digest,
        fingerprint_before=before,
        fingerprint_after=fingerprint(model),
        over=tuple(digest for digest, _, _ in merged_before),
        never_trained=fresh,
        modules=tuple(modules),
        trained=(*adapter.trained, *(f"{path}.weight" for path in adapter.tokens)),
        untied=tuple(one.path for one in plan.kept if isinstance(one, KeptTie)),
        replaced={one.path: stored_as_now(one.replacement) for one in plan.kept if isinstance(one, KeptModule)},
        probe=result,
        kept=tuple(plan.kept),
        written=digests(model, plan.kept),
    )


def _copy_in(model: nn.Module, path: str, value: Tensor, kept: list[Kept], rows: tuple[int, ...] | None = None) -> None:
    """Copy what trained into a parameter, or into some rows of it."""
    parameter = model.get_parameter(path)
    rounded = round_once(value.to(torch.float64), parameter.dtype).to(parameter.device)
    if not bool(torch.isfinite(rounded).all()):
        raise AdapterError(f"{path}: what the adapter trained leaves the range of {parameter.dtype}")
    kept.append(keep_bits(model, path))
    with torch.no_grad():
        if rows is None:
            parameter.copy_(rounded)
        else:
            parameter[list(rows)] = rounded


def _merge_one(model: nn.Module, target: Target, plan: _Plan, dtype: torch.dtype) -> MergedModule:
    """Merge one weight: in place, or into a layer that takes the place of a quantised one."""
    module, pair = model.get_submodule(target.owner), plan.adapter.modules[target.path]
    if target.owner not in plan.quantised or target.member:
        parameter = model.get_parameter(weight_path(target))
        plan.kept.append(keep_bits(model, weight_path(target)))
        with torch.no_grad():
            change = merge_weight(parameter, parameter, module, target, pair)
        name = _dtype_name(parameter.dtype)
        return _described(target, name, name, change)
    stored = stored_as_now(module)
    if plan.requantise:
        plan.kept.append(keep_stored(model, target.owner))
        return _described(target, stored, stored, requantise(module, target, pair))
    replacement, change = dequantised(module, target, pair, plan.full_weights, dtype)
    plan.kept.append(KeptModule(target.owner, module, replacement, fingerprint(module)))
    put(model, target.owner, replacement)
    return _described(target, stored, stored_as_now(replacement), change)


def _described(target: Target, stored: str, became: str, change: Change) -> MergedModule:
    return MergedModule(
        target.path,
        target.kind.name,
        stored,
        became,
        change.largest,
        change.relative,
        change.rounding_loss,
        change.unchanged,
    )


def stored_as_now(module: nn.Module) -> str:
    """Return how a layer stores its weight: a dtype, or the name of a quantised storage.

    Example:
        >>> stored_as_now(nn.Linear(1, 1))
        'float32'
    """
    name = stored_as(module)
    return _dtype_name(module.get_parameter("weight").dtype) if name == "plain" else str(name)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tolerance(model: nn.Module, plan: _Plan) -> float | None:
    """Return what the probe's outputs may differ by; None where the merged weights are not the attached ones."""
    if plan.quantised and (plan.requantise or plan.full_weights is not None):
        return None
    # bitsandbytes and torchao compute with their own kernels, which round products; ours do not.
    foreign = any(stored_as(one) in ("bitsandbytes", "torchao") for one in plan.quantised.values())
    coarsest = max(TOLERANCES.get(one.dtype, 0.0) for one in model.parameters())
    return max(TOLERANCES[torch.bfloat16] if foreign else 0.0, coarsest)


def _is_fresh(pair: LowRank, merged: MergedModule) -> bool:
    """Tell whether a module's factors are as they began: a zero update, and the magnitude the weight's own norm."""
    if pair.frozen_rank:
        (A, B), (A0, B0) = cut_ranks(pair.form, pair.lora_A, pair.lora_B, pair.frozen_rank)
        untouched = A.shape == A0.shape and torch.equal(A, A0) and torch.equal(B, -B0)
    else:
        untouched = not pair.lora_B.any()
    if pair.magnitude is None:
        return untouched
    return untouched and (merged.relative_change or 0.0) <= _FRESH
