"""The fast way from bytes to pixels, for plain JPEG and WebP; everything else, and all errors, are Pillow's.

Plain is what decodes to the same picture everywhere: 8-bit grey or YCbCr JPEG that lies upright, and WebP of one lossy
frame without metadata. What is plain is read off the header, in a few microseconds. PNG is left to Pillow, which takes
as long as libpng.
"""

import io
from collections.abc import Callable
from functools import cache

import torch
from jaxtyping import UInt8
from PIL import ExifTags, Image
from torch import Tensor

Pixels = UInt8[Tensor, "3 height width"]
Decoders = dict[str, Callable[[bytes], Tensor]]  # by Pillow's name of the format

SOF, SOS, APP1 = (0xC0, 0xC1, 0xC2), 0xDA, 0xE1  # baseline, extended and progressive frames; scan; metadata
OTHER_FRAMES = {0xC3, *range(0xC5, 0xD0)} - {0xCC}  # lossless, hierarchical, arithmetic
EXIF, XMP = b"Exif\0\0", b"http://"
WEBP_NUMBERS = ((4, 4), (16, 4), (26, 2), (28, 2))  # where they lie, and how long they are


def decode_plain(content: bytes, *, max_pixels: int) -> Pixels | None:
    """RGB pixels of a plain picture; None where Pillow must say what it is, or what is wrong with it."""
    if content.startswith(b"\xff\xd8"):
        name, size = "JPEG", _plain_jpeg_size(content)
    elif content.startswith(b"RIFF"):
        name, size = "WEBP", _plain_webp_size(content)
    else:
        return None
    decode = fast_decoders().get(name)
    if decode is None or size is None or not 0 < size[0] * size[1] <= max_pixels:
        return None
    try:
        return decode(content)
    except Exception:  # cut or corrupt
        return None


@cache
def fast_decoders() -> Decoders:
    """The first library here that decodes JPEG and WebP to tensors; an empty dict if none does."""
    for find in (torchvision_decoders, torchcodec_decoders):
        try:
            decoders = find()
            for name, decode in decoders.items():
                file = io.BytesIO()
                Image.new("RGB", (4, 2)).save(file, name)
                if decode(file.getvalue()).shape != (3, 2, 4):
                    raise ValueError(f"{name} decodes to another shape")
        except Exception:  # not installed, built without these formats, or changed since: the next one
            continue
        return decoders
    return {}


def torchvision_decoders() -> Decoders:
    """Its operators. The functions of torchvision.io around them warn from 0.29 on that they will move to torchcodec."""
    import torchvision.io  # noqa: F401 - registers the operators

    jpeg, webp, rgb = torch.ops.image.decode_jpeg, torch.ops.image.decode_webp, 3

    def as_tensor(content: bytes) -> Tensor:
        return torch.frombuffer(bytearray(content), dtype=torch.uint8)

    return {
        "JPEG": lambda content: jpeg(as_tensor(content), rgb, False),
        "WEBP": lambda content: webp(as_tensor(content), rgb),
    }


def torchcodec_decoders() -> Decoders:
    """From torchcodec 0.16 on."""
    from torchcodec.decoders import decode_jpeg, decode_webp  # pyright: ignore[reportMissingImports]

    return {"JPEG": decode_jpeg, "WEBP": decode_webp}


def _plain_jpeg_size(content: bytes) -> tuple[int, int] | None:
    """(height, width), or None. The segments before the first scan: ITU-T T.81, annex B."""
    size, has_exif, position = None, False, 2
    while True:
        head = content[position : position + 4]
        if len(head) < 4 or head[0] != 0xFF:
            return None
        marker, length = head[1], int.from_bytes(head[2:])
        body = content[position + 4 : position + 2 + length]
        if marker == SOS:
            return size
        if marker in SOF and size is None and len(body) >= 6 and body[0] == 8 and body[5] in (1, 3):
            size = int.from_bytes(body[1:3]), int.from_bytes(body[3:5])
        elif marker in SOF or marker in OTHER_FRAMES or marker < 0xC0 or 0xD0 <= marker < SOS or length < 2:
            return None
        elif marker == APP1 and body.startswith(EXIF):
            if has_exif or not _is_upright(body):
                return None
            has_exif = True
        elif marker == APP1 and (b"rientation" in body or not body.startswith(XMP)):
            return None
        position += 2 + length


def _is_upright(exif: bytes) -> bool:
    read = Image.Exif()
    try:
        read.load(exif)
        return read.get(ExifTags.Base.Orientation, 1) == 1
    except Exception:  # Pillow's readers of EXIF have many errors
        return False


def _plain_webp_size(content: bytes) -> tuple[int, int] | None:
    """(height, width), or None. RFC 9649: a RIFF file of one chunk `VP8 `, whose key frame begins with its size."""
    whole, chunk, width, height = (int.from_bytes(content[at : at + n], "little") for at, n in WEBP_NUMBERS)
    is_one = content[8:16] == b"WEBPVP8 " and whole + 8 == len(content) == 20 + chunk + chunk % 2
    return (height & 0x3FFF, width & 0x3FFF) if is_one and content[23:26] == b"\x9d\x01\x2a" else None
