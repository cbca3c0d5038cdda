"""A step's batch depends on (seed, step) alone: not on workers, ranks, accumulation, or where the run started."""

import importlib
import multiprocessing
import subprocess
import sys
import traceback
from functools import partial
from itertools import chain

import pytest
import torch
from PIL import Image

from vlmoe.config import SourceConfig
from vlmoe.data import BrokenSample, Stream, build_eval_loader, build_loader, held_out_samples, train_transform
from vlmoe.errors import UserError

WORKERS = [0, 1, 3]


def prepare(sample, stream, rng, training):
    if sample.texts[0] == "refused":
        raise BrokenSample("empty text")
    if sample.texts[0] == "impossible":
        raise UserError("this sample needs another recipe")
    if sample.texts[0] == "defect":
        raise ZeroDivisionError("a defect of the task")
    return {
        "text": torch.tensor([ord(each) for each in sample.texts[0]]),
        "draw": torch.tensor(rng.random()),
        "training": torch.tensor(training),
        "threads": torch.tensor(torch.get_num_threads()),
        "caption": sample.texts[0],
    }


@pytest.fixture
def streams(write_texts):
    def stream(name, lengths, batch_size):
        source = SourceConfig(shards=write_texts(name + "{}.tar", lengths))
        return Stream([source], name="texts", batch_size=batch_size, seed=3, shuffle_shards=2)

    return {"texts": stream("a", [5, 4, 6], 8), "more": stream("b", [3, 2], 4)}


load = partial(build_loader, prepare=prepare, seed=7, pad_id=0, max_text_length=16)


def flat(loader):
    """[(step, stream, caption, draw)] in the order read."""
    return [
        (step, stream, caption, draw)
        for step, batches in enumerate(loader)
        for batch in batches
        for stream, values in batch.inputs.items()
        for caption, draw in zip(values["caption"], values["draw"].tolist(), strict=True)
    ]


pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.mark.parametrize("workers", WORKERS[1:])
def test_workers_change_nothing(streams, workers):
    one = list(load(streams, num_steps=5, accumulate=2))
    many = list(load(streams, num_steps=5, accumulate=2, workers=workers))
    assert [len(step) for step in many] == [2] * 5
    for ours, theirs in zip(chain(*one), chain(*many), strict=True):
        assert list(ours.inputs) == list(theirs.inputs) == ["texts", "more"]
        for stream, values in ours.inputs.items():
            assert theirs.inputs[stream]["threads"].unique().tolist() == [1]
            for name in values.keys() - {"threads", "caption"}:
                assert torch.equal(values[name], theirs.inputs[stream][name])
        assert ours.seen == theirs.seen == 6 and ours.inputs["texts"]["training"].all()


def test_pictures_are_the_same_from_any_number_of_workers(write_shard, encode_image):
    noise = [Image.effect_noise((60 + n, 50), 40 + n) for n in range(6)]
    samples = [{"jpg": encode_image(each.convert("RGB")), "txt": "a"} for each in noise[:5]]
    shard = write_shard("p.tar", [*samples, {"png": encode_image(noise[5].convert("RGB"), format="PNG"), "txt": "a"}])

    def crop(sample, stream, rng, training):
        return {"image": train_transform(sample.image, rng, image_size=32, flip=True, color_jitter=0.4, rand_augment=2)}

    def images(workers):
        stream = Stream([SourceConfig(shards=shard)], name="pairs", batch_size=6, seed=0, shuffle_shards=1)
        steps = build_loader({"pairs": stream}, crop, seed=7, num_steps=2, workers=workers)
        return torch.cat([batch.inputs["pairs"]["image"] for (batch,) in steps])

    alone = images(0)
    assert alone.shape == (12, 3, 32, 32) and alone.dtype == torch.float32 and -1 <= alone.min() < 0 < alone.max() <= 1
    assert len({each.sum().item() for each in alone}) == 12
    assert all(torch.equal(images(workers), alone) for workers in WORKERS[1:])


@pytest.mark.parametrize("workers", WORKERS)
def test_resume_is_the_tail_of_the_whole_run(streams, workers):
    whole = [flat([step]) for step in load(streams, num_steps=9)]
    for first_step in (1, 4, 8):
        assert [flat([s]) for s in load(streams, num_steps=9, first_step=first_step, workers=workers)] == whole[
            first_step:
        ]
    assert list(load(streams, num_steps=9, first_step=9)) == []


@pytest.mark.parametrize(("world_size", "accumulate"), [(2, 1), (1, 4), (2, 2), (4, 1)])
def test_ranks_and_micro_batches_share_out_the_same_samples(streams, world_size, accumulate):
    whole = flat(load(streams, num_steps=6))
    shares = [
        flat(load(streams, num_steps=6, rank=rank, world_size=world_size, accumulate=accumulate))
        for rank in range(world_size)
    ]
    assert all(len(share) == len(whole) / world_size for share in shares)
    assert sorted(chain(*shares)) == sorted(whole)


def test_random_numbers_belong_to_the_position(streams):
    draws = [draw for *_, draw in flat(load(streams, num_steps=6))]
    assert len(set(draws)) == len(draws)
    assert draws != [draw for *_, draw in flat(load(streams, num_steps=6, seed=8))]


def test_loading_leaves_the_global_generator_alone(streams):
    state = torch.get_rng_state()
    list(load(streams, num_steps=2, workers=1))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_batch_moves_as_one(streams):
    ((batch,),) = load(streams, num_steps=1)
    moved = batch.to(torch.device("meta"))
    assert moved.inputs["more"]["text"].is_meta and moved.inputs["texts"]["text_padding"].is_meta
    assert moved.inputs["texts"]["caption"] == batch.inputs["texts"]["caption"] and moved.seen == 12
    assert not batch.inputs["texts"]["text"].is_meta


def test_a_batch_that_cannot_be_shared_out_is_refused_at_once(streams):
    with pytest.raises(UserError, match=r"data\.texts\.batch_size is 8.*3 ranks x 2 .*multiple of 6, such as 6"):
        load(streams, num_steps=1, world_size=3, accumulate=2)


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_samples_are_replaced_and_reported(write_shard, workers):
    path = write_shard("a.tar", [{"txt": text} for text in ("a", "b", "refused", " ", "c", "d")])
    stream = Stream([SourceConfig(shards=path)], name="texts", batch_size=6, seed=0, shuffle_shards=1)
    ((batch,),) = load({"texts": stream}, num_steps=1, workers=workers)
    assert len(batch.inputs["texts"]["caption"]) == 6
    assert {(bad.stream, bad.cause, bad.shard, bad.key) for bad in batch.bad} == {
        ("texts", "empty text", path, "0002"),
        ("texts", "empty text", path, "0003"),
    }
    assert batch.seen == 6 + len(batch.bad)


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_arrive_as_they_are(write_shard, workers):
    def texts(text):
        source = SourceConfig(shards=write_shard(f"{text.strip()}.tar", [{"txt": text}]))
        return {"texts": Stream([source], name="texts", batch_size=1, seed=0, shuffle_shards=1)}

    with pytest.raises(UserError) as caught:
        list(load(texts("impossible"), num_steps=1, workers=workers))
    assert str(caught.value) == "this sample needs another recipe"
    assert multiprocessing.active_children() == [], "the workers are gone while the error is still held"
    with pytest.raises(UserError, match="9 samples in a row are broken") as caught:
        list(load(texts(" "), num_steps=1, workers=workers))
    assert "\n" not in str(caught.value)
    with pytest.raises(ZeroDivisionError, match="a defect of the task") as caught:
        list(load(texts("defect"), num_steps=1, workers=workers))
    traceback.clear_frames(caught.tb)  # they hold DataLoader's iterator


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_held_out_samples_are_read_once_and_alike_each_time(write_texts, world_size, workers):
    patterns = [write_texts("v{}.tar", [4, 3]), write_texts("w{}.tar", [6])]
    evaluate = partial(
        build_eval_loader, held_out_samples(patterns, "texts"), "texts", prepare, seed=0, batch_size=2, pad_id=0
    )
    expected = [f"{s}.{n}" for s, length in ((0, 4), (1, 3), (0, 6)) for n in range(length)]

    loaders = [evaluate(rank=rank, world_size=world_size, workers=workers) for rank in range(world_size)]
    runs = [[flat([[batch]]) for batch in loader] for loader in loaders]
    assert runs == [[flat([[batch]]) for batch in loader] for loader in loaders]
    assert {len(run) for run in runs} == {len(loaders[0])} == {-(-13 // (2 * world_size))}
    captions = [[caption for batch in run for _, _, caption, _ in batch] for run in runs]
    assert captions == [expected[rank::world_size] for rank in range(world_size)]
    single = {caption_draw[2:] for batch in evaluate() for caption_draw in flat([[batch]])}
    assert {each[2:] for run in runs for batch in run for each in batch} == single
    assert not next(iter(loaders[0])).inputs["texts"]["training"].any()
    assert sum(len(batch) for batch in map(flat, ([[b]] for b in evaluate(limit=5)))) == 5


def test_broken_held_out_samples_are_skipped_and_reported(write_shard):
    path = write_shard("v.tar", [{"txt": text} for text in ("a", " ", "b", "refused", " ")])
    batches = list(
        build_eval_loader(held_out_samples([path], "texts"), "texts", prepare, seed=0, batch_size=2, pad_id=0)
    )
    assert [batch.inputs.get("texts", {}).get("caption") for batch in batches] == [["a"], ["b"], None]
    assert [batch.seen for batch in batches] == [2, 2, 1]
    assert [bad.key for batch in batches for bad in batch.bad] == ["0001", "0003", "0004"]


def test_held_out_shards_must_exist(tmp_path):
    with pytest.raises(UserError, match=r"data\.pairs\.eval_shards\[0\]: no file matches"):
        held_out_samples([f"{tmp_path}/v*.tar"], "pairs")


def test_spawned_workers(streams, tmp_path, monkeypatch):
    (tmp_path / "spawned_prepare.py").write_text(
        "def prepare(sample, stream, rng, training):\n    return {'caption': sample.texts[0], 'draw': rng.random()}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)  # a spawned worker has the same path
    prepare = importlib.import_module("spawned_prepare").prepare
    here, there = (
        [batch for (batch,) in build_loader(streams, prepare, seed=7, num_steps=2, **options)]
        for options in ({}, {"workers": 1, "start_method": "spawn"})
    )
    assert here == there


def test_a_process_ends_that_still_holds_its_workers():
    """They ignore the SIGTERM that `multiprocessing` sends them at exit."""
    script = """
import torch
from vlmoe.data.loader import Batch, _load
batch = Batch({"texts": {"text": torch.zeros(1)}}, num_targets={})
batches = _load([batch] * 50, range(50), workers=1, device=torch.device("cpu"), start_method=None)
next(batches)
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=120, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
