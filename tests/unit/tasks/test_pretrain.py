"""Masked data modelling: what is hidden, and the loss against one sample at a time."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vlmoe.config import load
from vlmoe.data import BrokenSample, Sample, collate, to_device, to_float
from vlmoe.errors import UserError
from vlmoe.metrics.perplexity import perplexity, unigram_perplexity
from vlmoe.tasks import make_task
from vlmoe.tasks.pretrain import Pretrain


@pytest.fixture
def task(pretrain_recipe) -> Pretrain:
    config = load(pretrain_recipe, ["model.ffn.kind=dense", "model.drop_path=0", "data.images.batch_size=8"])
    made = make_task(config, torch.device("cpu"))
    assert isinstance(made, Pretrain)
    return made


@pytest.fixture
def samples(tiny_world) -> list[Sample]:
    from vlmoe.config import SourceConfig
    from vlmoe.data.shards import Stream

    stream = Stream([SourceConfig(shards=tiny_world.pairs)], name="pairs", batch_size=6, seed=0, shuffle_shards=8)
    return [stream.locate(i).load() for i in range(6)]


def prepared(task: Pretrain, samples: list[Sample], stream: str) -> list[dict]:
    return [task.prepare(each, stream, np.random.default_rng(i), False) for i, each in enumerate(samples)]


@pytest.mark.parametrize(("stream", "ratio"), [("texts", 0.15), ("pairs", 0.5)])
def test_an_exact_share_of_the_words_is_hidden_and_never_a_special_token(task, samples, stream, ratio):
    for tensors in prepared(task, samples, stream):
        words = len(tensors["text"]) - 2
        assert tensors["text_masked"].sum() == max(1, round(ratio * words))
        assert not tensors["text_masked"][0] and not tensors["text_masked"][-1]


@pytest.mark.parametrize("stream", ["images", "pairs"])
def test_exactly_forty_percent_of_the_patches_are_hidden(task, samples, stream):
    assert all(tensors["image_masked"].sum() == round(0.4 * 16) for tensors in prepared(task, samples, stream))


def test_a_mask_ratio_that_hides_nothing_is_refused(pretrain_recipe):
    with pytest.raises(UserError, match=r"image_mask_ratio 0.03 hides none of the 16 patches"):
        make_task(load(pretrain_recipe, ["image_mask_ratio=0.03"]), torch.device("cpu"))


def test_a_visual_tokenizer_that_is_not_trained_yet_is_named_by_its_key(pretrain_recipe, tmp_path):
    with pytest.raises(UserError, match=r"visual_tokenizer: .* has no checkpoint"):
        make_task(load(pretrain_recipe, [f"visual_tokenizer={tmp_path}"]), torch.device("cpu"))


def test_streams_carry_what_they_are_made_of(task, samples):
    assert prepared(task, samples, "images")[0].keys() == {"image", "image_masked"}
    assert prepared(task, samples, "texts")[0].keys() == {"text", "text_masked"}


def test_the_loss_is_that_of_the_samples_one_at_a_time(task, samples):
    model = task.build_model().eval().requires_grad_(False)
    parts = {stream: prepared(task, samples, stream) for stream in ("images", "texts", "pairs")}
    inputs = {
        stream: to_device(collate(rows, pad_id=task.pad_id), torch.device("cpu")) for stream, rows in parts.items()
    }
    counts = {name: float(count) for name, count in task.num_targets(inputs).items()}
    together = task.loss(model, inputs, counts)

    sums = dict.fromkeys(("images_image", "texts_text", "pairs_image", "pairs_text"), 0.0)
    for stream, rows in parts.items():
        for row in rows:
            text, image = row.get("text"), to_float(row["image"]) if "image" in row else None
            hidden = text[None].masked_fill(row["text_masked"], task.tokenizer.mask_id) if text is not None else None
            masked = row["image_masked"][None] if image is not None else None
            states = model.encoder(image[None] if image is not None else None, hidden, image_masked=masked)
            if text is not None:
                at = states.states[0, states.num_vision :][row["text_masked"]]
                sums[f"{stream}_text"] += float(
                    F.cross_entropy(model.mlm_head(at), text[row["text_masked"]], reduction="sum")
                )
            if image is not None:
                at = states.states[0, 1 : states.num_vision][row["image_masked"]]
                codes = task.codes_of.encode(image[None])[0][row["image_masked"]]
                sums[f"{stream}_image"] += float(F.cross_entropy(model.mim_head(at), codes, reduction="sum"))
    for name, value in sums.items():
        assert float(together.metrics[name]) == pytest.approx(value / counts[name], rel=1e-5), name
    assert float(together.total) == pytest.approx(sum(sums[name] / counts[name] for name in sums), rel=1e-5)


def test_scores_do_not_depend_on_how_the_samples_were_batched(task, samples):
    model = task.build_model().eval()
    rows = prepared(task, samples, "texts")

    def score(*groups: list[dict]) -> dict[str, float]:
        with torch.no_grad():
            records = [
                r for group in groups for r in task.predict(model, {"texts": collate(group, pad_id=task.pad_id)})
            ]
        return task.score(records)

    assert score(rows) == pytest.approx(score(rows[:1], rows[1:4], rows[4:]), rel=1e-5)


def test_a_picture_alone_has_no_other_in_its_place(task, samples):
    model, rows = task.build_model().eval(), prepared(task, samples, "pairs")

    def terms(rows: list[dict]) -> dict[str, dict]:
        inputs = to_device(collate(rows, pad_id=task.pad_id), torch.device("cpu"))
        with torch.no_grad():
            return task.predict(model, {"pairs": inputs})[0]["terms"]

    assert "pairs_text_image_shuffled" not in terms(rows[:1])
    both = terms(rows[:2])
    assert both["pairs_text_image_shuffled"]["n"] == both["pairs_text"]["n"]


def test_a_text_without_words_is_broken(task, samples):
    empty = Sample(key="a", source="b", image=None, texts=["  "], meta={})
    with pytest.raises(BrokenSample, match="empty text"):
        task.prepare(empty, "texts", np.random.default_rng(0), True)


def test_unigram_perplexity_is_that_of_the_best_context_free_guess():
    counts = np.array([5, 3, 2, 0])
    share = counts[:3] / 10
    assert unigram_perplexity(counts) == pytest.approx(float(np.prod(share ** -(counts[:3] / 10))))
    assert unigram_perplexity(np.ones(7)) == pytest.approx(7)
    assert perplexity(10 * np.log(3), 10) == pytest.approx(3) and perplexity(1e6, 1) == float("inf")
