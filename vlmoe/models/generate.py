"""Captions word by word: beam search over a prefix language model whose keys and values are cached.

A caption grows as the released BEiT-3 models decode it: the sequence is <s>, the words so far and <mask>, and the logits
at <mask> say the next word. A position sees the image, itself and what stands before it, so nothing but the mask changes
when a word comes in: each step passes two positions, the newest word and a mask after it, and keeps the word's keys and
values. Every function is pure: what was computed is handed on as a `Cache`.

Axes: B images, K beams, R = B * K rows, V vision positions, T words so far (<s> included), N new positions, d width,
a attention heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vlmoe.models.encoder import Block, Encoder
from vlmoe.models.heads import CaptioningModel
from vlmoe.nn.attention import split_heads
from vlmoe.nn.embed import UNUSED_ROWS
from vlmoe.nn.multiway import Multiway

KeysValues = tuple[Tensor, Tensor]
# (state, tokens [B, K, T], parents [B, K]: the beam of the step before that each beam goes on from)
# -> (logits of the next word [B, K, vocab], state)
NextWord = Callable[[Any, Tensor, Tensor], tuple[Tensor, Any]]


@dataclass(frozen=True)
class Generated:
    tokens: Int[Tensor, "B length"]  # <s>, words, </s>; after the end </s> again
    scores: Float[Tensor, " B"]  # log-probability of the caption / its number of tokens ** length_penalty


@dataclass(frozen=True)
class Cache:
    """Keys and values of each layer. Those of the image are kept once for all of its beams."""

    vision: list[KeysValues]  # [B, a, V, d_head]
    text: list[KeysValues]  # [R, a, T, d_head]


@torch.no_grad()
def generate_captions(
    model: CaptioningModel,
    image: Float[Tensor, "B 3 H W"],
    *,
    bos_id: int,
    eos_id: int,
    mask_id: int,
    beam_size: int = 3,
    max_length: int = 32,
    length_penalty: float = 0.6,
) -> Generated:
    """The best caption of each image that the beam finds; images do not influence each other.

    The model computes as in evaluation, whatever its mode. Where its experts have a capacity, the positions of one step
    share it, as those of a batch do elsewhere.

    Args:
        beam_size: captions that are followed at a time.
        max_length: tokens of a caption, <s> and </s> included.
        length_penalty: see `beam_search`.

    Raises:
        ValueError: `max_length` is more than the model has text positions for.
    """
    longest = model.encoder.text_embed.max_length
    if not 2 <= max_length <= longest:
        raise ValueError(f"max_length is {max_length}; choose 2 to {longest}, the text positions of the model")

    def next_word(cache: Cache, tokens: Tensor, parents: Tensor) -> tuple[Tensor, Cache]:
        newest = torch.stack([tokens[..., -1], torch.full_like(tokens[..., -1], mask_id)], dim=-1)
        states, cache = extend(model.encoder, keep_beams(cache, parents), newest)
        return model.mlm_head(states[:, :, -1]), cache

    return beam_search(
        next_word,
        read_image(model.encoder, image, beam_size=beam_size),
        batch_size=len(image),
        bos_id=bos_id,
        eos_id=eos_id,
        beam_size=beam_size,
        max_length=max_length,
        length_penalty=length_penalty,
        device=image.device,
    )


def beam_search(
    next_word: NextWord,
    state: Any,
    *,
    batch_size: int,
    bos_id: int,
    eos_id: int,
    beam_size: int,
    max_length: int,
    length_penalty: float,
    device: torch.device | None = None,
) -> Generated:
    """The finished sequence with the highest score that a beam of `beam_size` meets.

    The score is the log-probability of the sequence over its length, <s> and </s> included, to the power of
    `length_penalty`; unilm's beit3 counts so (engine_for_finetuning.py). A sequence ends with </s>, or without it at
    `max_length`. The search stops when no beam can rise above the best finished sequence any more, which changes nothing
    in what is found.

    Of the 2 * K likeliest continuations at most K end, so the K likeliest that do not end are among them.
    """
    tokens = torch.full((batch_size, beam_size, 1), bos_id, device=device)
    parents = torch.arange(beam_size, device=device).expand(batch_size, -1)
    log_probs = torch.full((batch_size, beam_size), -torch.inf, device=device)
    log_probs[:, 0] = 0.0  # the beams are still one
    best = torch.full((batch_size, max_length), eos_id, device=device)
    best_score = torch.full((batch_size,), -torch.inf, device=device)
    for length in range(2, max_length + 1):
        logits, state = next_word(state, tokens, parents)
        vocab_size = logits.shape[-1]
        totals = log_probs[..., None] + logits.float().log_softmax(-1)
        totals, chosen = totals.flatten(1).topk(2 * beam_size)
        words = chosen % vocab_size
        longer = torch.cat([_take(tokens, chosen // vocab_size), words[..., None]], dim=-1)

        ends = words == eos_id
        is_considered = (~ends).cumsum(1) - (~ends).long() < beam_size  # before the beam is full
        finishes = is_considered & (ends if length < max_length else torch.ones_like(ends))
        scores, place = (totals / length**length_penalty).masked_fill(~finishes, -torch.inf).max(1)
        is_better = scores > best_score
        best_score = torch.where(is_better, scores, best_score)
        best[:, :length] = torch.where(is_better[:, None], _take(longer, place[:, None])[:, 0], best[:, :length])
        best[:, length:] = torch.where(is_better[:, None], eos_id, best[:, length:])

        going_on = ends.long().argsort(dim=1, stable=True)[:, :beam_size]  # the likeliest that do not end
        log_probs, tokens = totals.gather(1, going_on), _take(longer, going_on)
        parents = (chosen // vocab_size).gather(1, going_on)
        if bool((best_score >= log_probs.max(1).values / max_length**length_penalty).all()):
            break
    return Generated(best, best_score)


def read_image(encoder: Encoder, image: Float[Tensor, "B 3 H W"], *, beam_size: int) -> Cache:
    """The image's keys and values in a pair under the prefix mask (the image does not see the text)."""
    x = encoder.vision_embed(image)
    vision, text = [], []
    for block in _blocks(encoder):
        q, k, v = _project(block, x, "vision")
        x = _finish(block, x, F.scaled_dot_product_attention(q, k, v), "vision")
        vision.append((k, v))
        empty = k.new_empty(len(image) * beam_size, k.shape[1], 0, k.shape[3])
        text.append((empty, empty))
    return Cache(vision, text)


def extend(encoder: Encoder, cache: Cache, ids: Int[Tensor, "B K N"]) -> tuple[Float[Tensor, "B K N d"], Cache]:
    """States of N new text positions, and the cache with all of them but the last, which is a mask's."""
    batch, beams, new = ids.shape
    first = UNUSED_ROWS + cache.text[0][0].shape[2]
    embed = encoder.text_embed
    x = (embed.tokens(ids) + embed.positions[first : first + new]).flatten(0, 1)
    visible = torch.ones(new, new, dtype=torch.bool, device=ids.device).tril()
    text = []
    for block, vision, (old_k, old_v) in zip(_blocks(encoder), cache.vision, cache.text, strict=True):
        q, k, v = _project(block, x, "text")
        k, v = torch.cat([old_k, k], dim=2), torch.cat([old_v, v], dim=2)
        x = _finish(block, x, _attend_to_both(q, vision, (k, v), visible), "text")
        text.append((k[:, :, :-1], v[:, :, :-1]))
    if encoder.norm is not None:
        x = _copy(encoder.norm, "text")(x)
    return x.unflatten(0, (batch, beams)), Cache(cache.vision, text)


def keep_beams(cache: Cache, parents: Int[Tensor, "B K"]) -> Cache:
    """The cache in which beam k goes on from what was beam parents[:, k]."""
    batch, beams = parents.shape
    rows = (parents + beams * torch.arange(batch, device=parents.device)[:, None]).flatten()
    return Cache(cache.vision, [(k[rows], v[rows]) for k, v in cache.text])


def _attend_to_both(
    q: Float[Tensor, "R a N d_head"], vision: KeysValues, text: KeysValues, visible: Bool[Tensor, "N N"]
) -> Float[Tensor, "R a N d_head"]:
    """Softmax over vision and text together, without a copy of the image's keys and values per beam."""
    rows, _, new, _ = q.shape
    batch, num_vision = vision[0].shape[0], vision[0].shape[2]

    def by_image(x: Tensor) -> Tensor:  # [R, a, N, _] -> [B, a, K * N, _]
        return x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)

    def by_row(x: Tensor) -> Tensor:
        return x.unflatten(2, (rows // batch, new)).transpose(1, 2).flatten(0, 1)

    q = q * q.shape[-1] ** -0.5
    to_text = q @ text[0].transpose(-2, -1)
    seen = F.pad(visible, (to_text.shape[-1] - new, 0), value=True)
    to_text = to_text.masked_fill(~seen, torch.finfo(to_text.dtype).min)
    to_vision = by_row(by_image(q) @ vision[0].transpose(-2, -1))
    weights = torch.cat([to_vision, to_text], dim=-1).softmax(-1).to(q.dtype)
    from_vision = by_row(by_image(weights[..., :num_vision]) @ vision[1])
    return from_vision + weights[..., num_vision:] @ text[1]


def _project(block: Block, x: Tensor, modality: str) -> tuple[Tensor, Tensor, Tensor]:
    return split_heads(_copy(block.attention.qkv, modality)(x), block.attention.attn_heads)


def _finish(block: Block, x: Tensor, attended: Tensor, modality: str) -> Tensor:
    """The rest of a block after the attention: output projection, feed-forward part, residuals."""
    x = x + _copy(block.attention.out, modality)(attended.transpose(1, 2).flatten(2))
    y = _copy(block.ffn.ffn, modality)(_copy(block.ffn.norm, modality)(x))
    return x + (y if isinstance(y, Tensor) else y[0])  # sparse layers also say where they sent the rows


def _copy(multiway: Multiway, modality: str) -> nn.Module:
    """The copy that positions of a modality pass in a pair; see `Multiway`."""
    name = next(each for each in ("vl", "shared", modality) if each in multiway.copies)
    return multiway.get_submodule(name)


def _blocks(encoder: Encoder) -> list[Block]:
    return [block for block in encoder.layers if isinstance(block, Block)]


def _take(x: Tensor, places: Int[Tensor, "B n"]) -> Tensor:
    """x[b, places[b]] of x [B, m, T]."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))
