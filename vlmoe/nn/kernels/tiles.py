"""Tiles of slots: where they stand, and how many of them a kernel works on at a time."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from vlmoe.nn.kernels import configs
from vlmoe.nn.kernels import expert_mlp as forward_kernels
from vlmoe.nn.kernels.launch import launch


class Tiles(NamedTuple):
    """Where each tile of slots stands, for at most `len(expert)` tiles: known without asking the device."""

    expert: Tensor
    place: Tensor
    base: Tensor


def new_tiles(ends: Tensor, slots: int, block_m: int) -> Tiles:
    """Of `block_m` slots each, not filled in."""
    E = len(ends)
    return Tiles(*(ends.new_empty(size) for size in (slots // block_m + E, slots // block_m + E, E + 1)))


def find_tiles(ends: Tensor, slots: int, block_m: int) -> Tiles:
    tiles, E = new_tiles(ends, slots, block_m), len(ends)
    experts, count = power_of_two(E), len(tiles.expert)
    block = max(16, 4096 // experts)
    launch(
        forward_kernels.tile_table, (cdiv(count, block),), ends, *tiles, count, E, EXPERTS=experts, BLOCK_M=block_m,
        BLOCK=block,
    )  # fmt: skip
    return tiles


def cut(tiles: Tiles, tile_bytes: int, programs: int, device: torch.device) -> tuple[int, int, int]:
    """Tiles per chunk, tiles per segment, and places for the parts of a chunk. `programs` is those per segment.

    Chunks are whole waves of tiles, and segments as many as fill one wave.
    """
    wave = multiprocessors(device)
    chunk = min(len(tiles.expert), wave * max(1, configs.CHUNK_BYTES // (wave * tile_bytes)))
    segments = max(1, wave // programs)
    E = len(tiles.base) - 1  # a part's place is segment + expert, counted from the chunk's first one, empty ones too
    return chunk, cdiv(chunk, segments), segments + E


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def persistent_programs(steps: int, per_multiprocessor: int, device: torch.device) -> int:
    """Programs that share so many steps of a loop."""
    return max(1, min(steps, per_multiprocessor * multiprocessors(device)))


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's own takes 3 us."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
