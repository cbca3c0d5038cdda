"""What `bench.py experts` times on a GPU: whether "auto" takes the faster backend, shape by shape."""

import argparse
from collections.abc import Iterable
from typing import Any

import torch
from bench_table import median_ratio
from bench_time import median, replayed, rounds_ms

from vlmoe.nn.experts import Experts, fastest_backend

ROUNDS = 3
BACKENDS = ("grouped", "triton")
USUAL = {
    "rows": 65_536, "dim": 192, "hidden_dim": 1152, "experts": 32, "top_k": 2, "activation": "gelu", "bias": True,
    "routing": "even",
}  # fmt: skip
CASES: tuple[dict[str, Any], ...] = (
    {},
    *({"dim": dim, "hidden_dim": 6 * dim} for dim in (64, 96, 128, 160, 256, 320, 384)),
    *({"activation": name} for name in ("relu", "swiglu")),
    *({"dim": dim, "hidden_dim": 4 * dim, "activation": "swiglu"} for dim in (64, 128, 256)),
    {"bias": False},
    {"hidden_dim": 1136},
    {"experts": 1, "top_k": 1},
    *({"experts": experts} for experts in (8, 128, 256)),
    *({"top_k": top_k} for top_k in (1, 3)),
    *({"rows": rows} for rows in (1024, 8192, 262_144)),
    {"rows": 1024, "dim": 96, "hidden_dim": 256, "experts": 8},
    {"routing": "skewed"},
)  # each differs from USUAL in little


def experts(args: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """Forward + backward of the experts alone, the order of slots with them, on both backends: compiled, bf16, played from a
    CUDA graph and launched. With "skewed" routing the first experts have most slots, and the last ones none."""
    for number, differs in enumerate(CASES):
        if args.cases and number not in args.cases:
            continue
        case = USUAL | differs
        torch.compiler.reset()
        passes = [_pass(case, backend) for backend in BACKENDS]
        row = {"auto": _auto(case), **case}
        for prefix, how in (("", replayed), ("launched_", lambda function: function)):
            grouped, triton = rounds_ms([how(each) for each in passes], args.repeats, ROUNDS)
            row |= {
                f"{prefix}grouped_ms": median(grouped),
                f"{prefix}triton_ms": median(triton),
                f"{prefix}triton_vs_grouped": round(median_ratio(triton, grouped), 3),
            }
        yield row


def _pass(case: dict[str, Any], backend: str) -> Any:
    torch.manual_seed(0)
    rows, dim, E = case["rows"], case["dim"], case["experts"]
    module = Experts(dim, case["hidden_dim"], E, activation=case["activation"], bias=case["bias"], backend=backend)
    compiled = torch.compile(module.to("cuda", torch.bfloat16), fullgraph=True)
    x = torch.randn(rows, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn_like(x)
    scores = torch.rand(rows, E, device="cuda")
    if case["routing"] == "skewed":
        scores -= torch.arange(E, device="cuda") / E
    ids, weights = (
        scores.topk(case["top_k"]).indices,
        torch.rand(rows, case["top_k"], device="cuda", requires_grad=True),
    )
    inputs = (x, weights, *module.parameters())

    def both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(compiled(x, ids, weights), inputs, grad)

    both()
    return both


def _auto(case: dict[str, Any]) -> str:
    x = torch.empty(0, case["dim"], device="cuda", dtype=torch.bfloat16)
    return fastest_backend(x, case["hidden_dim"], case["activation"], compiled=True)
