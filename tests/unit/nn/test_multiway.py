import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vlmoe.nn.attention import Attention, as_bias, plain_attention
from vlmoe.nn.embed import ConvStem, TextEmbed, VisionEmbed, project_patches, resize_positions
from vlmoe.nn.ffn import FeedForward
from vlmoe.nn.mhmoe import MHMoE
from vlmoe.nn.multiway import PER_MODALITY, SHARED, Multiway, MultiwayFFN, Stream, cut, join


@pytest.mark.parametrize(
    ("copies", "image_only", "text_only", "pair"),
    [
        (PER_MODALITY, "VVVVV", "TTTTT", "VVTTT"),
        (SHARED, "SSSSS", "SSSSS", "SSSSS"),
        ((*PER_MODALITY, "vl"), "VVVVV", "TTTTT", "LLLLL"),
        ((*SHARED, "vl"), "SSSSS", "SSSSS", "LLLLL"),
    ],
)
def test_each_position_passes_its_copy(copies, image_only, text_only, pair):
    module = Multiway(lambda: nn.Linear(1, 1), copies=copies)
    letters = {"vision": "V", "text": "T", "vl": "L", "shared": "S"}
    for name, copy in module.named_children():
        nn.init.zeros_(copy.weight)
        nn.init.constant_(copy.bias, ord(letters[name]))
    for lengths, expected in (({"vision": 5}, image_only), ({"text": 5}, text_only), ({"vision": 2, "text": 3}, pair)):
        given = {modality: torch.zeros(1, length, 1) for modality, length in lengths.items()}
        passed = module(given)
        assert {modality: part.shape[1] for modality, part in passed.items()} == lengths
        assert "".join(map(chr, join(passed).flatten().int().tolist())) == expected


def test_parts_are_the_sequence_cut():
    x = {"vision": torch.randn(2, 4, 3), "text": torch.randn(2, 2, 3)}
    whole = join(x)
    torch.testing.assert_close(cut(whole, x), x)
    assert whole.shape == (2, 6, 3) and torch.equal(whole[:, 4:], x["text"])
    assert join({"text": whole}) is whole and cut(whole, {"text": whole})["text"] is whole


def test_ffn_names_its_routings_and_hides_padding():
    def make():
        return MHMoE(dim=8, hidden_dim=8, num_experts=2, top_k=1, num_heads=2)

    x = {"vision": torch.randn(3, 2, 8), "text": torch.randn(3, 3, 8)}
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 4] = True
    ffn = MultiwayFFN(8, make, norm_copies=PER_MODALITY, copies=PER_MODALITY)
    total, _, routings = ffn(Stream(x), padding)
    assert total.keys() == x.keys() and all(torch.equal(total[name], x[name]) for name in x)
    assert {name: len(each.logits) for name, each in routings.items()} == {"vision": 12, "text": 18}
    assert routings["vision"].is_padding is None and routings["text"].is_padding.sum() == 2

    bank = MultiwayFFN(8, make, norm_copies=PER_MODALITY, copies=SHARED)
    _, _, routings = bank(Stream(x), padding)
    assert {name: len(each.logits) for name, each in routings.items()} == {"shared": 30}
    assert routings["shared"].is_padding.sum() == 2

    dense = MultiwayFFN(8, lambda: FeedForward(8, 16), norm_copies=PER_MODALITY, copies=PER_MODALITY)
    assert dense(Stream(x), padding)[2] == {}


@pytest.mark.parametrize("copies", [PER_MODALITY, SHARED, (*PER_MODALITY, "vl")])
@pytest.mark.parametrize("drops", [False, True])
def test_a_norm_adds_what_the_last_layer_put_out(copies, drops):
    norms = Multiway(lambda: torch.nn.LayerNorm(4), copies=copies)
    x, y = ({"vision": torch.randn(2, 3, 4), "text": torch.randn(2, 5, 4)} for _ in range(2))
    factor = {name: torch.rand(2, 1, 1) for name in x} if drops else None
    stream = Stream(x, y, factor)
    want = {name: x[name] + y[name] * (factor[name] if drops else 1) for name in x}
    for name, each in norms.named_parameters():
        torch.nn.init.constant_(each, 1.0 + len(name))  # another one for each copy
    total, normed = norms.add_norm(stream)
    for name, got in stream.total().items():
        assert torch.equal(got, want[name]) and torch.equal(total[name], want[name])
        torch.testing.assert_close(normed[name], norms(want)[name])
    alone, _ = norms.add_norm(Stream({"text": x["text"]}))
    assert torch.equal(alone["text"], x["text"])


@pytest.mark.parametrize("activation", ["gelu", "relu", "swiglu"])
@pytest.mark.parametrize("sub_layernorm", [True, False])
def test_feed_forward_is_its_formula(activation, sub_layernorm):
    ffn, x = FeedForward(6, 10, activation=activation, sub_layernorm=sub_layernorm), torch.randn(4, 6)
    hidden = x @ ffn.fc1.weight.T + ffn.fc1.bias
    if activation == "swiglu":
        gate = x @ ffn.fc_gate.weight.T + ffn.fc_gate.bias
        hidden = gate * torch.sigmoid(gate) * hidden
    elif activation == "relu":
        hidden = hidden.clamp(min=0)
    else:
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    if sub_layernorm:
        hidden = (hidden - hidden.mean(-1, keepdim=True)) / (hidden.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(ffn(x), hidden @ ffn.fc2.weight.T + ffn.fc2.bias)


@pytest.mark.parametrize("masked", [False, True])
def test_plain_attention_equals_the_fused_one(masked):
    q, k, v = torch.randn(3, 2, 4, 7, 5, dtype=torch.float64)
    visible = torch.rand(2, 1, 7, 7) < 0.6 if masked else None
    if visible is not None:
        visible |= torch.eye(7, dtype=torch.bool)
    fused = F.scaled_dot_product_attention(q, k, v, visible)
    torch.testing.assert_close(plain_attention(q, k, v, visible), fused)
    if visible is not None:
        bias = as_bias(visible, torch.float32)
        assert bias.shape == visible.shape and bias.stride(-2) % 8 == 0
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, bias), fused)


def test_attention_scores_are_joint_in_both_styles():
    """Copies of one set of weights, or the set itself: the same function."""
    shared, decoupled = Attention(8, 2, copies=SHARED), Attention(8, 2, copies=PER_MODALITY)
    state = shared.state_dict()
    copied = {k.replace("shared", m): v for k, v in state.items() for m in PER_MODALITY}
    decoupled.load_state_dict(copied)
    x = Stream({"vision": torch.randn(2, 4, 8), "text": torch.randn(2, 2, 8)})
    torch.testing.assert_close(decoupled(x, None), shared(x, None))


def test_position_tables_are_resized_as_images():
    table = torch.arange(2 * 19, dtype=torch.float32).reshape(19, 2)
    assert resize_positions(table, 4) is table
    resized = resize_positions(table, 6)
    assert resized.shape == (39, 2) and torch.equal(resized[:3], table[:3])
    grid = table[3:].reshape(4, 4, 2)
    for channel in range(2):
        image = F.interpolate(grid[None, None, ..., channel], size=(6, 6), mode="bicubic", align_corners=False)
        torch.testing.assert_close(resized[3:, channel], image.flatten())
    with pytest.raises(ValueError, match="20 rows"):
        resize_positions(torch.zeros(20, 2), 4)


def test_inputs_that_the_tables_do_not_cover():
    vision, text = VisionEmbed(image_size=8, patch_size=4, dim=4), TextEmbed(vocab_size=9, max_length=3, dim=4)
    with pytest.raises(ValueError, match="made for 8"):
        vision(torch.zeros(1, 3, 12, 12))
    with pytest.raises(ValueError, match="made for 3"):
        text(torch.zeros(1, 4, dtype=torch.long))


def test_patches_as_a_product_are_those_of_the_convolution():
    proj = torch.nn.Conv2d(3, 5, 4, 4).double()
    image = torch.randn(2, 3, 12, 8, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    product, convolution = project_patches(image, proj), proj(image).flatten(2).transpose(1, 2)
    torch.testing.assert_close(product, convolution)
    probe, wrt = torch.randn_like(product), (image, proj.weight, proj.bias)
    torch.testing.assert_close(
        torch.autograd.grad((product * probe).sum(), wrt), torch.autograd.grad((convolution * probe).sum(), wrt)
    )


@pytest.mark.parametrize("stem", ["linear", "conv"])
def test_masked_patches_say_nothing_of_their_pixels(stem):
    vision, image = VisionEmbed(image_size=8, patch_size=4, dim=4, stem=stem), torch.randn(1, 3, 8, 8)
    other = image.clone()
    other[..., :4, 4:] = 9.0  # the second patch
    is_masked = torch.tensor([[False, True, False, False]])
    assert torch.equal(vision(image, is_masked), vision(other, is_masked))
    assert not torch.equal(vision(image), vision(other))


def test_conv_stem_halves_the_image_up_to_the_width():
    stem, image = ConvStem(8, 16).double(), torch.randn(2, 3, 24, 16, dtype=torch.float64)
    assert [tuple(conv.weight.shape[:2]) for conv in stem.convs] == [(4, 3), (8, 4), (8, 8), (16, 8), (16, 16)]
    x = image
    for conv, stride in zip(stem.convs, (2, 2, 1, 2, 1), strict=True):
        x = F.pad(x, (1, 1, 1, 1))
        windows = x.unfold(2, 3, stride).unfold(3, 3, stride)  # [B, channels, rows, columns, 3, 3]
        x = F.gelu(torch.einsum("bcyxij,ocij->boyx", windows, conv.weight) + conv.bias[:, None, None])
    torch.testing.assert_close(stem(image), torch.einsum("bcyx,oc->boyx", x, stem.proj.weight[..., 0, 0]))
    wide = ConvStem(16, 384)(torch.randn(4, 3, 128, 128))  # the signal of a wide stem is neither lost nor blown up
    assert 0.2 < wide.std() < 5


@pytest.mark.parametrize(("patch_size", "dim"), [(12, 16), (1, 16), (16, 12)])
def test_conv_stem_names_the_sizes_that_do_not_fit(patch_size, dim):
    with pytest.raises(ValueError, match=rf"patch_size is {patch_size} and dim {dim}"):
        ConvStem(patch_size, dim)
