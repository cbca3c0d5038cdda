"""Laws of the masks: exact counts, special tokens, determinism, blocks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmoe.data.masking import block_mask, text_mask


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.floats(0, 1), st.integers(0, 2**32))
def test_block_mask_is_exact_and_deterministic(rows, columns, share, seed):
    num_masked = round(share * rows * columns)
    mask = block_mask((rows, columns), num_masked, np.random.default_rng(seed))
    assert mask.shape == (rows * columns,) and mask.dtype == bool and mask.sum() == num_masked
    assert np.array_equal(mask, block_mask((rows, columns), num_masked, np.random.default_rng(seed)))


@settings(max_examples=150, deadline=None)
@given(st.integers(3, 80), st.floats(0, 1), st.integers(0, 2**32))
def test_text_mask_is_exact_and_spares_the_ends(length, ratio, seed):
    mask = text_mask(length, ratio, np.random.default_rng(seed))
    assert mask.shape == (length,) and not mask[0] and not mask[-1]
    assert mask.sum() == max(1, round(ratio * (length - 2)))
    assert np.array_equal(mask, text_mask(length, ratio, np.random.default_rng(seed)))


@pytest.mark.parametrize("grid", [4, 8, 14])
def test_every_patch_is_masked_at_times_and_masks_are_blocks(grid):
    rng = np.random.default_rng(0)
    masks = np.stack([block_mask(grid, round(0.4 * grid * grid), rng) for _ in range(400)]).reshape(-1, grid, grid)
    share = masks.mean(0)
    assert share.min() > 0.01 and share.max() < 0.85
    same = (masks[:, 1:] == masks[:, :-1]).mean()
    assert same > 0.52 + 0.1, "two neighbours are alike more often than the 52 % of independent patches"


def test_every_token_is_masked_at_times():
    rng = np.random.default_rng(0)
    share = np.mean([text_mask(12, 0.15, rng) for _ in range(500)], axis=0)
    assert (share[1:-1] > 0.1).all() and share[[0, -1]].max() == 0


def test_impossible_masks_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="between 0 and 16"):
        block_mask(4, 17, rng)
    with pytest.raises(ValueError, match="needs a token"):
        text_mask(2, 0.15, rng)
