"""An adapter against a base: by the headers of its checkpoint alone, or by the model in memory."""

import re
from collections.abc import Iterator

import torch
from torch import nn

from veneer.adapter import Adapter, LowRank
from veneer.errors import AdapterError, BaseModelError
from veneer.files.doctor_codes import MAX_OF_A_CODE, Finding
from veneer.files.shards import Checkpoint, read_tensor
from veneer.names import did_you_mean
from veneer.nn.attach import check_base, require_bare
from veneer.nn.fingerprint import fingerprint
from veneer.nn.fitting import targets_of
from veneer.nn.targets import locate

_MODEL_CODES = (
    ("V501", r"the model has no such module"),
    ("V502", r"the layer is \(out, in\)|should have shapes"),
)
_SPLIT = re.compile(r"(?P<where>[^\s:]+): (?P<what>.*)", re.DOTALL)
_BY_VALUE = ("conv", "conv_across", "conv_transpose")


def weight_norms(checkpoint: Checkpoint, adapter: Adapter) -> dict[str, float]:
    """Return the Frobenius norm of the weight under each of an adapter's modules.

    Raises:
        BaseModelError: If the checkpoint lacks a weight; each is listed.

    Cost:
        Reads the weights, one after another.

    Example:
        weight_norms(read_checkpoint("models/llama"), adapter)["model.layers.0.self_attn.q_proj"]
    """
    names, missing = weight_names(checkpoint, adapter)
    if missing:
        raise BaseModelError(
            f"{checkpoint.folder}: holds no weights of {len(missing)} of {len(adapter.modules)} adapted modules",
            [f"{path}{_near(path, checkpoint)}" for path in missing[:MAX_OF_A_CODE]],
        )
    return {path: _norm(checkpoint, name) for path, name in names.items()}


def weight_names(checkpoint: Checkpoint, adapter: Adapter) -> tuple[dict[str, str], list[str]]:
    """Return the name in a checkpoint of the weight under each module, and the modules that have none.

    A checkpoint of the model without its head lacks the name before the first layer (`transformer.`, `model.`), and
    one with a wrapper has more of it; a name that differs only so is taken where it is the only one.

    Args:
        checkpoint: The base's headers.
        adapter: The adapter.
    """
    by_end: dict[str, list[str]] = {}
    for name in checkpoint.tensors:
        by_end.setdefault(name.partition(".")[2], []).append(name)
    found, missing = {}, []
    for path in adapter.modules:
        wanted = [f"{path}.weight", path]
        own = [name for name in wanted if name in checkpoint.tensors]
        shorter = [end for name in wanted if (end := name.partition(".")[2]) in checkpoint.tensors]
        longer = [name for one in wanted for name in by_end.get(one, ())]
        if candidates := own or shorter or longer:
            found[path] = candidates[0]
        if len(candidates) != 1 and not own:
            found.pop(path, None)
            missing.append(path)
    return found, missing


def checkpoint_findings(adapter: Adapter, checkpoint: Checkpoint) -> list[Finding]:
    """Return how an adapter does not fit a checkpoint, by names and shapes alone.

    Example:
        checkpoint_findings(adapter, read_checkpoint("models/llama"))
    """
    names, missing = weight_names(checkpoint, adapter)
    findings = [  # of so many near misses are looked for: that takes its time in long lists
        Finding("V501", path, f"no such weight{_near(path, checkpoint) if place < MAX_OF_A_CODE else ''}")
        for place, path in enumerate(missing)
    ]
    for path, name in names.items():
        shape = checkpoint.tensors[name].shape
        if problem := _shape_problem(adapter.modules[path], shape):
            findings.append(Finding("V502", path, problem))
    if checkpoint.config.get("tie_word_embeddings") is True:
        tied = ("embed_tokens", "lm_head", "wte")
        paths = [path for path in adapter.modules if path.rpartition(".")[2] in tied]
        findings += [Finding("V506", path, "config.json says tie_word_embeddings") for path in paths]
    return findings


def model_findings(adapter: Adapter, model: nn.Module) -> list[Finding]:
    """Return how an adapter does not fit a model: names, shapes, fingerprint, what was carried along, ties.

    Raises:
        AttachError: If the model has an adapter attached.

    Example:
        >>> from veneer.config import LoRAConfig
        >>> adapter = Adapter({"1": LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0)}, LoRAConfig(rank=1))
        >>> [(one.code, one.where) for one in model_findings(adapter, nn.Sequential(nn.Linear(2, 2)))]
        [('V501', '1')]
    """
    require_bare(model)
    findings = []
    try:
        targets_of(model, adapter)
    except AdapterError as error:
        findings += [_placed(line, _MODEL_CODES, "V505") for line in error.problems or (error.message,)]
    # `targets_of` stops at names; shapes of the modules that are there are told all the same.
    missing = {one.where for one in findings if one.code == "V501"}
    if missing and len(missing) < len(adapter.modules):
        rest = {path: pair for path, pair in adapter.modules.items() if path not in missing}
        try:
            targets_of(model, Adapter(rest, adapter.config))
        except AdapterError as error:
            findings += [_placed(line, _MODEL_CODES, "V505") for line in error.problems]
    try:
        check_base(model, adapter, fingerprint(model))
    except AdapterError as error:
        rows = (("V503", r"^fingerprint: "),)
        findings += [_placed(line, rows, "V504") for line in error.problems]
    findings += [*_unchanged(adapter, model), *_carried(adapter, findings), *_tied(adapter, model)]
    return list(dict.fromkeys(findings))


def _unchanged(adapter: Adapter, model: nn.Module) -> Iterator[Finding]:
    """Find what trained whole and is what the base has, and what the base has not or in another shape."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for path, tensor in adapter.trained.items():
        own = parameters.get(path)
        if own is None:
            yield Finding(
                "V501", path, f"trained whole, the base has no such parameter{did_you_mean(path, parameters)}"
            )
        elif own.shape != tensor.shape:
            yield Finding("V502", path, f"trained whole, shape {tuple(tensor.shape)}, the base's is {tuple(own.shape)}")
        elif bool(torch.equal(own.detach().cpu().to(tensor.dtype), tensor)):
            yield Finding("V507", path, f"{tensor.numel():,} values, all of them the base's")


def _carried(adapter: Adapter, findings: list[Finding]) -> Iterator[Finding]:
    """Find base weights in the file that are the base's own."""
    other = {one.where.removesuffix(".weight") for one in findings if one.code == "V504"}
    for path, _ in adapter.metadata.base_weights:
        if path not in other:
            yield Finding("V311", f"{path}.weight", "equal to the base's, by a sample of its values")


def _tied(adapter: Adapter, model: nn.Module) -> Iterator[Finding]:
    """Find modules whose weight is also that of another module."""
    holders: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name)
    own = {name: names for names in holders.values() if len(names) > 1 for name in names}
    modules = dict(model.named_modules())
    for path in adapter.modules:
        try:
            owner, _ = locate(modules, path)
        except KeyError:
            continue
        if others := [name for name in own.get(f"{owner}.weight", ()) if name != f"{owner}.weight"]:
            yield Finding("V506", path, f"its weight is also {', '.join(others)}, which stays as it is")
    for path in adapter.trained:
        if others := [name for name in own.get(path, ()) if name != path]:
            yield Finding("V506", path, f"it is also {', '.join(others)} in the base")


def _shape_problem(pair: LowRank, shape: tuple[int, ...]) -> str | None:
    """Return how a weight's shape is not that of an update; which axis is the output, only a model tells for sure."""
    delta = _delta_shape(pair)
    if delta is None or sorted(delta) == sorted(shape):
        return None
    return f"the base's weight has shape {shape}, the update {delta}"


def _delta_shape(pair: LowRank) -> tuple[int, ...] | None:
    """Return the shape of an update's delta without forming it; None for convolutions, whose groups only it has."""
    if pair.form in _BY_VALUE:
        return None
    stack = pair.lora_A.shape[:1] if pair.form.startswith("experts") else ()
    return (*stack, *pair.sizes)


def _placed(line: str, rows: tuple[tuple[str, str], ...], default: str) -> Finding:
    code = next((code for code, pattern in rows if re.search(pattern, line)), default)
    found = _SPLIT.fullmatch(line)
    return Finding(code, found["where"], found["what"]) if found else Finding(code, "the base", line)


def _near(path: str, checkpoint: Checkpoint) -> str:
    return did_you_mean(f"{path}.weight", checkpoint.tensors)


def _norm(checkpoint: Checkpoint, name: str) -> float:
    return float(torch.linalg.vector_norm(read_tensor(checkpoint, name).double()))
