"""Visual tokenizer: images -> discrete codes, by vector-quantised knowledge distillation (BEiT v2, arXiv 2208.06366).

Encoder ViT -> unit vectors of width `code_dim` -> nearest of `num_codes` unit codes -> decoder ViT -> the teacher's features.
The codebook learns by exponential moving average, outside `forward`: `Codebook.update` is called once per step.

Axes: B images, P patches, V rows of a batch (B * P), C codes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.layers import PatchEmbed
from torch import Tensor, nn

from vlmoe.config import VisualTokenizerConfig, load
from vlmoe.errors import UserError
from vlmoe.models.encoder import Block
from vlmoe.models.weights import latest_checkpoint, load_weights
from vlmoe.nn.attention import Attention
from vlmoe.nn.ffn import FeedForward
from vlmoe.nn.multiway import SHARED, MultiwayFFN, Stream


@dataclass(frozen=True)
class TokenizerOutput:
    vectors: Float[Tensor, "B P code_dim"]  # unit vectors before quantisation
    codes: Int[Tensor, "B P"]
    features: Float[Tensor, "B P feature_dim"]  # the decoder's guess of the teacher's features


@dataclass(frozen=True)
class PixelTeacher:
    """The patch's own pixels: no weights needed. Features are [-1, 1] values in the order (row, column, channel)."""

    patch_size: int

    @property
    def feature_dim(self) -> int:
        return 3 * self.patch_size**2

    def features(self, image: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B P feature_dim"]:
        p = self.patch_size
        rows, columns = image.shape[2] // p, image.shape[3] // p
        return (
            image.unflatten(3, (columns, p)).unflatten(2, (rows, p)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        )

    def image(self, features: Float[Tensor, "B P feature_dim"]) -> Float[Tensor, "B 3 H W"]:
        """The inverse of `features`, for square images."""
        p, grid = self.patch_size, round(features.shape[1] ** 0.5)
        return (
            features.unflatten(2, (p, p, 3))
            .unflatten(1, (grid, grid))
            .permute(0, 5, 1, 3, 2, 4)
            .flatten(4)
            .flatten(2, 3)
        )

    def distance(self, guess: Tensor, target: Tensor) -> Float[Tensor, ""]:
        return F.mse_loss(guess.float(), target.float())


TEACHERS: dict[str, Callable[[int], PixelTeacher]] = {"pixels": PixelTeacher}


class Codebook(nn.Module):
    """C unit vectors; a row's code is the one with the largest cosine."""

    weight: Tensor
    idle_steps: Tensor
    is_started: Tensor

    def __init__(self, num_codes: int, code_dim: int) -> None:
        super().__init__()
        self.register_buffer("weight", F.normalize(torch.randn(num_codes, code_dim), dim=-1))
        self.register_buffer(
            "idle_steps", torch.zeros(num_codes, dtype=torch.int64)
        )  # steps since a code was last chosen
        self.register_buffer("is_started", torch.zeros((), dtype=torch.bool))

    def forward(self, vectors: Float[Tensor, "*rows code_dim"]) -> Int[Tensor, "*rows"]:
        with torch.autocast(vectors.device.type, enabled=False):  # in 16 bits near codes are equally far
            return (vectors.float() @ self.weight.T).argmax(-1)

    @torch.no_grad()
    def update(self, vectors: Float[Tensor, "V code_dim"], *, decay: float, revive_after: int) -> None:
        """One step: k-means start on the first call, then EMA towards the mean of each code's rows (BEiT v2, section 2),
        and a code idle for `revive_after` steps restarts at a random row of this batch.
        """
        vectors = vectors.float()
        if not self.is_started:
            self.weight.copy_(spherical_k_means(vectors, self.weight.shape[0]))
            self.is_started.fill_(True)
        means, counts = _means_by_code(vectors, self(vectors), self.weight.shape[0])
        moved = F.normalize(decay * self.weight + (1 - decay) * means, dim=-1)
        self.weight.copy_(torch.where(counts[:, None] > 0, moved, self.weight))
        self.idle_steps.copy_(torch.where(counts > 0, 0, self.idle_steps + 1))
        dead = self.idle_steps >= revive_after
        self.weight.copy_(torch.where(dead[:, None], _random_rows(vectors, len(dead)), self.weight))
        self.idle_steps.masked_fill_(dead, 0)


class _Transformer(nn.Module):
    def __init__(self, dim: int, depth: int, attn_heads: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Block(
                Attention(dim, attn_heads, copies=SHARED),
                MultiwayFFN(dim, lambda: FeedForward(dim, 4 * dim), norm_copies=SHARED, copies=SHARED),
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Float[Tensor, "B P dim"]) -> Float[Tensor, "B P dim"]:
        stream = Stream({"vision": x})
        for layer in self.layers:
            stream, _ = layer(stream)
        return self.norm(stream.total()["vision"])


class VisualTokenizer(nn.Module):
    """ViT encoder, codebook, ViT decoder.

    Raises:
        ValueError: `image_size` is not a multiple of `patch_size`, or `dim` not of `attn_heads`.
    """

    def __init__(
        self, *, image_size: int, patch_size: int, dim: int, depth: int, attn_heads: int, decoder_depth: int,
        num_codes: int, code_dim: int, teacher: str = "pixels",
    ) -> None:  # fmt: skip
        super().__init__()
        if image_size % patch_size:
            raise ValueError(
                f"image_size {image_size} is not a multiple of patch_size {patch_size}; "
                f"use {image_size // patch_size * patch_size or patch_size}"
            )
        if dim % attn_heads:
            raise ValueError(f"dim {dim} is not divisible by attn_heads {attn_heads}")
        self.image_size, self.patch_size, self.num_codes = image_size, patch_size, num_codes
        self.teacher = TEACHERS[teacher](patch_size)
        patches = (image_size // patch_size) ** 2
        self.patch_embed = PatchEmbed(image_size, patch_size, 3, dim)
        self.positions = nn.Parameter(torch.randn(1, patches, dim) * 0.02)
        self.encoder = _Transformer(dim, depth, attn_heads)
        self.to_code = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, code_dim))
        self.codebook = Codebook(num_codes, code_dim)
        self.from_code = nn.Linear(code_dim, dim)
        self.decoder_positions = nn.Parameter(torch.randn(1, patches, dim) * 0.02)
        self.decoder = _Transformer(dim, decoder_depth, attn_heads)
        self.to_features = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, self.teacher.feature_dim))

    def vectors(self, image: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B P code_dim"]:
        hidden = self.encoder(self.patch_embed(image) + self.positions)
        return F.normalize(self.to_code(hidden).float(), dim=-1)

    def encode(self, image: Float[Tensor, "B 3 H W"]) -> Int[Tensor, "B P"]:
        """Image in [-1, 1] -> codes in [0, num_codes)."""
        return self.codebook(self.vectors(image))

    def decode(self, codes: Int[Tensor, "B P"]) -> Float[Tensor, "B P feature_dim"]:
        return self._features(self.codebook.weight[codes])

    def forward(self, image: Float[Tensor, "B 3 H W"]) -> TokenizerOutput:
        vectors = self.vectors(image)
        codes = self.codebook(vectors.detach())
        straight_through = vectors + (self.codebook.weight[codes] - vectors).detach()
        return TokenizerOutput(vectors, codes, self._features(straight_through))

    def _features(self, quantised: Float[Tensor, "B P code_dim"]) -> Float[Tensor, "B P feature_dim"]:
        return self.to_features(self.decoder(self.from_code(quantised) + self.decoder_positions))


def build_visual_tokenizer(config: VisualTokenizerConfig) -> VisualTokenizer:
    try:
        return VisualTokenizer(
            image_size=config.image_size, patch_size=config.patch_size, dim=config.dim, depth=config.depth,
            attn_heads=config.attn_heads, decoder_depth=config.decoder_depth, num_codes=config.num_codes,
            code_dim=config.code_dim, teacher=config.teacher,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(str(error)) from None


def load_visual_tokenizer(run: Path) -> VisualTokenizer:
    """The trained tokenizer of a run folder (or of one of its checkpoint folders), frozen.

    Raises:
        UserError: no such run, another task's run, or a damaged checkpoint.
    """
    folder = latest_checkpoint(run)
    config = load(folder / "recipe.yaml")
    if not isinstance(config, VisualTokenizerConfig):
        raise UserError(f"{run} is a run of task {config.task!r}; visual_tokenizer wants one of task visual_tokenizer")
    model = build_visual_tokenizer(config)
    load_weights(folder, model)
    return model.eval().requires_grad_(False)


def spherical_k_means(
    vectors: Float[Tensor, "V code_dim"], num_codes: int, *, iterations: int = 10
) -> Float[Tensor, "C code_dim"]:
    """Cosine k-means from random rows; an empty cluster keeps its centre."""
    centres = _random_rows(vectors, num_codes)
    for _ in range(iterations):
        means, counts = _means_by_code(vectors, (vectors @ centres.T).argmax(-1), num_codes)
        centres = torch.where(counts[:, None] > 0, F.normalize(means, dim=-1), centres)
    return centres


def _means_by_code(
    vectors: Float[Tensor, "V code_dim"], codes: Int[Tensor, " V"], num_codes: int
) -> tuple[Float[Tensor, "C code_dim"], Float[Tensor, " C"]]:
    """Mean direction of each code's rows over all ranks (zero where it has none), and how many rows it has."""
    counts = vectors.new_zeros(num_codes).index_add_(0, codes, vectors.new_ones(len(codes)))
    # in one order: sums by atomics would differ from run to run
    by_code = vectors[codes.argsort(stable=True)]
    sums = torch.segment_reduce(by_code, "sum", lengths=counts.long(), unsafe=True)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
        torch.distributed.all_reduce(counts)
    return F.normalize(sums, dim=-1), counts


def _random_rows(vectors: Float[Tensor, "V code_dim"], count: int) -> Float[Tensor, "C code_dim"]:
    """`count` rows drawn without replacement where there are enough, slightly jittered so that no two are equal."""
    order = torch.randperm(max(len(vectors), count), device=vectors.device)[:count] % len(vectors)
    rows = vectors[order] + 1e-3 * torch.randn(count, vectors.shape[1], device=vectors.device, dtype=vectors.dtype)
    if torch.distributed.is_initialized():
        torch.distributed.broadcast(rows, 0)
    return F.normalize(rows, dim=-1)
