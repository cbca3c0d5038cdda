"""The fast decoders against Pillow: the same picture from plain files, and nothing at all from the others."""

import io
import sys
from importlib.util import find_spec
from pathlib import Path

import bench_loader
import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmoe.data import decode
from vlmoe.data.decode import decode_plain, fast_decoders, torchcodec_decoders, torchvision_decoders
from vlmoe.data.sample import MAX_PIXELS, BrokenSample, decode_image, decode_with_pillow, to_pixels
from vlmoe.data.transforms import eval_transform, random_crop, to_float, train_transform

PHOTOGRAPH = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
FAR = 2  # levels that builds of libjpeg and libwebp may differ by; those of torchvision, torchcodec and Pillow: 0
ORIENTATION = 0x0112


LIBRARIES = {"torchvision": torchvision_decoders, "torchcodec": torchcodec_decoders}


@pytest.fixture(params=[name for name in LIBRARIES if find_spec(name)])
def library(request, monkeypatch):
    """Each of the libraries that decode for us and are here, in turn."""
    decoders = LIBRARIES[request.param]()
    monkeypatch.setattr(decode, "fast_decoders", lambda: decoders)


def plain(content):
    return decode_plain(content, max_pixels=MAX_PIXELS)


def slow(content):
    return to_pixels(decode_with_pillow(content))


def levels_apart(one, other):
    """(mean, maximum)"""
    apart = (one.int() - other.int()).abs()
    return float(apart.float().mean()), int(apart.max())


def exif(orientation):
    tags = Image.Exif()
    tags[0x010F], tags[ORIENTATION] = "a camera", orientation
    return tags


def encoded(format="JPEG", mode="RGB", **options):
    """A cut of the photograph, 61 x 43 pixels."""
    file = io.BytesIO()
    Image.open(PHOTOGRAPH).crop((200, 60, 500, 270)).resize((61, 43)).convert(mode).save(file, format, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "options",
    [
        {"quality": 95, "subsampling": 0},
        {"subsampling": 1},
        {"progressive": True, "optimize": True},
        {"restart_marker_blocks": 2, "comment": b"a comment", "dpi": (72, 72)},
        {"icc_profile": b"any" * 200},
        {"keep_rgb": True},
        {"mode": "L"},
        {"exif": exif(1)},
        {"xmp": b"<x:xmpmeta><rdf:li>a cat</rdf:li></x:xmpmeta>"},
        {"format": "WEBP"},
    ],
    ids=str,
)
def test_plain_pictures_are_pillows(library, options):
    content = encoded(**options)
    pixels = plain(content)
    assert pixels is not None and pixels.dtype == torch.uint8 and pixels.shape == (3, 43, 61)
    assert levels_apart(pixels, slow(content))[1] <= FAR


def test_a_photograph_is_pillows(library):
    content = PHOTOGRAPH.read_bytes()
    pixels = plain(content)
    assert pixels is not None
    assert levels_apart(pixels, slow(content))[1] <= FAR


@pytest.mark.parametrize(
    "options",
    [
        {"exif": exif(6)},
        {"xmp": b'<x:xmpmeta><rdf:li tiff:Orientation="6"/></x:xmpmeta>'},
        {"mode": "CMYK"},
        {"format": "WEBP", "lossless": True},
        {"format": "WEBP", "exif": exif(3)},
        {"format": "PNG"},
        {"format": "GIF"},
        {"format": "BMP"},
    ],
    ids=str,
)
def test_the_others_are_left_to_pillow(library, options):
    content = encoded(**options)
    assert plain(content) is None
    assert torch.equal(decode_image(content), slow(content))


def test_exif_that_is_odd_is_left_to_pillow(library):
    content = encoded(exif=exif(1))
    start = content.index(b"\xff\xe1")
    segment = content[start : start + 2 + int.from_bytes(content[start + 2 : start + 4])]
    twice = content.replace(segment, 2 * segment)
    assert plain(content) is not None and plain(twice) is None
    assert plain(content.replace(b"Exif\0\0MM", b"Exif\0\0QQ")) is None
    assert plain(content.replace(b"Exif\0\0MM", b"Eqif\0\0MM")) is None


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"format": "WEBP"}], ids=str)
def test_cut_pictures_are_never_half_grey(library, options):
    content = encoded(**options)
    for length in range(len(content)):
        if (pixels := plain(content[:length])) is not None:  # cut in the last bytes, behind all pixels
            assert torch.equal(pixels, slow(content[:length]))
    with pytest.raises(BrokenSample) as caught:
        decode_image(content[: len(content) // 2])
    assert caught.value.cause == ("undecodable image" if options.get("format") == "WEBP" else "truncated image")


@settings(max_examples=50)
@given(st.sampled_from(["JPEG", "WEBP"]), st.data())
def test_damaged_pictures_are_what_they_are_to_pillow(format, data):
    content = encoded(format)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content = content[:at] + bytes([data.draw(st.integers(0, 255))]) + content[at + 1 :]
    if (pixels := plain(content)) is not None:
        assert levels_apart(pixels, slow(content))[1] <= FAR


def test_a_bomb_is_not_decoded():
    for content in (encoded(), encoded(format="WEBP")):
        assert decode_plain(content, max_pixels=61 * 43) is not None
        assert decode_plain(content, max_pixels=61 * 43 - 1) is None
    content = bytearray(encoded())
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"  # height and width
    with pytest.raises(BrokenSample, match="image too large"):
        decode_image(bytes(content))


def test_without_a_fast_library_pillow_decodes(monkeypatch):
    monkeypatch.setattr(torch.ops.image, "decode_jpeg", None, raising=False)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    fast_decoders.cache_clear()
    try:
        assert fast_decoders() == {} and plain(encoded()) is None
        assert torch.equal(decode_image(encoded()), slow(encoded()))
    finally:
        fast_decoders.cache_clear()


def test_decoding_warns_of_nothing(recwarn):
    fast_decoders.cache_clear()
    assert plain(encoded()) is not None and not recwarn.list


@pytest.mark.parametrize("size", [64, 224, 384])
def test_the_whole_transform_is_pillows(size):
    """To a rounding: each of the two passes of a resize rounds to 8 bits, in one order here and in the other there."""
    content = PHOTOGRAPH.read_bytes()
    image, pixels = decode_with_pillow(content), decode_image(content)
    whole = to_pixels(image.resize((size, size), Image.Resampling.BICUBIC))
    mean, most = levels_apart(eval_transform(pixels, image_size=size), whole)
    assert mean < 0.01 and most <= 2  # measured: 0.004 and 1
    for seed in range(20):
        view = train_transform(pixels, np.random.default_rng(seed), image_size=size, crop_scale=0.3)
        box = random_crop(image.height, image.width, np.random.default_rng(seed), least_area=0.3)
        top, left, height, width = box
        cut = image.crop((left, top, left + width, top + height))
        mean, most = levels_apart(view, to_pixels(cut.resize((size, size), Image.Resampling.BICUBIC)))
        assert mean < 0.25 and most <= 12, box  # measured: 0.21 and 9


def test_the_bench_times_the_same_views():
    content = PHOTOGRAPH.read_bytes()
    for seed in range(3):
        ours = to_float(bench_loader.view(content, np.random.default_rng(seed)))
        pillows = bench_loader.view_with_pillow(content, np.random.default_rng(seed))
        assert ours.shape == pillows.shape == (3, 224, 224)
        assert (ours - pillows).abs().mean() < 0.25 / 127.5
