"""Pictures -> tensors: range, determinism, crops, flips, and agreement with Pillow's resize."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmoe.data.augment import OPERATIONS, rand_augment
from vlmoe.data.sample import to_pixels
from vlmoe.data.transforms import eval_transform, random_crop, to_float, train_transform


@pytest.fixture
def image():
    grey = Image.radial_gradient("L").resize((90, 70))
    return Image.merge("RGB", (grey, grey.rotate(90), Image.linear_gradient("L").resize((90, 70))))


@pytest.fixture
def picture(image):
    return to_pixels(image)


def test_eval_is_a_plain_resize(image):
    pixels = to_float(eval_transform(to_pixels(image), image_size=32))
    assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.float32 and pixels.is_contiguous()
    theirs = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC), dtype=np.float32)
    assert np.abs((pixels.permute(1, 2, 0).numpy() + 1) * 127.5 - theirs).max() <= 2
    white_black = Image.new("RGB", (5, 5), "white"), Image.new("RGB", (5, 5))
    views = [to_float(eval_transform(to_pixels(each), image_size=4)) for each in white_black]
    assert [view.unique().tolist() for view in views] == [[1.0], [-1.0]]


def test_train_without_augmentation_is_eval(picture):
    plain = train_transform(picture, np.random.default_rng(0), image_size=32, crop_scale=1.0)
    assert torch.equal(plain, eval_transform(picture, image_size=32))


def test_train_depends_on_its_generator_alone(picture):
    options = {"image_size": 32, "crop_scale": 0.3, "flip": True, "color_jitter": 0.4, "rand_augment": 2}
    state = torch.get_rng_state()
    views = [train_transform(picture, np.random.default_rng(seed), **options) for seed in (0, 0, 1)]
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])
    assert all(view.shape == (3, 32, 32) and view.dtype == torch.uint8 for view in views)
    assert all(to_float(view).abs().max() <= 1 for view in views)
    assert torch.equal(torch.get_rng_state(), state)


def test_flip_is_off_unless_asked_for_and_even(picture):
    rng = np.random.default_rng(0)
    plain = eval_transform(picture, image_size=8)
    views = [train_transform(picture, rng, image_size=8, crop_scale=1.0, flip=True) for _ in range(200)]
    flipped = sum(torch.equal(view, plain.flip(-1)) for view in views)
    assert 70 < flipped < 130 and flipped + sum(torch.equal(view, plain) for view in views) == 200


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_keeps_size_type_and_most_of_the_picture(picture, name):
    changed = [OPERATIONS[name](picture, sign) for sign in (-1, 1)]
    for each in changed:
        assert each.shape == picture.shape and each.dtype == torch.uint8
        assert torch.equal(each, picture) == (name == "identity")
        # grey comes into view where the picture is moved; nothing turns black
        assert (each.float() - picture.float()).abs().mean() < 70
    assert torch.equal(*changed) == (name not in ("shear_x", "shear_y", "shift_x", "shift_y", "rotate"))


def test_operations_are_drawn_evenly_and_carried_out_half_the_time(monkeypatch):
    drawn = []
    for name in OPERATIONS:
        monkeypatch.setitem(OPERATIONS, name, lambda pixels, sign, name=name: drawn.append((name, sign)) or pixels)
    rng = np.random.default_rng(0)
    for _ in range(2000):
        rand_augment(torch.zeros(3, 4, 4, dtype=torch.uint8), rng, operations=2)
    assert 1900 < len(drawn) < 2100
    counts = Counter(drawn)
    assert len(counts) == 2 * len(OPERATIONS) and min(counts.values()) > 70


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.floats(0.05, 0.99), st.integers(0, 2**32))
def test_crops_lie_inside_the_picture(height, width, least_area, seed):
    top, left, crop_height, crop_width = random_crop(height, width, np.random.default_rng(seed), least_area=least_area)
    assert top >= 0 and top + crop_height <= height and crop_height > 0
    assert left >= 0 and left + crop_width <= width and crop_width > 0
    if min(height, width) > 60 and max(height, width) < 1.2 * min(height, width):
        assert crop_height * crop_width >= 0.98 * least_area * height * width
        assert 0.73 < crop_width / crop_height < 1.37
