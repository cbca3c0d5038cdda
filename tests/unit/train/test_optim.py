import pytest

from vlmoe.config import ModelConfig, OptimConfig
from vlmoe.models import PretrainModel, build_encoder
from vlmoe.train.optim import learning_rate, make_optimizer, set_learning_rate


def test_warm_up_then_cosine():
    config = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=10)
    rates = [learning_rate(step, 110, config) for step in range(110)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.55)  # half way down
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_layer_decay_reaches_the_learning_rate_once():
    model = PretrainModel(build_encoder(ModelConfig(dim=32, depth=3, attn_heads=2), 50), 50, 8)
    optimizer = make_optimizer(model, OptimConfig(layer_decay=0.5))
    set_learning_rate(optimizer, 1.0)
    set_learning_rate(optimizer, 0.8)
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
    assert rates["mlm_head.weight"] == pytest.approx(0.8)
    assert rates["encoder.text_embed.tokens.weight"] == pytest.approx(0.8 * 0.5**4)
    for layer in range(3):
        names = [name for name in rates if name.startswith(f"encoder.layers.{layer}.")]
        assert names and all(rates[name] == pytest.approx(0.8 * 0.5 ** (3 - layer)) for name in names)


def test_heads_have_their_own_rate():
    model = PretrainModel(build_encoder(ModelConfig(dim=32, depth=2, attn_heads=2), 50), 50, 8)
    optimizer = make_optimizer(model, OptimConfig(layer_decay=0.5, head_lr_scale=20.0))
    set_learning_rate(optimizer, 0.1)
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
    assert rates["mlm_head.weight"] == rates["mim_head.bias"] == pytest.approx(2.0)
    assert rates["encoder.norm.vision.weight"] == pytest.approx(0.1)  # the layer of the heads, and none of them
    assert rates["encoder.layers.1.attention.qkv.vision.linear.weight"] == pytest.approx(0.05)


def test_every_parameter_is_in_one_group_and_biases_do_not_decay():
    model = PretrainModel(build_encoder(ModelConfig(dim=32, depth=2, attn_heads=2), 50), 50, 8)
    groups = make_optimizer(model, OptimConfig()).param_groups
    decay = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert decay.keys() == dict(model.named_parameters()).keys()
    assert decay["encoder.layers.1.ffn.ffn.vision.moe.experts.w_in"] == 0.05
    assert decay["encoder.layers.1.ffn.ffn.vision.moe.experts.b_in"] == 0.0
    assert decay["encoder.vision_embed.cls_token"] == 0.0
