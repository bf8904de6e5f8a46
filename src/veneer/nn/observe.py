"""What data show of a model's layers: the directions of their inputs, the gradients of their weights.

Both passes watch through hooks and know nothing of the architecture. Afterwards the model is as it was: no hook, no
`.grad`, the same `requires_grad` flags, the same training modes, the same random state.

Shapes: N rows, O out, I in, R rank.
"""

import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import ConfigError, NonFiniteError, TargetError
from veneer.names import did_you_mean
from veneer.nn.kinds import kind_of
from veneer.ops.initialise_directions import Directions, add_rows, turned

__all__ = ["Directions", "input_directions", "weight_gradients"]


def input_directions(
    model: nn.Module,
    paths: Sequence[str],
    batches: Iterable[Callable[[], object]],
    rank: int,
    *,
    tolerance: float = 0.01,
    centred: bool = False,
) -> dict[str, Directions]:
    """Return the leading right singular vectors of each layer's inputs, from a few batches.

    Equals, for one batch in which each layer is called once, and up to the error that `add_rows` states,

        torch.linalg.svd(inputs_of_layer.reshape(-1, in), full_matrices=False)     # truncated to `rank`

    A layer is left out of later batches once a batch has turned none of its directions by more than the tolerance;
    when all are, no further batch is asked for. Layers that get the same tensor are computed once. All rows count:
    feed ragged batches, or padding is taken for data.

    Args:
        model: Any module; its mode is kept, so put it into evaluation mode to keep dropout out.
        paths: The layers, linear ones.
        batches: Each runs the model once when it is called; what it returns is not looked at.
        rank: Directions for each layer; for ranks by `redistribute_ranks`, `round(rank · rho)`.
        tolerance: 1 less the cosine that counts as unchanged; PEFT's `1 - tau`. 0 uses every batch.
        centred: Take the mean of the inputs away, as PEFT does.

    Returns:
        For each path its directions, on the device of its inputs; fewer than `rank` where the inputs span no more.

    Raises:
        ConfigError: If the rank is below 1.
        TargetError: If a path names no linear layer, or a layer was never called.
        NonFiniteError: If an input holds NaN or infinity.

    Cost:
        A forward for each batch, and an SVD for each distinct input of it. Memory: twice (rank, in) for each distinct
        input, and twice the one input at hand.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        >>> found = input_directions(model, ["0"], [lambda: model(torch.tensor([[0.0, 2.0], [1.0, 0.0]]))], rank=1)
        >>> found["0"].directions_DI.tolist(), found["0"].explained.tolist()
        ([[0.0, 1.0]], [0.8])

    Source:
        Paischer et al. 2024, arXiv:2410.07170, section 3 and algorithm 1.
    """
    if rank < 1:
        raise ConfigError(f"a rank must be at least 1, got {rank}")
    layers = _row_layers(model, paths)
    found: dict[str, Directions] = {}
    computed: dict[int, list[_Update]] = {}

    def observe(path: str, x: Tensor, y: Tensor) -> Tensor:
        before = found.get(path)
        # An expert may be called without a row.
        if x.numel() and (before is None or not before.converged):
            found[path] = _updated(
                computed, path, before, x, lambda rows: add_rows(before, rows, rank, centred=centred)
            )
        return y

    with torch.no_grad(), _random_state_kept(model):
        for run in batches:
            start = dict(found)
            with _watching(layers, observe):
                run()
            computed.clear()
            for path, before in start.items():
                after = found[path]
                # A batch of fewer rows than directions says little: one row turns next to nothing.
                if after.rows - before.rows >= rank and turned(before, after) < tolerance:
                    found[path] = replace(after, converged=True)
            if len(found) == len(layers) and all(one.converged for one in found.values()):
                break
    _raise_for(layers, found, "never called in the pass (with any row)")
    return {path: found[path] for path in layers}


def weight_gradients(
    model: nn.Module, paths: Sequence[str], losses: Iterable[Callable[[], Tensor]]
) -> dict[str, Tensor]:
    """Return the gradient of the mean loss by each layer's weight; no weight is asked for it.

    Equals, in (out, in) whichever way the layer stores it, and without the model's parameters taking part,

        layer.weight.requires_grad_(); sum(loss() for loss in losses).backward(); layer.weight.grad / len(losses)

    Each layer's `dyᵀ x` is formed as the backward pass goes by. No parameter needs to ask for gradients: the layers'
    outputs are tied to a number that does.

    Args:
        model: Any module; its mode is kept. Gradient checkpointing must be the kind without `use_reentrant`.
        paths: The layers, linear ones. A weight that stands at other places too gets the gradient of this one alone.
        losses: Each runs the model once when it is called and returns a scalar; the mean over them is taken.

    Returns:
        For each path a float32 matrix (out, in) on the CPU.

    Raises:
        TargetError: If a path names no linear layer, a layer was never called or has no part in the loss, or a loss is
            no scalar that depends on any of them.
        NonFiniteError: If a gradient holds NaN or infinity.

    Cost:
        A forward and backward for each loss; the layers' inputs are kept in between, as in training, and each layer's
        output is copied. One float32 matrix (out, in) for each path on the CPU, and one more on the layer's device.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False)).requires_grad_(False)
        >>> weight_gradients(model, ["0"], [lambda: model(torch.tensor([[1.0, 2.0]])).sum()])["0"].tolist()
        [[1.0, 2.0], [1.0, 2.0]]

    Source:
        Wang et al. 2024, arXiv:2407.05000, section 3 (gradients layer by layer). Differs: from `dy` and `x` by hooks.
    """
    layers = _row_layers(model, paths)
    called: set[str] = set()
    gradients: dict[str, Tensor] = {}
    anchor = torch.zeros((), requires_grad=True)
    count = 0

    def add(path: str, dy: Tensor, x: Tensor) -> None:
        gradient_OI = _outer(dy, x)
        if path in gradients:
            gradients[path] += gradient_OI
        else:
            gradients[path] = gradient_OI

    def observe(path: str, x: Tensor, y: Tensor) -> Tensor:
        called.add(path)
        return _Tap.apply(y, x, anchor, partial(add, path))

    with torch.enable_grad(), _random_state_kept(model), _watching(layers, observe):
        for run in losses:
            loss = run()
            if loss.numel() != 1 or not loss.requires_grad:
                raise TargetError(
                    f"loss {count} must be a scalar that depends on the layers, got shape {tuple(loss.shape)}"
                    f"{'' if loss.requires_grad else ' without a gradient (no_grad, detach or item within?)'}"
                )
            # Of the anchor alone: no parameter gets a `.grad`, not even one that asks.
            torch.autograd.grad(loss, anchor, allow_unused=True)
            count += 1
    _raise_for(layers, called, "never called in the pass")
    _raise_for(layers, gradients, "called, but the loss does not depend on it")
    bad = [f"{path}: the gradient holds NaN or infinity" for path in layers if not gradients[path].isfinite().all()]
    if bad:
        raise NonFiniteError("gradients must be finite to start from", bad)
    return {path: gradients[path] / count for path in layers}


class _Tap(torch.autograd.Function):
    """Hands a layer's output on, and its gradient together with the layer's input to a function."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, anchor: Tensor, add: Callable[[Tensor, Tensor], None]) -> Tensor:  # noqa: ARG004 (the anchor is there to ask for the gradient)
        ctx.save_for_backward(x)
        ctx.add = add
        return y.clone()  # a view could not be changed in place by what follows, such as ReLU(inplace=True)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        ctx.add(dy, x)
        return dy, None, None, None


@torch.no_grad()
def _outer(dy: Tensor, x: Tensor) -> Tensor:
    """Return `dyᵀ x` over all rows, in float32 on the CPU, whatever autocast says."""
    with torch.autocast(x.device.type, enabled=False):
        dy_NO, x_NI = dy.reshape(-1, dy.shape[-1]).float(), x.reshape(-1, x.shape[-1]).float()
        return (dy_NO.T @ x_NI).cpu()


@dataclass(frozen=True)
class _Update:
    """What a layer's directions became by a tensor; another layer with the same past and tensor takes it over."""

    x: "weakref.ref[Tensor]"
    version: int
    before: Directions | None
    after: Directions


def _updated(
    computed: dict[int, list[_Update]],
    path: str,
    before: Directions | None,
    x: Tensor,
    update: Callable[[Tensor], Directions],
) -> Directions:
    """Return a layer's directions after a tensor, computed once for all layers that share the past and the tensor."""
    # Tensors of inference mode keep no version, so that a change in between could not be seen.
    version = None if x.is_inference() else x._version
    for one in computed.get(id(x), ()):
        if one.x() is x and one.version == version and one.before is before:
            return one.after
    try:
        with torch.autocast(x.device.type, enabled=False):
            after = update(x.detach().reshape(-1, x.shape[-1]))
    except NonFiniteError as error:
        raise NonFiniteError(f"{path}: {error}") from error
    if version is not None:
        computed.setdefault(id(x), []).append(_Update(weakref.ref(x), version, before, after))
    return after


def _row_layers(model: nn.Module, paths: Sequence[str]) -> dict[str, nn.Module]:
    """Return the layers by their paths, linear ones in whatever form their weights are stored.

    Raises:
        TargetError: For every path that names none, or no linear one, all at once.
    """
    known = dict(model.named_modules(remove_duplicate=False))
    problems = []
    for path in paths:
        if path not in known:
            problems.append(f"{path}: the model has no such module{did_you_mean(path, known)}")
        elif (kind := kind_of(known[path])) is None or kind.form not in ("linear", "transposed"):
            problems.append(f"{path}: is a {type(known[path]).__name__}, expected a linear layer without an adapter")
    if problems:
        raise TargetError("these layers cannot be observed (nothing was run)", problems)
    return {path: known[path] for path in paths}


@contextmanager
def _watching(layers: Mapping[str, nn.Module], observe: Callable[[str, Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Call a function with path, input and output at each call of a layer; what it returns becomes the output."""

    def hook_of(path: str) -> Callable[..., Tensor]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
            return observe(path, args[0] if args else next(iter(kwargs.values())), y)

        return hook

    with ExitStack() as stack:
        for path, layer in layers.items():
            stack.callback(layer.register_forward_hook(hook_of(path), with_kwargs=True).remove)
        yield


@contextmanager
def _random_state_kept(model: nn.Module) -> Iterator[None]:
    """Put the random state of the CPU and of the model's GPUs back after the block."""
    gpus = {parameter.device.index for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(sorted(gpus)):
        yield


def _raise_for(layers: Mapping[str, nn.Module], seen: Container[str], what: str) -> None:
    """Raise for every layer that was not seen.

    Raises:
        TargetError: Then.
    """
    problems = [f"{path}: {what}" for path in layers if path not in seen]
    if problems:
        raise TargetError(
            f"{len(problems)} of {len(layers)} layers showed nothing; leave them out of the targets", problems
        )
