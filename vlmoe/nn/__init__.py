"""Layers: keyword arguments in, tensors out. Nothing here knows recipes or data."""

from vlmoe.nn.experts import Experts, experts
from vlmoe.nn.mhmoe import MHMoE
from vlmoe.nn.moe import MoE
from vlmoe.nn.router import Routing, TopKRouter, load_balancing_loss, router_z_loss

__all__ = ["Experts", "MHMoE", "MoE", "Routing", "TopKRouter", "experts", "load_balancing_loss", "router_z_loss"]
