import torch
import torch.nn.functional as F

from vlmoe.data.batch import positions
from vlmoe.nn.packing import packing


def test_packed_are_the_tokens_in_order_and_fillers_are_zeros():
    padding = torch.tensor([[False, True, True], [False, False, False]])
    packed = packing(positions(~padding, multiple=3), padding)
    assert packed.at.tolist() == [0, 3, 4, 5, -1, -1] and packed.rows.tolist() == [[0, -1, -1], [1, 2, 3]]
    assert packed.spans.tolist() == [[0, 1], [1, 4]] and packed.spans.dtype == torch.int32
    between = packing(torch.tensor([0, -1, 3, 4, 5, -1]), padding)
    assert between.rows.tolist() == [[0, -1, -1], [2, 3, 4]] and between.spans.tolist() == [[0, 1], [2, 5]]
    assert packed.visible(2).squeeze().tolist() == [[True, True, True, False, False], [True] * 5]
    nothing = packing(torch.tensor([-1, 3, 4, 5]), torch.tensor([[True] * 3, [False] * 3]))
    assert nothing.spans.tolist() == [[0, 0], [1, 4]]
    x = torch.randn(2, 3, 4)
    rows = packed.pack(x)
    assert torch.equal(rows[0], torch.cat([x[~padding], torch.zeros(2, 4)]))
    assert torch.equal(packed.unpack(rows), x.masked_fill(padding[..., None], 0))
    assert packed.spread(torch.tensor([7.0, 8.0]).view(2, 1, 1)).flatten().tolist()[:4] == [7, 8, 8, 8]


def test_gradients_are_those_of_indexing():
    padding = torch.rand(5, 7) < 0.4
    padding[:, 0] = False
    packed = packing(positions(~padding, multiple=10), padding)
    x = torch.randn(5, 7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(packed.pack, x)
    rows = torch.randn(1, len(packed.at), 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(packed.unpack, rows)
    tokens = int((~padding).sum())
    twin = F.pad(x[~padding], (0, 0, 0, len(packed.at) - tokens))
    probe = torch.randn_like(twin)
    ours, theirs = (torch.autograd.grad((y * probe).sum(), x)[0] for y in (packed.pack(x)[0], twin))
    assert torch.equal(ours, theirs)
