"""`bench.py cpu`: sparse layers on this machine's processor against a dense FFN of as many FLOPs, every backend."""

import platform
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from bench_table import median_ratio
from torch import Tensor, nn

from vlmoe.nn import MHMoE
from vlmoe.nn.budget import dense_cost, flops_parity_hidden_dim
from vlmoe.nn.ffn import FeedForward
from vlmoe.train.hardware import multiplies_bf16
from vlmoe.train.memory import keep_freed_memory

SHAPES = ((192, 2, 20, 1024), (384, 3, 30, 2048), (768, 4, 32, 2048))  # width, heads, experts, tokens
BACKENDS = ("auto", "loop", "batched", "grouped")
TOP_K = 2


def cpu(*, repeats: int) -> Iterable[dict[str, Any]]:
    """Forward + backward of one layer, in bf16 too where the processor multiplies it (elsewhere it is emulated, and no recipe
    takes it). All ways of a shape take turns, so that a busy machine slows all of them alike; `grouped` in bf16 comes after the
    others, for it has a product compiled for every number of slots, and oneDNN forgets theirs."""
    keep_freed_memory()  # as training does
    precisions = ("fp32", "bf16") if multiplies_bf16(torch.device("cpu")) else ("fp32",)
    for dim, heads, experts, tokens in SHAPES:
        hidden = flops_parity_hidden_dim(dense_cost(dim, 4 * dim), dim=dim, top_k=TOP_K)
        for precision in precisions:
            torch.manual_seed(0)
            ways: dict[str, nn.Module] = {"dense": FeedForward(dim, 4 * dim, sub_layernorm=False)}
            for backend in BACKENDS:
                ways[backend] = MHMoE(
                    dim=dim, hidden_dim=hidden, num_experts=experts, top_k=TOP_K, num_heads=heads, backend=backend
                )
                ways[backend].load_state_dict(ways[BACKENDS[0]].state_dict())  # whose experts are as full
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            alone = ("grouped",) if precision == "bf16" else ()
            for turns in ([name for name in ways if name not in alone], alone):
                for repeat in range(-2, repeats):  # two to warm up
                    x = torch.randn(tokens, dim)
                    for name in turns:
                        taken = _time(ways[name], x.clone().requires_grad_(), is_bf16=precision == "bf16")
                        if repeat >= 0:
                            seconds[name].append(taken)
            for name, taken in seconds.items():
                yield {
                    "tokens": tokens, "dim": dim, "heads": heads, "experts": experts, "top_k": TOP_K, "precision": precision,
                    "what": name, "fwd_bwd_ms": round(1e3 * statistics.median(taken), 2),
                    "vs_dense": round(median_ratio(taken, seconds["dense"]), 3),
                }  # fmt: skip


def machine() -> dict[str, str]:
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    has = [name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if flags.get(name)]
    return {
        "hardware": processor(),
        "has": " ".join(has),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
    }


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _time(module: nn.Module, x: Tensor, *, is_bf16: bool) -> float:
    started = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
        y = module(x)
    y = y if isinstance(y, Tensor) else y[0]
    y.float().square().mean().backward()
    taken = time.perf_counter() - started
    module.zero_grad()  # as training does: the next step then finds room, and adds to no older gradients
    return taken
