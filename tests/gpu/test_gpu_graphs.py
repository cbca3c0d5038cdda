"""Recorded steps on a GPU against the same steps launched one kernel after another."""

import copy

import pytest
import torch
from torch import Tensor, nn

from vlmoe.config import OptimConfig, load
from vlmoe.data import Batch
from vlmoe.models.weights import latest_checkpoint, read_tensors
from vlmoe.nn import MHMoE
from vlmoe.train.graphs import WARM_UP, GraphedUpdate
from vlmoe.train.optim import make_optimizer, set_learning_rate
from vlmoe.train.trainer import train

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
        torch.compiler.reset()  # what was compiled before decides which sums are split how
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
            found.append(step([batch], {"examples": torch.tensor(32.0).cuda()})["loss"].item())
        losses.append(found)
        assert not is_recorded or len(step.recorded) == 2
    assert losses[0] == losses[1]
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


FORMATS = {"vqa": "vqa", "retrieval": "coco", "captioning": "coco", "nlvr2": "nlvr2", "classification": "instances"}


@pytest.mark.parametrize("task", ["pretrain", *FORMATS])
def test_a_recorded_run_ends_with_the_weights_of_one_that_is_not(task, pretrain_recipe, finetune_recipe, tmp_path):
    own = {"min_answer_count": 1} if task == "vqa" else {}
    recipe = pretrain_recipe if task == "pretrain" else finetune_recipe(task, FORMATS[task], **own)
    model = ["model.dim=128", "model.stem=conv", "model.ffn.backend=triton", "model.ffn.num_experts=4"]
    weights = []
    for is_recorded in (False, True):
        run = tmp_path / f"run_{is_recorded}"
        train(load(recipe, [
            *model, f"cuda_graphs={is_recorded}", f"out={run}", "device=cuda", "precision=bf16", "steps=8",
        ]))  # fmt: skip
        weights.append(read_tensors(latest_checkpoint(run) / "model.safetensors"))
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name
