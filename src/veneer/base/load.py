"""Load a base model and its tokenizer: frozen, in a dtype that the processor is fast in, or in fewer bits."""

import logging
from collections import Counter
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from veneer.base.quiet import quiet_transformers
from veneer.base.source import Source, find_source
from veneer.errors import BaseModelError, ConfigError, shortened
from veneer.names import did_you_mean
from veneer.nn.attach import require_bare
from veneer.nn.heads import output_heads
from veneer.storage.quantise import QUANTISERS, quantise_model
from veneer.storage.registry import storage_of

log = logging.getLogger("veneer")

PLAIN = "plain"
"""The storage of a base that stays as it was loaded."""

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What a base may be computed in, by name."""


def load_base(
    base: str,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
    storage: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a frozen language model and its tokenizer.

    Args:
        base: Directory, hub id, `.gguf` file, or the name of an embedded model such as `smollm2`.
        dtype: What the weights are held and computed in, `"bfloat16"` for example; None or `"auto"` chooses with
            `compute_dtype`. An adapter belongs to the base in the dtype that it was trained on, where that rounds it.
        device: Where the model goes.
        storage: `"int8"` or `"nf4"` to store the linear layers in 8 or 4 bits, see `quantise_base`; None or `"plain"`
            leaves them as they are. An adapter belongs to the base in the storage that it was trained on.

    Returns:
        The model in evaluation mode with no gradient asked for, tied weights tied; and its tokenizer.

    Raises:
        ConfigError: If the storage or the dtype is unknown.
        BaseModelError: If it cannot be found, loaded or quantised.

    Cost:
        The whole model in its dtype is in memory before it is quantised: that is the peak. A device other than the CPU
        only ever holds the quantised one.

    Example:
        model, tokenizer = load_base("smollm2", storage="nf4")
    """
    check_storage(storage)
    dtype = named_dtype(dtype)
    source = find_source(base)
    return load_model(source, dtype=dtype, device=device, storage=storage), load_tokenizer(source)


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a base that was found.

    Raises:
        BaseModelError: If it cannot be loaded.
    """
    return _pretrained(AutoTokenizer, source)


def load_config(source: Source) -> PreTrainedConfig:
    """Load the configuration of a base that was found; it costs nothing beside the weights.

    Raises:
        BaseModelError: If it cannot be loaded.
    """
    return _pretrained(AutoConfig, source)


def num_positions(config: PreTrainedConfig) -> int | None:
    """Return how many tokens a model of a configuration has positions for, or None where it does not say.

    Example:
        >>> num_positions(AutoConfig.for_model("opt"))
        2048
    """
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def load_model(
    source: Source,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
    storage: str | None = None,
) -> PreTrainedModel:
    """Load the model of a base that was found, see `load_base`.

    Raises:
        ConfigError: If the storage or the dtype is unknown.
        BaseModelError: If it cannot be loaded or quantised.
    """
    check_storage(storage)
    dtype = named_dtype(dtype)
    if dtype is None:
        stored = load_config(source).dtype
        dtype, reason = compute_dtype(stored, torch.device(device))
        log.info("%s computes in %s: %s", source.name, _name(dtype), reason)
    model, found = _pretrained(AutoModelForCausalLM, source, dtype=dtype, output_loading_info=True)
    check_complete(found, source.name)
    model.name_or_path = source.name  # a converted file is known by its own name, not by its place in our cache
    model.requires_grad_(False).eval()
    if storage is not None:
        quantise_base(model, storage)
    return model.to(device)


def named_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return a dtype that a base may be computed in by its name; None for `auto`.

    Raises:
        ConfigError: With the nearest name.

    Example:
        >>> named_dtype("bfloat16"), named_dtype("auto")
        (torch.bfloat16, None)
    """
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}{did_you_mean(dtype, DTYPES)}")
    return DTYPES[dtype]


def check_storage(storage: str | None) -> None:
    """Raise unless a base can be stored so.

    Raises:
        ConfigError: With the nearest name.
    """
    known = (PLAIN, *QUANTISERS)
    if storage is not None and storage not in known:
        raise ConfigError(f"storage={storage!r} is not one of {', '.join(known)}{did_you_mean(str(storage), known)}")


def quantise_base(model: PreTrainedModel, storage: str) -> None:
    """Store the linear layers of a model in fewer bits, in place, one after the other.

    Left as they are: the output head (whose weight the loss reads, and which is often the embedding), layers of other
    types and tables, and modules that transformers keeps in float32: they are precious, and T5 reads the dtype of one's
    weight, which a quantised layer has not.

    Args:
        model: Changed in place.
        storage: `"int8"` or `"nf4"`; for `"plain"` nothing is done.

    Raises:
        AttachError: If an adapter is attached: quantise first.
        BaseModelError: If there is no layer to quantise (GPT-2's are of a type of its own; those of a quantised model
            are quantised already), or weights are not finite.

    Example:
        quantise_base(model, "nf4")
    """
    if storage == PLAIN:
        return
    require_bare(model)
    heads = output_heads(model)
    precious = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    skip = [
        path
        for path, module in model.named_modules(remove_duplicate=False)
        if any(module is head for head in heads) or any(f".{name}." in f".{path}." for name in precious)
    ]
    before = _stored_bytes(model)
    count = quantise_model(model, storage, skip=skip)
    if not count:
        raise BaseModelError(_why_none(model, storage))
    _own_memory(model)
    log.info(
        "%s: %d linear layers stored as %s, %s bytes before, %s after",
        *(model.name_or_path, count, storage, f"{before:,}", f"{_stored_bytes(model):,}"),
    )


def _why_none(model: nn.Module, storage: str) -> str:
    """Return why no layer of a model was quantised: there are none, or they are quantised already."""
    stored = Counter(found.name for module in model.modules() if (found := storage_of(module)) is not None)
    already = ", ".join(f"{count} as {name}" for name, count in stored.items() if name != PLAIN)
    if already:
        return (
            f"linear layers of this {type(model).__name__} are quantised already ({already}), and no other is left to "
            f"store as {storage}; a second time would round twice: load the base anew with storage={storage!r}"
        )
    return f"{type(model).__name__} has no linear layer that can be stored as {storage}; load it with storage='plain'"


def _own_memory(model: nn.Module) -> None:
    """Copy what was left as it is: a checkpoint's file is mapped into memory, and one table holds on to all of it."""
    copies: dict[tuple[int, torch.Size], torch.Tensor] = {}
    for parameter in model.parameters():
        place = (parameter.data_ptr(), parameter.shape)
        if place not in copies:
            copies[place] = parameter.detach().clone()
        parameter.data = copies[place]


def _stored_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of all that a model holds, what is tied counted once."""
    return sum(one.nbytes for one in chain(model.parameters(), model.buffers()))


def check_complete(found: Mapping[str, Any], name: str) -> None:
    """Raise unless every weight of a model came from its file: transformers fills what is missing at random.

    Args:
        found: What transformers tells with `output_loading_info`.
        name: The base, for the message.

    Raises:
        BaseModelError: Listing keys that are missing, left over, or of another shape.
    """
    kinds = {"missing_keys": "missing", "unexpected_keys": "not the model's", "mismatched_keys": "of another shape"}
    problems = [f"{key}: {word}" for kind, word in kinds.items() for key in sorted(map(str, found.get(kind) or ()))]
    if problems:
        count = len(problems)
        raise BaseModelError(
            f"base {name!r}: {count} weights of its file do not fit the model", shortened(problems, 20)
        )


def compute_dtype(stored: torch.dtype | None, device: torch.device) -> tuple[torch.dtype, str]:
    """Return the dtype to compute in for weights stored in a dtype, and why.

    16-bit products on a processor without units for them are 8 to 500 times slower than float32 ones.

    Example:
        >>> compute_dtype(torch.float16, torch.device("cpu"))[0]
        torch.float32

    Source:
        pytorch/pytorch#146508: bf16 44 to 500 times slower than float32 on processors with AVX2 only.
    """
    if stored in (None, torch.float32):
        return torch.float32, "its weights are stored so"
    assert stored is not None
    if device.type != "cpu":
        return stored, f"its weights are stored so, and {device.type} has units for it"
    if stored == torch.bfloat16 and has_bf16_units():
        return stored, "its weights are stored so, and this processor has bf16 units"
    if stored.itemsize < 4:
        return torch.float32, (
            f"this processor has no units for {_name(stored)}, in which the weights are stored: products would be 8 "
            "to 500 times slower"
        )
    return stored, "its weights are stored so"


def has_bf16_units() -> bool:
    """Tell whether the processor multiplies bf16 in hardware (AVX512-BF16 or AMX)."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _pretrained(factory: Any, source: Source, **options: Any) -> Any:
    """Call a `from_pretrained` of transformers; a model that is not there is our error, in our words."""
    try:
        with quiet_transformers():
            return factory.from_pretrained(source.location, **options)
    except Exception as error:  # whatever reading damaged or foreign files may raise
        where = "its directory" if source.is_local else "the hub (or its local cache)"
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BaseModelError(f"base {source.name!r} cannot be loaded from {where}: {first}{source.hint}") from error
