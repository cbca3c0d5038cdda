"""Pictures of a run, with matplotlib (extra `pictures`): loss curves, experts per patch, codes, words behind masks."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from vlmoe.errors import UserError
from vlmoe.inspect.routing import PlacedRouting, distinct_experts
from vlmoe.models.visual_tokenizer import VisualTokenizer

FONT = "DejaVu Sans Mono"  # matplotlib's own


def draw_losses(metrics: Sequence[dict[str, Any]], path: Path) -> None:
    """Training losses by step, held-out perplexities with their unigram baselines (dashed)."""
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    names = [n for n in dict.fromkeys(key for line in metrics for key in line) if n.startswith("train/")]
    for name in names:
        if name.split("/")[1] in ("lr", "seconds", "gradient_norm", "router_z", "load_balancing", "loss"):
            continue
        points = [(line["step"], line[name]) for line in metrics if name in line]
        left.plot(*_smoothed(points), label=name.split("/")[1])
    left.set(xlabel="step", ylabel="cross-entropy at masked positions (nats)", title="training")
    left.legend()
    evaluations = [line for line in metrics if any(key.startswith("eval/") for key in line)]
    for i, name in enumerate(key for key in (evaluations[-1] if evaluations else {}) if key.endswith("/perplexity")):
        steps = [line["step"] for line in evaluations]
        right.plot(steps, [line[name] for line in evaluations], "o-", color=f"C{i}", label=name.split("/")[1])
        baseline = evaluations[-1].get(name.replace("/perplexity", "/unigram_perplexity"))
        right.axhline(baseline, color=f"C{i}", linestyle=":", linewidth=1)
    right.set(xlabel="step", yscale="log", title="held-out perplexity (dotted: unigram baseline)")
    right.legend()
    _save(figure, path)


def draw_experts(
    images: Float[Tensor, "B 3 H W"],
    routings: Sequence[PlacedRouting],
    num_vision: int,
    path: Path,
    *,
    captions: Sequence[str] = (),
) -> None:
    """One row per image: the image; per layer the first-choice expert of each sub-token of each patch (a patch is split
    into as many stripes as it has sub-tokens, one colour per expert, grey where capacity dropped the choice); and how many
    different experts the patch reached.
    """
    plt = _pyplot()
    rows, columns = len(images), 1 + len(routings) + 1
    figure, axes = plt.subplots(rows, columns, figsize=(2.3 * columns, 2.5 * rows), layout="constrained", squeeze=False)
    divergence = [distinct_experts(each.patches(num_vision)).float() for each in routings]
    most = max(int(each.max()) for each in divergence)
    for row, image in enumerate(images):
        picture = _to_picture(image)
        axes[row][0].imshow(picture)
        for column, each in enumerate(routings, start=1):
            colours = plt.get_cmap("turbo" if each.num_experts > 20 else "tab20")
            tiles = _stripes(each.patches(num_vision)[row, :, :, 0].cpu().numpy(), picture.shape[0])
            grey = picture.mean(-1, keepdims=True).repeat(3, -1)
            shade = colours(tiles / max(each.num_experts - 1, 1))[..., :3]
            axes[row][column].imshow(np.where(tiles[..., None] < 0, grey, 0.35 * grey + 0.65 * shade))
            if row == 0:
                axes[row][column].set_title(f"{each.name}\n{each.num_experts} experts", fontsize=8)
        mean = sum(divergence[1:], divergence[0])[row] / len(divergence)
        grid = round(len(mean) ** 0.5)
        axes[row][-1].imshow(mean.view(grid, grid).cpu().numpy(), cmap="magma", vmin=1, vmax=most)
        if row == 0:
            axes[row][0].set_title("image", fontsize=8)
            axes[row][-1].set_title("different experts\nper patch (mean)", fontsize=8)
        if captions:
            axes[row][0].set_xlabel(_wrapped(captions[row]), fontsize=6)
    figure.colorbar(axes[0][-1].images[0], ax=list(axes[:, -1]), shrink=0.6)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    _save(figure, path)


def draw_codes(images: Float[Tensor, "B 3 H W"], codes_of: VisualTokenizer, path: Path) -> None:
    """Each image above what its codes alone say of it."""
    plt = _pyplot()
    codes = codes_of.encode(images)
    decoded = codes_of.teacher.image(codes_of.decode(codes)).clamp(-1, 1)
    figure, axes = plt.subplots(2, len(images), figsize=(1.8 * len(images), 4), layout="constrained", squeeze=False)
    for column, (image, again) in enumerate(zip(images, decoded, strict=True)):
        axes[0][column].imshow(_to_picture(image))
        axes[1][column].imshow(_to_picture(again))
        axes[1][column].set_xlabel(f"{len(codes[column].unique())} different codes", fontsize=7)
    axes[0][0].set_ylabel("image")
    axes[1][0].set_ylabel(f"from {codes.shape[1]} codes")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    _save(figure, path)


def draw_texts(images: Float[Tensor, "B 3 H W"], texts: Sequence[str], path: Path) -> None:
    """Each image beside what a model says of it."""
    plt = _pyplot()
    figure, axes = plt.subplots(
        len(images), 2, figsize=(10, 1.7 * len(images)), layout="constrained", width_ratios=(1, 4), squeeze=False
    )
    for (left, right), image, text in zip(axes, images, texts, strict=True):
        left.imshow(_to_picture(image))
        left.axis("off")
        right.text(0, 0.5, _drawable(text, FONT), va="center", fontsize=10, family=FONT, in_layout=False)
        right.axis("off")
    _save(figure, path)


def _stripes(expert_ids: Int[np.ndarray, "P h"], size: int) -> Int[np.ndarray, "size size"]:
    """Expert of each pixel: patches in their grid, each split into h vertical stripes."""
    grid, heads = round(len(expert_ids) ** 0.5), expert_ids.shape[1]
    small = expert_ids.reshape(grid, grid * heads)
    row = np.arange(size) * grid // size
    column = np.arange(size) * grid * heads // size
    return small[row][:, column]


def _to_picture(image: Float[Tensor, "3 H W"]) -> np.ndarray:
    return (image.float().cpu().permute(1, 2, 0).numpy() + 1) / 2


def _smoothed(points: Sequence[tuple[int, float]]) -> tuple[list[int], np.ndarray]:
    steps, values = [step for step, _ in points], np.array([value for _, value in points])
    width = max(1, len(values) // 40)
    padded = np.pad(values, (width // 2, width - 1 - width // 2), mode="edge")
    return steps, np.convolve(padded, np.ones(width) / width, mode="valid")


def _drawable(text: str, family: str, width: int = 84) -> str:
    """In lines of `width`; characters that the font lacks as their numbers."""
    from matplotlib import font_manager

    known = font_manager.get_font(font_manager.findfont(family)).get_charmap()
    text = "".join(c if c == "\n" or ord(c) in known else f"<{ord(c):x}>" for c in text)
    return "\n".join(line for each in text.split("\n") for line in textwrap.wrap(each, width, subsequent_indent="    "))


def _wrapped(text: str, width: int = 34) -> str:
    return "\n".join(textwrap.wrap(text, width)[:3])


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    _pyplot().close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise UserError("pictures need matplotlib: pip install 'vlmoe[pictures]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
