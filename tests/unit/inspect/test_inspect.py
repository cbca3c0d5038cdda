"""Routing laid out as picture and sentence, and the pictures that are drawn of it."""

import pytest
import torch
from PIL import Image

from vlmoe.config import FFNConfig, ModelConfig, load
from vlmoe.inspect.pictures import FONT, _drawable, draw_experts, draw_losses
from vlmoe.inspect.reading import draw_samples
from vlmoe.inspect.routing import PlacedRouting, distinct_experts, place_routings
from vlmoe.models import build_encoder
from vlmoe.tasks import load_run
from vlmoe.train.tracker import read_metrics
from vlmoe.train.trainer import train


def test_every_row_gets_its_position_back():
    ffn = FFNConfig(num_experts=6, num_heads=2, moe_every=1)
    encoder = build_encoder(ModelConfig(dim=32, depth=1, attn_heads=2, image_size=16, ffn=ffn), 50).eval()
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    out = encoder(torch.rand(2, 3, 16, 16), torch.randint(4, 50, (2, 5)), text_padding=padding)
    vision, text = place_routings(out, 2)
    assert (vision.name, vision.expert_ids.shape) == ("layers.0.vision", (2, 5, 2, 2))
    assert (text.name, text.first_position) == ("layers.0.text", 5)
    flat = out.routings["layers.0.vision"].expert_ids
    for sample, position, head in ((0, 0, 0), (1, 4, 1), (1, 2, 0)):
        assert torch.equal(vision.expert_ids[sample, position, head], flat[(sample * 5 + position) * 2 + head])
    assert torch.equal(vision.patches(out.num_vision), vision.expert_ids[:, 1:])
    assert (text.expert_ids[1, 3:] == -1).all() and (text.expert_ids[0] >= 0).all()


def test_distinct_experts_is_the_size_of_a_set():
    ids = torch.randint(-1, 4, (7, 3, 2))
    slow = [len({e for e in token.flatten().tolist() if e >= 0}) for token in ids]
    assert distinct_experts(ids).tolist() == slow


def test_a_dropped_choice_has_no_colour(tmp_path):
    def grey_pixels(*experts: int) -> int:
        placed = PlacedRouting("layers.0.vision", 4, torch.tensor([0, *experts]).view(1, 5, 1, 1), first_position=0)
        draw_experts(torch.zeros(1, 3, 16, 16), [placed], 5, tmp_path / "a.png")  # a picture that is grey
        colours = Image.open(tmp_path / "a.png").convert("RGB").getcolors(maxcolors=2**24)
        return sum(count for count, colour in colours if colour in ((127, 127, 127), (128, 128, 128)))

    assert grey_pixels(0, -1, 0, -1) == pytest.approx(1.5 * grey_pixels(0, 1, 0, 1), rel=0.1)


def test_the_pictures_of_a_run(pretrain_recipe, tmp_path):
    train(load(pretrain_recipe, [f"out={tmp_path}", "steps=4", "eval_every=2"]))
    loaded = load_run(tmp_path, torch.device("cpu"), [])
    few = draw_samples(loaded, tmp_path / "few", count=40, device=torch.device("cpu"))  # there are 32
    assert len(few) == 3
    paths = draw_samples(loaded, tmp_path / "seen", device=torch.device("cpu"))
    assert set(paths) == {"codes", "masked_text", "experts"}
    paths["losses"] = tmp_path / "losses.png"
    draw_losses(read_metrics(tmp_path), paths["losses"])
    for path in paths.values():
        picture = Image.open(path)
        assert min(picture.size) > 200 and len(picture.convert("RGB").getcolors(maxcolors=2**24)) > 50


def test_texts_are_wrapped_and_characters_without_a_glyph_are_numbers():
    assert _drawable("a \u7684 b\nc", FONT) == "a <7684> b\nc"
    assert _drawable("word " * 5, FONT, width=12) == "word word\n    word\n    word\n    word"
