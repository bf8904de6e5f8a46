"""A frozen linear layer with four bits for each weight.

Shapes: I in, O out, K blocks of 64 weights, G groups of 256 blocks, Y bytes of two codes, P a panel of the O rows.
"""

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.storage.checks import checked
from veneer.storage.layer import StoredLinear
from veneer.storage.panels import BLOCK, Decode
from veneer.storage.rounding import CHUNK, to_int8

GROUP = 256
"""Blocks whose scales share a scale of their own."""

CODEBOOK = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    dtype=torch.float32,
    device="cpu",
)
"""The 16 values of NormalFloat-4 (QLoRA, arXiv:2305.14314, appendix E)."""

_MIDPOINTS = (CODEBOOK[1:] + CODEBOOK[:-1]) / 2

_PAIRS = torch.cartesian_prod(CODEBOOK, CODEBOOK).contiguous().view(torch.int64).view(256)
"""For each byte the two values it stands for (the first in its high bits), as the bits of one 8-byte number.

So a byte is decoded by one look-up of one element. Measured on one core with 1,536 × 576 weights, 10⁹ weights a second:
this 2.7, rows of two floats 0.8 (`F.embedding`), `take` 1.2, `gather` 1.0, indexing with brackets 0.8, two codes at a
time from 65,536 rows 2.4, shifting and masking 0.2.
"""


def _absmax(stored: tuple[Tensor, ...], first: int, last: int) -> Tensor:
    """The scales of some blocks, as they are stored."""
    _, codes_K, scale_bits_G, mean_bits = stored
    first_group, last_group = first // GROUP, -(-last // GROUP)
    codes_GK = codes_K[first_group * GROUP : last_group * GROUP].view(-1, GROUP)
    absmax_GK = codes_GK * scale_bits_G.view(torch.float32)[first_group:last_group, None] + mean_bits.view(
        torch.float32
    )
    # The scale of a block far below the mean can round to less than nothing, which would turn its weights around.
    return absmax_GK.view(-1)[first - first_group * GROUP : last - first_group * GROUP].clamp_min_(0)


def _decode(stored: tuple[Tensor, ...], start: int, stop: int, in_features: int, scratch: Tensor) -> Tensor:
    # Panels begin at multiples of 64 rows, and so of blocks; only the end of the weight can lie inside of one.
    first, last = start * in_features // BLOCK, -(-stop * in_features // BLOCK)
    flat = scratch[: (last - first) * BLOCK]
    index_Y = stored[0][first * BLOCK // 2 : last * BLOCK // 2].to(torch.int32)
    pairs = _PAIRS if flat.is_cpu else _PAIRS.to(flat.device)
    torch.index_select(pairs, 0, index_Y, out=flat.view(torch.int64))
    flat.view(-1, BLOCK).mul_(_absmax(stored, first, last)[:, None])
    return flat[: (stop - start) * in_features].view(stop - start, in_features)


class NF4Linear(StoredLinear):
    """A frozen linear layer that stores 4-bit NormalFloat codes, two in a byte, and their scales in 8 bits.

    Equals, over the blocks of 64 weights that follow each other in the flattened weight:

        absmax = (mean + absmax_codes * absmax_scale[block // 256]).clamp(min=0)
        W      = CODEBOOK[code] * absmax[block]
        out    = x @ W.T + bias

    Blocks run along the flattened weight, as in bitsandbytes, so that only the very last one is filled up and any
    number of inputs costs the same. Each code is the one nearest to its weight under the scale as it is *stored*, so
    that rounding the scale costs no more than it must.

    There is no `weight`, which would hide a whole decoding: `storage.registry.read_weight` is the one way to it. The
    scales of the scales are kept as their bits in int32 buffers: casts of the module change floating tensors only, and
    so never round them. The bias is an ordinary, frozen Parameter, which casts do change.

    Args:
        in_features: Size of an input row.
        out_features: Size of an output row.
        bias: The bias, which is copied, or None.
        device: Where the codes live.

    Cost:
        1/2 + 1/64 + 4/16,384 = 0.516 bytes for each weight.

    Example:
        >>> layer = quantise_nf4(nn.Linear(1024, 16))
        >>> layer, layer.stored_bytes, layer(torch.ones(5, 1024)).shape
        (NF4Linear(in_features=1024, out_features=16, bias=True), 8456, torch.Size([5, 16]))

    Source:
        Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3 and appendix E. Differs: the scales less their mean are
        rounded to evenly spaced int8 codes, absmax / 127 in groups of 256, where bitsandbytes uses an uneven 8-bit
        "dynamic" map that is finer near the mean; and codes are chosen after the scales are rounded, not before.
    """

    bytes_Y: Tensor
    absmax_codes_K: Tensor
    absmax_scale_bits_G: Tensor
    absmax_mean_bits: Tensor

    def __init__(
        self, in_features: int, out_features: int, bias: Tensor | None = None, device: torch.device | str | None = None
    ) -> None:
        super().__init__(in_features, out_features, bias)
        num_blocks = -(-in_features * out_features // BLOCK)
        num_groups = -(-num_blocks // GROUP)
        for name, size, dtype in (
            ("bytes_Y", num_blocks * BLOCK // 2, torch.uint8),
            ("absmax_codes_K", num_groups * GROUP, torch.int8),
            ("absmax_scale_bits_G", num_groups, torch.int32),
            ("absmax_mean_bits", 1, torch.int32),
        ):
            self.register_buffer(name, torch.zeros(size, dtype=dtype, device=device))

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self:
        """Return the quantised layer of a linear one, which stays as it is.

        Raises:
            BaseModelError: If the weight holds NaN or infinity.
        """
        layer = cls(linear.in_features, linear.out_features, linear.bias, linear.weight.device)
        write_nf4(layer, linear.weight.detach())
        return layer.train(linear.training)

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """The stored weight: codes, codes of the scales, bits of their scales, bits of their mean."""
        return self.bytes_Y, self.absmax_codes_K, self.absmax_scale_bits_G, self.absmax_mean_bits

    @property
    def decode(self) -> Decode:
        """The function that reads rows of the weight."""
        return _decode


def quantise_nf4(linear: nn.Linear) -> NF4Linear:
    """Return a linear layer with its weight rounded to NF4.

    With e half the scale of a block's group, each weight is off by at most 0.152 · absmax of its block + e: half of the
    widest gap between two codes, and what rounding the absmax costs.

    Raises:
        BaseModelError: If the weight holds NaN or infinity.

    Example:
        >>> layer = nn.Linear(64, 2)
        >>> difference = read_nf4(quantise_nf4(layer)) - layer.weight
        >>> bool((difference.abs() <= 0.16 * layer.weight.abs().amax()).all())
        True
    """
    return NF4Linear.from_linear(linear)


def read_nf4(layer: NF4Linear) -> Tensor:
    """Return the weight as a fresh float32 tensor (O, I)."""
    scratch = torch.empty(layer.bytes_Y.numel() * 2, dtype=torch.float32, device=layer.bytes_Y.device)
    return _decode(layer.stored, 0, layer.out_features, layer.in_features, scratch)


@torch.no_grad()
def write_nf4(layer: NF4Linear, weight_OI: Tensor) -> None:
    """Round a weight (O, I) into the codes and scales of a layer, in place."""
    shape = torch.Size([layer.out_features, layer.in_features])
    weight_OI = checked(weight_OI, shape, layer.bytes_Y.device, "an NF4Linear")
    chunks = weight_OI.reshape(-1).split(CHUNK)
    absmax_K = torch.cat([_blocks(chunk).abs().amax(1) for chunk in chunks])
    mean = absmax_K.mean()
    # What fills up the last group is the mean, which takes no room in the scale of its group.
    spread_GK = F.pad(absmax_K - mean, (0, layer.absmax_codes_K.numel() - absmax_K.numel())).view(-1, GROUP)
    layer.absmax_mean_bits.view(torch.float32).copy_(mean)
    to_int8(spread_GK, layer.absmax_codes_K.view(-1, GROUP), layer.absmax_scale_bits_G.view(torch.float32))
    stored_absmax_K = _absmax(layer.stored, 0, absmax_K.numel())
    first = 0
    for chunk in chunks:
        values_KB = _blocks(chunk)
        last = first + values_KB.shape[0]
        # Under a scale of zero every code means zero: any divisor will do.
        values_KB = values_KB / stored_absmax_K[first:last, None].clamp_min(torch.finfo(torch.float32).tiny)
        codes_Y2 = torch.bucketize(values_KB, _MIDPOINTS.to(values_KB.device), out_int32=True).view(-1, 2)
        layer.bytes_Y[first * BLOCK // 2 : last * BLOCK // 2] = codes_Y2[:, 0] * 16 + codes_Y2[:, 1]
        first = last


def _blocks(flat: Tensor) -> Tensor:
    """Some weights in blocks, float32, the last block filled up with zeros."""
    return F.pad(flat.to(torch.float32), (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
