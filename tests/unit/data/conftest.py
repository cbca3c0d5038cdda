"""Shards made in the test's own folder."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import webdataset
from PIL import Image

Parts = Mapping[str, Any]  # extension -> bytes, text or object


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The index cache of a test is its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def encode_image() -> Callable[..., bytes]:
    def encode(image: Image.Image | None = None, *, format: str = "JPEG", **options: Any) -> bytes:
        file = io.BytesIO()
        (image or Image.radial_gradient("L").resize((24, 16)).convert("RGB")).save(file, format, **options)
        return file.getvalue()

    return encode


@pytest.fixture
def write_shard(tmp_path: Path) -> Callable[[str, Sequence[Parts]], str]:
    """write_shard("a.tar", [{"jpg": bytes, "json": {...}}, ...]) -> its path; keys are 0000, 0001, ..."""

    def write(name: str, samples: Sequence[Parts]) -> str:
        path = tmp_path / name
        with webdataset.TarWriter(str(path)) as writer:
            for number, parts in enumerate(samples):
                encoded = {
                    ext: json.dumps(each).encode() if isinstance(each, dict) else each for ext, each in parts.items()
                }
                writer.write({"__key__": f"{number:04d}", **encoded})
        return str(path)

    return write


@pytest.fixture
def write_texts(write_shard: Callable[[str, Sequence[Parts]], str]) -> Callable[[str, Sequence[int]], str]:
    """write_texts("s-{}.tar", [3, 2]): one shard per length, texts 'shard.sample'; the pattern with a wildcard."""

    def write(name: str, lengths: Sequence[int]) -> str:
        paths = [
            write_shard(name.format(shard), [{"txt": f"{shard}.{sample}"} for sample in range(length)])
            for shard, length in enumerate(lengths)
        ]
        return paths[0].replace(name.format(0), name.format("*"))

    return write
