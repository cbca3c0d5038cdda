# type: ignore  # kernels are Gluon's language, which checkers read as Python
"""The experts' row gradients for Hopper: one warp streams weights, two warpgroups multiply and do not wait for each other.

The same function as `expert_mlp_backward.row_gradients`, for ungated experts whose widths fill the blocks. A tile of 128
slots is two halves of 64, one per warpgroup: while one is at its activation, the other has the tensor cores.
Axes as there; D1 + D2 = dim.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from vlmoe.nn.kernels.activations import activate_with_slope
from vlmoe.nn.kernels.configs import split_width

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
def multiply(
    tiles, pointers, hiddens, rows, rings, full, empty, E, chunk_rows, HALF: gl.constexpr, TOP_K: gl.constexpr,
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
    x, _, slots, weights, b_out, dx, dweights, _, _, b_in = pointers
    stores, staged_dh, staged_a = hiddens
    x1, x2, dy1, dy2 = rows
    in1, in2, out1, out2 = rings
    in_full, out_full = full
    in_empty, out_empty = empty
    step = 0
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
            slot = gl.load(slots + place, mask=place < end, other=0)
            weight = gl.load(weights + slot, mask=place < end, other=0.0)
            dweight = gl.zeros([HALF_ROWS], gl.float32, gl.SliceLayout(1, HIDDEN_MMA))
            if BIAS:
                dweight += gl.convert_layout(times_bias(dy1, b_out + expert * DIM, D1, MMA1), dweight.type.layout)
                if D2 > 0:
                    dweight += gl.convert_layout(
                        times_bias(dy2, b_out + expert * DIM + D1, D2, MMA2), dweight.type.layout
                    )
            acc1 = warpgroup_mma_init(gl.zeros([HALF_ROWS, D1], gl.float32, MMA1))
            acc2 = warpgroup_mma_init(gl.zeros([HALF_ROWS, D2 if D2 > 0 else D1], gl.float32, MMA2))
            zeros = gl.zeros([HALF_ROWS, BLOCK_N], gl.float32, HIDDEN_MMA)
            for n in range(0, HIDDEN, BLOCK_N):
                in_slot = step % IN_SLOTS
                out_slot = step % OUT_SLOTS
                mbarrier.wait(in_full.index(in_slot), (step // IN_SLOTS) & 1)
                h = warpgroup_mma(x1, in1.index(in_slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
                if D2 > 0:
                    h = warpgroup_mma(x2, in2.index(in_slot).permute((1, 0)), h, is_async=True)
                mbarrier.wait(out_full.index(out_slot), (step // OUT_SLOTS) & 1)
                da = warpgroup_mma(dy1, out1.index(out_slot), zeros, use_acc=False, is_async=True)
                if D2 > 0:
                    da = warpgroup_mma(dy2, out2.index(out_slot), da, is_async=True)
                if D2 > 0:
                    h, da, acc1, acc2 = warpgroup_mma_wait(0, deps=[h, da, acc1, acc2])
                else:
                    h, da, acc1 = warpgroup_mma_wait(0, deps=[h, da, acc1])
                if BIAS:
                    bias = gl.load(b_in + expert * HIDDEN + n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, HIDDEN_MMA)))
                    h += bias.to(gl.float32)[None, :]
                a, slope = activate_with_slope(h, ACTIVATION)
                tma.store_wait(0)
                barrier()  # the last step's products and stores are done in all four warps
                mbarrier.arrive(in_empty.index((step + IN_SLOTS - 1) % IN_SLOTS), pred=n > 0)
                staged_a.store(a.to(x.dtype.element_ty))
                dweight += gl.sum(da * a, 1)
                dh = (da * slope * weight[:, None]).to(x.dtype.element_ty)
                staged_dh.store(dh)
                fence_async_shared()
                barrier()
                mbarrier.arrive(out_empty.index(out_slot))
                at = local * (2 * HALF_ROWS) + HALF * HALF_ROWS
                tma.async_copy_shared_to_global(stores, [at, n], staged_dh)
                tma.async_copy_shared_to_global(stores, [chunk_rows + at, n], staged_a)
                acc1 = warpgroup_mma(staged_dh, in1.index(in_slot), acc1, is_async=True)
                if D2 > 0:
                    acc2 = warpgroup_mma(staged_dh, in2.index(in_slot), acc2, is_async=True)
                step += 1
            if D2 > 0:
                acc1, acc2 = warpgroup_mma_wait(0, deps=[acc1, acc2])
            else:
                acc1 = warpgroup_mma_wait(0, deps=[acc1])
            barrier()
            mbarrier.arrive(in_empty.index((step + IN_SLOTS - 1) % IN_SLOTS))
            gl.store(dweights + slot, dweight, mask=place < end)
            store_slots(dx, slots, first_place, end, acc1, x1, DIM, 0, D1, ROWS1)
            if D2 > 0:
                store_slots(dx, slots, first_place, end, acc2, x2, DIM, D1, D2, ROWS2)
            barrier()
    tma.store_wait(0)


@gluon.jit
def row_gradients(
    x, dy, slots, ends, tile_expert, tile_place, weights, b_in, b_out,
    in_desc1, in_desc2, out_desc1, out_desc2, stores,
    dx, dweights, gathered, db_parts, first_tile, num_tiles, E, chunk_rows,
    TOP_K: gl.constexpr, DIM: gl.constexpr, HIDDEN: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr,
    BIAS: gl.constexpr, ACTIVATION: gl.constexpr, BLOCK_N: gl.constexpr,
    IN_SLOTS: gl.constexpr, OUT_SLOTS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """See `expert_mlp_backward.row_gradients`; `db_parts` is [2 * tiles, dim]. `stores` describes `hiddens`."""
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
    fence_async_shared()
    barrier()
    tiles = (tile_expert, tile_place, ends, first_tile, num_tiles)
    pointers = (x, dy, slots, weights, b_out, dx, dweights, gathered, db_parts, b_in)
    rings, full, empty = (in1, in2, out1, out2), (in_full, out_full), (in_empty, out_empty)
    rows_a = (rows1.index(0), rows2.index(0), rows1.index(1), rows2.index(1))
    rows_b = (rows1.index(2), rows2.index(2), rows1.index(3), rows2.index(3))
    hiddens_a = (stores, staged.index(0), staged.index(1))
    hiddens_b = (stores, staged.index(2), staged.index(3))
    matrices = (in_desc1, in_desc2, out_desc1, out_desc2)
    gl.warp_specialize(
        [
            (multiply, (tiles, pointers, hiddens_a, rows_a, rings, full, empty, E, chunk_rows, gl.constexpr(0), TOP_K,
                        HIDDEN, DIM, D1, D2, BIAS, ACTIVATION, BLOCK_N, IN_SLOTS, OUT_SLOTS)),
            (multiply, (tiles, pointers, hiddens_b, rows_b, rings, full, empty, E, chunk_rows, gl.constexpr(1), TOP_K,
                        HIDDEN, DIM, D1, D2, BIAS, ACTIVATION, BLOCK_N, IN_SLOTS, OUT_SLOTS)),
            (stream_weights, (tiles, matrices, rings, full, empty, E, HIDDEN, DIM, D1, D2, BLOCK_N, IN_SLOTS,
                              OUT_SLOTS)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


def launch_row_gradients(
    tile, x, dy, slots, ends, tile_expert, tile_place, weights, bank, dx, dweights, hiddens, gathered, db_parts,
    first_tile, num_tiles, top_k, bias, activation,
):  # fmt: skip
    """`row_gradients` for the tiles of one chunk, one program per multiprocessor. `bank` in the other kernels' order."""
    w_in, w_out, _, b_in, b_out, _ = bank
    E, hidden, dim = w_in.shape
    first, second = split_width(dim)
    half = HALF_ROWS.value
    n = tile.block_n

    def describe(matrix, block):
        layout = gl.NVMMASharedLayout.get_default_for(block, DTYPES[matrix.dtype])
        return TensorDescriptor.from_tensor(matrix.view(-1, matrix.shape[-1]), block, layout)

    widths = (first, second or first)
    descriptors = [describe(w_in, [n, width]) for width in widths] + [describe(w_out, [width, n]) for width in widths]
    programs = min(num_tiles, torch.cuda.get_device_properties(x.device).multi_processor_count)
    row_gradients[(programs,)](
        x, dy, slots, ends, tile_expert, tile_place, weights, b_in, b_out, *descriptors, describe(hiddens, [half, n]),
        dx, dweights, gathered, db_parts, first_tile, num_tiles, E, hiddens.shape[1],
        TOP_K=top_k, DIM=dim, HIDDEN=hidden, D1=first, D2=second, BIAS=bias, ACTIVATION=activation, BLOCK_N=n,
        IN_SLOTS=tile.in_slots, OUT_SLOTS=tile.out_slots, REGISTERS=240, num_warps=4,
    )  # fmt: skip
