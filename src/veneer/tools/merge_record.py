"""What a merge did, as a value; and what it takes to undo it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class MergedModule:
    """What a merge did to one weight.

    Args:
        path: Path of the module, or of the parameter.
        kind: Kind of the layer.
        stored: How its weight was stored: a dtype, or the name of a quantised storage.
        became: How it is stored now.
        max_change: Largest absolute value of the update; on files, of what was looked at.
        relative_change: ‖update‖ / ‖weight‖; None for an update of a weight that is zero.
        rounding_loss: ‖stored change − update‖ / ‖update‖: what the stored form cannot hold of the update.
        unchanged: Share of the updated numbers that are stored as before.
    """

    path: str
    kind: str
    stored: str
    became: str
    max_change: float
    relative_change: float | None
    rounding_loss: float
    unchanged: float


@dataclass(frozen=True)
class ProbeResult:
    """What a model computed with the base, with the adapter attached, and merged.

    Args:
        probed: Whether it was asked.
        reason: Why it was not.
        effect: Largest absolute difference between base and adapter.
        difference: Largest absolute difference between the attached adapter and the merged model.
        relative_effect: `effect` as a share of the largest output with the adapter.
        relative_difference: `difference` as such a share.
        tolerance: What `relative_difference` may be; None where the base is another one after the merge.
    """

    probed: bool
    reason: str | None = None
    effect: float | None = None
    difference: float | None = None
    relative_effect: float | None = None
    relative_difference: float | None = None
    tolerance: float | None = None


@dataclass(frozen=True)
class KeptBits:
    """A parameter was written: its numbers before, on the CPU."""

    path: str
    original: Tensor


@dataclass(frozen=True)
class KeptStored:
    """A quantised weight was written in its stored form: its tensors, each with its numbers before, on the CPU."""

    path: str
    tensors: Mapping[str, tuple[Tensor, Tensor]]
    digest: str


@dataclass(frozen=True)
class KeptModule:
    """A module was replaced; the fingerprint is the original's."""

    path: str
    original: nn.Module
    replacement: nn.Module
    fingerprint: str


@dataclass(frozen=True)
class KeptTie:
    """A place got a parameter of its own; before, it had that of the keeper, or another on the same memory."""

    path: str
    keeper: str
    original: nn.Parameter
    copy: nn.Parameter
    was_the_keepers: bool


@dataclass(frozen=True)
class KeptSetting:
    """`tie_word_embeddings` was set in one of a model's configurations, counted as `tying_configs` gives them."""

    place: int
    value: bool | None


Kept = KeptBits | KeptStored | KeptModule | KeptTie | KeptSetting


@dataclass(frozen=True, eq=False)
class MergeRecord:
    """What a merge did, and privately what `unmerge` needs: the original numbers and objects.

    Args:
        adapter: Digest of the adapter.
        fingerprint_before: Of the base model, see `veneer.nn.fingerprint`.
        fingerprint_after: Of the merged model.
        over: Digests of the adapters that were merged before, the first one first.
        never_trained: Whether the adapter is one that was never trained: the merge changed nothing.
        modules: What was done to each weight.
        trained: Parameters that were copied in whole.
        untied: Places that got a parameter of their own.
        replaced: Path of each module that another one stands in for, with how its weight is stored now.
        probe: What the model computed before and after.
        kept: For `unmerge`; not part of what the record says.
        written: Digest of what the merge wrote, by path; for `unmerge`.

    Example:
        >>> from veneer import LoRAConfig, attach, detach
        >>> from veneer.tools.merge import merge, unmerge
        >>> model = nn.Sequential(nn.Linear(3, 4))
        >>> _ = attach(model, LoRAConfig(rank=1))
        >>> record = merge(model, detach(model))
        >>> record.never_trained, record.to_json()["modules"][0]["path"]
        (True, '0')
    """

    adapter: str
    fingerprint_before: str
    fingerprint_after: str
    over: tuple[str, ...]
    never_trained: bool
    modules: tuple[MergedModule, ...]
    trained: tuple[str, ...]
    untied: tuple[str, ...]
    replaced: Mapping[str, str]
    probe: ProbeResult
    kept: tuple[Kept, ...] = field(default=(), repr=False)
    written: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def key(self) -> tuple[str, str, str]:
        """By which a model knows that it was merged."""
        return self.adapter, self.fingerprint_before, self.fingerprint_after

    def to_json(self) -> dict[str, Any]:
        """Return all that it says as plain values, without the originals."""
        return {
            "adapter": self.adapter,
            "fingerprint_before": self.fingerprint_before,
            "fingerprint_after": self.fingerprint_after,
            "over": list(self.over),
            "never_trained": self.never_trained,
            "modules": [asdict(one) for one in self.modules],
            "trained": list(self.trained),
            "untied": list(self.untied),
            "replaced": dict(self.replaced),
            "probe": asdict(self.probe),
        }
