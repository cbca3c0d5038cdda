# type: ignore  # kernels are Gluon's language, which checkers read as Python
"""The experts' weight gradients for Hopper, with the hidden layer computed once more instead of read.

A program has one expert's block of hidden columns at a time and goes through that expert's slots. Everything is
transposed, so that what one product leaves in registers is the left operand of the next: of two warpgroups the first
makes h^T = w_in x^T and adds act(h)^T dy to the gradient of w_out, the second makes da^T = w_out^T dy^T and adds dh^T x to
that of w_in. Between them goes act'(h) alone. Four more warps gather x and dy.

Axes as in `expert_mlp_backward`, whose `finish_segments` adds the parts; D1 + D2 = dim.
"""

from collections.abc import Mapping
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from vlmoe.nn.kernels.activations import activate_with_slope
from vlmoe.nn.kernels.configs import HopperWeightTile
from vlmoe.nn.kernels.hopper import add_product, barrier, wait_products
from vlmoe.nn.kernels.launch import launch_by_name


@gluon.jit
def slots_of(tables, tile, expert, behind, BLOCK_M: gl.constexpr):
    """First place of a tile, the place behind its expert's last before tile `behind`, and how many tiles that are."""
    _, tile_place, ends = tables
    place = gl.load(tile_place + tile)
    end = gl.load(ends + expert)
    count = min((end - place + BLOCK_M - 1) // BLOCK_M, behind - tile)
    return place, min(place + count * BLOCK_M, end), count


@gluon.jit
def rows_of(slots, place, end, BLOCK_K: gl.constexpr, TOP_K: gl.constexpr, DIM: gl.constexpr, ROWS: gl.constexpr):
    """Where the rows of BLOCK_K slots begin, in eights of elements (32 bits do); behind `end` the last again, of weight 0."""
    at = gl.minimum(gl.arange(0, BLOCK_K, gl.SliceLayout(1, ROWS)), end - 1 - place)
    slot = gl.load(slots + (gl.to_tensor(place).to(gl.int64) + at.to(gl.int64)))
    return slot.to(gl.uint32) // TOP_K * (DIM // 8)


@gluon.jit
def copy_rows(x, dy, x_shared, dy_shared, row, FIRST: gl.constexpr, WIDTH: gl.constexpr, ROWS: gl.constexpr):
    """Columns FIRST to FIRST + WIDTH of the rows that begin at `row`, not waited for."""
    column = FIRST + gl.arange(0, WIDTH, gl.SliceLayout(0, ROWS))
    source = row.to(gl.int64)[:, None] * 8 + column[None, :]
    async_copy.async_copy_global_to_shared(x_shared, x + source)
    async_copy.async_copy_global_to_shared(dy_shared, dy + source)


@gluon.jit
def stream_rows(
    tables, pointers, matrices, weights, rings, barriers, num_tiles, segment_tiles, E, TOP_K: gl.constexpr,
    DIM: gl.constexpr, HIDDEN: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_F: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fills the rings with x and dy, BLOCK_K slots per step, and before an expert's first step its two matrices."""
    ROWS1: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D1, D1 // 8], [4, 1], [1, 0])
    ROWS2: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D2, D2 // 8], [4, 1], [1, 0]) if D2 > 0 else ROWS1
    x, dy, slots = pointers
    in_desc1, in_desc2, out_desc1, out_desc2 = matrices
    in1, in2, out1, out2 = weights
    x1, x2, dy1, dy2 = rings
    full, empty, weights_full, weights_empty, _, _ = barriers
    column = gl.program_id(0) * BLOCK_F
    tile = gl.program_id(1) * segment_tiles
    behind = min(tile + segment_tiles, num_tiles)
    step = 0
    item = 0
    while tile < behind:
        expert = gl.load(tables[0] + tile)
        if expert < E:
            place, stop, count = slots_of(tables, tile, expert, behind, BLOCK_M)
            mbarrier.wait(weights_empty, (item & 1) ^ 1)
            mbarrier.expect(weights_full, 2 * BLOCK_F * DIM * 2)
            tma.async_copy_global_to_shared(in_desc1, [expert * HIDDEN + column, 0], weights_full, in1)
            tma.async_copy_global_to_shared(out_desc1, [expert * DIM, column], weights_full, out1)
            if D2 > 0:
                tma.async_copy_global_to_shared(in_desc2, [expert * HIDDEN + column, D1], weights_full, in2)
                tma.async_copy_global_to_shared(out_desc2, [expert * DIM + D1, column], weights_full, out2)
            row1 = rows_of(slots, place, stop, BLOCK_K, TOP_K, DIM, ROWS1)
            row2 = rows_of(slots, place, stop, BLOCK_K, TOP_K, DIM, ROWS2)
            for first in range(place, stop, BLOCK_K):
                slot = step % STAGES
                # the next step's, before there is a place for this one's
                next1 = rows_of(slots, first + BLOCK_K, stop, BLOCK_K, TOP_K, DIM, ROWS1)
                next2 = rows_of(slots, first + BLOCK_K, stop, BLOCK_K, TOP_K, DIM, ROWS2)
                mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
                copy_rows(x, dy, x1.index(slot), dy1.index(slot), row1, 0, D1, ROWS1)
                if D2 > 0:
                    copy_rows(x, dy, x2.index(slot), dy2.index(slot), row2, D1, D2, ROWS2)
                row1, row2 = next1, next2
                async_copy.mbarrier_arrive(full.index(slot), increment_count=False)
                step += 1
            item += 1
            tile += count
        else:
            tile = behind


@gluon.jit
def start_hidden(w1, w2, ring1, ring2, full, zeros, step, D2: gl.constexpr, STAGES: gl.constexpr):
    """[w1, w2] @ [ring1, ring2]^T of one step's slots, not waited for."""
    slot = step % STAGES
    mbarrier.wait(full.index(slot), (step // STAGES) & 1)
    fence_async_shared()  # the copies are not the tensor cores' own
    out = warpgroup_mma(w1, ring1.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
    if D2 > 0:
        out = warpgroup_mma(w2, ring2.index(slot).permute((1, 0)), out, is_async=True)
    return out


@gluon.jit
def left_operand(
    hidden, bias, scale, sums, slopes, barriers, step, FIRST: gl.constexpr, ACTIVATION: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Of the second product: weight * act(h) for the FIRST warpgroup, else dh, and `sums` with dh's slots."""
    _, _, _, _, slope_full, slope_empty = barriers
    at = step % 2
    if FIRST:
        a, slope = activate_with_slope(hidden + bias[:, None], ACTIVATION)
        mbarrier.wait(slope_empty.index(at), ((step // 2) & 1) ^ 1)
        slopes.index(at).store(slope.to(gl.float16))
        mbarrier.arrive(slope_full.index(at))
        out = a * scale[None, :]
    else:
        mbarrier.wait(slope_full.index(at), (step // 2) & 1)
        slope = slopes.index(at).load(LAYOUT)
        mbarrier.arrive(slope_empty.index(at))
        out = hidden * slope.to(gl.float32) * scale[None, :]
        sums += gl.sum(out, 1)
    return out, sums


@gluon.jit
def store_part(part, column, acc, DIM: gl.constexpr, FIRST: gl.constexpr, WIDTH: gl.constexpr, BLOCK_F: gl.constexpr,
               LAYOUT: gl.constexpr):  # fmt: skip
    row = column + gl.arange(0, BLOCK_F, gl.SliceLayout(1, LAYOUT))
    at = FIRST + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    gl.store(part + row[:, None] * DIM + at[None, :], acc)


@gluon.jit
def accumulate(
    tables, tile_weights, b_in, parts, weights, rings, slopes, barriers, num_tiles, segment_tiles, E,
    FIRST: gl.constexpr, PLACES: gl.constexpr, DIM: gl.constexpr, HIDDEN: gl.constexpr, D1: gl.constexpr,
    D2: gl.constexpr, BIAS: gl.constexpr, ACTIVATION: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_F: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup; the FIRST starts with w_in, the other with w_out."""
    HIDDEN_MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    MMA1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D1, 16])
    MMA2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D2 if D2 > 0 else D1, 16])
    IN_FLIGHT: gl.constexpr = 2 if D2 > 0 else 1
    in1, in2, out1, out2 = weights
    x1, x2, dy1, dy2 = rings
    full, empty, weights_full, weights_empty, _, _ = barriers
    if FIRST:
        w1, w2, left1, left2, right1, right2 = in1, in2, x1, x2, dy1, dy2
    else:
        w1, w2, left1, left2, right1, right2 = out1.permute((1, 0)), out2.permute((1, 0)), dy1, dy2, x1, x2
    dtype: gl.constexpr = in1.dtype
    zeros = gl.zeros([BLOCK_F, BLOCK_K], gl.float32, HIDDEN_MMA)
    column = gl.program_id(0) * BLOCK_F
    row = column + gl.arange(0, BLOCK_F, gl.SliceLayout(1, HIDDEN_MMA))
    tile = gl.program_id(1) * segment_tiles
    behind = min(tile + segment_tiles, num_tiles)
    step = 0
    item = 0
    while tile < behind:
        expert = gl.load(tables[0] + tile)
        if expert < E:
            place, stop, count = slots_of(tables, tile, expert, behind, BLOCK_M)
            acc1 = gl.zeros([BLOCK_F, D1], gl.float32, MMA1)
            acc2 = gl.zeros([BLOCK_F, D2 if D2 > 0 else D1], gl.float32, MMA2)
            sums = gl.zeros([BLOCK_F], gl.float32, gl.SliceLayout(1, HIDDEN_MMA))
            bias = gl.zeros([BLOCK_F], gl.float32, gl.SliceLayout(1, HIDDEN_MMA))
            if BIAS and FIRST:
                bias = gl.load(b_in + expert * HIDDEN + row).to(gl.float32)
            scales = tile_weights + tile * BLOCK_M + gl.arange(0, BLOCK_K, gl.SliceLayout(0, HIDDEN_MMA))
            scale = gl.load(scales)
            mbarrier.wait(weights_full, item & 1)
            if not FIRST and DIM <= 192:  # it has the registers, and shared memory is what both wait for
                held1 = w1.load(gl.DotOperandLayout(0, HIDDEN_MMA, 2))
                held2 = w2.load(gl.DotOperandLayout(0, HIDDEN_MMA, 2)) if D2 > 0 else held1
            else:
                held1, held2 = w1, w2
            hidden = start_hidden(held1, held2, left1, left2, full, zeros, step, D2, STAGES)
            hidden = warpgroup_mma_wait(0, deps=[hidden])
            for first in range(0, stop - place - BLOCK_K, BLOCK_K):
                left, sums = left_operand(
                    hidden, bias, scale, sums, slopes, barriers, step, FIRST, ACTIVATION, HIDDEN_MMA
                )
                slot = step % STAGES
                acc1, acc2 = add_product(
                    left.to(dtype), right1.index(slot), right2.index(slot), acc1, acc2, D2, MMA1, MMA2
                )
                step += 1
                hidden = start_hidden(held1, held2, left1, left2, full, zeros, step, D2, STAGES)
                scale = gl.load(scales + first + BLOCK_K)
                acc1, acc2 = wait_products(acc1, acc2, D2, IN_FLIGHT)
                mbarrier.arrive(empty.index(slot))
                hidden = warpgroup_mma_wait(0, deps=[hidden])
            left, sums = left_operand(hidden, bias, scale, sums, slopes, barriers, step, FIRST, ACTIVATION, HIDDEN_MMA)
            slot = step % STAGES
            acc1, acc2 = add_product(left.to(dtype), right1.index(slot), right2.index(slot), acc1, acc2, D2, MMA1, MMA2)
            acc1, acc2 = wait_products(acc1, acc2, D2, 0)
            mbarrier.arrive(empty.index(slot))
            mbarrier.arrive(weights_empty)
            step += 1
            WHICH: gl.constexpr = 1 if FIRST else 0
            index = (WHICH * PLACES + gl.program_id(1) + expert).to(gl.int64)
            part = parts + index * (HIDDEN * DIM + HIDDEN)
            store_part(part, column, acc1, DIM, 0, D1, BLOCK_F, MMA1)
            if D2 > 0:
                store_part(part, column, acc2, DIM, D1, D2, BLOCK_F, MMA2)
            if BIAS and not FIRST:
                gl.store(part + HIDDEN * DIM + row, sums)
            item += 1
            tile += count
        else:
            tile = behind


@gluon.jit(do_not_specialize=["num_tiles", "segment_tiles"])
def weight_gradients(
    x, dy, slots, tile_weights, ends, tile_expert, tile_place, b_in, in_desc1, in_desc2, out_desc1, out_desc2,
    parts, num_tiles, segment_tiles, E,
    TOP_K: gl.constexpr, DIM: gl.constexpr, HIDDEN: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr,
    BIAS: gl.constexpr, ACTIVATION: gl.constexpr, PLACES: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_F: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """The part of expert e in segment s, as `expert_mlp_backward.weight_gradients` leaves it, at place s + e of `parts`.

    The grid is (hidden / BLOCK_F, segments). `tile_weights` as `hopper.row_gradients` leaves them.
    """
    dtype: gl.constexpr = x.dtype.element_ty
    W2: gl.constexpr = D2 if D2 > 0 else 16
    layout1: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_K, D1], dtype)
    layout2: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_K, W2], dtype)
    x1 = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, D1], layout1)
    dy1 = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, D1], layout1)
    in1 = gl.allocate_shared_memory(dtype, [BLOCK_F, D1], in_desc1.layout)
    out1 = gl.allocate_shared_memory(dtype, [D1, BLOCK_F], out_desc1.layout)
    x2, dy2, in2, out2 = x1, dy1, in1, out1
    if D2 > 0:
        x2 = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, W2], layout2)
        dy2 = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, W2], layout2)
        in2 = gl.allocate_shared_memory(dtype, [BLOCK_F, W2], in_desc2.layout)
        out2 = gl.allocate_shared_memory(dtype, [W2, BLOCK_F], out_desc2.layout)
    slopes = gl.allocate_shared_memory(
        gl.float16, [2, BLOCK_F, BLOCK_K], gl.NVMMASharedLayout.get_default_for([BLOCK_F, BLOCK_K], gl.float16)
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=128)  # every thread that copies
        mbarrier.init(empty.index(i), count=2)
    slope_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    slope_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(slope_full.index(i), count=1)
        mbarrier.init(slope_empty.index(i), count=1)
    weights_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    weights_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(weights_full, count=1)
    mbarrier.init(weights_empty, count=2)
    fence_async_shared()
    barrier()
    tables, pointers = (tile_expert, tile_place, ends), (x, dy, slots)
    weights, rings = (in1, in2, out1, out2), (x1, x2, dy1, dy2)
    matrices = (in_desc1, in_desc2, out_desc1, out_desc2)
    barriers = (full, empty, weights_full, weights_empty, slope_full, slope_empty)
    gl.warp_specialize(
        [
            (accumulate, (tables, tile_weights, b_in, parts, weights, rings, slopes, barriers, num_tiles, segment_tiles,
                          E, gl.constexpr(True), PLACES, DIM, HIDDEN, D1, D2, BIAS, ACTIVATION, BLOCK_M, BLOCK_F,
                          BLOCK_K, STAGES)),
            (accumulate, (tables, tile_weights, b_in, parts, weights, rings, slopes, barriers, num_tiles, segment_tiles,
                          E, gl.constexpr(False), PLACES, DIM, HIDDEN, D1, D2, BIAS, ACTIVATION, BLOCK_M, BLOCK_F,
                          BLOCK_K, STAGES)),
            (stream_rows, (tables, pointers, matrices, weights, rings, barriers, num_tiles, segment_tiles, E, TOP_K,
                           DIM, HIDDEN, D1, D2, BLOCK_M, BLOCK_F, BLOCK_K, STAGES)),
        ],
        [4, 4],
        [REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def constants(tile: HopperWeightTile) -> dict[str, int]:
    """A tile as the kernel's parameters."""
    shape = {"BLOCK_F": tile.block_f, "BLOCK_K": tile.block_k, "STAGES": tile.stages}
    producers = tile.producer_registers  # three groups of warps share 3 * 168 registers per thread
    return shape | {"REGISTERS": (504 - producers) // 2, "PRODUCER_REGISTERS": producers}


def launch_weight_gradients(tile: HopperWeightTile, grid: tuple[int, int], arguments: Mapping[str, Any]) -> None:
    """`arguments` by the names of the portable kernel and of this one, with the descriptors of the weights."""
    launch_by_name(weight_gradients, grid, {**arguments, **constants(tile)}, num_warps=4)
