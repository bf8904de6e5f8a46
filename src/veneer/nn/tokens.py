"""Single rows of an embedding table that train: new or repurposed tokens, beside the factors.

Shapes: N ids, V vocabulary, D size of a row, T trained rows.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter import TokenRows
from veneer.errors import TargetError
from veneer.names import did_you_mean, matches_suffix
from veneer.nn.embedding import embedding_scale, why_not_embedding
from veneer.nn.layer import LoRALayer
from veneer.nn.routing import Routing
from veneer.nn.unfit import tied_tables


class TokenSlot(nn.Module):
    """The trained rows of one adapter in one table.

    Args:
        value: Which rows, and their first values.
        num_embeddings: Rows of the table.
    """

    def __init__(self, value: TokenRows, num_embeddings: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(value.rows.to(torch.promote_types(value.rows.dtype, torch.float32), copy=True))
        places = torch.full((num_embeddings,), -1)
        places[list(value.indices)] = torch.arange(len(value.indices))
        self.register_buffer("places_V", places, persistent=False)
        self.register_buffer("indices_T", torch.tensor(value.indices), persistent=False)

    def value(self) -> TokenRows:
        """Return the rows as they are now."""
        indices: Any = self.indices_T
        return TokenRows(tuple(indices.tolist()), self.rows)


class TokenTable(LoRALayer):
    """A frozen embedding table of which some rows are an adapter's.

        out[n] = rows[place of ids[n]] if ids[n] is one of the adapter's, else base(ids)[n]

    Args:
        base: The table.
        routing: Which ids go through which slot.
    """

    @property
    def num_embeddings(self) -> int:
        """Number of rows."""
        return self.base.num_embeddings  # type: ignore[return-value]

    @property
    def embedding_dim(self) -> int:
        """Size of a row."""
        return self.base.embedding_dim  # type: ignore[return-value]

    def forward(self, ids: Tensor) -> Tensor:
        """Look ids of any shape up; the result has one axis more."""
        out = self.by_segment(ids.reshape(-1), self._segment)
        return out.view(*ids.shape, out.shape[-1])

    def _segment(self, ids_N: Tensor, slot_index: int | None) -> Tensor:
        out_ND = self.base(ids_N)
        if slot_index is None:
            return out_ND
        slot: Any = self.slots[slot_index]
        place_N = slot.places_V[ids_N]
        scale = torch.as_tensor(embedding_scale(self.base), dtype=out_ND.dtype, device=out_ND.device)
        rows_ND = slot.rows.to(out_ND.dtype)[place_N.clamp_min(0)] * scale
        return torch.where((place_N >= 0)[:, None], rows_ND, out_ND)


class TokenHead(LoRALayer):
    """A frozen output head tied to a table: the logits of the adapter's rows are those rows'.

        out = base(x); out[:, indices] = x @ rows.T + bias[indices]

    Args:
        base: The head.
        routing: Which rows go through which slot.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return logits; x has shape (..., D)."""
        out = self.by_segment(x.reshape(-1, x.shape[-1]), self._segment)
        return out.view(*x.shape[:-1], out.shape[-1])

    def _segment(self, x_ND: Tensor, slot_index: int | None) -> Tensor:
        out_NV = self.base(x_ND)
        if slot_index is None:
            return out_NV
        slot: Any = self.slots[slot_index]
        own_NT = x_ND @ slot.rows.to(x_ND.dtype).T
        if self.bias is not None:
            own_NT = own_NT + self.bias[slot.indices_T]
        return out_NV.index_copy(1, slot.indices_T, own_NT)


@dataclass(frozen=True)
class TokenTarget:
    """A table of which rows train, with the head that is tied to it, if any."""

    path: str
    head: str | None
    value: TokenRows


def token_targets(
    model: nn.Module,
    asked: Mapping[str, tuple[int, ...]],
    adapted: set[str],
    values: Mapping[str, TokenRows] | None,
    *,
    whole: Collection[str] = (),
) -> list[TokenTarget]:
    """Return the tables of which rows train; the model is not touched.

    Args:
        model: The model, nothing attached yet.
        asked: Suffix of a table's path to the rows, from a configuration.
        adapted: Paths of layers with factors: one cannot be both.
        values: What an adapter brings, by path; None for a fresh adapter, which starts from the base's rows.
        whole: Paths of parameters that train whole: a table among them has no rows of its own.

    Raises:
        TargetError: If an entry matches no table or several, or rows lie outside; all at once.
    """
    modules = dict(model.named_modules())
    tables = [path for path, module in modules.items() if isinstance(module, nn.Embedding)]
    problems: list[str] = []
    wanted = {path: value.indices for path, value in (values or {}).items()}
    if values is None:
        for entry, indices in asked.items():
            found = [path for path in tables if matches_suffix(path, entry)]
            if len(found) != 1:
                problems.append(f"token_rows entry {entry!r} matches {len(found)} tables{did_you_mean(entry, tables)}")
            wanted |= dict.fromkeys(found[:1], indices)
    problems += [line for path in wanted for line in _problems(modules, path, wanted[path], adapted, tables)]
    problems += [
        f"{path}: the whole table trains by modules_to_save, its rows with it; choose one"
        for path in wanted
        if f"{path}.weight" in whole
    ]
    if problems:
        raise TargetError("the rows of these tokens cannot be trained as asked (nothing was touched)", problems)
    targets = []
    for path, indices in wanted.items():
        table: Any = modules[path]
        value = TokenRows(indices, table.weight.detach()[list(indices)]) if values is None else values[path]
        if value.rows.shape[1] != table.embedding_dim:
            problems.append(
                f"{path}: the table's rows have {table.embedding_dim} values, the adapter's {value.rows.shape[1]}"
            )
        targets.append(TokenTarget(path, _tied_head(modules, path), value))
    if problems:
        raise TargetError("the adapter's token rows do not fit the model (nothing was touched)", problems)
    return targets


def install_tokens(model: nn.Module, target: TokenTarget, routing: Routing) -> dict[str, LoRALayer]:
    """Put the layers of one table, and of its tied head, into a model; return them by path."""
    table: Any = model.get_submodule(target.path)
    slot = TokenSlot(target.value, table.num_embeddings).to(table.weight.device)
    layers: dict[str, LoRALayer] = {target.path: TokenTable(table, routing)}
    if target.head is not None:
        layers[target.head] = TokenHead(model.get_submodule(target.head), routing)
    for path, layer in layers.items():
        layer.slots.append(slot)
        layer.train(layer.base.training)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
    return layers


def _problems(
    modules: Mapping[str, nn.Module], path: str, indices: tuple[int, ...], adapted: set[str], tables: list[str]
) -> Iterator[str]:
    if path not in tables:
        yield f"{path}: the model has no such table{did_you_mean(path, tables)}"
        return
    table: Any = modules[path]
    if outside := [index for index in indices if index >= table.num_embeddings]:
        yield f"{path}: rows {outside[:5]} lie outside of the table's {table.num_embeddings}"
    if reason := why_not_embedding(table):
        yield f"{path} {reason}"
    yield from tied_tables(modules, [path])
    if path in adapted or _tied_head(modules, path) in adapted:
        yield f"{path}: it, or the head tied to it, is adapted by factors too; choose one"


def _tied_head(modules: Mapping[str, nn.Module], path: str) -> str | None:
    """Return the path of the linear layer whose weight is the table's own."""
    weight = modules[path].get_parameter("weight")
    heads = [
        name for name, one in modules.items() if isinstance(one, nn.Linear) and one.weight is weight and name != path
    ]
    return heads[0] if heads else None
