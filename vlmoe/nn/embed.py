"""Where images and text become vectors.

Axes: B samples, P patches (row by row over the grid), V = 1 + P vision positions, L text positions, d width.
Position tables begin with UNUSED_ROWS rows that nothing reads, as those of the released checkpoints do, so that tables
convert both ways bit for bit.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

UNUSED_ROWS = 2


class VisionEmbed(nn.Module):
    """Image -> [CLS, patches] with positions.

    Args:
        image_size: side of the (square) image in pixels, a multiple of `patch_size`.
        patch_size: side of a patch in pixels.
        dim: d.
    """

    def __init__(self, *, image_size: int, patch_size: int, dim: int) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size {image_size} is not a multiple of patch_size {patch_size}")
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_patches = (image_size // patch_size) ** 2
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.positions = nn.Parameter(torch.empty(UNUSED_ROWS + 1 + self.num_patches, dim))
        for table in (self.cls_token, self.mask_token, self.positions):
            nn.init.trunc_normal_(table, std=0.02)

    def forward(
        self, image: Float[Tensor, "B 3 H W"], is_masked: Bool[Tensor, "B P"] | None = None
    ) -> Float[Tensor, "B V d"]:
        """`is_masked` patches are replaced by the mask token before positions are added."""
        if tuple(image.shape[2:]) != (self.image_size, self.image_size):
            raise ValueError(
                f"image is {tuple(image.shape[2:])} pixels; the position table is made for {self.image_size}"
            )
        # On CPUs the convolution, which rounds as the released models do.
        patches = project_patches(image, self.proj) if image.is_cuda else self.proj(image).flatten(2).transpose(1, 2)
        if is_masked is not None:
            patches = torch.where(is_masked[..., None], self.mask_token, patches)
        x = torch.cat([self.cls_token.expand(len(image), -1, -1), patches], dim=1)
        return x + self.positions[UNUSED_ROWS:]


def project_patches(image: Float[Tensor, "B 3 H W"], proj: nn.Conv2d) -> Float[Tensor, "B P d"]:
    """`proj`, whose windows do not overlap, as one product: cuDNN is slow at it (2 ms for 1,024 images of 128 pixels)."""
    rows, columns = proj.kernel_size
    windows = image.unflatten(3, (-1, columns)).unflatten(2, (-1, rows)).permute(0, 2, 4, 1, 3, 5)
    return F.linear(windows.flatten(3).flatten(1, 2), proj.weight.flatten(1), proj.bias)


class TextEmbed(nn.Module):
    """Token ids -> vectors with positions; padding counts as a position.

    Args:
        vocab_size: rows of the token table.
        max_length: longest text in tokens.
        dim: d.
    """

    def __init__(self, *, vocab_size: int, max_length: int, dim: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.tokens = nn.Embedding(vocab_size, dim)
        self.positions = nn.Parameter(torch.empty(UNUSED_ROWS + max_length, dim))
        for table in (self.tokens.weight, self.positions):
            nn.init.trunc_normal_(table, std=0.02)

    def forward(self, text: Int[Tensor, "B L"]) -> Float[Tensor, "B L d"]:
        length = text.shape[1]
        if length > self.max_length:
            raise ValueError(f"text has {length} tokens; the position table is made for {self.max_length}")
        return self.tokens(text) + self.positions[UNUSED_ROWS : UNUSED_ROWS + length]


def resize_positions(table: Float[Tensor, "rows d"], grid: int) -> Float[Tensor, "new_rows d"]:
    """A vision position table for `grid` x `grid` patches: the first three rows (two unused, CLS) stay, the rest is
    resampled (bicubic, corners not aligned), as the released fine-tuning code does. An equal grid changes nothing.

    Raises:
        ValueError: the table is not that of a square grid.
    """
    first, patches = table[: UNUSED_ROWS + 1], table[UNUSED_ROWS + 1 :]
    old = math.isqrt(len(patches))
    if old * old != len(patches) or not old:
        raise ValueError(f"a position table of {len(table)} rows is not one of a square grid of patches")
    if old == grid:
        return table
    image = patches.T.reshape(1, -1, old, old).float()
    resized = F.interpolate(image, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([first, resized.flatten(2)[0].T.to(table.dtype)])
