"""The contrastive loss of a dual encoder over the batch of all ranks.

Axes: B pairs of this rank, N pairs of all ranks (N = world size * B), D embedding.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def contrastive_loss(
    image_embedding: Float[Tensor, "B D"],
    text_embedding: Float[Tensor, "B D"],
    logit_scale: Float[Tensor, ""],
    image_key: Int[Tensor, " B"],
) -> Float[Tensor, ""]:
    """Symmetric cross-entropy of cosines (CLIP, arXiv:2103.00020, figure 3), summed over this rank's pairs.

    Pair i of a rank is told from the pairs of all ranks; the embeddings of the others have a gradient too, so that the
    sum over ranks of this loss has the gradient that one process with all the pairs would compute. Two captions of one
    picture in a batch (equal `image_key`) are not held against each other, which the released code does.
    """
    first = dist.get_rank() * len(image_key) if dist.is_initialized() else 0
    own = torch.arange(first, first + len(image_key), device=image_key.device)
    is_same = image_key[:, None] == _gather(image_key)
    is_same.scatter_(1, own[:, None], False)
    with torch.autocast(image_key.device.type, enabled=False):
        losses = [
            F.cross_entropy(
                (logit_scale.float() * queries.float() @ _gather_with_gradient(candidates.float()).T).masked_fill(
                    is_same, -torch.inf
                ),
                own,
                reduction="sum",
            )
            for queries, candidates in ((image_embedding, text_embedding), (text_embedding, image_embedding))
        ]
    return (losses[0] + losses[1]) / 2


def _gather_with_gradient(x: Float[Tensor, "B D"]) -> Float[Tensor, "N D"]:
    return _GatherWithGradient.apply(x) if dist.is_initialized() else x


def _gather(x: Tensor) -> Tensor:
    """The rows of every rank, in rank order; all ranks have equally many."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return _gather(x)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> Tensor:
        gradient = grad_outputs[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]
