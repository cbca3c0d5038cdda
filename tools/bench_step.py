"""`bench.py step`: whole optimiser steps of pretraining on one GPU, the models of a recipe and its twins beside each other.

A step is what the trainer does: the task's own loss under bf16 autocast (load balancing included), backward, clipping of
the gradient, fused AdamW. The batch is random, lies on the device and has the recipe's shapes and masks; texts are about as
long as captions, padded as `collate` does. Visual codes are given: their tokenizer, decoding and loading are not timed.
Drop path is off. Recorded steps are played from a CUDA graph, as `cuda_graphs: true` does.

Model FLOPs per step are three forward passes of the real tokens (padding is no work): the blocks as `vlmoe.models.cost` counts
them, and, added here, attention scores and sums (4 S^2 d per layer and sample) and both heads at masked positions. Patch
embedding, norms, router and optimiser are left out.
"""

import gc
import itertools
import math
import statistics
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from bench_cpu import processor
from torch import Tensor, nn

from vlmoe.config import ModelConfig, PretrainConfig, load
from vlmoe.data import Batch, Tokenizer, block_mask, collate, text_mask, to_device
from vlmoe.errors import UserError
from vlmoe.models import build_encoder
from vlmoe.models.build import compile_blocks, experts_backend
from vlmoe.models.cost import count_parameters, flops_per_token
from vlmoe.models.heads import PretrainModel
from vlmoe.models.visual_tokenizer import VisualTokenizer
from vlmoe.tasks.pretrain import Pretrain
from vlmoe.tasks.task import Inputs
from vlmoe.train.graphs import GraphedUpdate
from vlmoe.train.optim import learning_rate, make_optimizer, set_learning_rate

MODELS = ("dense_equal_flops", "mhmoe", "dense_equal_params", "xmoe")  # the first is what the others are compared to
VOCAB_SIZE, PAD_ID, MASK_ID = 8_002, 1, 8_001  # of 8,000 pieces, as data/train_tokenizer.py makes them
NUM_CODES = 8_192
CAPTION_LENGTH, CAPTION_SPREAD = 16, 0.4  # median tokens with <s> and </s>, and the standard deviation of its logarithm
PEAK_FLOPS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}  # dense bf16


@dataclass(frozen=True, kw_only=True)
class Plan:
    recipe: Path  # of mhmoe; those of its twins lie beside it
    models: Sequence[str]
    streams: str  # "pairs", or "all" of the recipe
    batch: int  # pairs per step; other streams in the recipe's proportion
    steps: int
    warmup: int
    compiled: bool
    recorded: bool
    device: str


def step(plan: Plan) -> Iterable[dict[str, Any]]:
    """Whole pretraining steps: tokens per second, share of the peak and memory of a recipe's model and of its twins."""
    configs = {name: _read_recipe(plan.recipe, name) for name in MODELS if name in plan.models}
    rate, failed = None, []
    for name, config in configs.items():
        try:
            row = _measure(plan, name, config)
        except Exception:  # whatever it is, the other models' rows are wanted
            print(f"{name} failed:", file=sys.stderr)
            traceback.print_exc()
            failed.append(name)
        else:
            rate = row["tokens_per_s"] if name == MODELS[0] else rate
            yield row | {"tokens_per_second_vs_dense": round(row["tokens_per_s"] / rate, 3) if rate else ""}
        gc.collect()
        if plan.device == "cuda":
            torch.cuda.empty_cache()
        torch.compiler.reset()
    if failed:
        raise SystemExit(f"no row of {', '.join(failed)}")


def machine_without_gpu() -> dict[str, str]:
    return {"hardware": processor(), "torch": torch.__version__, "cuda": "", "triton": ""}


def random_inputs(config: PretrainConfig, streams: str, batch: int) -> Inputs:
    """Collated samples of each stream as the task prepares them, with random pixels (uint8) and ids; always the same."""
    model, data, rng = config.model, config.data, np.random.default_rng(0)
    grid, most = model.image_size // model.patch_size, model.max_text_length
    inputs: Inputs = {}
    for stream in ("pairs", "images", "texts") if streams == "all" else ("pairs",):
        samples = []
        for _ in range(batch * getattr(data, stream).batch_size // data.pairs.batch_size):
            sample: dict[str, Tensor] = {}
            if stream != "texts":
                pixels = rng.integers(0, 256, (3, model.image_size, model.image_size), dtype=np.uint8)
                hidden = block_mask(grid, round(config.image_mask_ratio * grid**2), rng)
                sample = {"image": torch.from_numpy(pixels), "image_masked": torch.from_numpy(hidden)}
            if stream != "images":
                length = min(most, max(3, round(rng.lognormal(math.log(CAPTION_LENGTH), CAPTION_SPREAD))))
                ratio = config.pair_text_mask_ratio if stream == "pairs" else config.text_mask_ratio
                sample["text"] = torch.from_numpy(rng.integers(4, MASK_ID, length))
                sample["text_masked"] = torch.from_numpy(text_mask(length, ratio, rng))
            samples.append(sample)
        if samples:
            inputs[stream] = collate(samples, pad_id=PAD_ID, max_text_length=most)
    return inputs


def count_tokens(config: ModelConfig, inputs: Inputs) -> tuple[int, int, int]:
    """(tokens without padding, with it, sum over samples of the squared number of tokens without it)."""
    num_vision = 1 + (config.image_size // config.patch_size) ** 2
    real, padded, squares = 0, 0, 0
    for part in inputs.values():
        size = len(next(iter(part.values())))
        lengths = torch.full((size,), num_vision if "image" in part else 0)
        padded += int(lengths.sum())
        if "text" in part:
            lengths += (~part["text_padding"]).sum(1).to(lengths.device)
            padded += part["text"].numel()
        real += int(lengths.sum())
        squares += int(lengths.square().sum())
    return real, padded, squares


def model_flops(config: ModelConfig, tokens: int, squares: int, num_targets: dict[str, int]) -> int:
    """Of one step, as the head of this file says."""
    blocks = tokens * flops_per_token(config)
    attention = config.depth * 4 * config.dim * squares
    classes = {"text": VOCAB_SIZE, "image": NUM_CODES}
    predicted = sum(classes.get(term.rpartition("_")[2], 0) * count for term, count in num_targets.items())
    return 3 * (blocks + attention + 2 * config.dim * predicted)


def _measure(plan: Plan, name: str, config: PretrainConfig) -> dict[str, Any]:
    device = torch.device(plan.device)
    inputs = random_inputs(config, plan.streams, plan.batch)
    tokens, padded, squares = count_tokens(config.model, inputs)
    inputs = {stream: to_device(part, device) for stream, part in inputs.items()}
    torch.manual_seed(0)
    task = _task_without_files(config, inputs, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with device:
        model = PretrainModel(build_encoder(config.model, VOCAB_SIZE), VOCAB_SIZE, NUM_CODES)
    optimizer = make_optimizer(model, config.optim)
    if plan.compiled:
        compile_blocks(model)
    ms = statistics.median(_step_times(plan, config, task, model, optimizer, inputs))
    flops = model_flops(config.model, tokens, squares, task.num_targets(inputs))
    peak = PEAK_FLOPS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    total, active = count_parameters(config.model, VOCAB_SIZE, NUM_CODES)
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return {
        "recipe": plan.recipe.stem,
        "what": name,
        "compiled": plan.compiled,
        "recorded": plan.recorded,
        "backend": experts_backend(config.model, device, torch.bfloat16, compiled=plan.compiled),
        "streams": "+".join(inputs),
        "batch": plan.batch,
        "tokens": tokens,
        "padded_tokens": padded,
        "step_ms": round(ms, 2),
        "tokens_per_s": round(1e3 * tokens / ms),
        "mfu_percent": round(1e5 * flops / ms / peak, 1) if peak else "",
        "peak_memory_gib": "" if memory is None else round(memory, 2),
        "params_m": round(total / 1e6, 1),
        "active_params_m": round(active / 1e6, 1),
    }


def _step_times(
    plan: Plan,
    config: PretrainConfig,
    task: Pretrain,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Inputs,
) -> list[float]:
    """Milliseconds of each step after the warm-up; by device events, from the start of a step to that of the next."""

    def update(micro_batches: list[Batch], totals: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.autocast(plan.device, torch.bfloat16):
            loss = task.loss(model, micro_batches[0].inputs, totals)
        loss.total.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {"loss": loss.total.detach(), "gradient_norm": norm}

    if plan.recorded and plan.device == "cuda":
        update = GraphedUpdate(update, optimizer)
    totals = {term: torch.tensor(float(n), device=plan.device) for term, n in task.num_targets(inputs).items()}

    def run(number: int) -> None:
        set_learning_rate(optimizer, learning_rate(number, config.steps, config.optim))
        update([Batch(inputs)], totals)

    for number in range(plan.warmup):
        run(number)
    if plan.device != "cuda":
        times = [time.perf_counter()]
        for number in range(plan.steps):
            run(plan.warmup + number)
            times.append(time.perf_counter())
        return [1e3 * (end - start) for start, end in itertools.pairwise(times)]
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(plan.steps + 1)]
    events[0].record()
    for number, event in enumerate(events[1:]):
        run(plan.warmup + number)
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in itertools.pairwise(events)]


def _task_without_files(config: PretrainConfig, inputs: Inputs, device: torch.device) -> Pretrain:
    """The task as its loss needs it: neither a text tokenizer's file nor the run of a visual tokenizer."""
    images = max((len(part["image"]) for part in inputs.values() if "image" in part), default=0)
    codes = torch.randint(NUM_CODES, (images, (config.model.image_size // config.model.patch_size) ** 2), device=device)
    task = Pretrain.__new__(Pretrain)
    task.config = config
    task.tokenizer = cast(Tokenizer, SimpleNamespace(mask_id=MASK_ID))
    task.codes_of = cast(VisualTokenizer, SimpleNamespace(encode=lambda image: codes[: len(image)]))
    return task


def _read_recipe(recipe: Path, name: str) -> PretrainConfig:
    path = recipe if name == "mhmoe" else recipe.with_name(f"{recipe.stem}_{name}.yaml")
    try:
        config = load(path)
    except UserError as error:
        raise SystemExit(str(error)) from None
    if not isinstance(config, PretrainConfig):
        raise SystemExit(f"{path} is no recipe of task pretrain")
    if not config.data.pairs.batch_size:
        raise SystemExit(f"{path}: data.pairs.batch_size is 0, and steps are timed on pairs")
    config.model.drop_path = 0.0
    return config
