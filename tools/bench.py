"""Time layers and training steps on this machine's GPU, layers on its processor, or the loader on its cores, and append
rows to a CSV in docs/benchmarks.

python tools/bench.py layer --dim 768 --heads 4
python tools/bench.py experts
python tools/bench.py routing
python tools/bench.py step --recipe recipes/pretrain/base.yaml
python tools/bench.py loader
python tools/bench.py cpu
"""

import argparse
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import bench_cpu
import bench_experts
import bench_layer
import bench_step
import torch
from bench_table import append_row

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "benchmarks"


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


BENCHES = {"layer": bench_layer.layer, "routing": bench_layer.routing, "experts": bench_experts.experts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="bench", required=True)
    for name, bench in BENCHES.items():
        verb = verbs.add_parser(name, help=bench.__doc__)
        verb.add_argument("--repeats", type=int, default=20)
        verb.add_argument("--out", type=Path, default=FOLDER / f"{name}.csv")
        if name == "experts":
            verb.add_argument("--cases", type=int, nargs="+", help="numbers in bench_experts.CASES; all if left out")
        else:
            verb.add_argument("--tokens", type=int, default=65_536)
            verb.add_argument("--heads", type=int, default=4, help="sub-tokens per token")
            verb.add_argument("--experts", type=int, default=32)
            verb.add_argument("--top-k", type=int, default=2)
        if name == "layer":
            verb.add_argument("--dim", type=int, default=768)
            verb.add_argument("--multiple-of", type=int, default=64, help="of the experts' hidden width")
            verb.add_argument("--backends", nargs="+", default=bench_layer.BACKENDS)
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
