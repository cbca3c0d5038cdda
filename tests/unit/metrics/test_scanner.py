"""The lazy automaton against trying every rule on every prefix with `re`."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmoe.metrics.scanner import Rule, Scanner

DEFINITIONS = {"vowel": "a|e", "pair": "{vowel}b"}
RULES = [
    Rule("ab", "first"),
    Rule("a|ab", "same length as the first: never wins on ab"),
    Rule("{pair}+", "longest", "(b|c)?c"),
    Rule("(a|bc){2,3}", "counted"),
    Rule("[^a-c]*e", "negated"),
    Rule("b\\*?", "escaped", "a+"),
    Rule("[\\-c]", "single"),
]


def expanded(pattern: str) -> str:
    while (plain := re.sub(r"\{([a-z]+)\}", lambda name: f"({DEFINITIONS[name[1]]})", pattern)) != pattern:
        pattern = plain
    return pattern


def oracle(text: str) -> tuple[str, int] | None:
    best: tuple[int, int, str, int] | None = None
    for index, rule in enumerate(RULES):
        token, context = expanded(rule.pattern), expanded(rule.followed_by)
        for stop in range(1, len(text) + 1):
            for middle in range(1, stop + 1):
                if re.fullmatch(token, text[:middle]) and re.fullmatch(context, text[middle:stop]):
                    found = (stop, -index, rule.action, middle)
                    best = found if best is None else max(best, found, key=lambda item: (item[0], item[1], item[3]))
    return best and (best[2], best[3])


@pytest.fixture(scope="module")
def scanner() -> Scanner:
    return Scanner(RULES, DEFINITIONS, {})


@given(st.text("abce*-", max_size=8))
def test_longest_match_wins_then_the_first_rule(scanner: Scanner, text: str) -> None:
    match = scanner.match(text, 0)
    assert (match and (match.rule.action, match.end)) == oracle(text)


def test_letters_match_either_case_outside_brackets_alone() -> None:
    scanner = Scanner([Rule("a[b]", "x")], {}, {})
    assert scanner.match("Ab", 0) is not None
    assert scanner.match("AB", 0) is None
