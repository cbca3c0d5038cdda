"""Which experts do the patches of these pictures hit? `python tools/show_experts.py RUN --out experts.png [PICTURES...]`

Without pictures: the first held-out pairs of the run's recipe, with the words the model reads and the codes it sees.
"""

import argparse
import sys
from pathlib import Path

import torch

from vlmoe.data import Pixels
from vlmoe.data.sample import BrokenSample, decode_image
from vlmoe.data.transforms import eval_transform, to_float
from vlmoe.errors import UserError
from vlmoe.inspect.pictures import draw_experts
from vlmoe.inspect.reading import draw_samples
from vlmoe.inspect.routing import place_routings
from vlmoe.tasks import load_run
from vlmoe.tasks.pretrain import Pretrain


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a pretraining run")
    parser.add_argument("pictures", type=Path, nargs="*", help="image files; none: held-out pairs of the recipe")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write; without pictures, a folder")
    args = parser.parse_intermixed_args()  # pictures before or after --out
    try:
        if args.pictures and args.out.is_dir():
            raise UserError(f"--out {args.out} is a folder; with pictures, name a PNG file to write")
        if not args.pictures and args.out.is_file():
            raise UserError(f"--out {args.out} is a file; without pictures, name a folder")
        paths = [show(args.run, args.pictures, args.out)] if args.pictures else list(_samples(args.run, args.out))
    except UserError as error:
        print(f"show_experts: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(str, paths)))
    return 0


@torch.no_grad()
def show(run: Path, pictures: list[Path], out: Path) -> Path:
    """Draw the experts of each patch of image files."""
    loaded = load_run(run, torch.device("cpu"), [])
    if not isinstance(loaded.task, Pretrain):
        raise UserError(f"{run} is a run of task {loaded.config.task!r}; name one of task pretrain")
    size = loaded.task.config.model.image_size
    images = to_float(torch.stack([eval_transform(_open(path), image_size=size) for path in pictures]))
    output = loaded.model(images)
    if not output.routings:
        raise UserError(f"{run} has only dense layers: there are no experts to show")
    placed = place_routings(output, len(images))
    draw_experts(images, placed, output.num_vision, out, captions=[path.name for path in pictures])
    return out


def _samples(run: Path, out: Path) -> list[Path]:
    device = torch.device("cpu")
    return list(draw_samples(load_run(run, device, []), out, device=device).values())


def _open(path: Path) -> Pixels:
    try:
        return decode_image(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except BrokenSample as error:
        raise UserError(f"{path}: {error.cause}; give JPEG, PNG, WebP, GIF or BMP files") from None


if __name__ == "__main__":
    sys.exit(main())
