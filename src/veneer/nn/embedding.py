"""LoRA on an embedding table."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.nn.layer import LoRALayer
from veneer.ops.dora import magnitude_ratio, product_norm
from veneer.ops.lora import autocasting


class LoRAEmbedding(LoRALayer):
    """A frozen embedding table with a bank of low-rank updates.

    For the ids of each segment of the routing, `scale` being what the base multiplies its rows with (1, or the
    `embed_scale` of Gemma's):

        out[ids] = base(ids) + scale * scaling * lora_A.T[ids] @ lora_B.T

    With a magnitude (DoRA) the row is multiplied by `magnitude / ‖table + delta‖`, norms over the rows. What is looked
    up at the padding row has no part in any gradient, as in a table that trains whole. A head tied to the table keeps
    the table's frozen values: only what the table is read for here is updated.

    Args:
        base: The table that was there before; called as it is.
        routing: Which rows go through which slot.

    Source:
        microsoft/LoRA `loralib/layers.py`, Embedding; differs: `lora_A` starts at random, `lora_B` at zero, as
        everywhere else here.
    """

    @property
    def num_embeddings(self) -> int:
        """Number of rows."""
        return self.base.num_embeddings  # type: ignore[return-value]

    @property
    def embedding_dim(self) -> int:
        """Size of a row."""
        return self.base.embedding_dim  # type: ignore[return-value]

    @property
    def padding_idx(self) -> int | None:
        """The row that padding reads."""
        return self.base.padding_idx  # type: ignore[return-value]

    def forward(self, ids: Tensor) -> Tensor:
        """Look ids of any shape up; the result has one axis more."""
        out = self.by_segment(ids.reshape(-1), self._segment)
        return out.view(*ids.shape, out.shape[-1])

    def _segment(self, ids_N: Tensor, slot_index: int | None) -> Tensor:
        out_ND = self.base(ids_N)
        if slot_index is None:
            return out_ND
        slot = self.slot(slot_index)
        A_RN, B_DR = slot.factors(out_ND.dtype)
        rows_NR = self.drop(F.embedding(ids_N, A_RN.T), slot)
        scale = embedding_scale(self.base)
        if isinstance(scale, Tensor):
            rows_NR = rows_NR * scale.to(rows_NR)
        alpha = slot.scaling if isinstance(scale, Tensor) else slot.scaling * scale
        if autocasting(out_ND):  # it would take the sum to 16 bits too, and a table's output stays as wide as it is
            out_ND = out_ND + alpha * (rows_NR @ B_DR.T)
        else:
            out_ND = torch.addmm(out_ND, rows_NR, B_DR.T, alpha=alpha)
        if slot.magnitude is not None:
            with torch.no_grad():
                projected_DR = (A_RN.to(self.weight.dtype) @ self.weight).T
                norm_D = product_norm(cast(Tensor, slot.weight_norm2), projected_DR, A_RN, B_DR, slot.scaling)
            out_ND = out_ND * magnitude_ratio(slot.magnitude, norm_D).to(out_ND.dtype)
        if self.padding_idx is None:
            return out_ND
        return torch.where((ids_N == self.padding_idx)[:, None], out_ND.detach(), out_ND)


def embedding_scale(table: nn.Module) -> Tensor | float:
    """Return what a table multiplies its rows with: transformers' scaled ones (Gemma, M2M) have an `embed_scale`.

    Example:
        >>> embedding_scale(nn.Embedding(2, 2))
        1.0
    """
    return cast("Tensor | float", getattr(table, "embed_scale", 1.0))


def why_not_embedding(module: nn.Module) -> str | None:
    """Return why an embedding table cannot be adapted, or None."""
    table: Any = module
    if table.max_norm is not None:
        return "has max_norm, by which looking a row up changes the frozen table"
    if type(table).forward is not nn.Embedding.forward and not has_scale(table):
        return f"is a {type(table).__name__}, whose own forward may read other rows than it is asked for"
    return None


def has_scale(table: nn.Module) -> bool:
    """Tell whether a table is one of transformers' that multiply what they look up, and do nothing else."""
    return isinstance(getattr(table, "embed_scale", None), (Tensor, float, int))
