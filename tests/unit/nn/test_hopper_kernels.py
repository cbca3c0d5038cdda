"""The Gluon kernels, which no interpreter runs, compiled for Hopper without a GPU: with the Triton that is installed here, into
the shared memory that a block can have, without ptxas putting products one after another, and with a barrier of a warpgroup
before each of its arrivals.

`tests/gpu/test_gpu_kernels.py` runs them.
"""

import itertools
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from vlmoe.nn.kernels import LEAST_SHARED, configs, hopper, hopper_forward, hopper_weights  # noqa: E402

PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
FLOATS = ("weights", "tile_weights", "dweights", "bias_parts", "parts")
HALVES = ("x", "dy", "dx", "y", "b_in", "b_out")
INTEGERS = ("slots", "ends", "tile_expert", "tile_place", "tile_base")
HIDDEN = 1152
SERIALIZED = "C7512", "C7515"  # ptxas: "wgmma.mma_async instructions are serialized"


def compiled(
    kernel: Any, constants: dict[str, Any], blocks: dict[str, tuple[int, int]], dtype: str, folder: Path
) -> tuple[int, str, str]:
    """Bytes of shared memory, ptxas's report, and the PTX. `blocks` are those of the tensor descriptors."""
    signature, values, attributes = {}, {}, {}
    for at, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(at,)] = "constexpr", constants[name]
        elif name in blocks:
            layout = gl.NVMMASharedLayout.get_default_for(list(blocks[name]), gl.dtype(dtype))
            signature[name] = f"tensordesc<{dtype}{list(blocks[name])},{layout!r}>"
        elif name in FLOATS + HALVES + INTEGERS:
            signature[name] = "*fp32" if name in FLOATS else f"*{dtype}" if name in HALVES else "*i32"
            attributes[(at,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    source = GluonASTSource(kernel, signature, values, attributes)
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    ptx = folder / "kernel.ptx"
    ptx.write_text(done.asm["ptx"])
    command = [str(PTXAS), "-v", "--gpu-name=sm_90a", str(ptx), "-o", str(folder / "kernel.cubin")]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return done.metadata.shared, report, done.asm["ptx"]


def before_arrivals(ptx: str) -> list[str]:
    """What comes before each arrival of a warpgroup, of what touches shared memory, waits or jumps."""
    found = re.findall(
        r"^\s*(?:@\S+ )?((?:bar|barrier|ld|st|ldmatrix|stmatrix|wgmma|mbarrier|bra)\.?\S*)", ptx, re.MULTILINE
    )
    return [last for last, here in itertools.pairwise(found) if here.startswith("mbarrier.arrive.shared")]


@pytest.mark.parametrize(
    "dim, activation, bias, dtype",
    [
        (128, "gelu", True, "bf16"),
        (192, "gelu", True, "bf16"),
        (256, "gelu", True, "bf16"),
        (192, "relu", False, "fp16"),
    ],
)
def test_they_compile_for_hopper(
    dim: int, activation: str, bias: bool, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    first, second = configs.split_width(dim)
    shape = {
        "TOP_K": 2,
        "DIM": dim,
        "HIDDEN": HIDDEN,
        "D1": first,
        "D2": second,
        "BIAS": bias,
        "ACTIVATION": activation,
    }

    def matrices(block: int) -> dict[str, tuple[int, int]]:
        widths = (first, second or first)
        return {f"in_desc{i}": (block, width) for i, width in enumerate(widths, 1)} | {
            f"out_desc{i}": (width, block) for i, width in enumerate(widths, 1)
        }

    by_row, by_weight = configs.hopper_row_gradients_tile(dim, HIDDEN), configs.hopper_weight_gradients_tile(dim)
    assert by_row is not None
    assert by_row.block_n == by_weight.block_f  # one description of the weights serves both
    made = [
        compiled(hopper.row_gradients, shape | hopper.constants(by_row), matrices(by_row.block_n), dtype, tmp_path),
        compiled(
            hopper_weights.weight_gradients,
            shape | hopper_weights.constants(by_weight) | {"PLACES": 54, "BLOCK_M": configs.tile_slots(dim)},
            matrices(by_weight.block_f),
            dtype,
            tmp_path,
        ),
    ]
    if forward := configs.hopper_forward_tile(dim, HIDDEN):
        made.append(
            compiled(
                hopper_forward.forward, shape | hopper.constants(forward), matrices(forward.block_n), dtype, tmp_path
            )
        )
    for shared, report, ptx in made:
        assert shared <= LEAST_SHARED
        assert not any(code in report for code in SERIALIZED), report
        assert set(before_arrivals(ptx)) == {"bar.sync"}
