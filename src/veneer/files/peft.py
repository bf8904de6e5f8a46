"""Adapters in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`.

What PEFT and vLLM load, they load from here unchanged; nothing of ours stands in those two files. What else we know
(the base's fingerprint, the digest) is in the manifest's notes.
"""

from collections.abc import Mapping
from dataclasses import asdict
from dataclasses import replace as with_changes
from pathlib import Path
from typing import Any

from torch import Tensor

from veneer.adapter import Adapter, LowRank, TokenRows
from veneer.config import LoRAConfig
from veneer.errors import AdapterError, ConfigError, DamagedArtefactError
from veneer.files.commit import Manifest, commit_folder
from veneer.files.filesystem import REAL, FileSystem, Pieces
from veneer.files.patterns import divisor, resolve
from veneer.files.peft_config import config_from_peft, config_to_peft
from veneer.files.peft_folder import CONFIG, MAX_CONFIG, PREFIX, TENSORS, read_folder
from veneer.files.peft_keys import Parts, read_keys, trained_problems
from veneer.files.peft_layout import Placed, owner_of, place_factors, read_pair, write_factors
from veneer.files.peft_tokens import METHOD as TOKENS_ALONE
from veneer.files.peft_tokens import read_rows_alone, rows_alone, write_rows_alone
from veneer.files.strict_json import dump_json, parse_json
from veneer.files.tensors import MAX_FILE, non_finite, parse_tensors, tensor_pieces
from veneer.names import matches_suffix
from veneer.ops.sample import sample_digest

CARD = "README.md"
KIND = "adapter"

_ROWS = ".token_adapter.trainable_tokens_delta"
_NOTED = ("base_fingerprint", "row_format", "template_digest")
_CLOSE = 1e-12


def adapter_to_files(adapter: Adapter, *, card: str | None = None) -> dict[str, bytes]:
    """Return the files of an adapter by name; equal adapters give equal bytes, which read back as the same adapter.

    Args:
        adapter: The adapter.
        card: Text of a model card.

    Raises:
        AdapterError: If PEFT's layout cannot hold it, or what it holds and its settings disagree.

    Example:
        >>> import torch
        >>> pair = LowRank(torch.zeros(2, 3), torch.zeros(3, 2), scaling=2.0)
        >>> sorted(adapter_to_files(Adapter({"layers.0.q_proj": pair}, LoRAConfig(rank=2))))
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    pieces = adapter_pieces(adapter, card=card)
    files = {name: b"".join(content) for name, content in pieces.items()}
    # What cannot be read back the same is not written: odd names, for one, or a weight that is not finite.
    again = adapter_from_files(files, "the adapter as written", _notes(adapter))
    if again.digest != adapter.digest:
        raise AdapterError("the adapter would not be read back the same from PEFT's layout; please report this")
    return files


def adapter_pieces(adapter: Adapter, *, card: str | None = None) -> dict[str, Pieces]:
    """Return what `adapter_to_files` does without a copy of the tensors, and without reading it back.

    For an adapter whose like was proved before: the same run's, with other values.

    Raises:
        AdapterError: If PEFT's layout cannot hold it, what it holds and its settings disagree, or it is not finite.
    """
    problems = trained_problems(adapter.config, set(adapter.modules), adapter.trained, adapter.metadata.task_type)
    if problems:
        raise AdapterError("the adapter's settings do not say what it holds", problems)
    raw, named = write_rows_alone(adapter) if rows_alone(adapter) else (config_to_peft(adapter), _tensors(adapter))
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in named.items()}
    if problems := non_finite(tensors):
        raise AdapterError("the adapter is not finite", problems)
    files: dict[str, Pieces] = {CONFIG: [dump_json(raw)], TENSORS: tensor_pieces(tensors)}
    return files if card is None else files | {CARD: [card.encode()]}


def adapter_from_files(files: Mapping[str, bytes], where: str, notes: Mapping[str, Any] | None = None) -> Adapter:
    """Return the adapter that the bytes of its two files hold.

    Args:
        files: `adapter_config.json` and `adapter_model.safetensors` by name; others are not looked at.
        where: What errors call the folder.
        notes: The notes of the manifest that vouches for them.

    Raises:
        AdapterError: If a key is not understood, a value has the wrong shape, or anything is missing; all at once.
    """
    raw = parse_json(files[CONFIG], f"{where}/{CONFIG}", max_bytes=MAX_CONFIG)
    if isinstance(raw, dict) and raw.get("peft_type") == TOKENS_ALONE:
        tensors, known = parse_tensors(files[TENSORS], f"{where}/{TENSORS}"), _read_notes(notes or {}, where)
        config, metadata, tokens = read_rows_alone(raw, tensors, where)
        metadata = with_changes(metadata, **known["metadata"])
        return _vouched(Adapter({}, known["config"] or config, {}, metadata, tokens), known, where)
    config, metadata = config_from_peft(raw, f"{where}/{CONFIG}")
    place = f"{where}/{TENSORS}"
    tensors = parse_tensors(files[TENSORS], place)
    parts = read_keys(tensors, PREFIX, config.modules_to_save, place)
    problems = list(parts.problems)
    problems += trained_problems(config, set(parts.modules), parts.trained, metadata.task_type)
    known = _read_notes(notes or {}, where)
    transposed, version = raw.get("fan_in_fan_out") is True, raw.get("peft_version")
    placed, unclear = place_factors(parts.modules, tensors, config, transposed)
    problems += unclear
    modules = _modules(config, tensors, placed, version if isinstance(version, str) else None, known, problems)
    problems += _magnitude_problems(config, modules)
    tokens = _tokens(config, parts, tensors, problems)
    problems += _bias_problems(parts, modules, tensors)
    if problems:
        raise AdapterError(f"{place}: its tensors are not what {CONFIG} says", problems)
    trained = {path: tensors[key] for path, key in parts.trained.items()}
    weights = tuple((path, sample_digest(tensors[key])) for path, key in sorted(parts.base_weights.items()))
    metadata = with_changes(metadata, base_weights=weights or known["base_weights"], **known["metadata"])
    return _vouched(Adapter(modules, known["config"] or config, trained, metadata, tokens), known, where)


def _vouched(adapter: Adapter, known: Mapping[str, Any], where: str) -> Adapter:
    if known["digest"] not in (None, adapter.digest):
        raise DamagedArtefactError(f"{where}: expected digest {known['digest']}, got {adapter.digest}")
    return adapter


def _tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Return the tensors of an adapter by their names without PEFT's prefix."""
    named = write_factors(adapter.modules)
    named |= {f"{path}{_ROWS}": one.rows for path, one in adapter.tokens.items()}
    for path, tensor in adapter.trained.items():
        parent = path.removesuffix(".bias")
        wrapped = path.endswith(".bias") and parent in adapter.modules
        named[f"{parent}.base_layer.bias" if wrapped else path] = tensor
    return named


def save_adapter(
    adapter: Adapter,
    folder: str | Path,
    *,
    card: str | None = None,
    replace: bool = False,
    fs: FileSystem = REAL,
) -> Manifest:
    """Write an adapter's folder, whole or not at all.

    Args:
        adapter: The adapter.
        folder: The folder to make.
        card: Text of a model card.
        replace: Put it in the place of a folder that exists.
        fs: Where it lies.

    Raises:
        AdapterError: If PEFT's layout cannot hold the adapter.
        OutputError: If the folder exists or cannot be written.

    Example:
        >>> import tempfile, torch
        >>> pair = LowRank(torch.ones(2, 3), torch.zeros(3, 2), scaling=2.0)
        >>> adapter = Adapter({"layers.0.q_proj": pair}, LoRAConfig(rank=2, alpha=4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save_adapter(adapter, Path(folder) / "mine")
        ...     load_adapter(Path(folder) / "mine").digest == adapter.digest
        True
    """
    files = adapter_to_files(adapter, card=card)
    return commit_folder(folder, files, kind=KIND, notes=_notes(adapter), replace=replace, fs=fs)


def load_adapter(folder: str | Path, *, max_bytes: int = MAX_FILE, fs: FileSystem = REAL) -> Adapter:
    """Read an adapter's folder, of ours or of PEFT.

    Args:
        folder: The folder.
        max_bytes: Longest file that is read.
        fs: Where it lies.

    Raises:
        AdapterError: If anything in it is missing, unknown, unsupported or wrong; every problem is listed.
        DamagedArtefactError: If it has a manifest and does not match it.

    Example:
        load_adapter("runs/tickets/adapter").config.rank
    """
    files, manifest = read_folder(folder, max_bytes=max_bytes, fs=fs)
    ours = manifest is not None and manifest.kind == KIND
    return adapter_from_files(files, str(folder), manifest.notes if manifest is not None and ours else None)


def _modules(
    config: LoRAConfig,
    tensors: Mapping[str, Tensor],
    placed: Mapping[str, Placed],
    version: str | None,
    known: Mapping[str, Any],
    problems: list[str],
) -> dict[str, LowRank]:
    """Pair the factors and check them against the ranks and alphas that the configuration gives."""
    owners = {path: owner_of(path, one.form) for path, one in placed.items()}
    try:
        ranks = resolve(owners.values(), config.rank_pattern, config.rank)
        alphas = resolve(owners.values(), config.alpha_pattern, config.alpha)
    except AdapterError as error:
        problems.append(error.message)
        return {}
    modules = {}
    for path, one in placed.items():
        rank, derived = ranks[owners[path]], alphas[owners[path]] / divisor(ranks[owners[path]], config.use_rslora)
        scaling = known["scalings"].get(path, derived)
        if not abs(scaling - derived) <= _CLOSE * derived:
            problems.append(f"{path}: the manifest's scaling {scaling!r} is not the configuration's {derived!r}")
            continue
        try:
            pair = read_pair(one, tensors, rank, version)
            if not _is_filler(pair):
                modules[path] = with_changes(pair, scaling=scaling, frozen_rank=known["frozen"].get(path, 0))
        except AdapterError as error:
            problems += error.problems or [f"{path}: {error.message}"]
    return modules


def _is_filler(pair: LowRank) -> bool:
    """Tell whether a pair is what stands in a file for a projection of an attention that is not adapted."""
    return pair.form.startswith("attention") and not pair.lora_A.any() and not pair.lora_B.any()


def _magnitude_problems(config: LoRAConfig, modules: Mapping[str, LowRank]) -> list[str]:
    """Return where magnitudes are there without `use_dora`, or lacking with it: PEFT would silently use plain LoRA."""
    if config.use_dora:
        return [
            f"{path}: use_dora is true, but there is no magnitude"
            for path, one in modules.items()
            if one.magnitude is None
        ]
    return [
        f"{path}: there is a magnitude (DoRA), but use_dora is not true"
        for path, one in modules.items()
        if one.magnitude is not None
    ]


def _tokens(
    config: LoRAConfig, parts: Parts, tensors: Mapping[str, Tensor], problems: list[str]
) -> dict[str, TokenRows]:
    """Return the rows of tokens that trained; every table of the file and every entry of the configuration is used."""
    tokens, used = {}, set()
    for path, key in parts.tokens.items():
        entry = next((name for name in config.token_rows if matches_suffix(path, name)), None)
        # A plain list of ids does not name its table: the file's only one is meant.
        if entry is None and len(config.token_rows) == len(parts.tokens) == 1:
            entry = next(iter(config.token_rows))
        if entry is None:
            problems.append(f"{key!r}: rows of tokens, but trainable_token_indices names no such table")
            continue
        used.add(entry)
        try:
            tokens[path] = TokenRows(config.token_rows[entry], tensors[key])
        except AdapterError as error:
            problems.append(f"{key!r}: {error.message}")
    problems += [
        f"trainable_token_indices[{name!r}]: no rows of such a table are there"
        for name in config.token_rows
        if name not in used
    ]
    return tokens


def _bias_problems(parts: Parts, modules: Mapping[str, LowRank], tensors: Mapping[str, Tensor]) -> list[str]:
    problems = []
    for path, pair in modules.items():
        key = parts.trained.get(f"{path}.bias")
        expected = pair.sizes[:1]
        if key is not None and tensors[key].shape != expected:
            problems.append(f"{key!r}: expected shape {expected}, got {tuple(tensors[key].shape)}")
    return problems


def _notes(adapter: Adapter) -> dict[str, Any]:
    """Return what we know of an adapter that PEFT's files have no place for."""
    scales = LoRAConfig() if rows_alone(adapter) else config_from_peft(config_to_peft(adapter), CONFIG)[0]
    owners = {path: owner_of(path, pair.form) for path, pair in adapter.modules.items()}
    ranks = resolve(owners.values(), scales.rank_pattern, scales.rank)
    alphas = resolve(owners.values(), scales.alpha_pattern, scales.alpha)
    # Not every scaling is a quotient of two floats; where alpha gives it but for the last digit, it is noted.
    inexact = {
        path: float(pair.scaling).hex()
        for path, pair in adapter.modules.items()
        if alphas[owners[path]] / divisor(ranks[owners[path]], scales.use_rslora) != pair.scaling
    }
    values = asdict(adapter.metadata)
    return {
        "digest": adapter.digest,
        "metadata": {key: values[key] for key in _NOTED},
        "scalings": inexact,
        "base_weights": dict(adapter.metadata.base_weights),
        "frozen": {path: pair.frozen_rank for path, pair in adapter.modules.items() if pair.frozen_rank},
        "config": adapter.config.model_dump(mode="json"),
    }


def _read_notes(notes: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return what the notes of a manifest say, with their types checked."""
    digest, metadata, scalings = notes.get("digest"), notes.get("metadata", {}), notes.get("scalings", {})
    weights, frozen, config = notes.get("base_weights", {}), notes.get("frozen", {}), notes.get("config")
    texts = [digest, *(value for one in (metadata, weights) for value in (one.values() if type(one) is dict else [0]))]
    if not all(text is None or isinstance(text, str) for text in texts) or not set(metadata) <= set(_NOTED):
        raise DamagedArtefactError(f"{where}: the manifest's notes must hold digest and {', '.join(_NOTED)} as strings")
    if type(frozen) is not dict or not all(type(count) is int and count >= 0 for count in frozen.values()):
        raise DamagedArtefactError(f"{where}: the manifest's frozen ranks must be whole numbers by module")
    try:
        exact = {path: float.fromhex(text) for path, text in scalings.items()}
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise DamagedArtefactError(f"{where}: the manifest's scalings must be hexadecimal floats by module") from None
    try:
        settings = None if config is None else LoRAConfig.from_json(config)
    except (ConfigError, TypeError) as error:
        raise DamagedArtefactError(f"{where}: the manifest's config is none: {error}") from None
    return {
        "digest": digest,
        "metadata": metadata,
        "scalings": exact,
        "base_weights": tuple(sorted(weights.items())),
        "frozen": frozen,
        "config": settings,
    }
