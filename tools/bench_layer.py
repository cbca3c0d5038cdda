"""What `bench.py layer` and `bench.py routing` time on a GPU."""

import argparse
import unittest.mock
from collections.abc import Iterable
from typing import Any

import torch
from bench_table import median_ratio
from bench_time import median, replayed, rounds_ms
from torch import Tensor, nn

from vlmoe.nn import MHMoE, kernels
from vlmoe.nn.budget import dense_cost, flops_parity_hidden_dim
from vlmoe.nn.dispatch import order_slots
from vlmoe.nn.ffn import FeedForward

BACKENDS = ("triton", "grouped", "torch")
WAITING = ("loop", "batched")  # for the device: neither one graph nor recorded


def layer(args: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """A dense FFN, and MH-MoE layers of as many FLOPs: compiled, bf16, forward and forward + backward; played from a CUDA graph
    ("recorded"), which leaves the host out, and launched.

    Each runs at the clock at which it can run on: under such work a card's power limit slows it down by a tenth, within less
    than a second. A ratio is the median of those within each round. "torch" is "grouped" in torch's operators alone: also
    its gate, top-k and order of slots are not ours.
    """
    hidden = flops_parity_hidden_dim(
        dense_cost(args.dim, 4 * args.dim), dim=args.dim, top_k=args.top_k, multiple_of=args.multiple_of
    )
    x = torch.randn(args.tokens, args.dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn_like(x)
    passes = {name: _Passes(name, args, hidden, x, grad) for name in ("dense", *args.backends)}
    extra_gib = {name: each.extra_gib() for name, each in passes.items()}
    for recorded in (True, False):
        timed = {name: each for name, each in passes.items() if not (recorded and name in WAITING)}
        how = replayed if recorded else lambda function: function
        both_ms = rounds_ms([how(each.both) for each in timed.values()], args.repeats)
        forward_ms = rounds_ms([how(each.forward) for each in timed.values()], args.repeats)
        for name, both, forward in zip(timed, both_ms, forward_ms, strict=True):
            yield {
                "what": name,
                "tokens": args.tokens,
                "dim": args.dim,
                "heads": args.heads,
                "hidden_dim": 4 * args.dim if name == "dense" else hidden,
                "experts": args.experts,
                "top_k": args.top_k,
                "recorded": recorded,
                "fwd_ms": median(forward),
                "fwd_bwd_ms": median(both),
                "extra_gib": round(extra_gib[name], 3),
                "fwd_bwd_vs_dense": round(median_ratio(both, both_ms[0]), 3),
                "memory_vs_dense": round(extra_gib[name] / extra_gib["dense"], 3),
            }


def routing(args: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """Softmax, top-k and the order of slots: torch's operators, and the kernels."""
    from vlmoe.nn.kernels import routing_ops

    logits = torch.randn(args.tokens * args.heads, args.experts, device="cuda")

    def with_torch() -> None:
        order_slots(logits.softmax(-1).topk(args.top_k).indices, args.experts)

    def with_kernels() -> None:
        routing_ops.order_slots(routing_ops.top_k_softmax(logits, args.top_k)[1], args.experts)

    for name, function in (("torch", with_torch), ("triton", with_kernels)):
        yield {
            "what": name,
            "sub_tokens": len(logits),
            "experts": args.experts,
            "top_k": args.top_k,
            "eager_ms": median(rounds_ms([function], args.repeats)[0]),
            "graph_ms": median(rounds_ms([replayed(function)], args.repeats)[0]),
        }


class _Passes:
    """One layer's, forward alone and forward + backward. The first is made here, since it compiles."""

    def __init__(self, name: str, args: argparse.Namespace, hidden: int, x: Tensor, grad: Tensor) -> None:
        torch.manual_seed(0)
        if name == "dense":
            module: nn.Module = FeedForward(args.dim, 4 * args.dim, sub_layernorm=False)
        else:
            module = MHMoE(
                dim=args.dim,
                hidden_dim=hidden,
                num_experts=args.experts,
                top_k=args.top_k,
                num_heads=args.heads,
                backend="grouped" if name == "torch" else name,
            )
        module.to("cuda", torch.bfloat16)
        self.inputs, self.grad = (x, *module.parameters()), grad
        self.module = torch.compile(module, fullgraph=name not in WAITING)
        self.has_kernels = unittest.mock.patch.object(kernels, "HAS_TRITON", name != "torch")
        self.both()

    def forward(self) -> Tensor:
        with self.has_kernels:
            y = self.module(self.inputs[0])
        return y if isinstance(y, Tensor) else y[0]

    def both(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(), self.inputs, self.grad)

    def extra_gib(self) -> float:
        """Most memory that forward and backward take beside parameters, input and output's gradient; gradients count."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.both()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
