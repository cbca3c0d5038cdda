"""Prepared samples of one stream -> one dict of tensors -> what a model reads.

Axes: batch, length (text positions).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from vlmoe.data.transforms import to_float

LENGTH_MULTIPLE = 8  # padded text lengths are multiples of it: fewer shapes, aligned rows


def collate(
    samples: Sequence[Mapping[str, Any]], *, pad_id: int | None = None, max_text_length: int | None = None
) -> dict[str, Any]:
    """Stack the samples of one stream; all have the same keys.

    - `text` (int64 ids [length]) is padded with `pad_id` to the longest, rounded up to a multiple of 8 but not above
      `max_text_length`; `text_padding` [batch, length] comes with it, True where there is no token, and `text_at`, the
      `positions` where there is one, up to a multiple of twice the batch.
    - one-dimensional tensors named `text_*` are padded to the same length: bool with False, ids with `pad_id`.
    - pixels (uint8 [3, height, width]) are stacked as they lie in memory, colours last; `to_device` makes them float.
    - other tensors have one shape and are stacked; all else becomes a list.
    - masks (bool, named `*_masked`) come with `*_masked_at`, the same as `positions`, so that a GPU need not count.

    Raises:
        ValueError: there is text but no `pad_id`.
    """
    length = _padded_length([len(sample["text"]) for sample in samples if "text" in sample], max_text_length)
    batch: dict[str, Any] = {}
    for name, first in samples[0].items():
        values = [sample[name] for sample in samples]
        if not isinstance(first, Tensor):
            batch[name] = values
        elif name == "text":
            if pad_id is None:
                raise ValueError("collate needs the pad_id of the tokenizer for samples with text")
            batch["text"] = _pad(values, length, pad_id)
            batch["text_padding"] = ~_pad([torch.ones(len(ids), dtype=torch.bool) for ids in values], length, False)
            batch["text_at"] = positions(~batch["text_padding"], multiple=2 * len(samples))
        elif name.startswith("text_") and first.ndim == 1:
            batch[name] = _pad(values, length, False if first.dtype == torch.bool else pad_id or 0)
        elif first.dtype == torch.uint8:
            batch[name] = torch.stack([pixels.permute(1, 2, 0) for pixels in values]).permute(0, 3, 1, 2)
        else:
            batch[name] = torch.stack(values)
    masks = [name for name, value in batch.items() if name.endswith("_masked") and value.dtype == torch.bool]
    return batch | {f"{name}_at": positions(batch[name]) for name in masks}


def positions(mask: Bool[Tensor, "batch length"], multiple: int | None = None) -> Int[Tensor, " count"]:
    """Where a mask is True, counted row by row over the whole batch; -1 fills up to a multiple of the number of rows (or of
    another number), so that batches seldom differ in their count."""
    found = mask.flatten().nonzero()[:, 0]
    return F.pad(found, (0, -len(found) % (multiple or len(mask))), value=-1)


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on `device`, and its pixels there as float32 [batch, 3, height, width] in [-1, 1]."""

    def move(value: Tensor) -> Tensor:
        value = value.to(device, non_blocking=True)
        return to_float(value) if value.dtype == torch.uint8 else value

    return {name: move(value) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _padded_length(lengths: Sequence[int], limit: int | None) -> int:
    longest = -(-max(lengths, default=0) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    return longest if limit is None else min(longest, limit)


def _pad(rows: Sequence[Tensor], length: int, value: int | bool) -> Tensor:
    padded = rows[0].new_full((len(rows), length), value)
    for row, target in zip(rows, padded, strict=True):
        target[: len(row)] = row
    return padded
