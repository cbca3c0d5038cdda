"""The codebook against its slow twins, and the tokenizer as a whole."""

import pytest
import torch
import torch.nn.functional as F

from vlmoe.models.visual_tokenizer import Codebook, PixelTeacher, VisualTokenizer, spherical_k_means


def unit_rows(count: int, dim: int = 6) -> torch.Tensor:
    return F.normalize(torch.randn(count, dim), dim=-1)


def tokenizer(**changes: int) -> VisualTokenizer:
    sizes = {"image_size": 16, "patch_size": 4, "dim": 16, "depth": 1, "attn_heads": 2, "decoder_depth": 1}
    return VisualTokenizer(**{**sizes, "num_codes": 12, "code_dim": 6, **changes})


def test_a_row_gets_the_code_of_largest_cosine():
    book, rows = Codebook(12, 6), unit_rows(40)
    slow = [max(range(12), key=lambda c: float(F.cosine_similarity(row, book.weight[c], dim=0))) for row in rows]
    assert book(rows).tolist() == slow
    with torch.autocast("cpu", torch.bfloat16):  # as training calls it
        assert book(rows).tolist() == slow


def test_a_code_moves_towards_the_mean_of_its_rows():
    book, rows = Codebook(12, 6), unit_rows(40)
    book.is_started.fill_(True)
    before, codes = book.weight.clone(), book(rows)
    book.update(rows, decay=0.9, revive_after=100)
    for code in range(12):
        own = rows[codes == code]
        expected = before[code] if not len(own) else F.normalize(
            0.9 * before[code] + 0.1 * F.normalize(own.sum(0), dim=0), dim=0
        )  # fmt: skip
        torch.testing.assert_close(book.weight[code], expected)
        assert book.idle_steps[code] == (0 if len(own) else 1)


def test_k_means_finds_separate_clusters():
    centres = torch.eye(6)
    rows = F.normalize(centres.repeat_interleave(50, 0) + 0.05 * torch.randn(300, 6), dim=-1)
    found = [spherical_k_means(rows, 6) for _ in range(5)]  # from several starts, one of which finds all
    assert max(float((centres @ each.T).max(-1).values.min()) for each in found) > 0.99


def test_the_first_update_starts_from_k_means_and_every_code_is_a_unit_vector():
    book, rows = Codebook(12, 6), unit_rows(5)  # fewer rows than codes
    book.update(rows, decay=0.99, revive_after=3)
    assert book.is_started and len(book(rows).unique()) == 5
    torch.testing.assert_close(book.weight.norm(dim=-1), torch.ones(12))


def test_a_code_that_nothing_chooses_comes_back_at_a_row_of_the_batch():
    book, rows = Codebook(4, 6), unit_rows(1)
    for _ in range(3):
        book.update(rows, decay=0.5, revive_after=2)
    assert float((book.weight @ rows.T).min()) > 0.95


def test_features_are_the_pixels_of_the_patch_and_back():
    teacher, image = PixelTeacher(4), torch.rand(2, 3, 16, 16) * 2 - 1
    features = teacher.features(image)
    torch.testing.assert_close(features[1, 6], image[1, :, 4:8, 8:12].permute(1, 2, 0).flatten())  # row 1, column 2
    assert torch.equal(teacher.image(features), image)


def test_gradients_pass_the_quantiser_and_forward_writes_nothing():
    model, image = tokenizer(), torch.rand(2, 3, 16, 16)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    out = model(image)
    out.features.square().sum().backward()
    assert out.codes.shape == (2, 16) and model.patch_embed.proj.weight.grad.abs().sum() > 0
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    torch.testing.assert_close(model.decode(model.encode(image)), out.features)


def test_impossible_sizes_say_what_to_change():
    with pytest.raises(ValueError, match="image_size 18 is not a multiple of patch_size 4; use 16"):
        tokenizer(image_size=18)
    with pytest.raises(ValueError, match="dim 16 is not divisible by attn_heads 3"):
        tokenizer(attn_heads=3)
