"""The encoder on tiny sizes: laws that hold for any weights, and the lines that wrong recipes get."""

import dataclasses
import math

import pytest
import torch

from vlmoe.config import FFNConfig, ModelConfig
from vlmoe.data.batch import positions
from vlmoe.errors import UserError
from vlmoe.models import (
    CaptioningModel,
    NLVR2Model,
    PretrainModel,
    RetrievalModel,
    VQAModel,
    build_encoder,
    layer_ids,
    no_weight_decay,
)
from vlmoe.models.build import expert_dim, experts_backend
from vlmoe.models.cost import describe_model
from vlmoe.models.encoder import drop_paths
from vlmoe.models.heads import prefix_lm_blocked

VOCAB, PATCHES, LENGTH = 30, 4, 5
PAIR = 1 + PATCHES + LENGTH


def config(ffn: dict | None = None, **model) -> ModelConfig:
    small = {"num_experts": 4, "num_heads": 2, "top_k": 2, "hidden_dim": 8} | (ffn or {})
    sizes = {"dim": 16, "depth": 2, "attn_heads": 2, "image_size": 8, "patch_size": 4, "max_text_length": LENGTH}
    return ModelConfig(**(sizes | model), ffn=FFNConfig(**small))


STYLES = {
    "dense": config({"kind": "dense"}),
    "mhmoe": config(),
    "one_bank": config({"experts_per_modality": False, "kind": "moe"}),
    "shared_attention": config({"kind": "dense"}, multiway="shared_attention"),
    "vl_mhmoe": config(multiway="shared_attention", vl_layers=1),
}


@pytest.fixture
def given() -> dict:
    torch.manual_seed(0)
    padding = torch.zeros(3, LENGTH, dtype=torch.bool)
    padding[1, 3:] = padding[2, 4:] = True
    return {"image": torch.rand(3, 3, 8, 8) * 2 - 1, "text": torch.randint(VOCAB, (3, LENGTH)), "text_padding": padding}


def build(style: str):
    torch.manual_seed(1)
    return build_encoder(STYLES[style], VOCAB).eval()


@pytest.mark.parametrize("style", STYLES)
def test_padding_influences_nothing(style, given):
    encoder = build(style)
    other = given["text"].clone()
    other[given["text_padding"]] = (other[given["text_padding"]] + 7) % VOCAB
    is_real = torch.cat([torch.ones(3, 1 + PATCHES, dtype=torch.bool), ~given["text_padding"]], dim=1)
    one, two = encoder(**given), encoder(**(given | {"text": other}))
    assert torch.equal(one.states[is_real], two.states[is_real])
    shorter = encoder(image=given["image"][1:2], text=given["text"][1:2, :3])
    torch.testing.assert_close(one.states[1, :-2], shorter.states[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("style", ["dense", "mhmoe", "shared_attention", "one_bank"])
def test_image_alone_equals_a_pair_whose_text_is_blocked(style, given):
    """Not with VL layers: there a pair passes other weights than an image."""
    encoder, num_vision = build(style), 1 + PATCHES
    blocked = torch.zeros(PAIR, PAIR, dtype=torch.bool)
    blocked[:num_vision, num_vision:] = True
    pair, alone = encoder(**given, blocked=blocked), encoder(given["image"])
    torch.testing.assert_close(pair.states[:, :num_vision], alone.states)
    assert not torch.allclose(encoder(**given).states[:, :num_vision], alone.states, atol=1e-4)


def test_blocked_hides_columns_from_rows(given):
    encoder = build("dense")
    blocked = prefix_lm_blocked(1 + PATCHES, LENGTH)
    assert not blocked[:, : 1 + PATCHES].any() and blocked[: 1 + PATCHES, 1 + PATCHES :].all()
    later = given["text"].clone()
    later[:, -1] = (later[:, -1] + 1) % VOCAB
    given.pop("text_padding")
    one, two = encoder(**given, blocked=blocked), encoder(**(given | {"text": later}), blocked=blocked)
    assert torch.equal(one.states[:, :-1], two.states[:, :-1]) and not torch.equal(one.states, two.states)
    per_sample = encoder(**given, blocked=blocked.expand(3, -1, -1))
    assert torch.equal(one.states, per_sample.states)


def test_shared_attention_is_decoupled_with_equal_copies(given):
    shared, decoupled = build("shared_attention"), build("dense")
    copied = {}
    for name, tensor in shared.state_dict().items():
        for modality in ("vision", "text"):
            copied[name.replace(".shared.", f".{modality}.")] = tensor
    decoupled.load_state_dict(copied)
    torch.testing.assert_close(decoupled(**given).states, shared(**given).states)


@pytest.mark.parametrize(
    ("style", "image_only", "text_only", "pair"),
    [
        ("dense", {}, {}, {}),
        ("mhmoe", {"layers.1.vision": 30}, {"layers.1.text": 30}, {"layers.1.vision": 30, "layers.1.text": 30}),
        ("one_bank", {"layers.1": 15}, {"layers.1": 15}, {"layers.1": 30}),
        ("vl_mhmoe", {"layers.1.vision": 30}, {"layers.1.text": 30}, {"layers.1.vl": 60}),
    ],
)
def test_routings_have_a_row_per_sub_token(style, image_only, text_only, pair, given):
    encoder, text = build(style), {key: given[key] for key in ("text", "text_padding")}
    for out, expected in (
        (encoder(given["image"]), image_only),
        (encoder(**text), text_only),
        (encoder(**given), pair),
    ):
        assert {name: len(routing.logits) for name, routing in out.routings.items()} == expected


def test_padding_reaches_no_expert(given):
    for style, name, sub_tokens in (
        ("mhmoe", "layers.1.text", 2),
        ("vl_mhmoe", "layers.1.vl", 2),
        ("one_bank", "layers.1", 1),
    ):
        routing = build(style)(**given).routings[name]
        assert routing.is_padding.sum() == 3 * sub_tokens
        assert routing.load.sum() == (~routing.is_padding).sum() * 2
    assert build("mhmoe")(**given).routings["layers.1.vision"].is_padding is None


@pytest.mark.parametrize("style", STYLES)
def test_every_parameter_learns(style, given):
    model = PretrainModel(build_encoder(dataclasses.replace(STYLES[style], drop_path=0.1), VOCAB), VOCAB, 12)
    masks = {"image_masked": torch.rand(3, PATCHES) < 0.5, "text_masked": torch.rand(3, LENGTH) < 0.5}
    masks["image_masked"][0, 0] = masks["text_masked"][0, 0] = True
    image, text = given["image"], given["text"]
    outs = [
        model(**given, **masks),
        model(image=image, image_masked=masks["image_masked"]),
        model(text=text, text_masked=masks["text_masked"]),
    ]
    logits = [each for out in outs for each in (out.text_logits, out.image_logits) if each is not None]
    routings = [routing.logits for out in outs for routing in out.routings.values()]
    sum(each.square().sum() for each in [*logits, *routings]).backward()
    experts = ("w_in", "w_out", "b_in", "b_out")  # few rows: some expert may get none
    silent = [n for n, p in model.named_parameters() if p.grad is None or not (p.grad.abs().sum() > 0)]
    assert [name for name in silent if not name.endswith(experts)] == []


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("alone", [False, True])
def test_packed_text_is_the_same_text(style, alone, given):
    """States, gradients and loads, with paths dropped; where modules are shared, texts stay padded."""
    padding, masked = given["text_padding"], torch.rand(3, LENGTH) < 0.5
    inputs = given | {
        "image": None if alone else given["image"],
        "text_masked": masked,
        "text_masked_at": positions(masked),
    }
    at = positions(~padding, multiple=6)
    model = PretrainModel(build_encoder(dataclasses.replace(STYLES[style], drop_path=0.5), VOCAB), VOCAB, 12).double()
    if not alone:
        inputs["image"] = given["image"].double()
    found = []
    for text_at in (None, at):
        torch.manual_seed(7)
        out = model(**inputs, text_at=text_at)
        real = torch.cat([torch.zeros(3, out.num_vision, dtype=torch.bool), padding], dim=1).logical_not()
        states = out.states[real]
        probe = torch.linspace(-1, 1, states.numel(), dtype=torch.float64).view_as(states)
        gradients = torch.autograd.grad((states * probe).sum(), list(model.parameters()), allow_unused=True)
        found.append((states, gradients, {name: each.load for name, each in out.routings.items()}))
        rows = {len(each.logits) for name, each in out.routings.items() if name.endswith(".text")}
        assert not rows or not model.encoder.can_pack or rows == {2 * (3 * LENGTH if text_at is None else len(at))}
    torch.testing.assert_close(*found)
    assert model.encoder.can_pack == (style in ("dense", "mhmoe"))


def test_task_models_pack_their_texts(given):
    """The same logits and embeddings; the rows of routings say that less passed the experts of text."""
    image, text, padding = given.values()
    masked = (torch.rand(3, LENGTH) < 0.5) & ~padding
    models = {
        VQAModel(build("mhmoe"), 7): {},
        NLVR2Model(build("mhmoe")): {"image_b": image.flip(0)},
        CaptioningModel(build("mhmoe"), VOCAB): {"text_masked": masked, "text_masked_at": positions(masked)},
        RetrievalModel(build("mhmoe"), 6): {},
    }
    at = positions(~padding, multiple=6)
    for model, extra in models.items():
        padded, packed = (model.eval()(image, text, text_padding=padding, text_at=each, **extra) for each in (None, at))
        for name in ("logits", "image_embedding", "text_embedding"):
            torch.testing.assert_close(getattr(packed, name, None), getattr(padded, name, None))
        rows = [sum(len(each.logits) for each in out.routings.values()) for out in (padded, packed)]
        passes = 2 if "image_b" in extra else 1
        assert rows[0] - rows[1] == 2 * passes * (3 * LENGTH - len(at))
        loads = ([each.load for each in out.routings.values()] for out in (padded, packed))
        torch.testing.assert_close(*loads)


def test_drop_path_skips_parts_of_samples_and_keeps_the_mean():
    x, depth = torch.ones(4000, 1, 1), 5
    factors = drop_paths(x, depth, 0.4)
    assert factors.shape == (depth, 2, 4000, 1, 1)
    for layer, rate in enumerate([0, 0.1, 0.2, 0.3, 0.4]):
        values, counts = factors[layer].unique(return_counts=True)
        torch.testing.assert_close(values, torch.tensor([0, 1 / (1 - rate)] if rate else [1.0]))
        assert abs(counts[-1] / 8000 - (1 - rate)) < 0.03
    assert not drop_paths(x, 2, 1.0)[1].any()


def test_drop_path_is_for_training(given):
    model = build_encoder(dataclasses.replace(STYLES["mhmoe"], drop_path=0.9), VOCAB)
    torch.manual_seed(0)
    dropped = model(**given).states
    assert not torch.equal(dropped, model(**given).states)
    model.eval()
    assert torch.equal(model(**given).states, model(**given).states)


def test_pretrain_model_predicts_at_masked_positions_in_order(given):
    model = PretrainModel(build("mhmoe"), VOCAB, 12).eval()
    image_masked, text_masked = torch.rand(3, PATCHES) < 0.5, torch.rand(3, LENGTH) < 0.5
    out = model(**given, image_masked=image_masked, text_masked=text_masked)
    states = model.encoder(**given, image_masked=image_masked).states
    text = [states[b, 1 + PATCHES + i] for b, i in text_masked.nonzero().tolist()]
    image = [states[b, 1 + i] for b, i in image_masked.nonzero().tolist()]
    torch.testing.assert_close(out.text_logits, model.mlm_head(torch.stack(text)))
    torch.testing.assert_close(out.image_logits, model.mim_head(torch.stack(image)))
    assert out.num_vision == 1 + PATCHES and torch.equal(out.states, states)
    masks = {"image_masked": image_masked, "text_masked": text_masked}
    at = {f"{name}_at": positions(mask) for name, mask in masks.items()}
    same = model(**given, **masks, **at)
    torch.testing.assert_close(same.text_logits[at["text_masked_at"] >= 0], out.text_logits)
    torch.testing.assert_close(same.image_logits[at["image_masked_at"] >= 0], out.image_logits)
    assert model(given["image"]).text_logits is None and model(given["image"]).image_logits is None


def test_retrieval_takes_images_and_texts_apart(given):
    model = RetrievalModel(build("one_bank"), 6).eval()
    text = {key: given[key][:2] for key in ("text", "text_padding")}
    both, images = model(given["image"], **text), model(given["image"])
    assert both.image_embedding.shape == (3, 6) and both.text_embedding.shape == (2, 6)
    assert both.routings.keys() == {"image.layers.1", "text.layers.1"}
    assert torch.equal(both.image_embedding, images.image_embedding) and images.text_embedding is None
    assert both.logit_scale.item() == pytest.approx(1 / 0.07)
    with torch.autocast("cpu", torch.bfloat16):
        image = model(given["image"]).image_embedding
    torch.testing.assert_close(image.norm(dim=-1), torch.ones(3))


def test_experts_have_the_flops_of_a_dense_layer():
    """arXiv:2411.16205, eq. 8: f = F / k for whole tokens, (F - d) / k with one split and one merge layer."""
    assert expert_dim(FFNConfig(kind="moe", top_k=2), 192) == 384
    assert expert_dim(FFNConfig(kind="mhmoe", top_k=2), 192) == (768 - 192) // 2
    assert expert_dim(FFNConfig(kind="moe", hidden_dim=40), 192) == 40
    with pytest.raises(UserError, match=r"model\.ffn\.hidden_dim"):
        expert_dim(FFNConfig(kind="mhmoe", num_split_layers=3, num_merge_layers=3, dense_dim=192), 192)


def test_a_dense_model_needs_no_sizes_of_experts():
    config = ModelConfig(ffn=FFNConfig(kind="dense", top_k=0, dense_dim=16))
    assert "dense" in describe_model(config, 50, 8)


@pytest.mark.parametrize(
    ("ffn", "compiled", "backend"),
    [
        ({"moe_every": 0}, False, ""),
        ({"backend": "grouped"}, False, "grouped"),
        ({"hidden_dim": 64}, False, "batched"),
        ({"hidden_dim": 64}, True, "grouped"),
    ],
)
def test_what_the_experts_run_on(ffn, compiled, backend):
    config = ModelConfig(dim=96, ffn=FFNConfig(**{"num_heads": 2, "num_experts": 4} | ffn))
    assert experts_backend(config, torch.device("cpu"), torch.bfloat16, compiled=compiled) == backend


def test_initial_sizes_are_magnetos():
    encoder = build_encoder(config({"kind": "dense"}, dim=64, depth=4), VOCAB)
    gain, layer, std = math.sqrt(math.log(8)), encoder.layers[0], 0.02 * math.sqrt(768 / 64)
    query, _, value = layer.attention.qkv.vision.linear.weight.chunk(3)
    assert query.std().item() == pytest.approx(std, rel=0.1)
    for weight in (value, layer.attention.out.text.linear.weight, layer.ffn.ffn.text.fc1.weight):
        assert weight.std().item() == pytest.approx(std * gain, rel=0.1)


def test_layer_ids_and_no_weight_decay():
    model = PretrainModel(build("mhmoe"), VOCAB, 12)
    ids, spared = layer_ids(model), no_weight_decay(model)
    assert ids.keys() == {name for name, _ in model.named_parameters()}
    assert {name: ids[name] for name in ids if "embed" in name or name.endswith("_head.weight")} == {
        **{f"encoder.vision_embed.{each}": 0 for each in ("cls_token", "mask_token", "positions")},
        **{f"encoder.vision_embed.proj.{each}": 0 for each in ("weight", "bias")},
        **{f"encoder.text_embed.{each}": 0 for each in ("positions", "tokens.weight")},
        **{"mlm_head.weight": 3, "mim_head.weight": 3},
    }
    assert {ids[name] for name in ids if ".layers.1." in name} == {2} and ids["encoder.norm.text.weight"] == 3
    assert layer_ids(model.encoder) == {k.removeprefix("encoder."): v for k, v in ids.items() if k.startswith("enc")}
    assert {"encoder.vision_embed.cls_token", "encoder.text_embed.positions", "mlm_head.bias"} <= spared
    decayed = ids.keys() - spared
    assert "encoder.text_embed.tokens.weight" in decayed
    assert all(name.rpartition(".")[2] in ("weight", "w_in", "w_out") and "norm" not in name for name in decayed)


@pytest.mark.parametrize(
    ("model", "ffn", "keys"),
    [
        ({"image_size": 10}, {}, ("model.image_size", "model.patch_size")),
        ({"attn_heads": 3}, {}, ("model.dim", "model.attn_heads")),
        ({"depth": 0}, {}, ("model.depth",)),
        ({"stem": "conv", "patch_size": 1}, {}, ("model", "stem conv", "patch_size")),
        ({"vl_layers": 1}, {}, ("model.vl_layers", "model.multiway")),
        ({"vl_layers": 3, "multiway": "shared_attention"}, {}, ("model.vl_layers", "model.depth")),
        ({}, {"num_heads": 3}, ("model.dim", "model.ffn.num_heads")),
        ({"dim": 24}, {"backend": "grouped"}, ("model.ffn.num_heads", "multiple of 8")),
        ({}, {"backend": "grouped", "hidden_dim": 12}, ("model.ffn.hidden_dim", "multiple of 8")),
        ({}, {"moe_layers": [0, 2]}, ("model.ffn.moe_layers",)),
        ({}, {"moe_every": -1}, ("model.ffn.moe_every",)),
        ({}, {"top_k": 5}, ("model.ffn.top_k", "model.ffn.num_experts")),
        ({}, {"num_experts": 0}, ("model.ffn.num_experts",)),
        ({}, {"num_split_layers": 4}, ("num_split_layers",)),
    ],
)
def test_sizes_that_do_not_fit_name_their_keys(model, ffn, keys):
    with pytest.raises(UserError) as error:
        build_encoder(config(ffn, **model), VOCAB)
    assert "\n" not in str(error.value) and all(key in str(error.value) for key in keys)


def test_an_encoder_needs_an_input():
    with pytest.raises(ValueError, match="an image, a text, or both"):
        build("dense")()
