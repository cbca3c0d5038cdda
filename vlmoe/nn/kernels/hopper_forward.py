# type: ignore  # kernels are Gluon's language, which checkers read as Python
"""The experts' MLPs on Hopper, forward: `expert_mlp.forward` in the manner of `hopper`, with its weights in the same rings.

Axes as there. Nothing but x stays in shared memory, so blocks of hidden columns can be wide.
"""

from collections.abc import Mapping
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from vlmoe.nn.kernels.activations import activate
from vlmoe.nn.kernels.configs import HopperTile
from vlmoe.nn.kernels.hopper import (
    HALF_ROWS,
    are_slots,
    barrier,
    constants,
    describe_weights,
    find_tile,
    load_slots,
    row_offsets,
    store_slots,
    stream_weights,
)
from vlmoe.nn.kernels.launch import launch_by_name


@gluon.jit
def finish(acc, bias, weight, WIDTH: gl.constexpr, LAYOUT: gl.constexpr, BIAS: gl.constexpr):
    """(acc + bias) * weight."""
    if BIAS:
        acc += gl.load(bias + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))).to(gl.float32)[None, :]
    return acc * gl.convert_layout(weight, gl.SliceLayout(1, LAYOUT))[:, None]


@gluon.jit
def multiply_forward(
    tiles, pointers, rows, rings, full, empty, HALF: gl.constexpr, TOP_K: gl.constexpr,
    HIDDEN: gl.constexpr, DIM: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr, BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr, BLOCK_N: gl.constexpr, IN_SLOTS: gl.constexpr, OUT_SLOTS: gl.constexpr,
):  # fmt: skip
    """One warpgroup: its half of every tile of this program."""
    HIDDEN_MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    MMA1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D1, 16])
    MMA2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D2 if D2 > 0 else D1, 16])
    ROWS1: gl.constexpr = gl.BlockedLayout([1, 8], [1024 // D1, D1 // 32], [1, 4], [1, 0])
    ROWS2: gl.constexpr = gl.BlockedLayout([1, 8], [1024 // D2, D2 // 32], [1, 4], [1, 0]) if D2 > 0 else ROWS1
    x, slots, weights, b_in, b_out, y = pointers
    x1, x2 = rows
    in1, in2, out1, out2 = rings
    in_full, out_full = full
    in_empty, out_empty = empty
    zeros = gl.zeros([HALF_ROWS, BLOCK_N], gl.float32, HIDDEN_MMA)
    step = 0
    expert, place, end = find_tile(tiles, gl.program_id(0), HALF)
    slot1, slot2 = load_slots(slots, place, end, ROWS1), load_slots(slots, place, end, ROWS2)
    for tile in range(gl.program_id(0), tiles[3], gl.num_programs(0)):
        here, source = are_slots(place, end, ROWS1), row_offsets(slot1, TOP_K, DIM, 0, D1, ROWS1)
        rows1 = gl.load(x + source, mask=here[:, None], other=0.0)
        rows2 = rows1
        if D2 > 0:
            here, source = are_slots(place, end, ROWS2), row_offsets(slot2, TOP_K, DIM, D1, D2, ROWS2)
            rows2 = gl.load(x + source, mask=here[:, None], other=0.0)
        x1.store(rows1)
        if D2 > 0:
            x2.store(rows2)
        fence_async_shared()
        barrier()
        biases = b_in + expert * HIDDEN + gl.arange(0, BLOCK_N, gl.SliceLayout(0, HIDDEN_MMA))
        acc1 = gl.zeros([HALF_ROWS, D1], gl.float32, MMA1)
        acc2 = gl.zeros([HALF_ROWS, D2 if D2 > 0 else D1], gl.float32, MMA2)
        for n in range(0, HIDDEN, BLOCK_N):
            in_slot = step % IN_SLOTS
            out_slot = step % OUT_SLOTS
            mbarrier.wait(in_full.index(in_slot), (step // IN_SLOTS) & 1)
            h = warpgroup_mma(x1, in1.index(in_slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
            if D2 > 0:
                h = warpgroup_mma(x2, in2.index(in_slot).permute((1, 0)), h, is_async=True)
            if BIAS:
                bias = gl.load(biases + n)
            h = warpgroup_mma_wait(0, deps=[h])
            mbarrier.arrive(in_empty.index(in_slot))
            if BIAS:
                h += bias.to(gl.float32)[None, :]
            a = activate(h, h, ACTIVATION).to(x.dtype.element_ty)
            mbarrier.wait(out_full.index(out_slot), (step // OUT_SLOTS) & 1)
            acc1 = warpgroup_mma(gl.convert_layout(a, gl.DotOperandLayout(0, MMA1, 2)),
                                 out1.index(out_slot).permute((1, 0)), acc1, is_async=True)  # fmt: skip
            if D2 > 0:
                acc2 = warpgroup_mma(gl.convert_layout(a, gl.DotOperandLayout(0, MMA2, 2)),
                                     out2.index(out_slot).permute((1, 0)), acc2, is_async=True)  # fmt: skip
                acc1, acc2 = warpgroup_mma_wait(0, deps=[acc1, acc2])
            else:
                acc1 = warpgroup_mma_wait(0, deps=[acc1])
            mbarrier.arrive(out_empty.index(out_slot))
            step += 1
        weight = gl.load(weights + load_slots(slots, place, end, MMA1))
        next_expert, next_place, next_end = find_tile(tiles, tile + gl.num_programs(0), HALF)
        next_slot1 = load_slots(slots, next_place, next_end, ROWS1)
        next_slot2 = load_slots(slots, next_place, next_end, ROWS2)
        slot1, slot2 = load_slots(slots, place, end, ROWS1), load_slots(slots, place, end, ROWS2)  # again: registers
        acc1 = finish(acc1, b_out + expert * DIM, weight, D1, MMA1, BIAS)
        store_slots(y, slot1, place, end, acc1, x1, DIM, 0, D1, ROWS1)
        if D2 > 0:
            acc2 = finish(acc2, b_out + expert * DIM + D1, weight, D2, MMA2, BIAS)
            store_slots(y, slot2, place, end, acc2, x2, DIM, D1, D2, ROWS2)
        barrier()
        expert, place, end, slot1, slot2 = next_expert, next_place, next_end, next_slot1, next_slot2


@gluon.jit
def forward(
    x, slots, ends, tile_expert, tile_place, tile_base, weights, b_in, b_out, in_desc1, in_desc2, out_desc1, out_desc2,
    y, E,
    TOP_K: gl.constexpr, DIM: gl.constexpr, HIDDEN: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr,
    BIAS: gl.constexpr, ACTIVATION: gl.constexpr, BLOCK_N: gl.constexpr,
    IN_SLOTS: gl.constexpr, OUT_SLOTS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """See `expert_mlp.forward`."""
    dtype: gl.constexpr = x.dtype.element_ty
    W2: gl.constexpr = D2 if D2 > 0 else 16
    rows1 = gl.allocate_shared_memory(dtype, [2, HALF_ROWS, D1], gl.NVMMASharedLayout.get_default_for([64, D1], dtype))
    rows2 = rows1
    in1 = gl.allocate_shared_memory(dtype, [IN_SLOTS, BLOCK_N, D1], in_desc1.layout)
    out1 = gl.allocate_shared_memory(dtype, [OUT_SLOTS, D1, BLOCK_N], out_desc1.layout)
    in2, out2 = in1, out1
    if D2 > 0:
        rows2 = gl.allocate_shared_memory(
            dtype, [2, HALF_ROWS, W2], gl.NVMMASharedLayout.get_default_for([64, W2], dtype)
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
    pointers = (x, slots, weights, b_in, b_out, y)
    rings, full, empty = (in1, in2, out1, out2), (in_full, out_full), (in_empty, out_empty)
    rows_a = (rows1.index(0), rows2.index(0))
    rows_b = (rows1.index(1), rows2.index(1))
    matrices = (in_desc1, in_desc2, out_desc1, out_desc2)
    gl.warp_specialize(
        [
            (multiply_forward, (tiles, pointers, rows_a, rings, full, empty, gl.constexpr(0), TOP_K, HIDDEN, DIM, D1,
                                D2, BIAS, ACTIVATION, BLOCK_N, IN_SLOTS, OUT_SLOTS)),
            (multiply_forward, (tiles, pointers, rows_b, rings, full, empty, gl.constexpr(1), TOP_K, HIDDEN, DIM, D1,
                                D2, BIAS, ACTIVATION, BLOCK_N, IN_SLOTS, OUT_SLOTS)),
            (stream_weights, (tiles, matrices, rings, full, empty, HIDDEN, DIM, D1, D2, BLOCK_N, IN_SLOTS,
                              OUT_SLOTS)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


def launch_forward(tile: HopperTile, programs: int, arguments: Mapping[str, Any]) -> None:
    """`arguments` by the names of the portable kernel and of this one."""
    described = describe_weights(arguments["w_in"], arguments["w_out"], tile.block_n)
    launch_by_name(forward, (programs,), {**arguments, **described, **constants(tile)}, num_warps=4)
