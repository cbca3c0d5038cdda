# type: ignore  # kernels are Gluon's language, which checkers read as Python
"""The experts' row gradients for Hopper: one warp streams weights, two warpgroups multiply in turn.

The same function as `expert_mlp_backward.row_gradients`, for ungated experts whose widths fill the blocks. A tile of 128
slots is two halves of 64, one per warpgroup: while one is at its activation, the other has the tensor cores.
Axes as there; D1 + D2 = dim.
"""

from collections.abc import Callable, Mapping
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
from vlmoe.nn.kernels.launch import repeated

barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # its name in Triton 3.6, and in 3.8
HALF_ROWS = gl.constexpr(64)  # rows of a warpgroup's product
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@gluon.jit
def stream_weights(
    tiles, matrices, rings, full, empty, E, HIDDEN: gl.constexpr, DIM: gl.constexpr, D1: gl.constexpr,
    D2: gl.constexpr, BLOCK_N: gl.constexpr, IN_SLOTS: gl.constexpr, OUT_SLOTS: gl.constexpr,
):  # fmt: skip
    """Fills the rings with w_in [BLOCK_N, dim] and w_out [dim, BLOCK_N], block after block of the hidden columns."""
    tile_expert, first_tile, num_tiles = tiles[0], tiles[3], tiles[4]
    in_desc1, in_desc2, out_desc1, out_desc2 = matrices
    in1, in2, out1, out2 = rings
    in_full, out_full = full
    in_empty, out_empty = empty
    BYTES: gl.constexpr = BLOCK_N * DIM * 2
    step = 0
    for local in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        expert = gl.load(tile_expert + first_tile + local)
        if expert < E:
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
def gather_part(
    pointers, tiles, tile, local, expert, end, chunk_rows, x_shared, dy_shared, HALF: gl.constexpr,
    TOP_K: gl.constexpr, DIM: gl.constexpr, FIRST: gl.constexpr, WIDTH: gl.constexpr, BIAS: gl.constexpr,
    ROWS: gl.constexpr,
):  # fmt: skip
    """Columns FIRST to FIRST + WIDTH of this half's x and dy: into shared memory, and x and weight * dy to `gathered`."""
    x, dy, slots, weights, _, _, _, gathered, db_parts, _ = pointers
    at = HALF * HALF_ROWS + gl.arange(0, HALF_ROWS, gl.SliceLayout(1, ROWS))
    place = gl.load(tiles[1] + tile) + at
    valid = place < end
    slot = gl.load(slots + place, mask=valid, other=0)
    weight = gl.load(weights + slot, mask=valid, other=0.0)
    column = FIRST + gl.arange(0, WIDTH, gl.SliceLayout(0, ROWS))
    source = (slot // TOP_K).to(gl.int64)[:, None] * DIM + column[None, :]
    target = (local.to(gl.int64) * (2 * HALF_ROWS) + at)[:, None] * DIM + column[None, :]
    rows = gl.load(x + source, mask=valid[:, None], other=0.0)
    grad = gl.load(dy + source, mask=valid[:, None], other=0.0)
    x_shared.store(rows)
    dy_shared.store(grad)
    gl.store(gathered + target, rows)
    weighted = grad.to(gl.float32) * weight[:, None]
    gl.store(gathered + chunk_rows.to(gl.int64) * DIM + target, weighted.to(rows.dtype))
    if BIAS:
        gl.store(db_parts + (tile * 2 + HALF).to(gl.int64) * DIM + column, gl.sum(weighted, 0))


@gluon.jit
def times_bias(dy_shared, bias, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
    """dy . bias of each row."""
    grad = dy_shared.load(LAYOUT).to(gl.float32)
    bias = gl.load(bias + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))).to(gl.float32)
    return gl.sum(grad * bias[None, :], 1)


@gluon.jit
def store_slots(dx, slots, place, end, acc, shared, DIM: gl.constexpr, FIRST: gl.constexpr, WIDTH: gl.constexpr,
                ROWS: gl.constexpr):  # fmt: skip
    """acc to its slots' rows of dx, through shared memory, so that neighbours store neighbours."""
    shared.store(acc.to(dx.dtype.element_ty))
    values = shared.load(ROWS)
    place += gl.arange(0, HALF_ROWS, gl.SliceLayout(1, ROWS))
    valid = place < end
    slot = gl.load(slots + place, mask=valid, other=0).to(gl.int64)
    column = FIRST + gl.arange(0, WIDTH, gl.SliceLayout(0, ROWS))
    gl.store(dx + slot[:, None] * DIM + column[None, :], values, mask=valid[:, None])


@gluon.jit
def take_turn(turns, turn, HALF: gl.constexpr):
    """Waits until the other warpgroup has started its products of this turn (first half: of the turn before)."""
    mbarrier.wait(turns.index(HALF), (turn + 1 - HALF) & 1)


@gluon.jit
def pass_turn(turns, HALF: gl.constexpr):
    mbarrier.arrive(turns.index(1 - HALF))


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
def hidden_gradient(
    h, da, dweight, weight, bias, hiddens, BIAS: gl.constexpr, ACTIVATION: gl.constexpr, BLOCK_N: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """dh, staged beside the activated layer, and dweight with this block's part."""
    _, staged_dh, staged_a = hiddens
    if BIAS:
        h += gl.load(bias + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))).to(gl.float32)[None, :]
    a, slope = activate_with_slope(h, ACTIVATION)
    dweight += gl.sum(da * a, 1)
    dh = (da * slope * weight[:, None]).to(staged_dh.dtype)
    staged_a.store(a.to(staged_a.dtype))
    staged_dh.store(dh)
    fence_async_shared()
    return dh, dweight


@gluon.jit
def store_step(hiddens, row, n, chunk_rows):
    stores, staged_dh, staged_a = hiddens
    barrier()
    tma.async_copy_shared_to_global(stores, [row, n], staged_dh)
    tma.async_copy_shared_to_global(stores, [chunk_rows + row, n], staged_a)


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
    tiles, pointers, hiddens, rows, rings, full, empty, turns, E, chunk_rows, HALF: gl.constexpr, TOP_K: gl.constexpr,
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
    tile_expert, tile_place, ends, first_tile, num_tiles = tiles
    _, _, slots, weights, b_out, dx, dweights, _, _, b_in = pointers
    x1, x2, dy1, dy2 = rows
    in1, in2, _, _ = rings
    IN_FLIGHT: gl.constexpr = 4 if D2 > 0 else 2
    in_empty, out_empty = empty
    step = 0
    turn = 0
    for local in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        tile = first_tile + local
        expert = gl.load(tile_expert + tile)
        if expert < E:
            end = gl.load(ends + expert)
            gather_part(pointers, tiles, tile, local, expert, end, chunk_rows, x1, dy1, HALF, TOP_K, DIM, 0, D1, BIAS,
                        ROWS1)  # fmt: skip
            if D2 > 0:
                gather_part(pointers, tiles, tile, local, expert, end, chunk_rows, x2, dy2, HALF, TOP_K, DIM, D1, D2,
                            BIAS, ROWS2)  # fmt: skip
            fence_async_shared()
            barrier()
            first_place = gl.load(tile_place + tile) + HALF * HALF_ROWS
            place = first_place + gl.arange(0, HALF_ROWS, gl.SliceLayout(1, HIDDEN_MMA))
            slots_here = gl.load(slots + place, mask=place < end, other=0)
            weight = gl.load(weights + slots_here, mask=place < end, other=0.0)
            dweight = gl.zeros([HALF_ROWS], gl.float32, gl.SliceLayout(1, HIDDEN_MMA))
            if BIAS:
                dweight += gl.convert_layout(times_bias(dy1, b_out + expert * DIM, D1, MMA1), dweight.type.layout)
                if D2 > 0:
                    dweight += gl.convert_layout(
                        times_bias(dy2, b_out + expert * DIM + D1, D2, MMA2), dweight.type.layout
                    )
            acc1 = gl.zeros([HALF_ROWS, D1], gl.float32, MMA1)
            acc2 = gl.zeros([HALF_ROWS, D2 if D2 > 0 else D1], gl.float32, MMA2)
            zeros = gl.zeros([HALF_ROWS, BLOCK_N], gl.float32, HIDDEN_MMA)
            row = local * (2 * HALF_ROWS) + HALF * HALF_ROWS
            bias = b_in + expert * HIDDEN
            take_turn(turns, turn, HALF)
            h, da = start_both(rows, rings, full, zeros, step, D2, IN_SLOTS, OUT_SLOTS)
            pass_turn(turns, HALF)
            turn += 1
            h, da = warpgroup_mma_wait(0, deps=[h, da])
            for n in range(0, HIDDEN - BLOCK_N, BLOCK_N):
                tma.store_wait(0)
                barrier()  # in all four warps: the products that read w_out, the stores that read what was staged
                mbarrier.arrive(out_empty.index(step % OUT_SLOTS))
                dh, dweight = hidden_gradient(
                    h, da, dweight, weight, bias + n, hiddens, BIAS, ACTIVATION, BLOCK_N, HIDDEN_MMA
                )
                slot = step % IN_SLOTS
                take_turn(turns, turn, HALF)
                acc1, acc2 = add_product(dh, in1.index(slot), in2.index(slot), acc1, acc2, D2, MMA1, MMA2)
                step += 1
                h, da = start_both(rows, rings, full, zeros, step, D2, IN_SLOTS, OUT_SLOTS)
                pass_turn(turns, HALF)
                turn += 1
                store_step(hiddens, row, n, chunk_rows)
                acc1, acc2 = wait_products(acc1, acc2, D2, IN_FLIGHT)
                barrier()
                mbarrier.arrive(in_empty.index(slot))
                h, da = warpgroup_mma_wait(0, deps=[h, da])
            tma.store_wait(0)
            barrier()
            mbarrier.arrive(out_empty.index(step % OUT_SLOTS))
            dh, dweight = hidden_gradient(
                h, da, dweight, weight, bias + (HIDDEN - BLOCK_N), hiddens, BIAS, ACTIVATION, BLOCK_N, HIDDEN_MMA
            )
            slot = step % IN_SLOTS
            take_turn(turns, turn, HALF)
            acc1, acc2 = add_product(dh, in1.index(slot), in2.index(slot), acc1, acc2, D2, MMA1, MMA2)
            pass_turn(turns, HALF)
            turn += 1
            store_step(hiddens, row, HIDDEN - BLOCK_N, chunk_rows)
            acc1, acc2 = wait_products(acc1, acc2, D2, 0)
            barrier()
            mbarrier.arrive(in_empty.index(slot))
            step += 1
            gl.store(dweights + slots_here, dweight, mask=place < end)
            store_slots(dx, slots, first_place, end, acc1, x1, DIM, 0, D1, ROWS1)
            if D2 > 0:
                store_slots(dx, slots, first_place, end, acc2, x2, DIM, D1, D2, ROWS2)
            barrier()
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["first_tile", "num_tiles"])
def row_gradients(
    x, dy, slots, ends, tile_expert, tile_place, weights, b_in, b_out,
    in_desc1, in_desc2, out_desc1, out_desc2, stores,
    dx, dweights, gathered, bias_parts, first_tile, num_tiles, E, chunk_rows,
    TOP_K: gl.constexpr, DIM: gl.constexpr, HIDDEN: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr,
    BIAS: gl.constexpr, ACTIVATION: gl.constexpr, BLOCK_N: gl.constexpr,
    IN_SLOTS: gl.constexpr, OUT_SLOTS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """See `expert_mlp_backward.row_gradients`; `bias_parts` is [2 * tiles, dim]. `stores` describes `hiddens`."""
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
    staged = gl.allocate_shared_memory(dtype, [4, HALF_ROWS, BLOCK_N], stores.layout)
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
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(turns.index(i), count=1)
    fence_async_shared()
    barrier()
    tiles = (tile_expert, tile_place, ends, first_tile, num_tiles)
    pointers = (x, dy, slots, weights, b_out, dx, dweights, gathered, bias_parts, b_in)
    rings, full, empty = (in1, in2, out1, out2), (in_full, out_full), (in_empty, out_empty)
    rows_a = (rows1.index(0), rows2.index(0), rows1.index(1), rows2.index(1))
    rows_b = (rows1.index(2), rows2.index(2), rows1.index(3), rows2.index(3))
    hiddens_a = (stores, staged.index(0), staged.index(1))
    hiddens_b = (stores, staged.index(2), staged.index(3))
    matrices = (in_desc1, in_desc2, out_desc1, out_desc2)
    gl.warp_specialize(
        [
            (multiply, (tiles, pointers, hiddens_a, rows_a, rings, full, empty, turns, E, chunk_rows, gl.constexpr(0), TOP_K,
                        HIDDEN, DIM, D1, D2, BIAS, ACTIVATION, BLOCK_N, IN_SLOTS, OUT_SLOTS)),
            (multiply, (tiles, pointers, hiddens_b, rows_b, rings, full, empty, turns, E, chunk_rows, gl.constexpr(1), TOP_K,
                        HIDDEN, DIM, D1, D2, BIAS, ACTIVATION, BLOCK_N, IN_SLOTS, OUT_SLOTS)),
            (stream_weights, (tiles, matrices, rings, full, empty, E, HIDDEN, DIM, D1, D2, BLOCK_N, IN_SLOTS,
                              OUT_SLOTS)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


def describe(matrix: Tensor, block: list[int]) -> TensorDescriptor:
    """All rows of a [.., rows, columns] tensor, for copies of `block`."""
    layout = gl.NVMMASharedLayout.get_default_for(block, DTYPES[matrix.dtype])
    return TensorDescriptor.from_tensor(matrix.view(-1, matrix.shape[-1]), block, layout)


def describe_weights(w_in: Tensor, w_out: Tensor, block_n: int) -> list[TensorDescriptor]:
    """For `stream_weights`; the second of each is not used where dim is a power of two."""
    first, second = split_width(w_in.shape[2])
    widths = (first, second or first)
    described = [describe(w_in, [block_n, width]) for width in widths]
    return described + [describe(w_out, [width, block_n]) for width in widths]


def row_gradients_launcher(tile: HopperTile, arguments: Mapping[str, Any]) -> Callable[..., None]:
    """Of `row_gradients`, for a grid of one program per multiprocessor; `arguments` are those of the portable kernel."""
    weights = describe_weights(arguments["w_in"], arguments["w_out"], tile.block_n)
    shape = {"BLOCK_N": tile.block_n, "IN_SLOTS": tile.in_slots, "OUT_SLOTS": tile.out_slots, "REGISTERS": 240}
    described = dict(zip(("in_desc1", "in_desc2", "out_desc1", "out_desc2"), weights, strict=True))
    described["stores"] = describe(arguments["hiddens"], [HALF_ROWS.value, tile.block_n])
    return repeated(row_gradients, {**arguments, **described, **shape}, num_warps=4)
