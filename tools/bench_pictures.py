"""Pictures of the benchmark tables, as SVG: the same rows give the same file.

Colours are those of Okabe and Ito, which colour-blind readers tell apart, and every bar carries its figure.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams.update(
    {
        "svg.hashsalt": "vlmoe",
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
)
import matplotlib.pyplot as plt  # noqa: E402 (after the choice of what it draws with)

Row = dict[str, str]
Aims = dict[tuple[int, int], float]
GREY, BLUE, SKY, ORANGE, RED, GREEN = "#999999", "#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#009E73"
COLOURS = {
    "dense": GREY, "loop": RED, "torch": RED, "batched": GREEN, "grouped": ORANGE, "triton": BLUE, "auto": SKY,
    "dense_equal_flops": GREY, "dense_equal_params": GREEN, "xmoe": ORANGE, "mhmoe": BLUE,
    "pillow": GREY, "torchvision": ORANGE, "webdataset": RED, "ours": BLUE, "ours_to_float": SKY,
}  # fmt: skip
NAMES = {
    "dense_equal_flops": "dense, equal FLOPs", "dense_equal_params": "dense, equal parameters", "mhmoe": "MH-MoE",
    "xmoe": "X-MoE", "pillow": "Pillow", "ours_to_float": "ours, made float on the processor",
    "loader_0_workers": "loader,\nno workers", "loader_2_workers": "loader,\n2 workers", "batch": "view + batch",
}  # fmt: skip
WIDTH = 0.82  # of all bars of a group
SLOWEST = 10.0  # times the dense layer: what a picture of processors shows


def draw_layers(rows: Sequence[Row], path: Path, aims: Aims) -> None:
    """Time of forward + backward relative to the dense layer, per shape and backend, with the aims."""
    sparse = [row for row in rows if row["what"] != "dense"]
    panels = _by(sparse, _layer_panel)
    figure, axes = _figure(
        panels, "Time of an MH-MoE layer, forward + backward, relative to a dense layer of equal FLOPs"
    )
    for axis, (title, mine) in zip(axes, panels.items(), strict=True):
        shapes = _by(sorted(mine, key=lambda row: (int(row["dim"]), int(row["heads"]))), _shape)
        halves = _bars(axis, shapes, "what", "fwd_bwd_vs_dense", lambda row: f"{float(row['fwd_bwd_vs_dense']):.2f}")
        axis.axhline(1, color="black", linewidth=1, linestyle=":", label="dense layer")
        for place, (group, half) in enumerate(zip(shapes.values(), halves, strict=True)):
            if aim := aims.get((int(group[0]["dim"]), int(group[0]["heads"]))):
                ends = place - half - 0.05, place + half + 0.05
                axis.hlines(aim, *ends, color="black", linewidth=2, label="aim")
                axis.annotate(f"{aim:g}", (ends[1], aim), xytext=(2, -3), textcoords="offset points", fontsize=8)
        axis.set(title=title, ylabel="time / time of the dense layer")
        _legend(axis)
    _save(figure, path)


def draw_steps(rows: Sequence[Row], path: Path) -> None:
    """Tokens per second of whole training steps."""
    panels = _by(rows, lambda row: row["hardware"])
    figure, axes = _figure(panels, "Pretraining throughput of whole optimiser steps")
    for axis, (hardware, mine) in zip(axes, panels.items(), strict=True):
        groups = _by(mine, lambda row: f"{row['recipe']}, {row['batch']} pairs\n{row['streams']}\n{_how(row)}")
        _bars(axis, groups, "what", "tokens_per_s", _rate, scale=1e-3)
        axis.set(title=f"{hardware}, bf16 (in brackets: relative to dense, equal FLOPs)", ylabel="thousand tokens / s")
        _legend(axis)
    _save(figure, path)


def draw_loader(rows: Sequence[Row], path: Path) -> None:
    """Images per second and processor, per stage and way."""
    panels = _by(
        rows, lambda row: f"{row['hardware']}: JPEG of {row['size'].replace('x', ' × ')}, {float(row['kb']):.0f} kB"
    )
    figure, axes = _figure(panels, "Reading photographs for training at 224 × 224 pixels")
    for axis, (title, mine) in zip(axes, panels.items(), strict=True):
        stages = _by(mine, lambda row: NAMES.get(row["what"], row["what"]))
        _bars(axis, stages, "way", "images_per_s", lambda row: f"{float(row['images_per_s']):.0f}")
        axis.set(title=title, ylabel="images per second of one processor")
        _legend(axis)
    _save(figure, path)


def draw_processors(rows: Sequence[Row], path: Path) -> None:
    """Time of forward + backward relative to the dense layer, per shape, precision and backend, up to `SLOWEST`."""
    sparse = [row for row in rows if row["what"] != "dense" and float(row["vs_dense"]) <= SLOWEST]
    panels = _by(sparse, lambda row: row["hardware"])
    figure, axes = _figure(
        panels, "Time of an MH-MoE layer on a processor, forward + backward, relative to a dense layer"
    )
    for axis, (hardware, mine) in zip(axes, panels.items(), strict=True):
        shapes = _by(mine, lambda row: f"d = {row['dim']}\nh = {row['heads']}\n{row['precision']}")
        _bars(axis, shapes, "what", "vs_dense", lambda row: f"{float(row['vs_dense']):.1f}")
        axis.axhline(1, color="black", linewidth=1, linestyle=":", label="dense layer")
        axis.set(title=f"{hardware}, {mine[0]['threads']} threads", ylabel="time / time of the dense layer")
        _legend(axis)
    _save(figure, path)


def _layer_panel(row: Row) -> str:
    shape = f"{int(row['tokens']):,} tokens, {row['experts']} experts, top {row['top_k']}"
    return f"{row['hardware']}: {shape}, bf16, compiled" + _recorded(row)


def _shape(row: Row) -> str:
    dim, heads = int(row["dim"]), int(row["heads"])
    return f"d = {dim}, h = {heads}\n(sub-tokens of {dim // heads})"


def _rate(row: Row) -> str:
    ratio = row["tokens_per_second_vs_dense"]
    return f"{float(row['tokens_per_s']) / 1e3:.0f}" + (f"\n({float(ratio):.2f})" if ratio else "")


def _how(row: Row) -> str:
    return ("compiled" if row["compiled"] == "True" else "not compiled") + _recorded(row)


def _recorded(row: Row) -> str:
    return ", recorded" * (row["recorded"] == "True")


def _by(rows: Sequence[Row], name: Callable[[Row], str]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(name(row), []).append(row)
    return groups


def _figure(panels: dict[str, list[Row]], title: str) -> tuple[Any, Any]:
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(9, 0.4 + 3.2 * len(panels)), layout="constrained", squeeze=False
    )
    figure.suptitle(title, fontsize=11, fontweight="bold")
    return figure, axes[:, 0]


def _bars(
    axis: Any,
    groups: dict[str, list[Row]],
    series: str,
    column: str,
    figure: Callable[[Row], str],
    *,
    scale: float = 1.0,
) -> list[float]:
    """One group of bars per item of `groups`; a bar per row, coloured by its `series`, with its `figure` on top.

    Returns half the width of each group.
    """
    width = WIDTH / max(3, *map(len, groups.values()))
    for place, rows in enumerate(groups.values()):
        for number, row in enumerate(rows):
            name = row[series]
            bar = axis.bar(
                place + width * (number - (len(rows) - 1) / 2), scale * float(row[column]), 0.94 * width,
                color=COLOURS.get(name, "black"), label=NAMES.get(name, name),
            )  # fmt: skip
            axis.bar_label(bar, [figure(row)], padding=1, fontsize=8)
    axis.set_xticks(range(len(groups)), list(groups))
    axis.set_xlim(-0.6, len(groups) - 0.4)
    axis.margins(y=0.15)
    return [width * len(rows) / 2 for rows in groups.values()]


def _legend(axis: Any) -> None:
    """Each name once, beside the bars."""
    handles, labels = axis.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    axis.legend(list(once.values()), list(once), loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    plt.close(figure)
