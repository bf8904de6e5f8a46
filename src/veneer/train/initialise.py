"""What an initialisation is shown before the adapter is attached: a few rows of data, or the weights in full.

Everything is looked at in the base as it was loaded, before it is quantised: `load` -> `observe` -> quantise -> attach.
A new kind of look is a function and a row.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.base.ragged import RaggedBatch, check_ragged, ragged_attention
from veneer.config import LoRAConfig
from veneer.data.batches import make_batch, row_order
from veneer.data.encode import EncodedRow
from veneer.errors import ConfigError
from veneer.names import did_you_mean
from veneer.nn.heads import output_heads
from veneer.nn.modes import evaluating
from veneer.nn.observe import input_directions, weight_gradients
from veneer.nn.targets import Target, find_targets
from veneer.ops.initialise import initialisation_named, redistribute_ranks
from veneer.scoring.loss import summed_loss

Seen = tuple[LoRAConfig, dict[str, Tensor]]
"""The adapter's settings, and what was seen of each target, by path."""


@dataclass(frozen=True)
class Asked:
    """What a look is given: the bare model, the settings, the targets, a few ragged batches of rows, the options."""

    model: PreTrainedModel
    config: LoRAConfig
    targets: tuple[Target, ...]
    batches: tuple[RaggedBatch, ...]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Look:
    """One kind of look.

    Args:
        options: The settings in `init_options` that are its own, with their defaults; the others are the
            initialisation's.
        run: Looks.
    """

    options: Mapping[str, int | float]
    run: Callable[[Asked], Seen]


def _inputs(asked: Asked) -> Seen:
    """Find the directions of the targets' inputs, and with `rho` above 1 share the ranks out anew."""
    rho = asked.options["rho"]
    most = max(round(target.rank * rho) for target in asked.targets)
    # Through the loss and not the hidden states alone, so that a head that is adapted is seen too.
    runs = [partial(summed_loss, asked.model, batch) for batch in asked.batches]
    found = input_directions(asked.model, [target.path for target in asked.targets], runs, most)
    observed = {path: one.directions_DI for path, one in found.items()}
    if rho == 1:
        return asked.config, observed
    ranks = redistribute_ranks({path: one.explained for path, one in found.items()}, asked.config.rank, rho)
    return with_ranks(asked.config, ranks), observed


def _gradients(asked: Asked) -> Seen:
    """Find the gradient of the mean loss by each target's weight."""
    losses = [partial(_mean_loss, asked.model, batch) for batch in asked.batches]
    return asked.config, weight_gradients(asked.model, [target.path for target in asked.targets], losses)


def _full_weights(asked: Asked) -> Seen:
    """Keep hold of the targets' weights, which quantising replaces: no copies."""
    linear = [target for target in asked.targets if type(asked.model.get_submodule(target.owner)) is nn.Linear]
    return asked.config, {one.path: asked.model.get_parameter(f"{one.owner}.weight").detach() for one in linear}


def _mean_loss(model: PreTrainedModel, batch: RaggedBatch) -> Tensor:
    return summed_loss(model, batch) / batch.supervised.sum()


LOOKS: Mapping[str, Look] = MappingProxyType(
    {
        "inputs": Look({"batches": 8, "rho": 1.0}, _inputs),
        "gradient": Look({"batches": 8}, _gradients),
        "full_weight": Look({}, _full_weights),
    }
)
"""By what an initialisation needs, see `ops.initialise`; one that needs something else has all it needs in the layer.

`batches` bounds the micro-batches that go through the model; `rho` is the highest rank of a layer as a multiple of the
mean (EVA; 1 shares nothing out).
"""


def needs_look(config: LoRAConfig) -> bool:
    """Tell whether an adapter's initialisation must see data or full weights first.

    Example:
        >>> needs_look(LoRAConfig()), needs_look(LoRAConfig(init="eva"))
        (False, True)
    """
    return initialisation_named(config.init)[0].needs in LOOKS


def check_initialisation(config: LoRAConfig, storage: str) -> None:
    """Raise where an initialisation cannot be had as asked; nothing of base or rows is needed to tell.

    Args:
        config: The adapter.
        storage: How the base will be stored.

    Raises:
        ConfigError: For an unknown name, and for everything wrong with its options.

    Example:
        >>> check_initialisation(LoRAConfig(init="eva", init_options={"batches": 2}), "plain")
    """
    row, _ = initialisation_named(config.init)
    own = LOOKS[row.needs].options if row.needs in LOOKS else {}
    known = (*own, *row.options)
    problems = [
        f"unknown option {name!r}{did_you_mean(name, known)}; it takes {', '.join(known) or 'none'}"
        for name in config.init_options
        if name not in known
    ]
    asked = {**own, **config.init_options}
    if "batches" in own and not (isinstance(asked["batches"], int) and asked["batches"] >= 1):
        problems.append(f"batches must be a whole number of at least 1, got {asked['batches']!r}")
    if "rho" in own:
        problems += _rho_problems(asked["rho"], config)
    if row.needs == "full_weight" and storage == "plain":
        problems.append("it repairs a quantised base, and this one is stored plain: set storage to nf4 or int8")
    if problems:
        raise ConfigError(f"init={config.init!r} cannot be had as asked", problems)


def _rho_problems(rho: Any, config: LoRAConfig) -> list[str]:
    if not (isinstance(rho, int | float) and 1 <= rho < float("inf")):
        return [f"rho must be a number of at least 1 (the highest rank as a multiple of `rank`), got {rho!r}"]
    if rho > 1 and config.rank_pattern:
        return ["rho shares the ranks out by the data, and rank_pattern fixes them: choose one"]
    return []


def observe(
    model: PreTrainedModel,
    config: LoRAConfig,
    rows: Sequence[EncodedRow],
    *,
    seed: int = 0,
    tokens_per_batch: int = 4096,
) -> Seen:
    """Look at what an adapter's initialisation needs; the model is as it was afterwards.

    The rows are the first ones of the run's own order. The model is in evaluation mode meanwhile.

    Args:
        model: The bare model, as loaded, not quantised.
        config: The adapter, checked by `check_initialisation`.
        rows: Training rows.
        seed: Of the run: fixes which rows are looked at.
        tokens_per_batch: Token budget of a batch.

    Returns:
        The settings to attach with, the look's own options taken out and with `rho` the ranks put in; and `observed`
        for `attach`. The settings as they are and nothing where no look is needed.

    Raises:
        TargetError: If a layer cannot be adapted or observed.
        BaseModelError: If the model cannot take ragged batches.
        NonFiniteError: If inputs or gradients are not finite.

    Cost:
        eva: a forward for each batch and an SVD for each distinct input; lora_ga: a forward and backward for each
        batch, and a float32 matrix of the size of each target on the CPU. loftq: nothing; the weights that it refers to
        live on until they are let go, so that the peak is the full model and the quantised one. A run that is resumed
        looks again.
    """
    look = LOOKS.get(initialisation_named(config.init)[0].needs)
    if look is None:
        return config, {}
    options: dict[str, Any] = {**look.options, **config.init_options}
    targets = tuple(find_targets(model, config, skip=output_heads(model)))
    rest = {name: value for name, value in config.init_options.items() if name not in look.options}
    config = config.model_copy(update={"init_options": rest})
    if "batches" not in look.options:
        return look.run(Asked(model, config, targets, (), options))
    check_ragged(model)
    lengths = [len(row.token_ids) for row in rows]
    chosen = first_batches(lengths, seed=seed, budget=tokens_per_batch, count=options["batches"])
    batches = tuple(make_batch([rows[index] for index in batch]) for batch in chosen)
    with evaluating(model), ragged_attention(model):
        return look.run(Asked(model, config, targets, batches, options))


def first_batches(lengths: Sequence[int], *, seed: int, budget: int, count: int) -> list[list[int]]:
    """Return the first rows of the order of the first epoch, in at most so many batches within a token budget.

    Example:
        >>> [len(batch) for batch in first_batches([4] * 9, seed=0, budget=9, count=3)]
        [2, 2, 2]
    """
    batches: list[list[int]] = []
    room = 0
    for row in row_order(len(lengths), seed, epoch=0):
        if not batches or lengths[row] > room:
            if len(batches) == count:
                break
            batches.append([])
            room = budget
        batches[-1].append(row)
        room -= lengths[row]
    # By length, so that attention meets runs of equal ones.
    return [sorted(batch, key=lambda row: (lengths[row], row)) for batch in batches]


def with_ranks(config: LoRAConfig, ranks: Mapping[str, int]) -> LoRAConfig:
    r"""Return settings that give each layer its own rank and the scaling that it had; rank 0 leaves it out.

    Args:
        config: The settings that the layers were found with.
        ranks: The rank of every layer that they mean, by path.

    Example:
        >>> config = with_ranks(LoRAConfig(rank=4, alpha=8.0), {"a.q": 6, "a.k": 2, "a.v": 0})
        >>> config.rank_for("a.q"), config.scaling_for("a.q"), config.scaling_for("a.k"), config.target_modules
        (6, 2.0, 2.0, 'a\\.q|a\\.k')
    """
    # The longest first: a pattern stands for every path that ends in it.
    paths = sorted((path for path, rank in ranks.items() if rank), key=len, reverse=True)
    powers = 0.5 if config.use_rslora else 1.0
    changes: dict[str, Any] = {
        "rank_pattern": {re.escape(path): ranks[path] for path in paths},
        "alpha_pattern": {re.escape(path): config.scaling_for(path) * ranks[path] ** powers for path in paths},
    }
    if len(paths) < len(ranks):
        left = "|".join(re.escape(path) for path, rank in ranks.items() if rank)
        changes |= {"target_modules": left, "exclude_modules": (), "target_parameters": ()}
        changes |= {"layers_to_transform": None, "layers_pattern": None}
    return LoRAConfig(**{**config.model_dump(), **changes})
