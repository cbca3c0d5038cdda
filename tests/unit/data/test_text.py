"""Ids of both tokenizers, round trips, and models that cannot be used."""

import pickle

import pytest
from sentencepiece import SentencePieceTrainer

from vlmoe.config import TextConfig
from vlmoe.data.text import load_tokenizer
from vlmoe.errors import UserError

TEXTS = [
    "a red cat sits on the mat",
    "eine rote Katze",
    "two birds and three fish",
    "un oiseau bleu",
    "the cat and the dog",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    def train(name, **options):
        prefix = tmp_path_factory.mktemp("spm") / name
        SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS * 20),
            model_prefix=str(prefix),
            model_type="bpe",
            num_threads=1,
            minloglevel=2,
            **options,
        )
        return f"{prefix}.model"

    return train


@pytest.fixture(scope="module")
def sentencepiece(model):
    return load_tokenizer(TextConfig(model=model("plain", vocab_size=64)))


@pytest.fixture(scope="module")
def clip():
    return load_tokenizer(TextConfig(tokenizer="clip"))


def test_sentencepiece_ids_are_fairseqs(sentencepiece):
    t = sentencepiece
    assert (t.bos_id, t.pad_id, t.eos_id, t.unk_id) == (0, 1, 2, 3)
    assert t.vocab_size == 64 + 2 and t.mask_id == 65  # a model of 64,000 pieces: 64,002, mask 64,001
    assert t.encode("cat") == [piece + 1 for piece in t.pieces.encode("cat")]
    assert t.encode("語")[-1] == t.unk_id
    assert max(i for text in TEXTS for i in t.encode(text)) < t.mask_id
    assert min(i for text in TEXTS for i in t.encode(text)) > t.unk_id


def test_bytes_stand_in_for_unknown_letters(model):
    t = load_tokenizer(TextConfig(model=model("bytes", vocab_size=330, byte_fallback=True)))
    assert t.unk_id not in t.encode("語 cat") and t.decode(t.encode("語 cat")) == "語 cat"


def test_clip_ids(clip):
    assert clip.encode("hello World") == [3306, 1002]
    assert (clip.bos_id, clip.eos_id, clip.pad_id, clip.mask_id, clip.vocab_size) == (49406, 49407, 49408, 49409, 49410)
    assert clip.encode("a <end_of_text> b") == clip.encode("a b"), "text cannot smuggle in special tokens"
    assert clip.pieces.sot_token_id == clip.bos_id and clip.pieces.eot_token_id == clip.eos_id


@pytest.mark.parametrize("name", ["sentencepiece", "clip"])
def test_specials_and_round_trip(name, request):
    t = request.getfixturevalue(name)
    for text in TEXTS:
        ids = t.encode_with_specials(text, 64)
        assert ids == [t.bos_id, *t.encode(text), t.eos_id]
        assert t.decode([*ids, t.mask_id, t.pad_id]) == text.lower() if name == "clip" else text
        assert t.encode_with_specials(text, 4) == [t.bos_id, *t.encode(text)[:2], t.eos_id]
    assert t.encode(" ") == [] and t.decode([]) == ""
    assert pickle.loads(pickle.dumps(t)).encode(TEXTS[0]) == t.encode(TEXTS[0])


def test_models_that_cannot_be_used(model, tmp_path):
    (tmp_path / "garbage.model").write_bytes(b"garbage" * 50)
    (tmp_path / "empty.model").write_bytes(b"")
    odd = model("odd", vocab_size=64, pad_id=0, unk_id=1, bos_id=2, eos_id=3)
    for path, message in (
        (None, "data.text.model is not set"),
        ("none.model", "none.model does not exist.*set data.text.model"),
        (str(tmp_path), "does not exist"),
        (str(tmp_path / "garbage.model"), "is not a sentencepiece model"),
        (str(tmp_path / "empty.model"), "is not a sentencepiece model"),
        (odd, r"numbers unk, bos, eos, pad as \(1, 2, 3, 0\)"),
    ):
        with pytest.raises(UserError, match=message):
            load_tokenizer(TextConfig(model=path))
