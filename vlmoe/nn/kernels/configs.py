"""Block sizes of the kernels, chosen by measurement (docs/benchmarks/kernel-log.md); nothing is tuned at run time."""

from typing import NamedTuple


class Tile(NamedTuple):
    block_n: int  # hidden columns per step
    warps: int
    stages: int  # depth of the load pipeline


class WeightTile(NamedTuple):
    block_f: int  # hidden rows of a weight gradient
    block_k: int  # slots per step
    warps: int
    stages: int


class HopperTile(NamedTuple):
    block_n: int  # hidden columns per step
    in_slots: int  # blocks of w_in in shared memory
    out_slots: int  # of w_out


class HopperWeightTile(NamedTuple):
    block_f: int  # hidden rows of a weight gradient
    block_k: int  # slots per step
    stages: int  # steps' rows in shared memory
    producer_registers: int


class GateTile(NamedTuple):
    block: int  # rows per step
    warps: int
    stages: int  # depth of the load pipeline
    programs: int  # per multiprocessor


class Split(NamedTuple):
    """A width as the sum of two powers of two, padded where it is none."""

    first: int
    second: int  # 0: none


CHUNK_BYTES = 160 << 20  # buffer of the backward pass; a chunk is at least one tile per multiprocessor


def split_width(dim: int) -> Split:
    """192 -> 128 + 64, 96 -> 64 + 32, 112 -> 64 + 64 (padded)."""
    first = 1 << (dim.bit_length() - 1)
    rest = dim - first
    return Split(first, max(16, 1 << (rest - 1).bit_length()) if rest else 0)


def widths(dim: int) -> dict[str, int]:
    """A width as the kernels' parameters."""
    first, second = split_width(dim)
    return {"DIM": dim, "D1": first, "D2": second}


def tile_slots(dim: int) -> int:
    """Slots of a tile, forward and backward; the kernels for Hopper take 128."""
    return 128 if dim <= 256 else 64


def forward_tile(dim: int, gated: bool) -> Tile:
    if dim > 256:
        return Tile(32, 4, 2)
    if gated and dim > 128:
        return Tile(32, 8, 3)
    if dim <= 128 and not gated:
        return Tile(64, 4, 2)
    return Tile(64, 8, 3 if dim <= 192 and not gated else 2)


def row_gradients_tile(dim: int, gated: bool) -> Tile:
    if dim > 256:
        return Tile(32, 4, 1)
    if gated and dim > 128:
        return Tile(32 if dim <= 192 else 16, 8, 2)
    if dim <= 128:
        return Tile(32 if gated else 64, 8, 3)
    return Tile(32, 8, 3 if dim <= 192 else 2)


def weight_gradients_tile(dim: int) -> WeightTile:
    if dim > 256:
        return WeightTile(64, 64, 4, 2)
    if dim <= 128:
        return WeightTile(128, 64, 4, 3)
    return WeightTile(128, 64, 8, 4) if dim <= 192 else WeightTile(128, 32, 8, 6)


def hopper_row_gradients_tile(dim: int, hidden: int) -> HopperTile | None:
    """For the kernel of `hopper`; None: it does not run these widths."""
    tiles = {128: HopperTile(64, 4, 4), 192: HopperTile(64, 3, 2), 256: HopperTile(64, 2, 1)}
    return None if hidden % 64 else tiles.get(dim)


def hopper_weight_gradients_tile(dim: int) -> HopperWeightTile:
    """For the kernel of `hopper_weights`, which runs where that of `hopper` does."""
    return {
        128: HopperWeightTile(64, 64, 4, 40),
        192: HopperWeightTile(64, 64, 3, 56),
        256: HopperWeightTile(64, 32, 4, 56),
    }[dim]


def segments(blocks: int, multiprocessors: int) -> int:
    """Into how many a weight gradient's slots are cut for `blocks` programs each: what fills one to three waves best."""

    def filled(waves: int) -> float:
        return waves * multiprocessors // blocks * blocks / (waves * multiprocessors)

    return max(1, max(1, 2, 3, key=filled) * multiprocessors // blocks)


def hopper_forward_tile(dim: int, hidden: int) -> HopperTile | None:
    """For the kernel of `hopper_forward`; at 128 columns it is no faster (1.18 against 1.10 ms of 786,432 slots)."""
    tile = {192: HopperTile(128, 2, 1), 256: HopperTile(64, 3, 2)}.get(dim)
    return None if tile is None or hidden % tile.block_n else tile


def gate_top_k_tile(dim: int) -> GateTile:
    if dim <= 128:
        return GateTile(64, 4, 3, 2)
    return GateTile(128, 8, 3, 1) if dim <= 192 else GateTile(64, 4, 3, 1)


def gate_gradients_tile(dim: int) -> GateTile:
    return GateTile(32, 4, 3 if dim <= 192 else 2, 2)
