# type: ignore  # kernels are Gluon's language, which checkers read as Python
"""The experts' row gradients for Hopper: one warp streams weights, two warpgroups multiply.

Those of `expert_mlp_backward.row_gradients`, for ungated experts whose widths fill the blocks, without what it leaves for
weight gradients: `hopper_weights` makes that again. A tile of 128 slots is two halves of 64, one per warpgroup, which meet
nowhere. Triton itself puts a barrier of a half's four warps before its arrivals (triton-lang/triton#10035). Axes as there;
D1 + D2 = dim.
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from vlmoe.nn.kernels.activations import activate_with_slope
from vlmoe.nn.kernels.configs import HopperTile, split_width
from vlmoe.nn.kernels.launch import launch_by_name

barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # its name in Triton 3.6, and in 3.8
HALF_ROWS = gl.constexpr(64)  # rows of a warpgroup's product
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@gluon.jit
def stream_weights(
    tiles, matrices, rings, full, empty, HIDDEN: gl.constexpr, DIM: gl.constexpr, D1: gl.constexpr,
    D2: gl.constexpr, BLOCK_N: gl.constexpr, IN_SLOTS: gl.constexpr, OUT_SLOTS: gl.constexpr,
):  # fmt: skip
    """Fills the rings with w_in [BLOCK_N, dim] and w_out [dim, BLOCK_N], block after block of the hidden columns."""
    tile_expert, num_tiles = tiles[0], tiles[3]
    in_desc1, in_desc2, out_desc1, out_desc2 = matrices
    in1, in2, out1, out2 = rings
    in_full, out_full = full
    in_empty, out_empty = empty
    BYTES: gl.constexpr = BLOCK_N * DIM * 2
    step = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        expert = gl.load(tile_expert + tile)
        for n in range(0, HIDDEN, BLOCK_N):
            slot = step % IN_SLOTS
            ready = in_full.index(slot)
            mbarrier.wait(in_empty.index(slot), ((step // IN_SLOTS) & 1) ^ 1)
            mbarrier.expect(ready, BYTES)
            tma.async_copy_global_to_shared(in_desc1, [expert * HIDDEN + n, 0], ready, in1.index(slot))
            if D2 > 0:
                tma.async_copy_global_to_shared(in_desc2, [expert * HIDDEN + n, D1], ready, in2.index(slot))
            slot = step % OUT_SLOTS
            ready = out_full.index(slot)
            mbarrier.wait(out_empty.index(slot), ((step // OUT_SLOTS) & 1) ^ 1)
            mbarrier.expect(ready, BYTES)
            tma.async_copy_global_to_shared(out_desc1, [expert * DIM, n], ready, out1.index(slot))
            if D2 > 0:
                tma.async_copy_global_to_shared(out_desc2, [expert * DIM + D1, n], ready, out2.index(slot))
            step += 1


@gluon.jit
def find_tile(tiles, tile, HALF: gl.constexpr):
    """The expert of a tile, the first place of this half and the place behind the expert's last; the last tile's if past it."""
    tile_expert, tile_place, ends, num_tiles = tiles
    tile = max(min(tile, num_tiles - 1), 0)
    expert = gl.load(tile_expert + tile)
    end = gl.load(ends + expert, mask=num_tiles > 0, other=0)
    return expert, gl.load(tile_place + tile) + HALF * HALF_ROWS, end


@gluon.jit
def load_slots(slots, place, end, LAYOUT: gl.constexpr):
    """The slots of this half; where there are none the expert's last, so that no other expert's rows are looked at."""
    place += gl.arange(0, HALF_ROWS, gl.SliceLayout(1, LAYOUT))
    return gl.load(slots + gl.minimum(place, end - 1), mask=end > 0, other=0)


@gluon.jit
def row_offsets(slot, TOP_K: gl.constexpr, DIM: gl.constexpr, first, WIDTH: gl.constexpr, ROWS: gl.constexpr):
    """Of WIDTH columns from `first` of the slots' rows."""
    column = first + gl.arange(0, WIDTH, gl.SliceLayout(0, ROWS))
    return (slot // TOP_K).to(gl.int64)[:, None] * DIM + column[None, :]


@gluon.jit
def are_slots(place, end, LAYOUT: gl.constexpr):
    """Which rows of this half have a slot."""
    return place + gl.arange(0, HALF_ROWS, gl.SliceLayout(1, LAYOUT)) < end


@gluon.jit
def store_sum(part, weights, slot, dy, FIRST: gl.constexpr, WIDTH: gl.constexpr, ROWS: gl.constexpr):
    """The sum of weight * dy, in which rows without a slot are 0."""
    weighted = dy.to(gl.float32) * gl.load(weights + slot)[:, None]
    gl.store(part + FIRST + gl.arange(0, WIDTH, gl.SliceLayout(0, ROWS)), gl.sum(weighted, 0))


@gluon.jit
def times_bias(dy_shared, bias, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
    """dy . bias of each row."""
    grad = dy_shared.load(LAYOUT).to(gl.float32)
    bias = gl.load(bias + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))).to(gl.float32)
    return gl.sum(grad * bias[None, :], 1)


@gluon.jit
def store_slots(dx, slot, place, end, acc, shared, DIM: gl.constexpr, first, WIDTH: gl.constexpr, ROWS: gl.constexpr):
    """acc to WIDTH columns from `first` of its slots' rows, through shared memory, so that neighbours store neighbours."""
    shared.store(acc.to(dx.dtype.element_ty))
    values = shared.load(ROWS)
    valid = are_slots(place, end, ROWS)
    column = first + gl.arange(0, WIDTH, gl.SliceLayout(0, ROWS))
    gl.store(dx + slot.to(gl.int64)[:, None] * DIM + column[None, :], values, mask=valid[:, None])


@gluon.jit
def start_both(
    rows, rings, full, zeros, step, D2: gl.constexpr, IN_SLOTS: gl.constexpr, OUT_SLOTS: gl.constexpr
):  # fmt: skip
    """h = w_in x and da = dy w_out of one block of hidden columns, not waited for."""
    x1, x2, dy1, dy2 = rows
    in1, in2, out1, out2 = rings
    slot = step % IN_SLOTS
    mbarrier.wait(full[0].index(slot), (step // IN_SLOTS) & 1)
    h = warpgroup_mma(x1, in1.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
    if D2 > 0:
        h = warpgroup_mma(x2, in2.index(slot).permute((1, 0)), h, is_async=True)
    slot = step % OUT_SLOTS
    mbarrier.wait(full[1].index(slot), (step // OUT_SLOTS) & 1)
    da = warpgroup_mma(dy1, out1.index(slot), zeros, use_acc=False, is_async=True)
    if D2 > 0:
        da = warpgroup_mma(dy2, out2.index(slot), da, is_async=True)
    return h, da


@gluon.jit
def lane_columns(x):
    """[rows, columns] of a product as [rows, lanes, columns of a lane]."""
    parts = gl.reshape(x, [x.shape[0], x.shape[1] // 8, 4, 2])
    return gl.reshape(gl.permute(parts, (0, 2, 1, 3)), [x.shape[0], 4, x.shape[1] // 4])


@gluon.jit
def halves(x):
    """[rows, lanes, columns] as its first and its last columns."""
    parts = gl.reshape(x, [x.shape[0], x.shape[1], 2, x.shape[2] // 2])
    return gl.split(gl.permute(parts, (0, 1, 3, 2)))


@gluon.jit
def add_products(total, a, b):
    """total + sum(a * b, 2), term after term; a total of None is 0."""
    if a.shape[2] > 1:
        a1, a2 = halves(a)
        b1, b2 = halves(b)
        total = add_products(add_products(total, a1, b1), a2, b2)
    else:
        a, b = gl.reshape(a, [a.shape[0], a.shape[1]]), gl.reshape(b, [b.shape[0], b.shape[1]])
        total = a * b if total is None else gl.fma(a, b, total)
    return total


@gluon.jit
def dot_rows(a, b):
    """sum(a * b, 1) of [rows, columns] of products; `gl.sum` of Triton 3.8 adds in pairs, half of them without fma."""
    return gl.sum(add_products(None, lane_columns(a), lane_columns(b)), 1)


@gluon.jit
def hidden_gradient(h, da, dweight, bias, BIAS: gl.constexpr, ACTIVATION: gl.constexpr):
    """dh / weight, and dweight with this block's part."""
    if BIAS:
        h += bias.to(gl.float32)[None, :]
    a, slope = activate_with_slope(h, ACTIVATION)
    dweight += gl.convert_layout(dot_rows(da, a), dweight.type.layout)
    return da * slope, dweight


@gluon.jit
def add_product(a, ring1, ring2, acc1, acc2, D2: gl.constexpr, MMA1: gl.constexpr, MMA2: gl.constexpr):
    """acc += a @ [ring1, ring2], not waited for."""
    acc1 = warpgroup_mma(gl.convert_layout(a, gl.DotOperandLayout(0, MMA1, 2)), ring1, acc1, is_async=True)
    if D2 > 0:
        acc2 = warpgroup_mma(gl.convert_layout(a, gl.DotOperandLayout(0, MMA2, 2)), ring2, acc2, is_async=True)
    return acc1, acc2


@gluon.jit
def wait_products(acc1, acc2, D2: gl.constexpr, LATER: gl.constexpr):
    """Until only the LATER products started since are in flight."""
    if D2 > 0:
        acc1, acc2 = warpgroup_mma_wait(LATER, deps=[acc1, acc2])
    else:
        acc1 = warpgroup_mma_wait(LATER, deps=[acc1])
    return acc1, acc2


@gluon.jit
def multiply(
    tiles, pointers, rows, rings, full, empty, HALF: gl.constexpr, TOP_K: gl.constexpr,
    HIDDEN: gl.constexpr, DIM: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr, BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr, BLOCK_N: gl.constexpr, IN_SLOTS: gl.constexpr, OUT_SLOTS: gl.constexpr,
):  # fmt: skip
    """One warpgroup: its half of every tile of this program."""
    HIDDEN_MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    MMA1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D1, 16])
    MMA2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D2 if D2 > 0 else D1, 16])
    # warps side by side along the columns: sums over rows then stay within a warp
    ROWS1: gl.constexpr = gl.BlockedLayout([1, 8], [1024 // D1, D1 // 32], [1, 4], [1, 0])
    ROWS2: gl.constexpr = gl.BlockedLayout([1, 8], [1024 // D2, D2 // 32], [1, 4], [1, 0]) if D2 > 0 else ROWS1
    x, dy, slots, weights, b_out, dx, dweights, tile_weights, db_parts, b_in = pointers
    x1, x2, dy1, dy2 = rows
    in1, in2, _, _ = rings
    dtype: gl.constexpr = in1.dtype
    IN_FLIGHT: gl.constexpr = 4 if D2 > 0 else 2
    in_empty, out_empty = empty
    zeros = gl.zeros([HALF_ROWS, BLOCK_N], gl.float32, HIDDEN_MMA)
    step = 0
    expert, place, end = find_tile(tiles, gl.program_id(0), HALF)
    slot1, slot2 = load_slots(slots, place, end, ROWS1), load_slots(slots, place, end, ROWS2)
    for tile in range(gl.program_id(0), tiles[3], gl.num_programs(0)):
        # 0, which the compiler does not know, so that no address waits in registers from tile to tile
        zero = (expert >> 31) * 64 if D2 > 0 else 0
        # every load is under way before the first is waited for
        here, source = are_slots(place, end, ROWS1)[:, None], row_offsets(slot1, TOP_K, DIM, zero, D1, ROWS1)
        x_rows1, dy_rows1 = gl.load(x + source, mask=here, other=0.0), gl.load(dy + source, mask=here, other=0.0)
        x_rows2, dy_rows2 = x_rows1, dy_rows1
        if D2 > 0:
            here, source = are_slots(place, end, ROWS2)[:, None], row_offsets(slot2, TOP_K, DIM, D1 + zero, D2, ROWS2)
            x_rows2, dy_rows2 = gl.load(x + source, mask=here, other=0.0), gl.load(dy + source, mask=here, other=0.0)
        slot = load_slots(slots, place, end, HIDDEN_MMA)
        valid = are_slots(place, end, HIDDEN_MMA)
        weight = gl.load(weights + slot, mask=valid, other=0.0)
        x1.store(x_rows1)
        dy1.store(dy_rows1)
        if D2 > 0:
            x2.store(x_rows2)
            dy2.store(dy_rows2)
        fence_async_shared()
        barrier()
        # the end of x in registers, where it fits: products of 64 columns wait for shared memory
        operands = (x1, x2.load(gl.DotOperandLayout(0, HIDDEN_MMA, 2)) if D2 > 0 else x2, dy1, dy2)
        biases = b_in + expert * HIDDEN + gl.arange(0, BLOCK_N, gl.SliceLayout(0, HIDDEN_MMA))
        bias = gl.load(biases)
        h, da = start_both(operands, rings, full, zeros, step, D2, IN_SLOTS, OUT_SLOTS)
        dweight = gl.zeros([HALF_ROWS], gl.float32, gl.SliceLayout(1, HIDDEN_MMA))
        if BIAS:
            part = db_parts + (tile * 2 + HALF).to(gl.int64) * DIM
            store_sum(part, weights, slot1, dy_rows1, 0, D1, ROWS1)
            dweight += gl.convert_layout(times_bias(dy1, b_out + expert * DIM, D1, MMA1), dweight.type.layout)
            if D2 > 0:
                store_sum(part, weights, slot2, dy_rows2, D1, D2, ROWS2)
                dweight += gl.convert_layout(times_bias(dy2, b_out + expert * DIM + D1, D2, MMA2), dweight.type.layout)
        gl.store(tile_weights + (tile * 2 + HALF) * HALF_ROWS + gl.arange(0, HALF_ROWS, weight.type.layout), weight)
        acc1 = gl.zeros([HALF_ROWS, D1], gl.float32, MMA1)
        acc2 = gl.zeros([HALF_ROWS, D2 if D2 > 0 else D1], gl.float32, MMA2)
        h, da = warpgroup_mma_wait(0, deps=[h, da])
        for n in range(0, HIDDEN - BLOCK_N, BLOCK_N):
            mbarrier.arrive(out_empty.index(step % OUT_SLOTS))
            dh, dweight = hidden_gradient(h, da, dweight, bias, BIAS, ACTIVATION)
            at = step % IN_SLOTS
            acc1, acc2 = add_product(dh.to(dtype), in1.index(at), in2.index(at), acc1, acc2, D2, MMA1, MMA2)
            step += 1
            h, da = start_both(operands, rings, full, zeros, step, D2, IN_SLOTS, OUT_SLOTS)
            bias = gl.load(biases + n + BLOCK_N)
            acc1, acc2 = wait_products(acc1, acc2, D2, IN_FLIGHT)
            mbarrier.arrive(in_empty.index(at))
            h, da = warpgroup_mma_wait(0, deps=[h, da])
        mbarrier.arrive(out_empty.index(step % OUT_SLOTS))
        dh, dweight = hidden_gradient(h, da, dweight, bias, BIAS, ACTIVATION)
        at = step % IN_SLOTS
        acc1, acc2 = add_product(dh.to(dtype), in1.index(at), in2.index(at), acc1, acc2, D2, MMA1, MMA2)
        step += 1
        expert, next_place, next_end = find_tile(tiles, tile + gl.num_programs(0), HALF)
        next_slot1 = load_slots(slots, next_place, next_end, ROWS1)
        next_slot2 = load_slots(slots, next_place, next_end, ROWS2)
        # again, instead of in registers meanwhile
        if D2 > 0:
            _last, place, end = find_tile(tiles, tile, HALF)
            slot, valid = load_slots(slots, place, end, HIDDEN_MMA), are_slots(place, end, HIDDEN_MMA)
            weight = gl.load(weights + slot, mask=valid, other=0.0)
        slot1, slot2 = load_slots(slots, place, end, ROWS1), load_slots(slots, place, end, ROWS2)
        gl.store(dweights + slot, dweight, mask=valid)
        acc1, acc2 = wait_products(acc1, acc2, D2, 0)
        mbarrier.arrive(in_empty.index(at))
        acc1 *= gl.convert_layout(weight, gl.SliceLayout(1, MMA1))[:, None]
        store_slots(dx, slot1, place, end, acc1, x1, DIM, zero, D1, ROWS1)
        if D2 > 0:
            acc2 *= gl.convert_layout(weight, gl.SliceLayout(1, MMA2))[:, None]
            store_slots(dx, slot2, place, end, acc2, x2, DIM, D1 + zero, D2, ROWS2)
        barrier()
        place, end, slot1, slot2 = next_place, next_end, next_slot1, next_slot2


@gluon.jit
def row_gradients(
    x, dy, slots, ends, tile_expert, tile_place, tile_base, weights, b_in, b_out,
    in_desc1, in_desc2, out_desc1, out_desc2, dx, dweights, tile_weights, bias_parts, E,
    TOP_K: gl.constexpr, DIM: gl.constexpr, HIDDEN: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr,
    BIAS: gl.constexpr, ACTIVATION: gl.constexpr, BLOCK_N: gl.constexpr,
    IN_SLOTS: gl.constexpr, OUT_SLOTS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """See `expert_mlp_backward.row_gradients`; `bias_parts` is [2 * tiles, dim].

    `tile_weights` gets the slots' weights, tile after tile, 0 where a tile has none.
    """
    dtype: gl.constexpr = x.dtype.element_ty
    W2: gl.constexpr = D2 if D2 > 0 else 16
    rows1 = gl.allocate_shared_memory(dtype, [4, HALF_ROWS, D1], gl.NVMMASharedLayout.get_default_for([64, D1], dtype))
    rows2 = rows1
    in1 = gl.allocate_shared_memory(dtype, [IN_SLOTS, BLOCK_N, D1], in_desc1.layout)
    out1 = gl.allocate_shared_memory(dtype, [OUT_SLOTS, D1, BLOCK_N], out_desc1.layout)
    in2, out2 = in1, out1
    if D2 > 0:
        rows2 = gl.allocate_shared_memory(
            dtype, [4, HALF_ROWS, W2], gl.NVMMASharedLayout.get_default_for([64, W2], dtype)
        )
        in2 = gl.allocate_shared_memory(dtype, [IN_SLOTS, BLOCK_N, W2], in_desc2.layout)
        out2 = gl.allocate_shared_memory(dtype, [OUT_SLOTS, W2, BLOCK_N], out_desc2.layout)
    in_full = gl.allocate_shared_memory(gl.int64, [IN_SLOTS, 1], mbarrier.MBarrierLayout())
    in_empty = gl.allocate_shared_memory(gl.int64, [IN_SLOTS, 1], mbarrier.MBarrierLayout())
    out_full = gl.allocate_shared_memory(gl.int64, [OUT_SLOTS, 1], mbarrier.MBarrierLayout())
    out_empty = gl.allocate_shared_memory(gl.int64, [OUT_SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(IN_SLOTS):
        mbarrier.init(in_full.index(i), count=1)
        mbarrier.init(in_empty.index(i), count=2)
    for i in gl.static_range(OUT_SLOTS):
        mbarrier.init(out_full.index(i), count=1)
        mbarrier.init(out_empty.index(i), count=2)
    fence_async_shared()
    barrier()
    tiles = (tile_expert, tile_place, ends, gl.load(tile_base + E))
    pointers = (x, dy, slots, weights, b_out, dx, dweights, tile_weights, bias_parts, b_in)
    rings, full, empty = (in1, in2, out1, out2), (in_full, out_full), (in_empty, out_empty)
    rows_a = (rows1.index(0), rows2.index(0), rows1.index(1), rows2.index(1))
    rows_b = (rows1.index(2), rows2.index(2), rows1.index(3), rows2.index(3))
    matrices = (in_desc1, in_desc2, out_desc1, out_desc2)
    gl.warp_specialize(
        [
            (multiply, (tiles, pointers, rows_a, rings, full, empty, gl.constexpr(0), TOP_K,
                        HIDDEN, DIM, D1, D2, BIAS, ACTIVATION, BLOCK_N, IN_SLOTS, OUT_SLOTS)),
            (multiply, (tiles, pointers, rows_b, rings, full, empty, gl.constexpr(1), TOP_K,
                        HIDDEN, DIM, D1, D2, BIAS, ACTIVATION, BLOCK_N, IN_SLOTS, OUT_SLOTS)),
            (stream_weights, (tiles, matrices, rings, full, empty, HIDDEN, DIM, D1, D2, BLOCK_N, IN_SLOTS,
                              OUT_SLOTS)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


def describe(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """All of a [.., rows, columns] tensor, for copies of blocks."""
    described = TensorDescriptor.__new__(TensorDescriptor)  # whose checks take longer than all else
    described.__dict__.update(_checked(matrix.shape, matrix.dtype, rows, columns), base=matrix)
    return described


@functools.cache
def _checked(shape: torch.Size, dtype: torch.dtype, rows: int, columns: int) -> dict[str, Any]:
    """A descriptor's fields."""
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], DTYPES[dtype])
    flat = torch.empty(shape, dtype=dtype, device="meta").view(-1, shape[-1])
    return vars(TensorDescriptor.from_tensor(flat, [rows, columns], layout))


def describe_weights(w_in: Tensor, w_out: Tensor, block_n: int) -> dict[str, TensorDescriptor]:
    """For `stream_weights`, by the kernels' names; the second of each is not used where dim is a power of two."""
    first, second = split_width(w_in.shape[2])
    in1, out1 = describe(w_in, block_n, first), describe(w_out, first, block_n)
    in2, out2 = (describe(w_in, block_n, second), describe(w_out, second, block_n)) if second else (in1, out1)
    return {"in_desc1": in1, "in_desc2": in2, "out_desc1": out1, "out_desc2": out2}


def constants(tile: HopperTile) -> dict[str, int]:
    """A tile as the kernels' parameters."""
    return {"BLOCK_N": tile.block_n, "IN_SLOTS": tile.in_slots, "OUT_SLOTS": tile.out_slots, "REGISTERS": 240}


def launch_row_gradients(tile: HopperTile, programs: int, arguments: Mapping[str, Any]) -> None:
    """`arguments` by the names of the portable kernel and of this one, with the descriptors of the weights."""
    launch_by_name(row_gradients, (programs,), {**arguments, **constants(tile)}, num_warps=4)
