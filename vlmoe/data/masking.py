"""Which patches and which tokens a pretraining sample hides. NumPy only; True = hidden from the model.

Axes: patches (rows of the grid one after another), length (token positions, <s> and </s> included).
"""

import math

import numpy as np
from jaxtyping import Bool

LEAST_ASPECT = 0.3  # height / width of a block lies between this and its inverse
BLOCK_TRIES = 10
LEAST_BLOCK = 16, 14 * 14  # patches of the smallest block, on a grid of so many patches


def block_mask(grid: int | tuple[int, int], num_masked: int, rng: np.random.Generator) -> Bool[np.ndarray, " patches"]:
    """Block-wise mask of BEiT (Bao et al. 2022, arXiv:2106.08254, algorithm 1) with exactly `num_masked` patches.

    Rectangles are added until none fits into what is left to hide (ten tries), then single patches make up the count.
    A rectangle has at least 16 patches; on grids smaller than 14 x 14 as large a share of the grid as 16 is there.

    Args:
        grid: patches per side, or (rows, columns).
        num_masked: patches to hide, 0 to all of them.
        rng: the sample's own.

    Raises:
        ValueError: more patches to hide than there are.
    """
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    if not 0 <= num_masked <= rows * columns:
        raise ValueError(f"num_masked must lie between 0 and {rows * columns}, got {num_masked}")
    least, reference = LEAST_BLOCK
    least_block = max(1, min(least, round(least * rows * columns / reference)))
    mask = np.zeros((rows, columns), dtype=bool)
    while (missing := num_masked - int(mask.sum())) > 0 and _add_block(mask, min(least_block, missing), missing, rng):
        pass
    flat = mask.ravel()
    flat[rng.permutation(np.flatnonzero(~flat))[:missing]] = True
    return flat


def text_mask(length: int, ratio: float, rng: np.random.Generator) -> Bool[np.ndarray, " length"]:
    """Hide max(1, round(ratio * tokens)) of the tokens between <s> and </s>, which themselves are never hidden.

    Args:
        length: positions of the text with <s> and </s>: tokens = length - 2.
        ratio: share of the tokens to hide.
        rng: the sample's own.

    Raises:
        ValueError: there is no token between <s> and </s>.
    """
    tokens = length - 2
    if tokens < 1:
        raise ValueError(f"a text needs a token between <s> and </s>, got {length} positions")
    mask = np.zeros(length, dtype=bool)
    mask[1 + rng.permutation(tokens)[: max(1, round(ratio * tokens))]] = True
    return mask


def _add_block(mask: Bool[np.ndarray, "rows columns"], least: int, most: int, rng: np.random.Generator) -> bool:
    """Hide one more rectangle in place, with at most `most` patches not hidden yet; False when ten tries fail."""
    rows, columns = mask.shape
    for _ in range(BLOCK_TRIES):
        area = rng.uniform(least, most)
        aspect = math.exp(rng.uniform(math.log(LEAST_ASPECT), -math.log(LEAST_ASPECT)))
        height, width = max(1, round(math.sqrt(area * aspect))), max(1, round(math.sqrt(area / aspect)))
        if height > rows or width > columns:
            continue
        top, left = rng.integers(rows - height + 1), rng.integers(columns - width + 1)
        block = mask[top : top + height, left : left + width]
        if 0 < np.count_nonzero(~block) <= most:
            block[...] = True
            return True
    return False
