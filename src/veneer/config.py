"""Settings: a few small frozen models. They store; functions act.

A wrong setting is a `ConfigError` that lists every problem at once, each with its place and the
nearest known key.
"""

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from veneer.errors import ConfigError
from veneer.names import did_you_mean, matches_suffix, value_for

ALL_LINEAR = "all-linear"

Seed = Annotated[int, Field(ge=0, lt=2**63)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Settings(BaseModel):
    """What all settings share: frozen, strict about keys and types, errors listed at once."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            problems = list(_problems(error, type(self)))
            count = f"{len(problems)} setting{'s' * (len(problems) > 1)}"
            raise ConfigError(f"{type(self).__name__}: {count} cannot be used", problems) from None


def _problems(error: ValidationError, settings: type[BaseModel]) -> list[str]:
    """Turn pydantic's report into one line for each problem, nested settings included."""
    lines = []
    for item in error.errors():
        place = ".".join(str(part) for part in item["loc"])
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, ConfigError):
            lines += [f"{place}.{problem}" for problem in cause.problems]
        elif item["type"] == "extra_forbidden":
            lines.append(f"{place}: unknown key{did_you_mean(str(item['loc'][-1]), settings.model_fields)}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            lines.append(f"{place or settings.__name__}: {message} (got {item['input']!r})")
    return lines


def _check_regex(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return pattern


class LoRAConfig(Settings):
    """Which layers are adapted, and how. The names follow PEFT's meaning, `rank` for its `r`.

    The update of a layer is `scaling * lora_B @ lora_A` with `scaling = alpha / rank`, or
    `alpha / sqrt(rank)` with `use_rslora`, rank and alpha taken after the patterns.

    Args:
        rank: Inner dimension of the factors.
        alpha: Numerator of the scaling.
        dropout: Probability that an input of the low-rank branch is zeroed in training.
        target_modules: Suffixes of module paths, one regular expression for whole paths, or
            `"all-linear"` (every linear layer except the output head).
        exclude_modules: Suffixes or one regular expression; what it matches is not adapted.
        layers_to_transform: Only layers of these indices (needs a list of suffixes).
        layers_pattern: Name of the list of layers, where the first number in a path is another's.
        rank_pattern: Pattern to rank; the first that stands for a path wins.
        alpha_pattern: Pattern to alpha, likewise.
        use_rslora: Scale by `alpha / sqrt(rank)`.
        bias: Which biases train too: none, all of the model's, or those of adapted layers.
        modules_to_save: Suffixes of modules that train whole.
        target_parameters: Suffixes of parameter paths: stacked experts, or any matrix that has no layer of its own.
        use_dora: Train a magnitude for each output too (DoRA).
        freeze_A: Leave `lora_A` as it starts (LoRA-FA).
        parts: Pattern to runs of output rows (start, stop), each with ranks of its own: the q and v of a packed qkv.
        token_rows: Suffix of an embedding table's path to the tokens whose rows train; a tied head follows. With
            `target_modules=()` they train alone.
        invocation_tokens: The adapter acts from the last such sequence of tokens on, and not before (activated LoRA).
        init: How the factors start, a name in `ops.initialise.INITIALISATIONS`.
        init_options: Settings of that initialisation.

    Raises:
        ConfigError: Unknown keys, wrong types, values out of range; all at once.

    Example:
        >>> LoRAConfig(rank=16, alpha=32, target_modules=["q_proj", "v_proj"]).scaling_for("layers.0.q_proj")
        2.0

    Source:
        Hu et al. 2021, arXiv:2106.09685, section 4.1; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732.
    """

    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    layers_pattern: str | None = None
    rank_pattern: Mapping[str, PositiveInt] = Field(default_factory=dict)
    alpha_pattern: Mapping[str, PositiveFloat] = Field(default_factory=dict)
    use_rslora: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    use_dora: bool = False
    freeze_A: bool = False
    parts: Mapping[str, tuple[tuple[int, int], ...]] = Field(default_factory=dict)
    token_rows: Mapping[str, tuple[Annotated[int, Field(ge=0)], ...]] = Field(default_factory=dict)
    invocation_tokens: tuple[Annotated[int, Field(ge=0)], ...] = ()
    init: str = "kaiming"
    init_options: Mapping[str, int | float | str] = Field(default_factory=dict)

    @field_validator(
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "modules_to_save",
        "target_parameters",
        "invocation_tokens",
        mode="before",
    )
    @classmethod
    def _list_to_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, (list, set, frozenset)) else value

    @field_validator("target_modules", "exclude_modules")
    @classmethod
    def _is_pattern(cls, value: Any) -> Any:
        if isinstance(value, str):
            return value if value == ALL_LINEAR else _check_regex(value)
        if len(set(value)) != len(value):
            raise ValueError("an entry stands twice")
        return value

    @field_validator("parts", mode="before")
    @classmethod
    def _runs_to_tuples(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {
            key: tuple(tuple(run) if isinstance(run, list) else run for run in runs)
            if isinstance(runs, (list, tuple))
            else runs
            for key, runs in value.items()
        }

    @field_validator("token_rows", mode="before")
    @classmethod
    def _rows_to_tuples(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {key: tuple(ids) if isinstance(ids, (list, set, range)) else ids for key, ids in value.items()}

    @field_validator("token_rows")
    @classmethod
    def _rows_once(cls, value: Mapping[str, tuple[int, ...]]) -> Mapping[str, tuple[int, ...]]:
        for entry, ids in value.items():
            if not ids or len(set(ids)) != len(ids):
                raise ValueError(f"{entry!r}: name at least one token, each once")
        return value

    @field_validator("parts")
    @classmethod
    def _runs_follow(cls, value: Mapping[str, tuple[tuple[int, int], ...]]) -> Mapping[str, Any]:
        for pattern, runs in value.items():
            before = 0
            for start, stop in runs:
                if not before <= start < stop:
                    raise ValueError(f"{pattern!r}: runs (start, stop) must rise and not overlap, got {list(runs)}")
                before = stop
            if not runs:
                raise ValueError(f"{pattern!r}: name at least one run of output rows")
        return value

    @field_validator("rank_pattern", "alpha_pattern", "parts")
    @classmethod
    def _keys_are_patterns(cls, value: Mapping[str, Any]) -> Mapping[str, Any]:
        for pattern in value:
            _check_regex(pattern)
        return value

    @field_validator("layers_pattern")
    @classmethod
    def _is_regex(cls, value: str | None) -> str | None:
        return None if value is None else _check_regex(value)

    @model_validator(mode="after")
    def _layers_need_a_list(self) -> "LoRAConfig":
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError("layers_to_transform acts only with a list of target_modules")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("layers_pattern says where layers_to_transform counts; set that too")
        if self.invocation_tokens and self.token_rows:
            raise ValueError(
                "invocation_tokens and token_rows exclude each other: rows act wherever their token stands"
            )
        if not self.target_modules and not self.target_parameters:
            if not self.token_rows:
                raise ValueError("target_modules is empty; name at least one, or 'all-linear'")
            self._check_rows_alone()
        return self

    @model_validator(mode="after")
    def _rows_or_whole_table(self) -> "LoRAConfig":
        for table in self.token_rows:
            for module in self.modules_to_save:
                if matches_suffix(table, module) or matches_suffix(module, table):
                    raise ValueError(
                        f"token_rows {table!r} and modules_to_save {module!r} name the same table; its rows train "
                        "alone, or all of it does"
                    )
        return self

    def _check_rows_alone(self) -> None:
        """Raise for what rows of tokens without factors cannot have, in training or in PEFT's file of them."""
        settings = ("dropout", "modules_to_save", "bias", "use_dora", "freeze_A", "init", "init_options")
        defaults = {name: LoRAConfig.model_fields[name].get_default(call_default_factory=True) for name in settings}
        if changed := [name for name in settings if vars(self)[name] != defaults[name]]:
            raise ValueError(
                f"target_modules is empty, so that token_rows train alone; {', '.join(changed)} needs adapted modules"
            )
        if len(set(self.token_rows.values())) > 1:
            raise ValueError("token_rows that train alone: PEFT has one list of tokens for all tables, these differ")

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "LoRAConfig":
        """Return the settings that `model_dump(mode="json")` gave: JSON has lists where there are tuples.

        Example:
            >>> config = LoRAConfig(parts={"qkv": [(0, 4)]}, target_modules=["qkv"])
            >>> LoRAConfig.from_json(config.model_dump(mode="json")) == config
            True
        """
        return cls(**values)

    def rank_for(self, path: str) -> int:
        """Return the rank of the module at a path, after `rank_pattern`."""
        return value_for(path, self.rank_pattern, self.rank)

    def alpha_for(self, path: str) -> float:
        """Return the alpha of the module at a path, after `alpha_pattern`."""
        return value_for(path, self.alpha_pattern, self.alpha)

    def parts_for(self, path: str) -> tuple[tuple[int, int], ...]:
        """Return the runs of output rows of the module at a path that have factors of their own; empty for all rows."""
        return value_for(path, self.parts, ())

    def scaling_for(self, path: str) -> float:
        """Return the factor that multiplies `lora_B @ lora_A` of the module at a path."""
        rank = self.rank_for(path)
        return self.alpha_for(path) / (math.sqrt(rank) if self.use_rslora else rank)


class DataConfig(Settings):
    """Where the rows come from.

    Args:
        train: File of training rows.
        eval: File of rows to evaluate on; None means no evaluation.
        skip_bad_rows: Leave out rows that cannot be used, counted and listed, instead of refusing.

    Example:
        >>> DataConfig(train="train.jsonl").eval is None
        True
    """

    train: str
    eval: str | None = None
    skip_bad_rows: bool = False


class TrainConfig(Settings):
    """How an adapter is trained.

    Args:
        epochs: Passes over the training rows.
        max_steps: Stop after this many optimiser steps; None means all of the epochs.
        learning_rate: Peak learning rate (about ten times that of full fine-tuning).
        schedule: Course of the learning rate after the warm-up: linear or cosine to zero, or constant.
        warmup_ratio: Share of the steps in which the learning rate rises from zero.
        weight_decay: AdamW's decoupled decay of the factors. Magnitudes and what trains whole start at the base's
            values and are not decayed. The factors of pissa, olora and lora_ga are, which pulls them off their start.
        max_grad_norm: The gradient is scaled down to this global norm; None means never.
        tokens_per_step: Token budget of an optimiser step.
        tokens_per_micro_batch: Token budget of one forward and backward; bounds memory; without dropout it changes no
            result beyond rounding.
        max_length: Longest row in tokens. A longer row is reported, or cut where no answer is lost.
        eval_every: Optimiser steps between evaluations; None means once an epoch.
        patience: Stop after this many evaluations without a better loss; None means never.
        checkpoint_every: Optimiser steps between checkpoints.
        keep_checkpoints: How many of the newest checkpoints stay; at least two, for one may turn out damaged.
        cache_prefix: Where to keep what frozen layers below the lowest adapter give for each row, so that later epochs
            need not run them: auto is in memory if a quarter of what is free suffices, else in a file in the run
            folder that is gone afterwards.
        checkpoint_activations: What is computed again in the backward rather than kept. `true`: each layer, of which
            its input alone is kept: a tenth of the memory of activations, for about a third more time. `gates`: of each
            layer the gate and what it multiplies: half of the memory, for a tenth more time, a fifth where tokens are
            few. `auto` is `gates` from 1,024 tokens of a forward on in float32 on processors with matrix tiles (AMX),
            whose products cost little beside memory, else `false`.
        fast: Compute by the fast paths; `false` computes by the plain reference of each, for anyone who doubts.
        lora_plus_ratio: Learning rate of `lora_B` over `learning_rate` (LoRA+, about 16, with a lower
            `learning_rate`). Embeddings, magnitudes and what trains whole keep `learning_rate`.

    Example:
        >>> TrainConfig(learning_rate=1e-3).epochs
        1

    Source:
        Defaults: Schulman et al. 2025, "LoRA Without Regret" (constant `alpha / rank` scaling, no weight
        decay, small batches); differs: a linear schedule with a short warm-up. LoRA+: Hayou et al. 2024,
        arXiv:2402.12354; differs from the authors' code and PEFT, which also raise the rate of everything in
        one dimension and give adapted embeddings one of their own (1e-6).
    """

    epochs: PositiveInt = 1
    max_steps: PositiveInt | None = None
    learning_rate: PositiveFloat = 2e-4
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.03
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat | None = 1.0
    tokens_per_step: PositiveInt = 8192
    tokens_per_micro_batch: PositiveInt = 4096
    max_length: Annotated[int, Field(ge=2)] = 1024
    eval_every: PositiveInt | None = None
    patience: PositiveInt | None = None
    checkpoint_every: PositiveInt = 100
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    lora_plus_ratio: PositiveFloat = 1.0
    cache_prefix: Literal["auto", "off", "memory", "disk"] = "auto"
    checkpoint_activations: bool | Literal["auto", "gates"] = "auto"
    fast: bool = True


class SamplingConfig(Settings):
    """How the next token is chosen when a model writes.

    Args:
        max_new_tokens: Longest continuation.
        temperature: 0 takes the most likely token; above, one is drawn.
        top_p: Drawn from the most likely tokens that hold this share of the probability.
        seed: Fixes what is drawn.

    Example:
        >>> SamplingConfig(temperature=0.7).top_p
        1.0
    """

    max_new_tokens: PositiveInt = 256
    temperature: NonNegativeFloat = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Seed = 0


class RunConfig(Settings):
    """A whole run: what `veneer train` reads from a YAML file.

    Args:
        base: Hub id, directory, `.gguf` file, or the name of an embedded model.
        storage: How the base's linear layers are stored: as they are, or quantised to 8 or 4 bits.
        dtype: What the base is held and computed in; `auto`: as it is stored where the processor is fast in that, else
            float32.
        adapter: Which layers are adapted, and how.
        data: Where the rows come from.
        train: How the adapter is trained.
        seed: Fixes everything that is drawn at random.
        out: The run folder to write.

    Example:
        >>> RunConfig(base="smollm2", data={"train": "a.jsonl"}, out="runs/a").train.epochs
        1
    """

    base: str
    storage: Literal["plain", "int8", "nf4"] = "plain"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    adapter: LoRAConfig = Field(default_factory=LoRAConfig)
    data: DataConfig
    train: TrainConfig = Field(default_factory=TrainConfig)
    seed: Seed = 0
    out: str

    @property
    def base_options(self) -> str:
        """Options by which a command loads the base as the run does, each with a blank before it."""
        given = {"storage": (self.storage, "plain"), "dtype": (self.dtype, "auto")}
        return "".join(f" --{name} {value}" for name, (value, default) in given.items() if value != default)

    @model_validator(mode="after")
    def _patience_needs_evaluations(self) -> "RunConfig":
        if self.data.eval is None and (self.train.patience is not None or self.train.eval_every is not None):
            raise ValueError("train.patience and train.eval_every need rows to evaluate on; set data.eval")
        return self
