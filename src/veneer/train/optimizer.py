"""AdamW over one flat buffer: the trained parameters and their gradients are views of it.

Hundreds of small tensors would cost hundreds of small operations a step; a flat buffer costs a handful, and its norm
is one norm.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import groupby
from types import MappingProxyType

import torch
from torch import Tensor, nn

from veneer.errors import ConfigError, DamagedArtefactError, NonFiniteError

BETAS = (0.9, 0.999)
EPSILON = 1e-8
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Run:
    """A stretch of the buffer under one learning rate and decay: what the inner optimiser takes for one parameter."""

    values: nn.Parameter
    names: tuple[str, ...]
    rate: float


class FlatAdamW:
    """AdamW whose state lies beside one flat buffer of all parameters.

    Equals, and is tested against, `torch.optim.AdamW` over the parameters one by one, with
    `torch.nn.utils.clip_grad_norm_` before each step.

    Args:
        parameters: What trains, by name, on one device. Each becomes a view of the buffer.
        weight_decay: Decoupled decay.
        max_grad_norm: Gradients are scaled down to this norm; None means never.
        rates: Factor of the learning rate by name, where it is not 1.
        undecayed: Names of parameters without decay.

    Raises:
        ConfigError: If the parameters are not of one dtype: a bias or a whole module of a 16-bit base beside float32
            factors.

    Cost:
        12 bytes of state and gradient for each float32 parameter, about 30 bytes of traffic a step. Parameters alike
        in rate and decay stand together in the buffer, so that each kind costs one more kernel call a step.

    Source:
        Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        weight_decay: float,
        max_grad_norm: float | None,
        rates: Mapping[str, float] = MappingProxyType({}),
        undecayed: Collection[str] = (),
    ) -> None:
        check_one_dtype(parameters)
        self._max_grad_norm = max_grad_norm
        kinds = {name: (rates.get(name, 1.0), 0.0 if name in undecayed else weight_decay) for name in parameters}
        places = {kind: place for place, kind in enumerate(dict.fromkeys(kinds.values()))}
        names = sorted(parameters, key=lambda name: places[kinds[name]])
        self._parameters = {name: parameters[name] for name in names}
        values = torch.cat([one.detach().reshape(-1) for one in self._parameters.values()])
        self._gradient = torch.zeros_like(values)
        for name, view in self._views(values).items():
            self._parameters[name].data = view
        for name, view in self._views(self._gradient).items():
            self._parameters[name].grad = view
        self._runs, groups, start = [], [], 0
        for (rate, decay), alike in groupby(names, key=kinds.__getitem__):
            run_names = tuple(alike)
            stop = start + sum(self._parameters[name].numel() for name in run_names)
            run = _Run(nn.Parameter(values[start:stop]), run_names, rate)
            run.values.grad = self._gradient[start:stop]
            self._runs.append(run)
            groups.append({"params": [run.values], "weight_decay": decay})
            start = stop
        self._inner = torch.optim.AdamW(groups, betas=BETAS, eps=EPSILON, fused=True)

    def step(self, learning_rate: float) -> float:
        """Clip, update, clear the gradients; return the norm of the gradient before clipping.

        Raises:
            NonFiniteError: If the gradient is not finite, with the parameters named; nothing was updated.
        """
        norm = torch.linalg.vector_norm(self._gradient).item()
        if not norm < float("inf"):
            bad = [name for name, view in self._views(self._gradient).items() if not view.isfinite().all()]
            raise NonFiniteError("the gradient is not finite", bad or ["all tensors are, but not their norm"])
        if self._max_grad_norm is not None and norm > self._max_grad_norm:
            self._gradient.mul_(self._max_grad_norm / (norm + 1e-6))
        for group, run in zip(self._inner.param_groups, self._runs, strict=True):
            group["lr"] = learning_rate * run.rate
        self._inner.step()
        self.zero_grad()
        return norm

    def zero_grad(self) -> None:
        """Clear the gradients in place."""
        self._gradient.zero_()

    def state(self) -> dict[str, Tensor]:
        """Return the two moments of every parameter, as `NAME.exp_avg` and `NAME.exp_avg_sq`; nothing before step 1.

        They may be the memory in use: the next step changes them.
        """
        moments: dict[str, Tensor] = {}
        for moment in _MOMENTS:
            held = [self._inner.state[run.values].get(moment) for run in self._runs]
            if any(one is None for one in held):
                continue
            flat = torch.cat(held) if len(held) > 1 else held[0]  # the memory itself, where there is one run
            moments |= {f"{name}.{moment}": view for name, view in self._views(flat).items()}
        return moments

    def load_state(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Take up the moments that `state` returned after a number of steps.

        Raises:
            DamagedArtefactError: If one is missing, of another shape, or not known.
        """
        shapes = {f"{name}.{moment}": one.shape for moment in _MOMENTS for name, one in self._parameters.items()}
        expected, found = shapes if steps else {}, {name: one.shape for name, one in state.items()}
        problems = [
            f"{name}: expected {list(expected.get(name, ())) or None}, saved {list(found.get(name, ())) or None}"
            for name in dict.fromkeys([*expected, *found])
            if expected.get(name) != found.get(name)
        ]
        if problems:
            raise DamagedArtefactError("the moments are not those of what trains", problems)
        for run in self._runs if steps else ():
            inner, device = self._inner.state[run.values], run.values.device
            inner["step"] = torch.tensor(float(steps), device=device)
            for moment in _MOMENTS:
                inner[moment] = torch.cat([state[f"{name}.{moment}"].reshape(-1) for name in run.names]).to(device)

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the part of a flat buffer that belongs to each parameter, in its shape."""
        parts = flat.split([one.numel() for one in self._parameters.values()])
        return {name: part.view(one.shape) for (name, one), part in zip(self._parameters.items(), parts, strict=True)}


def check_one_dtype(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise unless parameters can share a buffer.

    Raises:
        ConfigError: Naming the dtypes.
    """
    dtypes = {str(one.dtype).removeprefix("torch.") for one in parameters.values()}
    if len(dtypes) > 1:
        raise ConfigError(
            f"parameters of {' and '.join(sorted(dtypes))} cannot train together; load the base in float32, or leave "
            "out bias and modules_to_save"
        )
