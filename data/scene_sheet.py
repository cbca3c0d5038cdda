"""A contact sheet of scenes: the picture with its boxes, captions, a question with its answer, and statement pairs."""

import io
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from scene_make import Sample

PICTURE = 288  # pixels of a picture's side on the sheet
CELL = (PICTURE * 2 + 40, PICTURE + 24)
COLUMNS = 3
MARGIN = 12


def contact_sheet(scenes: Sequence[Sample], pairs: Sequence[Sample]) -> Image.Image:
    """Scenes above, pairs of pictures with what is said of them below."""
    rows = -(-len(scenes) // COLUMNS) + -(-len(pairs) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * CELL[0], rows * CELL[1] + MARGIN), "white")
    for number, sample in enumerate(scenes):
        _draw_scene(sheet, sample, number % COLUMNS * CELL[0] + MARGIN, number // COLUMNS * CELL[1] + MARGIN)
    above = -(-len(scenes) // COLUMNS) * CELL[1]
    for number, sample in enumerate(pairs):
        _draw_pair(sheet, sample, number % COLUMNS * CELL[0] + MARGIN, above + number // COLUMNS * CELL[1] + MARGIN)
    return sheet


def _draw_scene(sheet: Image.Image, sample: Sample, left: int, top: int) -> None:
    record = sample.record
    picture = _enlarged(sample.files["jpg"])
    scale = PICTURE / record["width"]
    pen = ImageDraw.Draw(picture)
    for thing in record["objects"]:
        x, y, width, height = (round(side * scale) for side in thing["box"])
        pen.rectangle((x, y, x + width, y + height), outline="#d6006c")
        pen.text((x + 3, y + 1), thing["name"], fill="#d6006c", font=_font(11), stroke_width=2, stroke_fill="white")
    sheet.paste(picture, (left, top))
    lines = [(record["split"], "#888888")]
    lines += [(caption, "black") for caption in record["captions"][1:4]]
    lines += [(f"{q['question']}  {q['answer']}", "#0a5bbf") for q in record["questions"][:4]]
    lines += [
        (f"[{language}] {text}", "#888888") for language, text in record["captions_other"].items() if text.isascii()
    ]
    _write(sheet, lines, left + PICTURE + MARGIN, top, CELL[0] - PICTURE - 2 * MARGIN)


def _draw_pair(sheet: Image.Image, sample: Sample, left: int, top: int) -> None:
    side = PICTURE - 40
    for number, name in enumerate(("left.jpg", "right.jpg")):
        sheet.paste(_enlarged(sample.files[name]).resize((side, side)), (left + number * (side + 6), top))
    record = sample.record
    lines = [(record["sentence"], "black"), (record["label"], "#0a5bbf")]
    _write(sheet, lines, left, top + side + 4, CELL[0] - 2 * MARGIN)


def _write(sheet: Image.Image, lines: Sequence[tuple[str, str]], left: int, top: int, width: int) -> None:
    pen = ImageDraw.Draw(sheet)
    for text, color in lines:
        for part in textwrap.wrap(text, width // 7):
            pen.text((left, top), part, fill=color, font=_font(14))
            top += 17
        top += 3


def _enlarged(jpeg: bytes) -> Image.Image:
    return Image.open(io.BytesIO(jpeg)).resize((PICTURE, PICTURE), Image.Resampling.BICUBIC)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)
