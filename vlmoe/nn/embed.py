"""Where images and text become vectors.

Axes: B samples, P patches (row by row over the grid), V = 1 + P vision positions, L text positions, d width.
Position tables begin with UNUSED_ROWS rows that nothing reads, as those of the released checkpoints do, so that tables
convert both ways bit for bit.
"""

import math
from typing import Literal

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
        stem: "linear" projects the pixels of each patch (ViT, BEiT-3); "conv" is a `ConvStem`.
    """

    def __init__(
        self, *, image_size: int, patch_size: int, dim: int, stem: Literal["linear", "conv"] = "linear"
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size {image_size} is not a multiple of patch_size {patch_size}")
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_patches = (image_size // patch_size) ** 2
        self.proj = (
            ConvStem(patch_size, dim)
            if stem == "conv"
            else nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)
        )
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.positions = nn.Parameter(torch.empty(UNUSED_ROWS + 1 + self.num_patches, dim))
        for table in (self.cls_token, self.mask_token, self.positions):
            nn.init.trunc_normal_(table, std=0.02)

    def forward(
        self, image: Float[Tensor, "B 3 H W"], is_masked: Bool[Tensor, "B P"] | None = None
    ) -> Float[Tensor, "B V d"]:
        """`is_masked` patches are replaced by the mask token before positions are added; no other patch sees them."""
        if tuple(image.shape[2:]) != (self.image_size, self.image_size):
            raise ValueError(
                f"image is {tuple(image.shape[2:])} pixels; the position table is made for {self.image_size}"
            )
        if isinstance(self.proj, ConvStem) and is_masked is not None:
            image = grey_out(image, is_masked, self.patch_size)
        # On CPUs the convolution, which rounds as the released models do.
        if isinstance(self.proj, nn.Conv2d) and image.is_cuda:
            patches = project_patches(image, self.proj)
        else:
            patches = self.proj(image).flatten(2).transpose(1, 2)
        if is_masked is not None:
            patches = torch.where(is_masked[..., None], self.mask_token, patches)
        x = torch.cat([self.cls_token.expand(len(image), -1, -1), patches], dim=1)
        return x + self.positions[UNUSED_ROWS:]


class ConvStem(nn.Module):
    """Patches by overlapping convolutions that halve the image step by step (Xiao et al. 2021, arXiv:2106.14881).

    Each scale begins with a 3 x 3 convolution of stride 2, and all but the first have one of stride 1 after it, with GELU
    after each; channels double from scale to scale up to d. A 1 x 1 convolution comes last. Without the norms of the paper,
    whose statistics a batch would share. A small model that sees few pictures learns shapes much sooner from it than from
    linear patches, also in styles it has not seen (docs/benchmarks).

    Args:
        patch_size: side of a patch in pixels, a power of two from 2.
        dim: d, a multiple of half a patch's side.

    Raises:
        ValueError: another size.
    """

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        scales = patch_size.bit_length() - 1
        if patch_size < 2 or patch_size != 2**scales or dim % (patch_size // 2):
            raise ValueError(
                f"stem conv needs a patch_size that is a power of two, and a dim that patch_size / 2 divides; "
                f"patch_size is {patch_size} and dim {dim}"
            )
        self.convs = nn.ModuleList()
        channels = 3
        for scale in range(scales):
            width = 2 * dim * 2**scale // patch_size
            self.convs.append(nn.Conv2d(channels, width, 3, stride=2, padding=1))
            if scale:
                self.convs.append(nn.Conv2d(width, width, 3, padding=1))
            channels = width
        self.proj = nn.Conv2d(dim, dim, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He's initialisation, so that the signal neither grows nor fades without norms."""
        for conv in self.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.kaiming_normal_(conv.weight, nonlinearity="linear" if conv is self.proj else "relu")
                assert conv.bias is not None
                nn.init.zeros_(conv.bias)

    def forward(self, image: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B d rows columns"]:
        x = image.contiguous(memory_format=torch.channels_last)  # the faster order for convolutions
        for conv in self.convs:
            x = F.gelu(conv(x))
        return self.proj(x)


def grey_out(
    image: Float[Tensor, "B 3 H W"], is_masked: Bool[Tensor, "B P"], patch_size: int
) -> Float[Tensor, "B 3 H W"]:
    """The image with mid-grey (0) in its masked patches, for a stem whose windows reach into neighbours."""
    rows, columns = (side // patch_size for side in image.shape[2:])
    hidden = is_masked.view(-1, 1, rows, 1, columns, 1).expand(-1, 1, rows, patch_size, columns, patch_size)
    return image.masked_fill(hidden.reshape(-1, 1, *image.shape[2:]), 0.0)


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
