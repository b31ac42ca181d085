"""Draw an analysis with matplotlib, without changing the backend of the user's own plots."""

import math
from typing import Any

import numpy as np

from .findings import Findings, Run

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError:
    raise ValueError(
        "plots need the package matplotlib: pip install 'owl2_hf[analysis]'."
    ) from None

COLORS = {"text": "#3b6fb6", "visual": "#d9702b"}
PICTURE_STYLES = {"given": "-", "unrelated": "--"}
NORM_TITLES = {
    "residual": "residual stream, before the norm",
    "input_layernorm": "after the input norm",
    "key": "keys",
    "value": "values",
}
DPI = 100


def draw(analysis: Findings) -> dict[str, Figure]:
    """File name -> figure."""
    figures = {"attention.png": attention_figure(analysis), "norms.png": norms_figure(analysis)}
    for model, suffix in ((analysis, ""), (analysis.without, "_without")):
        for run in model.runs if model is not None else []:
            name = f"query_maps{suffix}" + ("" if run.picture == "given" else f"_{run.picture}")
            for index in range(0 if run.query_maps is None else len(run.query_maps)):
                square = "" if len(run.query_maps) == 1 else f"_{index + 1}"  # type: ignore[arg-type]
                figures[f"{name}{square}.png"] = query_maps_figure(run, index)
    return figures


def attention_figure(analysis: Findings) -> Figure:
    """Shares of the answer's attention on text and on visual tokens over the layers, a panel for
    each model.

    700 pixels wide for each model, 450 high.
    """
    models = _models(analysis)
    figure = Figure(figsize=(7 * len(models), 4.5), dpi=DPI, layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        for run in _with_picture(model):
            for modality, color in COLORS.items():
                label = f"{modality} tokens" + (
                    ", unrelated image" if run.picture == "unrelated" else ""
                )
                _plot(
                    axes,
                    run.attention["answer"][modality],
                    label,
                    color,
                    PICTURE_STYLES[run.picture],
                )
        uniform = model.runs[0].uniform["answer"]["visual"]
        axes.axhline(uniform, color="gray", lw=1, ls=":", label="visual, if attention were uniform")
        axes.set(title=_title(model), ylabel="share of the answer's attention", ylim=(0, 1))
        _finish(axes)
    _legend(figure, figure.axes[0])
    return figure


def norms_figure(analysis: Findings) -> Figure:
    """Norms of the two modalities over the layers; four panels for each model, 1400 x 380
    pixels.
    """
    models = _models(analysis)
    figure = Figure(figsize=(14, 3.8 * len(models)), dpi=DPI, layout="constrained")
    rows = figure.subplots(len(models), len(NORM_TITLES), squeeze=False)
    for row, model in zip(rows, models, strict=True):
        for axes, (state, title) in zip(row, NORM_TITLES.items(), strict=True):
            for modality, color in COLORS.items():
                _plot(axes, model.runs[0].norms[state][modality], f"{modality} tokens", color)
            axes.set(title=title, ylim=(0, 1.08 * axes.get_ylim()[1]))
            _finish(axes)
        row[0].set_ylabel(f"{_title(model)}\nroot mean square")
    _legend(figure, rows[0][0])
    return figure


def query_maps_figure(run: Run, index: int = 0) -> Figure:
    """A square of the image, the mean of all maps over it, and the map of each learnable query.

    A cell is 130 pixels wide, and as high as the image's shape asks for; the first two are twice as
    large.
    """
    assert run.query_maps is not None and run.squares is not None
    maps, picture = run.query_maps[index], run.squares[index]
    num_columns = max(5, math.ceil(math.sqrt(1.5 * len(maps))))
    num_rows = 2 + math.ceil(len(maps) / num_columns)
    cell_height = 1.3 * min(max(run.aspect_ratio, 0.4), 2.5) + 0.2
    figure = Figure(
        figsize=(1.3 * num_columns, cell_height * num_rows + 0.4), dpi=DPI, layout="constrained"
    )
    grid = figure.add_gridspec(num_rows, num_columns)
    title = "What the learnable queries attend to: mean of layers and heads, red at the maximum of each map"
    figure.suptitle(title, fontsize=9)
    _show(figure.add_subplot(grid[:2, :2]), picture, None, "image", run.aspect_ratio)
    _show(figure.add_subplot(grid[:2, 2:4]), picture, maps.mean(0), "all queries", run.aspect_ratio)
    for query, weights in enumerate(maps):
        row, column = divmod(query, num_columns)
        _show(
            figure.add_subplot(grid[row + 2, column]),
            picture,
            weights,
            f"{query + 1}",
            run.aspect_ratio,
        )
    return figure


def _show(
    axes: Any, picture: np.ndarray, weights: np.ndarray | None, title: str, aspect_ratio: float
) -> None:
    """An image in light grey under the (G, G) weights, or by itself in colour."""
    side = len(picture)
    axes.set_title(title, fontsize=8, pad=2)
    axes.axis("off")
    if weights is None:
        axes.imshow(picture, interpolation="bicubic", aspect=aspect_ratio)
        return
    grey = 0.6 * picture.mean(-1) + 102
    axes.imshow(grey, cmap="gray", vmin=0, vmax=255, interpolation="bicubic", aspect=aspect_ratio)
    heat = weights / weights.max()
    extent = (-0.5, side - 0.5, side - 0.5, -0.5)
    axes.imshow(
        heat,
        cmap="YlOrRd",
        vmin=0,
        vmax=1,
        alpha=0.1 + 0.75 * heat,
        extent=extent,
        aspect=aspect_ratio,
    )


def _models(analysis: Findings) -> list[Findings]:
    return [analysis] if analysis.without is None else [analysis, analysis.without]


def _with_picture(analysis: Findings) -> list[Run]:
    return [run for run in analysis.runs if run.picture in PICTURE_STYLES]


def _title(analysis: Findings) -> str:
    return f"{'with' if analysis.has_module else 'without'} modality-adaptive module"


def _plot(axes: Any, values: list[Any], label: str, color: str, style: str = "-") -> None:
    axes.plot(
        range(1, len(values) + 1),
        values,
        style,
        marker="o",
        ms=3.5,
        lw=1.6,
        color=color,
        label=label,
    )


def _finish(axes: Any) -> None:
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", lw=0.4, alpha=0.5)


def _legend(figure: Figure, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
