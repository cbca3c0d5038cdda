"""The encoder and the task models against what the official implementations computed from the same tensors."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from vlmoe.config import FFNConfig, ModelConfig
from vlmoe.errors import UserError
from vlmoe.models import (
    PretrainModel,
    beit3_from_state_dict,
    beit3_task_from_state_dict,
    beit3_task_to_state_dict,
    beit3_to_state_dict,
    build_encoder,
)

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
TASKS = ("vqa", "nlvr2", "retrieval", "captioning", "classification")
CLOSE = {"atol": 1e-5, "rtol": 0.0}


def read(name: str) -> tuple[dict, dict, dict]:
    """(official state dict, inputs, outputs) of a golden file."""
    groups: tuple[dict, dict, dict] = ({}, {}, {})
    for key, tensor in load_file(GOLDEN / f"beit3_{name}.safetensors").items():
        place = {"in": 1, "out": 2}.get(key.split(".")[0], 0)
        groups[place][key.split(".", 1)[1] if place else key] = tensor
    return groups


@pytest.mark.parametrize("case", ["image_only", "text_only", "pair", "pair_masked", "pair_seq2seq"])
def test_encoder_states(case):
    state, given, expected = read("encoder")
    encoder = beit3_from_state_dict(state, attn_heads=4).eval()
    image = None if case == "text_only" else given["image"]
    text, padding = (None, None) if case == "image_only" else (given["text"], given["text_padding"])
    out = encoder(
        image,
        text,
        text_padding=padding,
        image_masked=given["image_masked"] if case == "pair_masked" else None,
        blocked=given["seq2seq_blocked"] if case == "pair_seq2seq" else None,
    )
    assert out.num_vision == (0 if case == "text_only" else 17)
    is_real = torch.ones(out.states.shape[:2], dtype=torch.bool)
    if padding is not None:
        is_real[:, out.num_vision :] = ~padding
    torch.testing.assert_close(out.states[is_real], expected[case][is_real], **CLOSE)


@pytest.mark.parametrize("task", TASKS)
def test_task_outputs(task):
    state, given, expected = read(task)
    out = beit3_task_from_state_dict(task, state, attn_heads=4).eval()(**given)
    if task != "retrieval":
        torch.testing.assert_close(out.logits, expected["logits"], **CLOSE)
        return
    torch.testing.assert_close(out.image_embedding, expected["image_embedding"], **CLOSE)
    torch.testing.assert_close(out.text_embedding, expected["text_embedding"], **CLOSE)
    scores, same = out.logit_scale * out.image_embedding @ out.text_embedding.T, torch.arange(len(given["text"]))
    loss = (F.cross_entropy(scores, same) + F.cross_entropy(scores.T, same)) / 2
    torch.testing.assert_close(loss, expected["loss"][0], **CLOSE)


@pytest.mark.parametrize("name", ["encoder", *TASKS])
def test_state_dict_there_and_back_is_bit_equal(name):
    state, _, _ = read(name)
    if name == "encoder":
        back = beit3_to_state_dict(beit3_from_state_dict(state | {"mlm_head.bias": torch.ones(3)}, attn_heads=4))
    else:
        back = beit3_task_to_state_dict(beit3_task_from_state_dict(name, state, attn_heads=4))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_conversion_copies():
    state, _, _ = read("encoder")
    encoder = beit3_from_state_dict(state, attn_heads=4, drop_path=0.2)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
    assert state["beit3.text_embed.weight"].abs().sum() > 0
    assert encoder.drop_path == 0.2


def test_other_image_size_resizes_positions_only():
    state, given, _ = read("encoder")
    encoder = beit3_from_state_dict(state, attn_heads=4, image_size=48)
    assert encoder(F.interpolate(given["image"], size=48)).num_vision == 37
    back = beit3_to_state_dict(encoder)
    table = "beit3.encoder.embed_positions.A.weight"
    assert back[table].shape == (39, 48) and torch.equal(back[table][:3], state[table][:3])
    assert all(torch.equal(back[key], state[key]) for key in state if key != table)


@pytest.mark.parametrize(
    ("key", "change", "line"),
    [
        (
            "beit3.encoder.layers.1.ffn.B.fc2.bias",
            None,
            "checkpoint key beit3.encoder.layers.1.ffn.B.fc2.bias is missing",
        ),
        ("beit3.text_embed.weight", None, "checkpoint key beit3.text_embed.weight is missing"),
        ("beit3.encoder.layer_norm.A.bias", None, "checkpoint key beit3.encoder.layer_norm.A.bias is missing"),
        ("beit3.encoder.extra", torch.ones(1), "checkpoint key beit3.encoder.extra is not one of"),
        ("beit3.encoder.layers.0.ffn.A.fc1.weight", torch.ones(97, 48), "fc1.bias has shape [96]; [97] is expected"),
        ("beit3.vision_embed.proj.weight", torch.ones(48, 3, 64), "proj.weight has shape [48, 3, 64]; 4 axes"),
        ("beit3.encoder.embed_positions.A.weight", torch.ones(18, 48), "A.weight: a position table of 18 rows"),
        (
            "beit3.vision_embed.proj.bias",
            torch.ones(48).half(),
            "proj.bias is torch.float16, but beit3.text_embed.weight",
        ),
        ("beit3.vision_embed.proj.bias", torch.ones(48).long(), "proj.bias is torch.int64; a tensor of floating-point"),
        ("beit3.vision_embed.proj.bias", [1.0] * 48, "proj.bias is list; a tensor of floating-point numbers"),
    ],
)
def test_odd_checkpoints_are_named(key, change, line):
    state, _, _ = read("encoder")
    state.pop(key, None)
    with pytest.raises(UserError) as error:
        beit3_from_state_dict(state if change is None else state | {key: change}, attn_heads=4)
    assert line in str(error.value)


def test_half_precision_checkpoints_give_half_precision_encoders():
    state, given, expected = read("encoder")
    encoder = beit3_from_state_dict({key: tensor.half() for key, tensor in state.items()}, attn_heads=4).eval()
    assert {each.dtype for each in encoder.parameters()} == {torch.float16}
    out = encoder.float()(given["image"])
    torch.testing.assert_close(out.states, expected["image_only"], atol=0.02, rtol=0.0)


def test_odd_tasks_and_heads_are_named():
    state, _, _ = read("vqa")
    with pytest.raises(UserError, match="choose one of vqa, nlvr2, retrieval, captioning, classification"):
        beit3_task_from_state_dict("detection", state, attn_heads=4)
    with pytest.raises(UserError, match=r"fc_norm\.weight is missing"):
        beit3_task_from_state_dict("classification", state | {"head.weight": torch.ones(7, 32)}, attn_heads=4)
    with pytest.raises(UserError, match="attn_heads 5 does not divide the checkpoint's width 32"):
        beit3_from_state_dict(state, attn_heads=5)
    with pytest.raises(UserError, match="image_size 4 is not a multiple of the checkpoint's patch size 8"):
        beit3_from_state_dict(state, attn_heads=4, image_size=4)


def test_sparse_encoders_have_no_official_layout():
    config = ModelConfig(dim=16, depth=2, attn_heads=2, image_size=16, ffn=FFNConfig(num_experts=2, hidden_dim=8))
    with pytest.raises(UserError, match="only a decoupled, dense encoder"):
        beit3_to_state_dict(build_encoder(config, 20))
    config.ffn, config.multiway = FFNConfig(kind="dense", activation="relu"), "decoupled"
    with pytest.raises(UserError, match=r"only an encoder with GELU .* has relu"):
        beit3_to_state_dict(build_encoder(config, 20))


def test_base_model_has_the_released_number_of_parameters():
    """276M is what the release says of its pretraining checkpoint: encoder, mlm_head, mim_head of 8192 codes."""
    config = ModelConfig(
        dim=768,
        depth=12,
        attn_heads=12,
        image_size=224,
        patch_size=16,
        max_text_length=1022,
        ffn=FFNConfig(kind="dense"),
    )
    with torch.device("meta"):
        model = PretrainModel(build_encoder(config, 64010), 64010, 8192)
    assert sum(each.numel() for each in model.encoder.parameters()) == 220_987_392
    assert sum(each.numel() for each in model.parameters()) == 276_510_730
