"""By which names an adapter's paths go in a checkpoint's files: no model is asked, no family of models is known."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from veneer.errors import AdapterError, shortened
from veneer.names import did_you_mean

_SHOWN = 20


@dataclass(frozen=True)
class Renaming:
    """How a path of the model begins in the files, where not as in the model.

    Args:
        old: First parts of a path in the model, with the dot behind them; empty where parts are put before it.
        new: What stands in the files instead.
    """

    old: str = ""
    new: str = ""

    def __call__(self, name: str) -> str:
        """Return a name as it is in the files."""
        return self.new + name.removeprefix(self.old) if name.startswith(self.old) else name


def find_renaming(wanted: Collection[str], names: Collection[str]) -> Renaming:
    """Return the one change of first parts by which all names that are asked for are names in the files.

    A base saved from `AutoModel` lacks the `model.` of the model with a head; others have one part more, or two parts
    in another order. A part that is a number, such as a layer's, never changes.

    Args:
        wanted: Full names of tensors.
        names: Those in the files.

    Raises:
        AdapterError: If there is none, with the nearest name for each; or if there are several.

    Example:
        >>> find_renaming(["model.layers.0.q.weight"], ["layers.0.q.weight", "norm.weight"])
        Renaming(old='model.', new='')
    """
    known = set(names)
    missing = [name for name in wanted if name not in known]
    if not missing:
        return Renaming()
    by_length: dict[int, set[Renaming]] = {}
    for rule in _candidates(missing[0], names):
        if {rule(name) for name in missing} <= known:
            by_length.setdefault(len(rule.old), set()).add(rule)
    if not by_length:
        lines = [f"{name}: the files hold no such tensor{did_you_mean(name, known)}" for name in missing[:_SHOWN]]
        problems = shortened(lines, _SHOWN, len(missing))
        raise AdapterError("the adapter does not fit the files (nothing was written)", problems)
    best = by_length[min(by_length)]
    if len(best) > 1:
        places = sorted(rule(missing[0]) for rule in best)
        raise AdapterError(
            f"{missing[0]}: may be {' or '.join(places)} in the files (nothing was written); rename the adapter's paths"
        )
    return next(iter(best))


def _candidates(name: str, names: Collection[str]) -> Iterator[Renaming]:
    """Yield the changes of first parts that bring one name to one in the files."""
    parts = name.split(".")
    for count in range(len(parts) - 1):
        if any(part.isdigit() for part in parts[:count]):
            return
        old, rest = "".join(f"{part}." for part in parts[:count]), ".".join(parts[count:])
        for one in names:
            new = one.removesuffix(rest)
            if new != one or not rest:
                # Put before, taken away, or turned round: anything else would be another module.
                turned = sorted(new.split(".")) == sorted(old.split("."))
                whole = not new or new.endswith(".")
                if whole and (not old or not new or turned) and not any(part.isdigit() for part in new.split(".")):
                    yield Renaming(old, new)


SPLIT: Mapping[str, tuple[str, ...]] = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
}
"""Names in the files of what transformers 5 stacks: a matrix for each expert, the gate's before the other's rows."""


def split_names(path: str, count: int) -> list[str]:
    """Return the tensors that a stacked parameter is made of, expert by expert; none for one that is never stacked.

    Example:
        >>> split_names("mlp.experts.down_proj", 2)
        ['mlp.experts.0.down_proj.weight', 'mlp.experts.1.down_proj.weight']
    """
    owner, _, leaf = path.rpartition(".")
    return [f"{owner}.{expert}.{one}.weight" for expert in range(count) for one in SPLIT.get(leaf, ())]
