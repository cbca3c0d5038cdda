import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmoe.metrics import ptb_tokenize


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A man's dog isn't here.", "a man 's dog is n't here"),
        ("They cannot, gonna 'tis", "they can not gon na 't is"),
        ('A "stop" sign; two (2) men!', "a stop sign two -lrb- 2 -rrb- men"),
        ("It\u2019s \u201cnice\u201d \u2014 a caf\u00e9\u2026", "it 's nice a caf\u00e9"),
        ("\u20ac5, \u00a32 and $1.50 for \u00bd", "$ 5 # 2 and $ 1.50 for 1/2"),
        ("5 1/2 ft. of rope", "5\u00a01/2 ft. of rope"),
        ("see www.example.com or a@b.org", "see www.example.com or a@b.org"),
        ("black-and-white AT&amp;T van", "black-and-white at&t van"),
        ("\u732b and \U0001f600", "\u732b and"),
        ("", ""),
    ],
)
def test_tokens(caption: str, tokens: str) -> None:
    assert ptb_tokenize([caption, "x"])[0] == tokens  # the last caption of all lies at the end of the text


def test_an_abbreviation_ends_its_sentence_if_the_next_caption_begins_with_a_capital() -> None:
    assert ptb_tokenize(["at Acme Co.", "The next"])[0] == "at acme co."
    assert ptb_tokenize(["at Acme Co. ,", "the next"])[0] == "at acme co."


@given(st.lists(st.text(max_size=30), max_size=5))
def test_every_caption_keeps_its_place(captions: list[str]) -> None:
    """Whatever is in it, line breaks too; only a tag whose quotes stay open can reach into the next caption."""
    captions = [caption.replace("<", " ").replace("&", " ") for caption in captions]
    marked = [text for caption in captions for text in (caption, "marker")]
    assert ptb_tokenize(marked)[1::2] == ["marker"] * len(captions)
