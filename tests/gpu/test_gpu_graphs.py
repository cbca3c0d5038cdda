"""Recorded steps on a GPU against the same steps launched one kernel after another."""

import copy

import pytest
import torch
from torch import Tensor, nn

from vlmoe.config import OptimConfig
from vlmoe.data import Batch
from vlmoe.nn import MHMoE
from vlmoe.train.graphs import WARM_UP, GraphedUpdate
from vlmoe.train.optim import make_optimizer, set_learning_rate

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = MHMoE(dim=128, hidden_dim=64, num_experts=6, top_k=2, num_heads=2, backend="triton")
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(128, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(x + self.layer(x)[0]).mean(1))


@pytest.mark.parametrize("compiled", [False, True])
def test_recorded_steps_are_the_steps(compiled):
    torch.manual_seed(0)
    first = Small().cuda()
    models = [first, copy.deepcopy(first)]
    lengths = [24, 16] * (WARM_UP + 4)
    batches = [(torch.randn(32, n, 128).cuda(), torch.randint(5, (32,)).cuda()) for n in lengths]
    losses = []
    for model, is_recorded in zip(models, (False, True), strict=True):
        optimizer = make_optimizer(model, OptimConfig(lr=1e-3))
        if compiled:
            model.layer.compile()

        def update(micro_batches, totals, model=model, optimizer=optimizer):
            part = micro_batches[0].inputs["examples"]
            with torch.autocast("cuda", torch.bfloat16):
                loss = nn.functional.cross_entropy(model(part["x"]).float(), part["y"], reduction="sum")
            loss = loss / totals["examples"]
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return {"loss": loss.detach(), "gradient_norm": norm}

        step = GraphedUpdate(update, optimizer) if is_recorded else update
        found = []
        for number, (x, y) in enumerate(batches):
            torch.manual_seed(number)
            set_learning_rate(optimizer, 1e-3 / (1 + number))
            batch = Batch({"examples": {"x": x, "y": y, "names": ["a"]}}, num_targets={"examples": 32})
            found.append(step([batch], {"examples": 32.0})["loss"].item())
        losses.append(found)
        assert not is_recorded or len(step.recorded) == 2
    assert losses[0] == losses[1]
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)
