"""A picture of an adapter: what it changes where, and the spectra of its updates."""

import math
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from veneer.errors import AdapterError, OutputError
from veneer.files.commit import commit_file
from veneer.names import last_name, layer_index
from veneer.tools.summarize import ModuleSummary, Summary

MAX_ROWS = 60
_FLOOR = 1e-6
_NO_LAYER = -1
_PALETTE = (
    "#1f4e79",
    "#c8553d",
    "#5b8c5a",
    "#8e6c8a",
    "#d9a441",
    "#3a9188",
    "#7a7a7a",
    "#b5651d",
    "#4c6fbf",
    "#a23b72",
)

Cells = Mapping[str, Mapping[int, Sequence[ModuleSummary]]]
"""Target to layer to the modules there."""


def draw_summary(summary: Summary, path: str | Path) -> None:
    """Draw a PNG: norms and effective ranks by layer and target, and each target's singular values.

    Where several modules of a target lie in a layer, their norms are added as squares, their ranks averaged. Of more
    than 60 targets, those that change most are drawn.

    Args:
        summary: Of an adapter.
        path: The file to write, in the place of one that may be there; its folder must exist.

    Raises:
        OutputError: If the name does not end in .png, or the disk refuses.
        AdapterError: If there are no modules to draw.

    Example:
        >>> import tempfile, torch
        >>> from veneer.adapter import Adapter, LowRank
        >>> from veneer.config import LoRAConfig
        >>> from veneer.tools.summarize import summarize
        >>> pair = LowRank(torch.eye(3)[:2], torch.eye(4)[:, :2], 1.0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     draw_summary(summarize(Adapter({"layers.0.q": pair}, LoRAConfig(rank=2))), Path(folder) / "a.png")
        ...     (Path(folder) / "a.png").read_bytes()[1:4]
        b'PNG'
    """
    if Path(path).suffix != ".png":
        raise OutputError(f"{path}: a picture is written as PNG; expected a name that ends in .png")
    if not summary.modules:
        raise AdapterError("the adapter has no modules to draw: all of it trained whole")
    commit_file(path, _picture(summary))


def _picture(summary: Summary) -> bytes:
    cells = _cells(summary.modules)
    layers = sorted({layer for row in cells.values() for layer in row})
    rows = len(cells)
    width = min(24.0, max(8.0, 3.2 + 0.24 * len(layers)))
    tall = 0.9 + 0.26 * rows
    figure = Figure(figsize=(width, 2 * tall + 4.6), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    top, middle, bottom = figure.subplots(3, 1, height_ratios=(tall, tall, 4.2))
    relative = all(one.relative is not None for one in summary.modules)
    what = "norm of the update over that of the weight" if relative else "norm of the update"
    _map(top, cells, layers, _relative if relative else _norm, f"{what}, by layer", logarithmic=True)
    _map(middle, cells, layers, _effective_rank, "effective rank (entropy of σ²), by layer", logarithmic=False)
    middle.set_xlabel("layer")
    _spectra(bottom, cells)
    base = _short(summary.base or "base not said", most=60)
    figure.suptitle(f"{base}: {summary.num_modules} modules, {summary.num_parameters:,} parameters")
    picture = BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _cells(modules: Sequence[ModuleSummary]) -> Cells:
    cells: dict[str, dict[int, list[ModuleSummary]]] = {}
    stacks = [_stack(one.path) for one in modules]
    several = len(set(stacks) - {""}) > 1  # an encoder and a decoder, down and up blocks: layers of their own
    for one, stack in zip(modules, stacks, strict=True):
        layer = layer_index(one.path)
        name = last_name(one.path) + (f", {stack}" if several and stack else "")
        cells.setdefault(name, {}).setdefault(_NO_LAYER if layer is None else layer, []).append(one)
    if len(cells) <= MAX_ROWS:
        return cells
    most = sorted(cells, key=lambda name: -math.hypot(*(_norm(here) for here in cells[name].values())))[:MAX_ROWS]
    return {name: cells[name] for name in cells if name in most}


def _stack(path: str) -> str:
    """Return what stands before the number of the layer; empty without one."""
    parts = path.split(".")
    return next((".".join(parts[:at]) for at, part in enumerate(parts) if at and part.isdecimal()), "")


def _norm(here: Sequence[ModuleSummary]) -> float:
    return math.hypot(*(one.norm for one in here))


def _relative(here: Sequence[ModuleSummary]) -> float:
    weights = [one.norm / one.relative for one in here if one.relative]
    return _norm(here) / math.hypot(*weights) if weights else 0.0


def _effective_rank(here: Sequence[ModuleSummary]) -> float:
    return math.fsum(one.effective_rank for one in here) / len(here)


def _map(
    axes: Axes,
    cells: Cells,
    layers: Sequence[int],
    value: Callable[[Sequence[ModuleSummary]], float],
    title: str,
    *,
    logarithmic: bool,
) -> None:
    """Draw one number of each layer and target as a field of colour; what is not there, or zero, stays grey."""
    field = np.array([[value(row[layer]) if layer in row else 0.0 for layer in layers] for row in cells.values()])
    shown = np.ma.masked_less_equal(field, 0.0)
    least, largest = (shown.min(), shown.max()) if shown.count() else (1.0, 1.0)
    scale = LogNorm(least, largest) if logarithmic and largest > 2 * least else None
    axes.set_facecolor("#dddddd")
    image = axes.imshow(shown, aspect="auto", cmap="viridis", norm=scale, interpolation="nearest")
    axes.set_yticks(range(len(cells)), [_short(name) for name in cells], fontsize=8)
    step = max(1, len(layers) // 40)
    ticks = range(0, len(layers), step)
    axes.set_xticks(ticks, ["none" if layers[at] == _NO_LAYER else str(layers[at]) for at in ticks], fontsize=8)
    axes.set_title(title, fontsize=10, loc="left")
    axes.figure.colorbar(image, ax=axes, fraction=0.03, pad=0.01)


def _spectra(axes: Axes, cells: Cells) -> None:
    """Draw each target's singular values as shares of the largest: the median of its modules, and their range."""
    for place, (name, row) in enumerate(cells.items()):
        curves = [one.singular_values for here in row.values() for one in here if one.norm]
        length = min((len(curve) for curve in curves), default=0)
        if not length or place >= len(_PALETTE):
            continue
        shares = np.array([curve[:length] for curve in curves]) / np.array([[curve[0]] for curve in curves])
        shares = np.maximum(shares, _FLOOR)
        ranks, colour = np.arange(1, length + 1), _PALETTE[place]
        axes.fill_between(ranks, shares.min(0), shares.max(0), color=colour, alpha=0.12, linewidth=0)
        axes.plot(ranks, np.median(shares, 0), color=colour, marker="o", markersize=3, label=_short(name))
    axes.set_yscale("log")
    axes.set(xlabel="singular value", ylabel="share of the largest")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    more = f"; the first {len(_PALETTE)} of {len(cells)} targets" if len(cells) > len(_PALETTE) else ""
    axes.set_title(f"singular values by target: median and range of its modules{more}", fontsize=10, loc="left")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, ncols=2)


def _short(name: str, most: int = 32) -> str:
    """Return a name from a file as it can be drawn: its end, in letters that the font has, without markup."""
    plain = "".join(char if char.isascii() and char.isprintable() else "?" for char in name)
    return (plain if len(plain) <= most else f"…{plain[1 - most :]}").replace("$", r"\$")
