"""Find pictures of a folder by a text, with a saved index: only new and changed pictures are embedded again."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image
from tqdm import tqdm

from vlmoe.data.sample import FILE_EXTENSIONS
from vlmoe.errors import UserError
from vlmoe.train.checkpoint import clear_disk_errors
from vlmoe.use import Model, open_picture

Stamp = tuple[int, int]  # size in bytes and time of the last change, of a file
THUMBNAIL = 96  # pixels


@dataclass(frozen=True)
class ImageIndex:
    folder: Path
    names: list[str]  # relative to the folder
    embeddings: Float[Tensor, "pictures dim"]
    unreadable: list[str]  # one line for each file that is no picture

    def search(self, query: Float[Tensor, " dim"], top_k: int) -> list[tuple[Path, float]]:
        """The pictures of the highest cosines, best first."""
        top = (self.embeddings @ query).topk(min(top_k, len(self.names)))
        return [
            (self.folder / self.names[i], score)
            for i, score in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]


def index_folder(model: Model, folder: Path) -> ImageIndex:
    """Embeddings of all pictures below a folder. They are kept in `search/` of the run.

    Raises:
        UserError: there is no such folder, or no picture in it; or the index cannot be written.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; name one with pictures in it")
    found = {str(path.relative_to(folder)): _stamp(path) for path in sorted(folder.rglob("*")) if _is_picture(path)}
    path = index_path(model, folder)
    known = _read(path, _stamp(model.checkpoint / "model.safetensors"))
    kept = {name: known[name][1] for name, stamp in found.items() if name in known and known[name][0] == stamp}
    new, unreadable = [name for name in found if name not in kept], []
    for start in tqdm(range(0, len(new), model.batch_size), desc="embedding pictures", delay=2):
        pictures: dict[str, Tensor] = {}
        for name in new[start : start + model.batch_size]:
            try:
                pictures[name] = open_picture(folder / name)
            except UserError as error:
                unreadable.append(str(error))
        if pictures:
            kept |= zip(pictures, model.embed_image(list(pictures.values())), strict=True)
    if not kept:
        raise UserError(f"{folder} holds no picture ({', '.join(FILE_EXTENSIONS)})")
    names = sorted(kept)
    embeddings = torch.stack([kept[name] for name in names])
    if new or len(known) > len(names):
        files = json.dumps([[name, *found[name]] for name in names])
        stamp = json.dumps(_stamp(model.checkpoint / "model.safetensors"))
        with clear_disk_errors(path):
            path.parent.mkdir(exist_ok=True)
            partial = path.with_suffix(".partial")
            save_file(
                {"embeddings": embeddings}, partial, {"files": files, "model": stamp, "folder": json.dumps(str(folder))}
            )
            partial.replace(path)
    return ImageIndex(folder, names, embeddings, unreadable)


def index_path(model: Model, folder: Path) -> Path:
    name = hashlib.sha256(str(folder.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return model.run / "search" / f"{name}.safetensors"


def contact_sheet(paths: Sequence[Path], columns: int = 5) -> Image.Image:
    """The pictures as thumbnails, row by row."""
    rows = -(-len(paths) // columns)
    sheet = Image.new("RGB", (min(columns, len(paths)) * THUMBNAIL, rows * THUMBNAIL), "white")
    for number, path in enumerate(paths):
        picture = to_pil_image(open_picture(path))
        picture.thumbnail((THUMBNAIL - 4, THUMBNAIL - 4))
        row, column = divmod(number, columns)
        sheet.paste(
            picture,
            (
                column * THUMBNAIL + (THUMBNAIL - picture.width) // 2,
                row * THUMBNAIL + (THUMBNAIL - picture.height) // 2,
            ),
        )
    return sheet


def as_text(picture: Image.Image, width: int) -> str:
    """A picture for a terminal with 24-bit colours: a character holds two pixels, one above the other."""
    rows = max(1, round(picture.height * width / picture.width / 2))
    pixels = np.asarray(picture.convert("RGB").resize((width, 2 * rows))).reshape(rows, 2, width, 3)
    lines = []
    for upper, lower in pixels.tolist():
        pairs = zip(upper, lower, strict=True)
        cells = [f"\033[38;2;{r};{g};{b}m\033[48;2;{x};{y};{z}m▀" for (r, g, b), (x, y, z) in pairs]
        lines.append("".join(cells) + "\033[0m")
    return "\n".join(lines)


def _is_picture(path: Path) -> bool:
    return path.suffix.lower().removeprefix(".") in FILE_EXTENSIONS and path.is_file()


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _read(path: Path, model: Stamp) -> dict[str, tuple[Stamp, Tensor]]:
    """Name -> stamp and embedding, of a saved index of the same weights; {} where there is none."""
    try:
        with safe_open(path, "pt") as file:
            metadata, embeddings = file.metadata(), file.get_tensor("embeddings")
            if tuple(json.loads(metadata["model"])) != model:
                return {}
            files = json.loads(metadata["files"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return {}  # it is made again
    return {name: ((size, changed), row) for (name, size, changed), row in zip(files, embeddings, strict=True)}
