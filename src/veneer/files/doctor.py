"""The doctor of adapter files: why they are refused, all of it at once, and what is suspicious in those that are not.

`load_adapter` is the arbiter. What it accepts has no error here; what it refuses has at least one: its own stages are
gone through again one by one, each with what the ones before it could not use taken away.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.adapter import Adapter
from veneer.errors import AdapterError, DamagedArtefactError, VeneerError
from veneer.files.commit import readable_folder
from veneer.files.doctor_codes import ERROR, Finding, limited
from veneer.files.doctor_files import FILE_CHECKS, Place, convert_command, look
from veneer.files.doctor_suspicions import SUSPICIONS
from veneer.files.filesystem import REAL, FileSystem
from veneer.files.manifest import read_verified
from veneer.files.peft import KIND, adapter_from_files, load_adapter
from veneer.files.peft_config import config_from_peft
from veneer.files.peft_folder import CONFIG, MAX_CONFIG, TENSORS
from veneer.files.peft_other import METHODS, read_other
from veneer.files.peft_tokens import METHOD as TOKENS_ALONE
from veneer.files.strict_json import dump_json, parse_json
from veneer.files.tensors import MAX_FILE, dump_tensors, non_finite, parse_tensors

_SPLIT = re.compile(r"(?P<where>'(?:[^'\\]|\\.)*'|[^\s:]+): (?P<what>.*)", re.DOTALL)
_KEY = re.compile(r"\w+")

_CONFIG_CODES = (
    ("V208", r"ensure_weight_tying: "),
    ("V206", r"init_lora_weights: .*changed the base"),
    ("V207", r"can take for ever|quantifiers and alternatives|back references|characters; at most"),
    ("V204", r"unknown key with a value|a value here has no meaning"),
    ("V205", r"is not supported"),
)
_TENSOR_CODES = (
    ("V305", r"were sharded weights"),
    ("V314", r"use_dora|a magnitude without factors"),
    ("V306", r"expected rank|a stack of rank"),
    ("V308", r"share a floating dtype|expected floating numbers"),
    ("V107", r"the manifest's"),
    ("V207", r"patterns takes over"),
    ("V317", r"token"),
    ("V316", r"trained whole|modules_to_save|the bias of a layer|of which it should be a copy"),
    ("V304", r"lora_[AB] without|stands for the same|not the path|is not supported|weight of a layer that is not|"
             r"expected a key that begins|nested factors|not a tensor that"),
    ("V303", r"expected keys that begin with"),
)  # fmt: skip
_HEADER_CODES = (
    ("V302", r"stands twice|JSON that cannot be trusted|not JSON|not UTF-8|nested deeper|byte order mark"),
    ("V308", r"dtype .* is not supported"),
)
_DEPENDS = {
    "r": ("V306",),
    "rank_pattern": ("V306",),
    "use_dora": ("V314",),
    "modules_to_save": ("V316",),
    "bias": ("V316",),
    "task_type": ("V316",),
    "trainable_token_indices": ("V317",),
    "target_parameters": ("V300", "V304", "V306"),
}
"""What cannot be told any more where a key of the configuration cannot be used."""


@dataclass(frozen=True)
class Examined:
    """What the doctor found of the files of an adapter.

    Args:
        findings: Everything, errors first.
        adapter: The adapter, where `load_adapter` accepts it.
    """

    findings: tuple[Finding, ...]
    adapter: Adapter | None = None


@dataclass
class _Patient:
    """What the stages know of files that were refused, and what they found."""

    place: Place
    raw: dict[str, Any] = field(default_factory=dict)
    notes: Mapping[str, Any] | None = None
    blind: set[str] = field(default_factory=set)
    is_changed: bool = False
    findings: list[Finding] = field(default_factory=list)

    def add(self, error: VeneerError, rows: tuple[tuple[str, str], ...], default: str, where: str) -> None:
        """Add a finding for each problem of an error, by what it says."""
        for line in error.problems or (error.message,):
            code = next((code for code, pattern in rows if re.search(pattern, line)), default)
            split = _SPLIT.fullmatch(line) if error.problems else None
            place, what = (split["where"].strip("'"), split["what"]) if split else (where, line)
            if code not in self.blind:
                self.findings.append(Finding(code, place, what))


def examine(path: str | Path, *, max_bytes: int = MAX_FILE, fs: FileSystem = REAL) -> Examined:
    """Say everything that is wrong or suspicious about the files of an adapter; nothing in them is run.

    Args:
        path: The folder; or a file, of which is said what it is.
        max_bytes: Longest file that is read.
        fs: Where it lies.

    Cost:
        Of files that are accepted: one reading, and one more for the manifest's hashes. Of others: up to three.

    Example:
        >>> [(one.code, one.severity) for one in examine("no/such/folder").findings]
        [('V101', 'error')]
    """
    place = look(readable_folder(path, fs=fs), str(path), fs)
    findings = [finding for check in FILE_CHECKS for finding in check(place)]
    adapter, refusal = _load(path, max_bytes, fs)
    if adapter is not None:
        raw = parse_json(fs.read_bytes(place.path / CONFIG, MAX_CONFIG), CONFIG, max_bytes=MAX_CONFIG)
        findings += [finding for check in SUSPICIONS for finding in check(adapter, raw, place)]
    elif place.is_folder:
        findings += _explain(place, max_bytes, fs)
    if refusal is not None and not any(one.severity == ERROR for one in findings):
        findings += [Finding("V100", place.name, line) for line in refusal]
    return Examined(limited(findings), adapter)


def _load(path: str | Path, max_bytes: int, fs: FileSystem) -> tuple[Adapter | None, tuple[str, ...] | None]:
    """Return the adapter; or None and why not."""
    try:
        return load_adapter(path, max_bytes=max_bytes, fs=fs), None
    except VeneerError as error:
        return None, error.problems or (error.message,)
    except OSError as error:
        return None, (str(error),)


def _explain(place: Place, max_bytes: int, fs: FileSystem) -> list[Finding]:
    """Return what every stage of reading says of files that were refused."""
    patient, files = _Patient(place), {}
    for name in (CONFIG, TENSORS):
        if name in place.files:
            try:
                files[name] = fs.read_bytes(place.path / name, max_bytes)
            except OSError as error:
                patient.findings.append(Finding("V103", name, str(error)))
    try:
        _, manifest = read_verified(place.path, list(files), max_bytes=max_bytes, fs=fs)
        patient.notes = manifest.notes if manifest is not None and manifest.kind == KIND else None
    except DamagedArtefactError as error:
        patient.add(error, (), "V107", place.name)
    if CONFIG in files:
        files = _read_config(patient, files)
    if TENSORS in files:
        _read_tensors(patient, files)
    return patient.findings


def _read_config(patient: _Patient, files: dict[str, bytes]) -> dict[str, bytes]:
    """Find what is wrong with the configuration; return the files with one that can be used, or without one."""
    rest = {name: data for name, data in files.items() if name != CONFIG}
    try:
        raw = parse_json(files[CONFIG], CONFIG, max_bytes=MAX_CONFIG)
    except VeneerError as error:
        patient.add(error, (), "V201", CONFIG)
        return rest
    if not isinstance(raw, dict):
        patient.findings.append(Finding("V202", CONFIG, f"expected an object, got {type(raw).__name__}"))
        return rest
    patient.raw = raw
    method = raw.get("peft_type")
    if isinstance(method, str) and method in METHODS:
        _read_other(patient)
        return {}
    if method == TOKENS_ALONE:
        return files
    if method != "LORA":
        if not patient.place.format:
            patient.findings.append(Finding("V110", CONFIG, f"peft_type is {str(method)[:80]!r}; expected 'LORA'"))
        return rest
    try:
        config_from_peft(raw, CONFIG)
    except AdapterError as error:
        patient.add(error, _CONFIG_CODES, "V203", CONFIG)
        bad = {found[0] for line in error.problems if (found := _KEY.match(line))}
        patient.blind |= {code for key in bad for code in _DEPENDS.get(key, ())}
        return {**rest, CONFIG: dump_json(_without(raw, bad))}
    return files


def _without(raw: Mapping[str, Any], bad: Iterable[str]) -> dict[str, Any]:
    """Return a configuration that can be used, so that the tensors can be looked at all the same."""
    kept = {key: value for key, value in raw.items() if key not in bad}
    if not kept.get("target_modules") and not kept.get("target_parameters"):
        kept["target_modules"] = ["any"]
    return kept


def _read_other(patient: _Patient) -> None:
    """Say of an adapter of another method that it is one, and what is wrong with it besides."""
    place = patient.place
    method = METHODS[patient.raw["peft_type"]].name
    what = f"an adapter of {method}, not of LoRA"
    try:
        read_other(place.path)
        patient.findings.append(Finding("V109", place.name, what, convert_command(place, to="lora")))
    except VeneerError as error:
        patient.findings.append(Finding("V109", place.name, f"{what}, and refused as that too"))
        patient.add(error, (*_CONFIG_CODES, *_TENSOR_CODES, *_HEADER_CODES), "V300", place.name)


def _read_tensors(patient: _Patient, files: dict[str, bytes]) -> None:
    """Find what is wrong with the tensors: the header, the values, the names and shapes, one after another."""
    data = files[TENSORS]
    try:
        tensors = parse_tensors(data, TENSORS, finite=False)
    except VeneerError as error:
        if TENSORS not in patient.place.pickles:  # that was said
            patient.add(error, _HEADER_CODES, "V301", TENSORS)
        return
    if lines := non_finite(tensors):
        patient.add(AdapterError("not finite", lines), (), "V307", TENSORS)
        tensors = {name: _finite(one) for name, one in tensors.items()}
        files, patient.is_changed = {**files, TENSORS: dump_tensors(tensors)}, True
    if CONFIG not in files:
        patient.findings += _names_alone(tensors)
        return
    notes = None if patient.is_changed or patient.blind else patient.notes
    try:
        adapter_from_files(files, patient.place.name, notes)
    except DamagedArtefactError as error:
        patient.add(error, (), "V107", patient.place.name)
    except VeneerError as error:
        is_tokens = patient.raw.get("peft_type") == TOKENS_ALONE
        rows = (*_CONFIG_CODES, ("V317", "")) if is_tokens else _TENSOR_CODES
        patient.add(error, rows, "V300", TENSORS)


def _finite(tensor: Tensor) -> Tensor:
    return torch.nan_to_num(tensor, 0.0, 0.0, 0.0) if tensor.is_floating_point() else tensor


def _names_alone(tensors: Mapping[str, Tensor]) -> Iterator[Finding]:
    """Say what tensors show without a configuration: that they are empty."""
    for name, tensor in tensors.items():
        if ".lora_" in name and not tensor.numel():
            yield Finding("V305", name, f"shape {tuple(tensor.shape)}")
