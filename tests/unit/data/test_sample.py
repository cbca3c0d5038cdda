"""Bytes -> sample, every way a sample can be broken, and the counter of broken ones."""

import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from vlmoe.data.sample import MAX_PIXELS, BadSample, BadSampleCounter, BrokenSample, decode_image, decode_sample
from vlmoe.errors import UserError


def _decode(members, needs=("image", "text")):
    return decode_sample(members, key="k", source="a.tar", needs=needs)


def _cause(members, needs=("image", "text")):
    with pytest.raises(BrokenSample) as caught:
        _decode(members, needs)
    return caught.value.cause


def _decoded(content):
    """As an array [height, width, 3]."""
    return decode_image(content).permute(1, 2, 0).numpy()


def _bomb(side):
    """A PNG of a few bytes that claims side x side pixels."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


def test_whole_samples(encode_image):
    image = encode_image()
    pair = _decode(
        {"jpg": image, "txt": b" a cat\n", "json": b'{"captions": ["a cat", " ", "eine Katze"], "licence": "MIT"}'}
    )
    assert pair.texts == ["a cat", "eine Katze"] and pair.meta["licence"] == "MIT"
    assert pair.image is not None and (pair.image.dtype, pair.image.shape) == (torch.uint8, (3, 16, 24))
    assert (pair.key, pair.source) == ("k", "a.tar")
    text = _decode({"jpg": b"ignored", "txt": b"\xef\xbb\xbfa"}, needs=("text",))
    assert text.image is None and text.texts == ["a"] and text.meta == {}
    assert _decode({"webp": encode_image(format="WEBP"), "txt": b"\xff"}, needs=("image",)).texts == []


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_truncated_image(encode_image, format):
    content = encode_image(Image.effect_noise((64, 64), 90).convert("RGB"), format=format)
    for share in (0.5, 0.9):
        assert _cause({"jpg": content[: int(len(content) * share)]}, ["image"]) in (
            "truncated image",
            "undecodable image",
        )
    if format == "JPEG":
        assert _cause({"jpg": content[: len(content) // 2]}, ["image"]) == "truncated image"


def test_causes(encode_image, recwarn):
    image = encode_image()
    assert _cause({"png": _bomb(int(MAX_PIXELS**0.5) + 1)}, ["image"]) == "image too large"
    assert _cause({"png": _bomb(60_000)}, ["image"]) == "image too large"
    assert _cause({"jpg": b""}, ["image"]) == "undecodable image"
    assert _cause({"jpg": b"%PDF-1.4 not a picture"}, ["image"]) == "undecodable image"
    assert _cause({"txt": b"a cat"}) == "no image"
    assert _cause({"jpg": image}) == "no text"
    assert _cause({"jpg": image, "json": b'{"licence": "MIT"}'}) == "no text"
    for blank in ({"txt": b" \n"}, {"json": b'{"captions": []}'}, {"json": b'{"captions": [" "]}'}):
        assert _cause({"jpg": image, **blank}) == "empty text"
    for text in ({"txt": b"caf\xe9"}, {"json": rb'{"captions": ["\ud800"]}'}):
        assert _cause({"jpg": image, **text}) == "bad text encoding"
    for broken in (
        b"{",
        b"\xff\xfe\xff",
        b"[1]",
        b"null",
        b'{"captions": "a cat"}',
        b'{"captions": [1]}',
        b"[" * 100_000,
    ):
        assert _cause({"jpg": image, "json": broken}, ["image"]) == "bad json"


def test_every_kind_of_picture_becomes_rgb(encode_image):
    red = Image.new("RGB", (8, 8), (200, 30, 30))
    for mode in ("L", "1", "P", "CMYK", "YCbCr"):
        decoded = _decoded(encode_image(red.convert(mode), format="JPEG" if mode in ("CMYK", "YCbCr") else "PNG"))
        expected = np.asarray(red.convert(mode).convert("RGB"), dtype=int)
        assert np.abs(np.asarray(decoded, dtype=int) - expected).max() <= 8, mode
    deep = Image.fromarray(np.full((4, 4), 0x80FF, dtype=np.uint16))
    assert _decoded(encode_image(deep, format="PNG")).tolist() == np.full((4, 4, 3), 0x80).tolist()
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert _decoded(encode_image(half, format="PNG")).flat[0] == 127
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30] * 256)
    assert _decoded(encode_image(palette, format="GIF", transparency=0)).min() == 255
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    moving = encode_image(frames[0], format="WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert _decoded(moving)[0, 0].tolist() == [255, 0, 0]


def test_exif_orientation_is_applied(encode_image):
    upright = Image.new("RGB", (16, 8), "white")
    upright.paste("black", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned to the left; shown after a turn to the right
    decoded = _decoded(encode_image(upright.transpose(Image.Transpose.ROTATE_90), exif=exif, quality=95))
    assert np.abs(np.asarray(decoded, dtype=int) - np.asarray(upright)).max() < 16


def test_counter_stops_a_run_and_survives_a_checkpoint():
    counter = BadSampleCounter(max_bad_fraction=0.05)
    counter.add([BadSample("pairs", "bad json", "a.tar", "7")], seen=10)  # 10 %, but of few
    counter.add([], seen=80)
    resumed = BadSampleCounter(max_bad_fraction=0.05)
    resumed.load_state_dict(json.loads(json.dumps(counter.state_dict())))
    assert resumed == counter and resumed.bad == 1
    more = [BadSample("images", "no image", "b.tar", str(n)) for n in range(5)]
    with pytest.raises(
        UserError, match=r"6 of 100 samples are broken.*no image 5, bad json 1.*a\.tar key 7 \(bad json\)"
    ):
        resumed.add(more, seen=10)
    with pytest.raises(UserError, match="1 of 1"):
        BadSampleCounter(max_bad_fraction=0.5).add(more[:1], seen=1)
