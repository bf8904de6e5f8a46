"""The adapter as an immutable value.

An adapter is a mapping from module paths to low-rank factors, with its configuration, what else was
trained, and what it was made for. Its identity is the digest of its content; a name is only a pointer.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor

from veneer.config import LoRAConfig
from veneer.errors import AdapterError
from veneer.factors import FORMS, compute_delta


@dataclass(frozen=True, eq=False)
class LowRank:
    """The factors of one module: its update is `scaling * lora_B · lora_A`, in the form that fits the module.

    With a magnitude (DoRA) the module's weight becomes `magnitude · (W + delta) / ‖W + delta‖`, norms over the inputs.

    Args:
        lora_A: Down projection, shape (rank, in) in the linear form; see `veneer.factors.FORMS`.
        lora_B: Up projection, shape (out, rank) in the linear form.
        scaling: The factor that is really applied.
        form: What the axes are.
        magnitude: DoRA's, shape (out,).
        frozen_rank: How many of the last ranks are the frozen start of a compensated initialisation.

    Raises:
        AdapterError: If the tensors do not fit the form and each other.

    Example:
        >>> pair = LowRank(torch.ones(2, 3), torch.ones(4, 2), scaling=0.5)
        >>> pair.rank, pair.delta()[0].tolist()
        (2, [1.0, 1.0, 1.0])
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    form: str = "linear"
    magnitude: Tensor | None = None
    frozen_rank: int = 0

    def __post_init__(self) -> None:
        A, B, form = self.lora_A, self.lora_B, FORMS.get(self.form)
        if form is None:
            raise AdapterError(f"form must be one of {', '.join(FORMS)}, got {self.form!r}")
        if expected := form.problem(A, B):
            raise AdapterError(
                f"lora_A and lora_B of form {form.name} must be {expected}, {form.axes}; got {tuple(A.shape)} and "
                f"{tuple(B.shape)}"
            )
        if A.dtype != B.dtype or not A.dtype.is_floating_point:
            raise AdapterError(f"lora_A and lora_B must share a floating dtype, got {A.dtype} and {B.dtype}")
        out_features = form.sizes(A, B)[0]
        if self.magnitude is not None and self.magnitude.shape != (out_features,):
            raise AdapterError(f"magnitude must have shape ({out_features},), got {tuple(self.magnitude.shape)}")
        if not 0 <= self.frozen_rank < self.rank:
            raise AdapterError(f"frozen_rank must be from 0 to below the rank {self.rank}, got {self.frozen_rank}")
        for name, tensor in self.tensors().items():
            object.__setattr__(self, name, _own(tensor))

    @property
    def rank(self) -> int:
        """Inner dimension of the factors."""
        return FORMS[self.form].rank(self.lora_A, self.lora_B)

    @property
    def sizes(self) -> tuple[int, int]:
        """Size of an output and of an input: (out, in)."""
        return FORMS[self.form].sizes(self.lora_A, self.lora_B)

    def tensors(self) -> dict[str, Tensor]:
        """Return its tensors by name."""
        named = {"lora_A": self.lora_A, "lora_B": self.lora_B}
        return named if self.magnitude is None else named | {"magnitude": self.magnitude}

    def delta(self) -> Tensor:
        """Return `scaling * lora_B · lora_A` in the shape of the weight, in float64; a magnitude has no part in it."""
        return compute_delta(self.form, self.lora_A, self.lora_B, self.scaling)


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Rows of an embedding table that trained: their values, which stand in the place of the base's.

    Args:
        indices: Ids of the tokens, each once.
        rows: Their values, shape (tokens, size of a row).

    Raises:
        AdapterError: If the ids repeat, are negative, or are not as many as the rows.

    Example:
        >>> TokenRows((5, 7), torch.zeros(2, 3)).rows.shape
        torch.Size([2, 3])
    """

    indices: tuple[int, ...]
    rows: Tensor

    def __post_init__(self) -> None:
        if self.rows.ndim != 2 or len(self.indices) != len(self.rows) or not self.indices:
            raise AdapterError(f"{len(self.indices)} token ids and rows of shape {tuple(self.rows.shape)} disagree")
        if len(set(self.indices)) != len(self.indices) or min(self.indices) < 0:
            raise AdapterError("token ids must be 0 or above, each once")
        object.__setattr__(self, "rows", _own(self.rows))


@dataclass(frozen=True)
class AdapterMetadata:
    """What an adapter was made for; not part of its identity.

    Args:
        base: Name of the base model as the user gave it.
        base_fingerprint: Digest of the base's weights, see `veneer.nn.fingerprint`.
        revision: Revision of the base on its hub.
        task_type: PEFT's word for the head, such as `CAUSAL_LM`.
        row_format: The kind of rows it was trained on: chat, completion or text.
        template_digest: Digest of the chat template it was trained with.
        base_weights: Module path and `ops.sample.sample_digest` of each base weight that its file carried along.

    Example:
        >>> AdapterMetadata(base="smollm2", row_format="chat").base
        'smollm2'
    """

    base: str | None = None
    base_fingerprint: str | None = None
    revision: str | None = None
    task_type: str | None = None
    row_format: str | None = None
    template_digest: str | None = None
    base_weights: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, eq=False)
class Adapter:
    """A set of low-rank updates for one base model, as a value that never changes.

    Args:
        modules: Module path to its factors.
        config: The settings that it was made with.
        trained: Full parameter path to values of whatever trained whole (biases, heads).
        metadata: What it was made for.
        tokens: Path of an embedding table to the rows of it that trained.

    Raises:
        AdapterError: If there is nothing in it.

    Example:
        >>> pair = LowRank(torch.zeros(1, 2), torch.zeros(3, 1), 1.0)
        >>> Adapter({"layers.0.q_proj": pair}, LoRAConfig(rank=1)).num_parameters
        5
    """

    modules: Mapping[str, LowRank]
    config: LoRAConfig
    trained: Mapping[str, Tensor] = field(default_factory=dict)
    metadata: AdapterMetadata = field(default_factory=AdapterMetadata)
    tokens: Mapping[str, TokenRows] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.modules and not self.trained and not self.tokens:
            raise AdapterError("an adapter needs at least one module or trained parameter, got none")
        modules = {path: self.modules[path] for path in sorted(self.modules)}
        trained = {path: _own(self.trained[path]) for path in sorted(self.trained)}
        object.__setattr__(self, "modules", MappingProxyType(modules))
        object.__setattr__(self, "trained", MappingProxyType(trained))
        object.__setattr__(self, "tokens", MappingProxyType({path: self.tokens[path] for path in sorted(self.tokens)}))

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        """Pickle and copy by parts: a read-only mapping cannot be pickled itself."""
        return type(self), (dict(self.modules), self.config, dict(self.trained), self.metadata, dict(self.tokens))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over what the adapter does: paths, scalings, dtypes, shapes, values; not name or metadata."""
        sha = hashlib.sha256()
        for path, pair in self.modules.items():
            form = "" if pair.form == "linear" else f"{pair.form}\0"
            sha.update(f"{path}\0{float(pair.scaling).hex()}\0{form}".encode())
            for tensor in pair.tensors().values():
                _hash_tensor(sha, tensor)
        for path, tensor in self.trained.items():
            sha.update(f"{path}\0".encode())
            _hash_tensor(sha, tensor)
        for path, one in self.tokens.items():
            sha.update(f"{path}\0rows {one.indices}\0".encode())
            _hash_tensor(sha, one.rows)
        return sha.hexdigest()

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by a flat name: `PATH.lora_A` and so on; what trained whole by its path."""
        flat: dict[str, Tensor] = {}
        for path, pair in self.modules.items():
            flat |= {f"{path}.{name}": tensor for name, tensor in pair.tensors().items()}
        return flat | dict(self.trained) | {f"{path}.token_rows": one.rows for path, one in self.tokens.items()}

    @property
    def num_parameters(self) -> int:
        """How many numbers it holds."""
        return sum(tensor.numel() for tensor in self.tensors().values())

    @property
    def num_bytes(self) -> int:
        """How many bytes its numbers take."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())


def _own(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU that nobody else can change."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _hash_tensor(sha: "hashlib._Hash", tensor: Tensor) -> None:
    sha.update(f"{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
    sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
