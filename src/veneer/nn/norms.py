"""Frozen RMS norms of any make, known by what they compute."""

import torch
from torch import nn

from veneer.nn.layer import has_hooks
from veneer.ops.norm import RMSNorm, normalise

_EPSILONS = ("eps", "variance_epsilon", "epsilon")
_OFFSETS = (0.0, 1.0)
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def rms_norm_of(module: nn.Module) -> RMSNorm | None:
    """Return what a module computes with if it is a frozen RMS norm and nothing else, else None.

    Its name does not count: it is asked for the norm of a few rows, small ones too where epsilon matters.

    Example:
        >>> rms_norm_of(nn.RMSNorm(4, eps=1e-5).requires_grad_(False)).epsilon
        1e-05
        >>> rms_norm_of(nn.LayerNorm(4).requires_grad_(False)) is None
        True
    """
    parameters = dict(module.named_parameters())
    epsilon = next((vars(module)[name] for name in _EPSILONS if name in vars(module)), None)
    if set(parameters) != {"weight"} or not isinstance(epsilon, float) or has_hooks(module):
        return None
    weight_D = parameters["weight"]
    if weight_D.ndim != 1 or weight_D.requires_grad or weight_D.dtype not in _TOLERANCE:
        return None
    size = weight_D.shape[0]
    x_ND = (torch.arange(3 * size, dtype=torch.float32) * 0.7).sin().view(3, size)
    x_ND = (x_ND * torch.tensor([[1.0], [100.0], [epsilon**0.5]])).to(weight_D.device, weight_D.dtype)
    with torch.no_grad():
        try:
            expected_ND = module(x_ND)
        except (RuntimeError, TypeError, ValueError, IndexError):  # it wants something else than rows
            return None
        if expected_ND.shape != x_ND.shape:
            return None
        # Number by number: beside a gain of 50, gains of 0.1 and 1.1 are the same. And the nearest: 50 is nearly 51.
        size_ND = expected_ND.abs().double()
        size_ND = size_ND + 1e-3 * size_ND.max()
        norms = [RMSNorm(weight_D, epsilon, offset) for offset in _OFFSETS]
        errors = [((normalise(x_ND, one)[0].double() - expected_ND) / size_ND).abs().max().item() for one in norms]
    nearest = errors.index(min(errors))
    return norms[nearest] if errors[nearest] <= _TOLERANCE[weight_D.dtype] else None
