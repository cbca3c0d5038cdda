"""Beam search against every sequence there is, and cached decoding against decoding from the beginning each time."""

import itertools

import pytest
import torch
from torch import Tensor

from vlmoe.config import FFNConfig, ModelConfig
from vlmoe.models import CaptioningModel, build_encoder
from vlmoe.models.generate import beam_search, generate_captions

BOS, EOS, MASK = 0, 2, 11
VOCAB, BATCH = 12, 3

STYLES = {
    "dense": {"ffn": FFNConfig(kind="dense")},
    "mhmoe": {"ffn": FFNConfig(num_experts=4, hidden_dim=8)},
    "one_bank": {"ffn": FFNConfig(kind="moe", num_experts=4, hidden_dim=8, experts_per_modality=False)},
    "shared_attention": {"ffn": FFNConfig(kind="dense"), "multiway": "shared_attention"},
    "vl_mhmoe": {"ffn": FFNConfig(num_experts=4, hidden_dim=8), "multiway": "shared_attention", "vl_layers": 1},
}


def captioner(style: str = "dense", *, sharpness: float = 8.0) -> CaptioningModel:
    sizes = {"dim": 16, "depth": 2, "attn_heads": 2, "image_size": 8, "patch_size": 4, "max_text_length": 10}
    model = CaptioningModel(build_encoder(ModelConfig(**(sizes | STYLES[style])), VOCAB), VOCAB).eval()
    with torch.no_grad():
        model.mlm_head.weight.mul_(sharpness / 0.02 / 4)
        for table in (model.encoder.text_embed.tokens.weight, model.encoder.text_embed.positions):
            table.mul_(20)
    return model


def from_the_beginning(model: CaptioningModel, image: Tensor):
    """The model's own forward pass over image and text, anew for every word."""

    def next_word(state: None, tokens: Tensor, parents: Tensor) -> tuple[Tensor, None]:
        batch, beams, _ = tokens.shape
        text = torch.cat([tokens, torch.full((batch, beams, 1), MASK)], dim=-1).flatten(0, 1)
        is_last = torch.zeros_like(text, dtype=torch.bool)
        is_last[:, -1] = True
        out = model(image.repeat_interleave(beams, 0), text, text_masked=is_last)
        return out.logits.unflatten(0, (batch, beams)), None

    return next_word


@torch.no_grad()
@pytest.mark.parametrize("style", STYLES)
def test_cached_decoding_equals_decoding_from_the_beginning(style):
    model, image = captioner(style), torch.rand(BATCH, 3, 8, 8) * 2 - 1
    search = {"bos_id": BOS, "eos_id": EOS, "beam_size": 3, "max_length": 10, "length_penalty": 0.6}
    cached = generate_captions(model, image, mask_id=MASK, **search)
    plain = beam_search(from_the_beginning(model, image), None, batch_size=BATCH, **search)
    assert torch.equal(cached.tokens, plain.tokens)
    torch.testing.assert_close(cached.scores, plain.scores, atol=1e-4, rtol=1e-4)
    assert len({tuple(row) for row in cached.tokens.tolist()}) > 1


@torch.no_grad()
def test_images_of_a_batch_do_not_influence_each_other():
    model, image = captioner("mhmoe"), torch.rand(BATCH, 3, 8, 8) * 2 - 1
    ids = {"bos_id": BOS, "eos_id": EOS, "mask_id": MASK, "max_length": 8}
    together = generate_captions(model, image, **ids)
    for number in range(BATCH):
        alone = generate_captions(model, image[number : number + 1], **ids)
        assert torch.equal(alone.tokens[0], together.tokens[number])
        torch.testing.assert_close(alone.scores[0], together.scores[number], atol=1e-5, rtol=1e-5)


def log_prob_table(vocab: int, length: int, seed: int) -> dict[tuple[int, ...], Tensor]:
    """The logits of the next word after every sequence shorter than `length`."""
    generator = torch.Generator().manual_seed(seed)
    return {
        (BOS, *words): 3 * torch.randn(vocab, generator=generator)
        for count in range(length - 1)
        for words in itertools.product(range(vocab), repeat=count)
    }


def best_of_all(table: dict[tuple[int, ...], Tensor], vocab: int, length: int, penalty: float):
    """(score, sequence) by trying everything."""
    found = []
    for count in range(length):
        others = [word for word in range(vocab) if word != EOS]
        for words in itertools.product(others, repeat=count):
            sequence = (BOS, *words) if count == length - 1 else (BOS, *words, EOS)
            total = sum(float(table[sequence[:i]].log_softmax(-1)[sequence[i]]) for i in range(1, len(sequence)))
            found.append((total / len(sequence) ** penalty, sequence))
    return max(found)


@pytest.mark.parametrize("penalty", [0.0, 0.6, 2.0])
def test_a_wide_beam_finds_what_exhaustive_search_finds(penalty):
    vocab, length = 4, 5
    tables = [log_prob_table(vocab, length, seed) for seed in range(12)]

    def next_word(state: None, tokens: Tensor, parents: Tensor) -> tuple[Tensor, None]:
        rows = [[table[tuple(beam)] for beam in beams] for table, beams in zip(tables, tokens.tolist(), strict=True)]
        return torch.stack([torch.stack(row) for row in rows]), None

    search = {"batch_size": len(tables), "bos_id": BOS, "eos_id": EOS, "max_length": length, "length_penalty": penalty}
    wide = beam_search(next_word, None, beam_size=27, **search)
    narrow = beam_search(next_word, None, beam_size=1, **search)
    lengths = set()
    for number, table in enumerate(tables):
        score, sequence = best_of_all(table, vocab, length, penalty)
        lengths.add(len(sequence))
        assert wide.tokens[number].tolist() == [*sequence, *[EOS] * (length - len(sequence))]
        assert float(wide.scores[number]) == pytest.approx(score, abs=1e-5)
        assert float(narrow.scores[number]) <= score + 1e-5
    assert len(lengths) > 1


def test_a_caption_longer_than_the_text_positions_is_refused():
    with pytest.raises(ValueError, match="choose 2 to 10, the text positions of the model"):
        generate_captions(captioner(), torch.rand(1, 3, 8, 8), bos_id=BOS, eos_id=EOS, mask_id=MASK, max_length=11)
