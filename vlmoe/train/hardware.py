"""What a run computes on: device, precision, and the backend of its experts."""

import torch

from vlmoe.config import ModelConfig, RunConfig
from vlmoe.models.build import check_backend, describe_experts


def precision(config: RunConfig, device: torch.device) -> str:
    """The recipe's, with `auto` decided: bf16 where the hardware multiplies it natively."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if multiplies_bf16(device) else "fp32"


def multiplies_bf16(device: torch.device) -> bool:
    """Natively, not emulated."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    can = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(can.get("amx_bf16") or can.get("avx512_bf16"))


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision(config, device) == "bf16")


def check_experts(config: RunConfig, device: torch.device) -> None:
    """Raises UserError where the recipe's backend cannot run here."""
    model = getattr(config, "model", None)
    if isinstance(model, ModelConfig):
        check_backend(model, device, _product_dtype(config, device))


def describe_hardware(config: RunConfig, device: torch.device, world_size: int) -> str:
    is_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if is_gpu else f"CPU with {torch.get_num_threads()} threads"
    found = f"{world_size} x {name}, {precision(config, device)}"
    model = getattr(config, "model", None)
    if not isinstance(model, ModelConfig):
        return found
    experts = describe_experts(model, device, _product_dtype(config, device), compiled=config.compile)
    return f"{found}, experts on {experts}" if experts else found


def _product_dtype(config: RunConfig, device: torch.device) -> torch.dtype:
    return torch.bfloat16 if precision(config, device) == "bf16" else torch.float32
