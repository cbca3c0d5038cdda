"""Time layers and training steps on this machine's GPU, layers on its processor, or the loader on its cores, and append
rows to a CSV in docs/benchmarks.

python tools/bench.py layer --dim 768 --heads 4
python tools/bench.py routing
python tools/bench.py step --recipe recipes/pretrain/base.yaml
python tools/bench.py loader
python tools/bench.py cpu
"""

import argparse
import statistics
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import bench_cpu
import bench_step
import torch
from bench_table import append_row
from torch import Tensor, nn

from vlmoe.nn import MHMoE
from vlmoe.nn.budget import dense_cost, flops_parity_hidden_dim
from vlmoe.nn.dispatch import order_slots
from vlmoe.nn.ffn import FeedForward

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "benchmarks"


def layer(args: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """A dense FFN, and MH-MoE layers of as many FLOPs: compiled, bf16, forward and forward + backward."""
    dim = args.dim
    cost = dense_cost(dim, 4 * dim)
    hidden = flops_parity_hidden_dim(cost, dim=dim, top_k=args.top_k, multiple_of=args.multiple_of)
    x = torch.randn(args.tokens, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn_like(x)

    def sparse(backend: str) -> nn.Module:
        return MHMoE(
            dim=dim,
            hidden_dim=hidden,
            num_experts=args.experts,
            top_k=args.top_k,
            num_heads=args.heads,
            backend=backend,
        )

    dense = None
    for name in ("dense", *args.backends):
        torch.manual_seed(0)
        module = FeedForward(dim, 4 * dim, sub_layernorm=False) if name == "dense" else sparse(name)
        module = torch.compile(module.to("cuda", torch.bfloat16), fullgraph=name != "loop")
        row = {
            "what": name,
            "tokens": args.tokens,
            "dim": dim,
            "heads": args.heads,
            "hidden_dim": 4 * dim if name == "dense" else hidden,
            "experts": args.experts,
            "top_k": args.top_k,
            **_layer_figures(module, x, grad, repeats=args.repeats),
        }
        dense = dense or row
        row["fwd_bwd_vs_dense"] = round(row["fwd_bwd_ms"] / dense["fwd_bwd_ms"], 3)
        row["memory_vs_dense"] = round(row["extra_gib"] / dense["extra_gib"], 3)
        yield row
        del module


def routing(args: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """Softmax, top-k and the order of slots: torch's operators, and the kernels."""
    from vlmoe.nn.kernels import ops

    logits = torch.randn(args.tokens * args.heads, args.experts, device="cuda")

    def with_torch() -> None:
        order_slots(logits.softmax(-1).topk(args.top_k).indices, args.experts)

    def with_kernels() -> None:
        ops.order_slots(ops.top_k_softmax(logits, args.top_k)[1], args.experts)

    for name, function in (("torch", with_torch), ("triton", with_kernels)):
        yield {
            "what": name,
            "sub_tokens": len(logits),
            "experts": args.experts,
            "top_k": args.top_k,
            "eager_ms": _median_ms(function, args.repeats),
            "graph_ms": _median_ms(_replayed(function), args.repeats),
        }


def _layer_figures(module: Callable[..., Any], x: Tensor, grad: Tensor, repeats: int) -> dict[str, float]:
    def forward() -> Tensor:
        y = module(x)
        return y if isinstance(y, Tensor) else y[0]

    def both() -> None:
        x.grad = None
        for parameter in module.parameters():  # pyright: ignore[reportFunctionMemberAccess]
            parameter.grad = None
        forward().backward(grad)

    both_ms = _median_ms(both, repeats)
    x.grad = None
    for parameter in module.parameters():  # pyright: ignore[reportFunctionMemberAccess]
        parameter.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    extra = (torch.cuda.max_memory_allocated() - before) / 2**30
    return {"fwd_ms": _median_ms(forward, repeats), "fwd_bwd_ms": both_ms, "extra_gib": round(extra, 3)}


def _median_ms(function: Callable[[], object], repeats: int) -> float:
    """Median over `repeats` calls, after warm-up, by device events; the inputs are larger than the L2 cache."""
    for _ in range(5):
        function()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return round(statistics.median(start.elapsed_time(end) for start, end in events), 4)


def _replayed(function: Callable[[], object]) -> Callable[[], object]:
    """The same kernels from a CUDA graph: what the device needs, without the gaps between small launches."""
    function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def _machine() -> dict[str, str]:
    import triton

    return {
        "hardware": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "triton": triton.__version__,
        "commit": _commit(),
    }


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        return "unknown"


def _append(path: Path, rows: Iterable[dict[str, Any]], machine: dict[str, str]) -> None:
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items() if key not in machine), flush=True)
        append_row(path, machine | row)


BENCHES = {"layer": layer, "routing": routing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="bench", required=True)
    for name, bench in BENCHES.items():
        verb = verbs.add_parser(name, help=bench.__doc__)
        verb.add_argument("--tokens", type=int, default=65_536)
        verb.add_argument("--heads", type=int, default=4, help="sub-tokens per token")
        verb.add_argument("--experts", type=int, default=32)
        verb.add_argument("--top-k", type=int, default=2)
        verb.add_argument("--repeats", type=int, default=20)
        verb.add_argument("--out", type=Path, default=FOLDER / f"{name}.csv")
        if name == "layer":
            verb.add_argument("--dim", type=int, default=768)
            verb.add_argument("--multiple-of", type=int, default=64, help="of the experts' hidden width")
            verb.add_argument("--backends", nargs="+", default=["triton", "grouped"])
    verb = verbs.add_parser("loader", help="Decoding and training views of photographs, against Pillow and webdataset.")
    verb.add_argument("--samples", type=int, default=1000)
    verb.add_argument("--repeats", type=int, default=9)
    verb.add_argument("--out", type=Path, default=FOLDER / "loader.csv")
    verb = verbs.add_parser("cpu", help=bench_cpu.cpu.__doc__)
    verb.add_argument("--repeats", type=int, default=9)
    verb.add_argument("--out", type=Path, default=FOLDER / "cpu.csv")
    verb = verbs.add_parser("step", help=bench_step.step.__doc__)
    verb.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "pretrain" / "base.yaml")
    verb.add_argument("--models", nargs="+", choices=bench_step.MODELS, default=bench_step.MODELS)
    verb.add_argument("--streams", choices=("pairs", "all"), default="pairs", help="pairs alone, or the recipe's three")
    verb.add_argument("--batch", type=int, default=256, help="pairs per step")
    verb.add_argument("--steps", type=int, default=20)
    verb.add_argument("--warmup", type=int, default=5)
    verb.add_argument("--no-compile", dest="compiled", action="store_false")
    verb.add_argument("--recorded", action="store_true", help="play steps from a CUDA graph, as cuda_graphs: true does")
    verb.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    verb.add_argument("--out", type=Path, default=FOLDER / "step.csv")
    args = parser.parse_args()
    if args.bench == "cpu":
        return _append(args.out, bench_cpu.cpu(repeats=args.repeats), bench_cpu.machine() | {"commit": _commit()})
    if args.bench == "loader":
        import bench_loader

        rows = bench_loader.loader(samples=args.samples, repeats=args.repeats)
        return _append(args.out, rows, bench_loader.machine() | {"commit": _commit()})
    if getattr(args, "device", "cuda") == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench times GPU kernels and finds no CUDA device")
    if args.bench == "step":
        plan = bench_step.Plan(**{name: value for name, value in vars(args).items() if name not in ("bench", "out")})
        machine = _machine() if args.device == "cuda" else bench_step.machine_without_gpu()
        return _append(args.out, bench_step.step(plan), machine | {"commit": _commit()})
    _append(args.out, BENCHES[args.bench](args), _machine())


if __name__ == "__main__":
    main()
