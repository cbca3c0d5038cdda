"""`bench.py loader`: images per second and core, of Pillow, of webdataset's own pipeline, and of ours, on photographs.

One training view each: decode, random resized crop, bicubic, to 224 x 224. A second is one of a processor, worker processes
counted in, and the ways to do a thing take turns, so that a busy machine slows all of them alike.
"""

import io
import resource
import statistics
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from bench_cpu import processor
from bench_table import median_ratio
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from webdataset import TarWriter, WebDataset, WebLoader  # pyright: ignore[reportAttributeAccessIssue]

from vlmoe.config import SourceConfig
from vlmoe.data import Sample, Stream, build_loader, collate, to_float, train_transform
from vlmoe.data.decode import fast_decoders
from vlmoe.data.sample import decode_image, decode_with_pillow, to_pixels
from vlmoe.data.transforms import random_crop

PHOTOGRAPHS = {  # package -> (its module, colour photographs inside its wheel)
    "scikit-image": ("skimage", [f"data/{name}" for name in (
        "astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "motorcycle_right.png", "rocket.jpg",
    )]),
    "scikit-learn": ("sklearn", ["datasets/images/china.jpg", "datasets/images/flower.jpg"]),
}  # fmt: skip
SIZES = ((500, 375), (640, 480))
QUALITY = 90  # of the JPEG files
IMAGE_SIZE = 224
CROP_SCALE = 0.8  # the recipes' default
BATCH_SIZE = 50
Rows = Iterable[dict[str, Any]]


def loader(*, samples: int, repeats: int) -> Rows:
    """Decoding and training views of JPEG photographs, and whole loaders, against Pillow and webdataset."""
    torch.set_num_threads(1)
    photographs = list(read_photographs())
    with tempfile.TemporaryDirectory() as folder:
        for width, height in SIZES:
            shard = Path(folder, f"{width}x{height}.tar")
            write_shard(shard, photographs, (width, height), samples)
            about = {"size": f"{width}x{height}", "kb": round(shard.stat().st_size / samples / 1000, 1)}
            for what, rates in _measure(shard, samples, repeats):
                for row in _rows(rates):
                    yield {**about, "what": what, **row}


def machine() -> dict[str, str]:
    return {
        "hardware": processor(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "pillow": version("pillow"),
        "webdataset": version("webdataset"),
        "decoder": "fast" if fast_decoders() else "pillow",
    }


def read_photographs() -> Iterator[Image.Image]:
    for package, (module, names) in PHOTOGRAPHS.items():
        found = find_spec(module)
        if found is None or not found.submodule_search_locations:
            raise SystemExit(f"the loader is timed on the photographs of {package}: pip install {package}")
        for name in names:
            yield Image.open(Path(found.submodule_search_locations[0], name)).convert("RGB")


def write_shard(path: Path, photographs: list[Image.Image], size: tuple[int, int], samples: int) -> None:
    """Each sample a cut of another place in a photograph, so that no two are alike."""
    rng = np.random.default_rng(0)
    with TarWriter(str(path)) as shard:
        for number in range(samples):
            image = photographs[number % len(photographs)]
            top, left, height, width = random_crop(image.height, image.width, rng, least_area=0.5)
            cut = image.resize(size, Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))
            file = io.BytesIO()
            cut.save(file, "JPEG", quality=QUALITY)
            shard.write({"__key__": f"{number:06}", "jpg": file.getvalue(), "txt": "a photograph"})


def view_with_pillow(content: bytes, rng: np.random.Generator) -> Tensor:
    """The slow twin of `view`: Pillow's decoder and resize, float32 [3, 224, 224] in [-1, 1]."""
    image = decode_with_pillow(content)
    top, left, height, width = random_crop(image.height, image.width, rng, least_area=CROP_SCALE)
    cut = image.crop((left, top, left + width, top + height))
    return to_float(to_pixels(cut.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)))


def view(content: bytes, rng: np.random.Generator) -> Tensor:
    """What a loader process of ours makes: uint8 [3, 224, 224], which becomes float on the device."""
    return train_transform(decode_image(content), rng, image_size=IMAGE_SIZE, crop_scale=CROP_SCALE)


def torchvision_view() -> Callable[[Image.Image], Tensor]:
    """As it is written for webdataset and folders of pictures."""
    return v2.Compose([
        v2.RandomResizedCrop(IMAGE_SIZE, scale=(CROP_SCALE, 1.0), interpolation=v2.InterpolationMode.BICUBIC),
        v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3),
    ])  # fmt: skip


def _measure(shard: Path, samples: int, repeats: int) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """(what, images per second of each way in each repeat); the first way is what the others are compared to."""
    with tarfile.open(shard) as tar:
        contents = [tar.extractfile(each).read() for each in tar if each.name.endswith(".jpg")]  # type: ignore[union-attr]
    rng, with_torchvision = np.random.default_rng(0), torchvision_view()

    def over(function: Callable[[bytes], object]) -> Callable[[], int]:
        return lambda: sum(function(content) is not None for content in contents[: min(200, samples)])

    def batches(function: Callable[[bytes], Tensor]) -> Callable[[], int]:
        def run() -> int:
            for start in range(0, min(200, samples), BATCH_SIZE):
                collate([{"image": function(content)} for content in contents[start : start + BATCH_SIZE]])
            return min(200, samples)

        return run

    decode = {"pillow": over(decode_with_pillow), "ours": over(decode_image)}
    views = {
        "pillow": over(lambda content: view_with_pillow(content, rng)),
        "torchvision": over(lambda content: with_torchvision(decode_with_pillow(content))),
        "ours": over(lambda content: view(content, rng)),
        "ours_to_float": over(lambda content: to_float(view(content, rng))),
    }
    in_batches = {
        "pillow": batches(lambda content: view_with_pillow(content, rng)),
        "ours": batches(lambda content: view(content, rng)),
    }
    yield "decode", _in_turn(decode, repeats)
    yield "view", _in_turn(views, repeats)
    yield "batch", _in_turn(in_batches, repeats)
    for workers in (0, 2):
        ways = {
            "webdataset": lambda w=workers: _webdataset(shard, w),
            "ours": lambda w=workers: _ours(shard, samples, w),
        }
        yield f"loader_{workers}_workers", _in_turn(ways, max(3, repeats // 3))


def _webdataset(shard: Path, workers: int) -> int:
    """Its own pipeline, without shuffling. One shard is one worker's work, so each worker here gets its own."""
    urls = [str(shard)] * max(1, workers)
    dataset = WebDataset(urls, shardshuffle=False, empty_check=False).decode("pil").to_tuple("jpg")
    dataset = dataset.map_tuple(torchvision_view()).batched(BATCH_SIZE)
    return sum(len(images) for (images,) in WebLoader(dataset, batch_size=None, num_workers=workers))


def _ours(shard: Path, samples: int, workers: int) -> int:
    source = SourceConfig(shards=str(shard))
    stream = Stream([source], name="images", batch_size=BATCH_SIZE, seed=0, shuffle_shards=1)
    steps = max(1, workers) * samples // BATCH_SIZE
    loaded = build_loader({"images": stream}, _prepare, seed=0, num_steps=steps, workers=workers)
    return sum(len(batch.inputs["images"]["image"]) for (batch,) in loaded)


def _prepare(sample: Sample, stream: str, rng: np.random.Generator, training: bool) -> dict[str, Tensor]:
    assert sample.image is not None
    return {"image": train_transform(sample.image, rng, image_size=IMAGE_SIZE, crop_scale=CROP_SCALE)}


def _in_turn(ways: dict[str, Callable[[], int]], repeats: int) -> dict[str, list[float]]:
    """Images per second of each way in each repeat, after one repeat that does not count."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            start = _processor_seconds()
            rates[name].append(way() / (_processor_seconds() - start))
    return {name: each[1:] for name, each in rates.items()}


def _processor_seconds() -> float:
    """Of this process and of its workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def _rows(rates: dict[str, list[float]]) -> Rows:
    """The ratio is to the first way."""
    first = next(iter(rates.values()))
    for name, each in rates.items():
        yield {
            "way": name,
            "images_per_s": round(statistics.median(each), 1),
            "ratio": round(median_ratio(each, first), 2),
        }
