"""Load a base model and its tokenizer: frozen, in a dtype that the processor is fast in."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
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
from veneer.errors import BaseModelError

log = logging.getLogger("veneer")


def load_base(
    base: str, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a frozen language model and its tokenizer.

    Args:
        base: Directory, hub id, `.gguf` file, or the name of an embedded model such as `smollm2`.
        dtype: Dtype of the weights; None chooses with `compute_dtype`.
        device: Where the model goes.

    Returns:
        The model in evaluation mode with no gradient asked for, tied weights tied; and its tokenizer.

    Raises:
        BaseModelError: If it cannot be found or loaded.

    Example:
        model, tokenizer = load_base("smollm2")
    """
    source = find_source(base)
    return load_model(source, dtype=dtype, device=device), load_tokenizer(source)


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
    source: Source, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """Load the model of a base that was found, see `load_base`.

    Raises:
        BaseModelError: If it cannot be loaded.
    """
    if dtype is None:
        stored = load_config(source).dtype
        dtype, reason = compute_dtype(stored, torch.device(device))
        log.info("%s computes in %s: %s", source.name, _name(dtype), reason)
    model, found = _pretrained(AutoModelForCausalLM, source, dtype=dtype, output_loading_info=True)
    check_complete(found, source.name)
    model.name_or_path = source.name  # a converted file is known by its own name, not by its place in our cache
    return model.requires_grad_(False).eval().to(device)


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
        raise BaseModelError(f"base {name!r}: {count} weights of its file do not fit the model", problems[:20])


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
        return torch.float32, f"this processor has no units for {_name(stored)}, in which the weights are stored"
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
