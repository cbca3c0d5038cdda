"""The order law, its resume, replacement of broken samples, and patterns that name nothing."""

import pickle
from collections import Counter

import pytest

from vlmoe.config import DataConfig, SourceConfig, StreamConfig
from vlmoe.data.sample import BrokenSample
from vlmoe.data.shards import MAX_REPLACEMENTS, Stream, held_out_samples, open_shards, open_streams
from vlmoe.errors import UserError


def _stream(*patterns, upsampling=(), seed=0, shuffle_shards=4, name="texts"):
    factors = [*upsampling, *[1.0] * (len(patterns) - len(upsampling))]
    sources = [SourceConfig(shards=each, upsampling=u) for each, u in zip(patterns, factors, strict=True)]
    return Stream(sources, name=name, batch_size=4, seed=seed, shuffle_shards=shuffle_shards)


def _order(stream, positions):
    return [(where.shard, where.key) for where in map(stream.locate, positions)]


def test_an_epoch_is_every_sample_once_in_groups_of_shards(write_texts):
    stream = _stream(write_texts("a{}.tar", [5, 3, 4, 0, 6, 2, 5]), shuffle_shards=3)
    assert stream.epoch_length == 25
    first, second = _order(stream, range(25)), _order(stream, range(25, 50))
    assert len(set(first)) == 25 and sorted(first) == sorted(second) and first != second
    shards = list(dict.fromkeys(shard for shard, _ in first))
    group_of = {}
    for shard, _ in first:  # six shards with samples: two groups of three, none reached back to
        group_of[shard] = len(group_of) // 3 if shard not in group_of else group_of[shard]
    assert [group_of[shard] for shard, _ in first] == sorted(group_of[shard] for shard, _ in first)
    inside = [shard for shard, _ in first if group_of[shard] == 0]
    assert len(shards) == 6 and inside != sorted(inside, key=shards.index), "samples of a group are mixed"


def test_order_is_a_pure_function_of_seed_epoch_and_position(write_texts):
    pattern = write_texts("a{}.tar", [7, 7, 7])
    expected = _order(_stream(pattern), range(60))
    backwards = _order(_stream(pattern), reversed(range(60)))
    assert backwards[::-1] == expected
    assert _order(pickle.loads(pickle.dumps(_stream(pattern))), range(60)) == expected
    assert _order(_stream(pattern, seed=1), range(60)) != expected
    keys = [int(where.index.path[-5]) * 10 + where.sample for where in map(_stream(pattern).locate, range(8))]
    assert keys == [15, 1, 10, 12, 23, 24, 6, 25], "the order changed: runs saved before cannot be resumed exactly"


def test_upsampling_is_whole_passes_and_a_fresh_subset(write_texts):
    a, b, c = (write_texts(name + "{}.tar", lengths) for name, lengths in (("a", [10, 6]), ("b", [10]), ("c", [7, 8])))
    stream = _stream(a, b, c, upsampling=(2.5, 0.3, 1.0))
    assert stream.epoch_length == 40 + 3 + 15
    epochs = [Counter(_order(stream, range(e * 58, e * 58 + 58))) for e in range(12)]
    for epoch in epochs:
        counts = {name: [n for (shard, _), n in epoch.items() if f"/{name}" in shard] for name in "abc"}
        assert sorted(counts["a"]) == [2] * 8 + [3] * 8
        assert counts["b"] == [1] * 3 and counts["c"] == [1] * 15
    drawn_of_b = {place for epoch in epochs for place in epoch if "/b" in place[0]}
    assert len(drawn_of_b) > 6, "the subset changes with the epoch"
    assert {where.source for where in map(stream.locate, range(58))} == {a, b, c}


def test_broken_samples_are_replaced_and_reported(write_shard):
    texts = [{"txt": f"{n}"} for n in range(6)]
    path = write_shard("a.tar", [*texts, {"json": b"{", "txt": "x"}, {"txt": " "}])
    stream = _stream(path)
    reads = [stream.read(position) for position in range(80)]
    assert reads == [_stream(path).read(position) for position in range(80)]
    bad = {(each.cause, each.key) for _, failures in reads for each in failures}
    assert bad == {("bad json", "0006"), ("empty text", "0007")}
    for position, (sample, failures) in enumerate(reads):
        wanted = stream.locate(position).key
        assert sample.texts[0] in "012345"
        assert (sample.key == wanted) == (not failures)
        assert all(each.stream == "texts" and each.shard == path for each in failures)
        assert not failures or failures[0].key == wanted
    assert len({sample.key for sample, failures in reads if failures}) > 3, "stand-ins are drawn from everywhere"


def test_a_stand_in_is_found_among_few_samples(write_shard):
    stream = _stream(write_shard("a.tar", [{"txt": " "}] * MAX_REPLACEMENTS + [{"txt": "good"}]))
    assert {stream.read(position)[0].texts[0] for position in range(30)} == {"good"}


def test_only_broken_samples_stop_the_run(write_shard):
    stream = _stream(write_shard("a.tar", [{"txt": "a"}] * 30), name="pairs")
    with pytest.raises(UserError, match=r"stream pairs: 9 samples in a row are broken \(no image\), last .*a\.tar key"):
        stream.read(3)

    def refuse(sample):
        raise BrokenSample("empty text")

    with pytest.raises(UserError, match="empty text"):
        _stream(write_shard("b.tar", [{"txt": "a"}])).read(0, refuse)


def test_patterns_expand_braces_and_wildcards(write_texts, tmp_path):
    write_texts("a-00{}.tar", [1, 2, 3])
    wild = [index.path for index in open_shards(f"{tmp_path}/a-*.tar", recipe_key="k")]
    assert wild == sorted(wild) and len(wild) == 3
    assert [index.path for index in open_shards(f"{tmp_path}/a-{{000..002}}.tar", recipe_key="k")] == wild
    assert len(open_shards(f"{tmp_path}/a-{{000,002}}.tar", recipe_key="k")) == 2


def test_a_shard_is_trained_on_or_held_out(write_texts, tmp_path):
    pattern = write_texts("a{}.tar", [3, 4])
    (tmp_path / "link.tar").symlink_to(tmp_path / "a1.tar")
    texts = StreamConfig(batch_size=2, sources=[SourceConfig(shards=pattern)] * 2, eval_shards=[f"{tmp_path}/link.tar"])
    with pytest.raises(UserError, match=r"data.texts.eval_shards\[0\]: .*link.tar is one of data.texts.sources too"):
        open_streams(DataConfig(texts=texts), ["texts"], seed=0)


def test_a_held_out_shard_that_is_named_twice_is_read_once(write_texts, tmp_path):
    write_texts("a{}.tar", [3, 4])
    found = held_out_samples([f"{tmp_path}/a1.tar", f"{tmp_path}/a*.tar"], "texts")
    assert [(each.shard[-5], each.sample) for each in found] == [("1", n) for n in range(4)] + [
        ("0", n) for n in range(3)
    ]


def test_wrong_streams_are_one_clear_line(write_texts, write_shard, tmp_path):
    good = write_texts("a{}.tar", [3])

    def error(*sources, batch_size=4, shuffle_shards=4, seed=0):
        pairs = StreamConfig(batch_size=batch_size, sources=[SourceConfig(**each) for each in sources])
        with pytest.raises(UserError) as caught:
            open_streams(DataConfig(pairs=pairs, shuffle_shards=shuffle_shards), ["pairs"], seed=seed)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    ok = {"shards": good}
    for pattern in (f"{tmp_path}/none-*.tar", f"{tmp_path}/a{{0..2}}.tar", write_shard("empty.tar", [])):
        message = error(ok, {"shards": pattern})
        assert "data.pairs.sources[1].shards" in message and repr(pattern) in message
    assert "2 of 3 shards" in error({"shards": f"{tmp_path}/a{{0..2}}.tar"})
    assert "a0.tar/x" in error({"shards": f"{tmp_path}/a0.tar/x"})
    assert "data.pairs.sources[0].upsampling" in error({**ok, "upsampling": 0.0})
    assert "raise the upsampling" in error({**ok, "upsampling": 0.01})
    assert "data.pairs.sources is empty" in error()
    assert "data.pairs.batch_size is -1" in error(ok, batch_size=-1)
    assert "data.shuffle_shards is 0" in error(ok, shuffle_shards=0)
    assert "seed is -1" in error(ok, seed=-1)
    assert "data.pairs.batch_size is 0" in error(ok, batch_size=0)
