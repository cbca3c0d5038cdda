"""Captions to tokens as `PTBTokenizer` of CoreNLP 3.4.1 (`-preserveLines -lowerCase`) and pycocoevalcap 1.2 do it."""

import re
from collections.abc import Callable, Sequence

from vlmoe.metrics.ptb_grammar import scanner

# Brackets are -lrb- and so on by the time pycocoevalcap compares, which looks for capitals: they stay.
_PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
_NO_BREAK_SPACE = "\u00a0"
_BRACKETS = {"(": "-LRB-", ")": "-RRB-", "{": "-LCB-", "}": "-RCB-", "[": "-LSB-", "]": "-RSB-"}
_FRACTIONS = {"\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3"}
_CURRENCIES = {"\u00a2": "cents", "\u00a3": "#"} | dict.fromkeys("\u0080\u00a4\u20a0\u20ac", "$")
_QUOTES = {
    **dict.fromkeys(["\u0091", "\u2018", "\u201b", "\u2039"], "`"),
    **dict.fromkeys(["'", "&apos;", "\u0092", "\u2019", "\u203a"], "'"),
    **dict.fromkeys(["\u0093", "\u201c", "\u00ab"], "``"),
    **dict.fromkeys(['"', "&quot;", "\u0094", "\u201d", "\u00bb"], "''"),
}
_LEFT_QUOTES = {**_QUOTES, **dict.fromkeys(["'", "&apos;"], "`"), **dict.fromkeys(['"', "&quot;"], "``")}
_QUOTE = re.compile("|".join(map(re.escape, _QUOTES)))
_ENTITY_OF_AMPERSAND = re.compile("&amp;", re.IGNORECASE)


def ptb_tokenize(captions: Sequence[str]) -> list[str]:
    """Each caption's tokens in lower case, joined by spaces, without the tokens that are punctuation.

    All captions of one evaluation go in together, in their order: as in the original, the abbreviation that ends a
    caption is read in the light of how the next one begins. A token may hold a no-break space ("5 1/2" is one token).
    Unlike the original, a caption that holds a carriage return or another line separator stays one caption.
    """
    text = _code_units("\n".join(caption.replace("\n", " ") for caption in captions))
    lines = _tokens(text).split("\n")
    return [" ".join(token for token in line.rstrip().split(" ") if token not in _PUNCTUATION) for line in lines]


def _tokens(text: str) -> str:
    """Tokens parted by spaces, and lines by line feeds."""
    match_at = scanner().match
    lines: list[list[str]] = [[]]
    at = 0
    while at < len(text):
        match = match_at(text, at)
        if match is None:  # no rule knows the character: it vanishes
            at += 1
            continue
        start, at = at, match.end
        action, token = match.rule.action, text[start:at]
        if action == "newline":
            if "\n" in token:
                lines.append([])
            continue
        if action in _UNREAD:
            at -= _UNREAD[action]
        if action != "drop":
            lines[-1].append(_from_code_units(_NORMALIZE[action](token)).lower())
    return "\n".join(map(" ".join, lines))


# How many of a match's last characters are read again as the next token.
_UNREAD = {"split_last_2": 2, "split_last_3": 3, "repeat_period": 1, "acronym": 1}


def _replacing(table: dict[str, str]) -> Callable[[str], str]:
    codes = str.maketrans(table)
    return lambda token: token.translate(codes)


_NORMALIZE: dict[str, Callable[[str], str]] = {
    "plain": lambda token: token,
    "split_last_2": lambda token: token[:-2],
    "split_last_3": lambda token: token[:-3],
    "repeat_period": lambda token: token,
    "acronym": lambda token: token[0] if len(token) == 2 else token,
    "soft": lambda token: token.replace("\u00ad", "") or "-",
    "spaced": _replacing({" ": _NO_BREAK_SPACE}),
    "phone": _replacing({" ": _NO_BREAK_SPACE, "(": _BRACKETS["("], ")": _BRACKETS[")"]}),
    "face": _replacing({"(": _BRACKETS["("], ")": _BRACKETS[")"]}),
    "bracket": _replacing(_BRACKETS),
    "fraction": _replacing(_FRACTIONS),
    "currency": _replacing(_CURRENCIES),
    "quote_left": lambda token: _QUOTE.sub(lambda found: _LEFT_QUOTES[found[0]], token),
    "quote_right": lambda token: _QUOTE.sub(lambda found: _QUOTES[found[0]], token),
    "ampersand": lambda token: _ENTITY_OF_AMPERSAND.sub("&", token),
    "less": lambda _: "<",
    "greater": lambda _: ">",
    "dash": lambda _: "--",
    "hyphens": lambda token: "--" if 3 <= len(token) <= 4 else token,
    "ellipsis": lambda _: "...",
}


def _code_units(text: str) -> str:
    """A character beyond U+FFFF as its two surrogates: the original counts in code units of UTF-16."""
    return re.sub("[^\x00-\uffff]", lambda char: _surrogates(ord(char[0]) - 0x10000), text)


def _surrogates(offset: int) -> str:
    return chr(0xD800 + (offset >> 10)) + chr(0xDC00 + (offset & 0x3FF))


def _from_code_units(text: str) -> str:
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
