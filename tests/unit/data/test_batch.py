"""Collation: what is padded, what is stacked, what becomes a list."""

import pytest
import torch

from vlmoe.data.batch import collate, positions, to_device


def _sample(length):
    return {
        "image": torch.full((3, 2, 2), float(length)),
        "text": torch.arange(10, 10 + length),
        "text_masked": torch.ones(length, dtype=torch.bool),
        "image_masked": torch.tensor([True, False]),
        "caption": "x" * length,
        "id": length,
    }


def test_text_is_padded_and_the_rest_is_stacked():
    batch = collate([_sample(3), _sample(5)], pad_id=1, max_text_length=20)
    assert list(batch) == [
        "image", "text", "text_padding", "text_at", "text_masked", "image_masked", "caption", "id", "text_masked_at",
        "image_masked_at",
    ]  # fmt: skip
    assert batch["text_at"].tolist() == batch["text_masked_at"].tolist()
    assert batch["text_masked_at"].tolist() == [0, 1, 2, 8, 9, 10, 11, 12]
    assert batch["text"].tolist() == [[10, 11, 12, 1, 1, 1, 1, 1], [10, 11, 12, 13, 14, 1, 1, 1]]
    assert batch["text"].dtype == torch.int64
    assert batch["text_padding"].tolist() == (batch["text"] == 1).tolist()
    assert batch["text_masked"].tolist() == (batch["text"] != 1).tolist()
    assert batch["image"].shape == (2, 3, 2, 2) and batch["image_masked"].shape == (2, 2)
    assert batch["caption"] == ["xxx", "xxxxx"] and batch["id"] == [3, 5]


def test_pixels_become_floats_on_the_device():
    rows = torch.randint(0, 256, (2, 4, 5, 3), dtype=torch.uint8)
    samples = [{"image": rows[0].permute(2, 0, 1), "id": 0}, {"image": rows[1].permute(2, 0, 1).contiguous(), "id": 1}]
    batch = collate(samples)
    assert batch["image"].dtype == torch.uint8 and torch.equal(batch["image"], rows.permute(0, 3, 1, 2))
    moved = to_device(batch, torch.device("cpu"))
    assert moved["id"] == [0, 1] and moved["image"].is_contiguous() and moved["image"].dtype == torch.float32
    torch.testing.assert_close(moved["image"], rows.permute(0, 3, 1, 2) / 255 * 2 - 1)
    assert to_device({"image": torch.full((1, 3, 2, 2), 7.0)}, torch.device("cpu"))["image"].unique() == 7
    assert to_device(batch, torch.device("meta"))["image"].shape == (2, 3, 4, 5)


def test_a_padding_id_inside_a_text_is_a_token():
    batch = collate([{"text": torch.tensor([0, 1, 2])}], pad_id=1)
    assert batch["text_padding"][0].tolist() == [False] * 3 + [True] * 5


@pytest.mark.parametrize(
    ("longest", "limit", "width"), [(8, 20, 8), (9, 20, 16), (17, 20, 20), (20, 20, 20), (9, None, 16)]
)
def test_padded_width(longest, limit, width):
    assert collate([_sample(2), _sample(longest)], pad_id=1, max_text_length=limit)["text"].shape == (2, width)


def test_positions_are_filled_up_to_a_multiple_of_the_batch():
    mask = torch.tensor([[False, True, True], [True, False, False], [False, False, True]])
    assert positions(mask).tolist() == [1, 2, 3, 8, -1, -1] and positions(mask).dtype == torch.int64
    assert positions(~mask[:, :1]).tolist() == [0, 2, -1]
    assert positions(~mask[:, :1], multiple=4).tolist() == [0, 2, -1, -1]


def test_text_needs_a_pad_id():
    with pytest.raises(ValueError, match="pad_id"):
        collate([_sample(2)])
