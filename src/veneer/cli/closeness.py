"""What `combine` and `resize` show: how near an adapter is to what was meant, by modules alike."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from veneer.cli.output import grouped, print_table, ratio, span
from veneer.errors import ConfigError
from veneer.names import last_name

if TYPE_CHECKING:
    from veneer.adapter import Adapter
    from veneer.tools.stacks import Closeness


def print_closeness(adapter: "Adapter", modules: "Mapping[str, Closeness]") -> None:
    """Print ranks, kept energy and error of modules of one last name and size together."""
    rows = []
    for (name, sizes), paths in grouped(modules, lambda path: (last_name(path), adapter.modules[path].sizes)).items():
        alike = [modules[path] for path in paths]
        norm = sum(one.norm**2 for one in alike) ** 0.5
        missed = sum(one.missed**2 for one in alike) ** 0.5
        rows.append(
            {
                "target": name,
                "layers": len(alike),
                "out × in": f"{sizes[0]} × {sizes[1]}",
                "rank before": span([one.rank_before for one in alike]),
                "rank": span([one.rank for one in alike]),
                "norm": f"{norm:.4g}",
                "kept": share(1.0 - (missed / norm) ** 2 if norm else 1.0),
                "error": ratio(missed / norm if norm else 0.0),
                "worst error": ratio(max(one.error for one in alike)),
            }
        )
    if rows:
        print_table("", rows, right=[name for name in rows[0] if name != "target"])


def share(value: float) -> str:
    """Return a share in percent that reads 100 % only where nothing shows.

    Example:
        >>> share(1.0), share(0.98765), share(0.9999999)
        ('100.00 %', '98.77 %', '99.99 %')
    """
    percent = 100 * max(0.0, value)
    return f"{min(percent, 99.99) if value < 1 - 1e-12 else percent:.2f} %"


def require_one(**options: object) -> None:
    """Raise unless exactly one of some options is given.

    Raises:
        ConfigError: If none is, or several are.

    Example:
        >>> require_one(rank=4, energy=None)
    """
    if sum(value is not None for value in options.values()) != 1:
        raise ConfigError(f"give {' or '.join(f'--{name}' for name in options)}, one of them")
