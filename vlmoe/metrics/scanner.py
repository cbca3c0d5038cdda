"""A longest-match scanner: of the rules that match at a position the longest match wins, the first among equals.

`re` takes the first alternative that matches, not the longest, and tries its rules one after the other; here all rules
run together as one automaton, whose states are made when a text first needs them.

Pattern syntax: `ab` `a|b` `(a)` `a*` `a+` `a?` `a{2,4}` `a{2}` `[a-z]` `[^a-z]` `{name}` (a definition or a named set)
and `\\` before a special character. ASCII letters outside brackets match either case; brackets are exact.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

CharSet = Callable[[str], bool]

# JFlex folds these into the ASCII letter when a scanner ignores case.
_FOLDED = {"i": "\u0130\u0131", "k": "\u212a", "s": "\u017f"}


class Rule(NamedTuple):
    """`pattern` when `followed_by` comes right after it; the length that competes is that of both together."""

    pattern: str
    action: str
    followed_by: str = ""


class Match(NamedTuple):
    rule: Rule
    end: int  # of the part that `pattern` matched


class Scanner:
    """`rules` in falling precedence, `definitions` by name (without braces), `sets` of characters by name."""

    def __init__(self, rules: Sequence[Rule], definitions: Mapping[str, str], sets: Mapping[str, CharSet]) -> None:
        self._rules = rules
        self._compiler = _Compiler(definitions, sets)
        self._all = _Machine(self._compiler, [f"({rule.pattern})({rule.followed_by})" for rule in rules])
        self._parts: dict[str, _Machine] = {}

    def match(self, text: str, start: int) -> Match | None:
        """The winning rule at `start`, and where its token ends."""
        found = self._all.longest(text, start)
        if found is None:
            return None
        rule, end = self._rules[found[0]], found[1]
        return Match(rule, self._token_end(rule, text, start, end) if rule.followed_by else end)

    def _token_end(self, rule: Rule, text: str, start: int, end: int) -> int:
        """The longest token that leaves something `followed_by` matches to the last character."""
        token, context = self._part(rule.pattern), self._part(rule.followed_by)
        ends = token.ends(text, start, end)
        return next(middle for middle in reversed(ends) if end in context.ends(text, middle, end))

    def _part(self, pattern: str) -> "_Machine":
        if pattern not in self._parts:
            self._parts[pattern] = _Machine(self._compiler, [pattern])
        return self._parts[pattern]


@dataclass(eq=False)
class _State:
    """A state of the deterministic automaton: the NFA states one may be in, and the first rule they accept."""

    members: frozenset[int]
    rule: int | None
    following: dict[str, "_State | None"] = field(default_factory=dict)


class _Machine:
    """Several patterns as one automaton, made deterministic lazily."""

    def __init__(self, compiler: "_Compiler", patterns: Sequence[str]) -> None:
        self._compiler = compiler
        self._accepts: dict[int, int] = {}
        self._states: dict[frozenset[int], _State] = {}
        entry = compiler.new_state()
        for index, pattern in enumerate(patterns):
            branch = compiler.new_state()
            compiler.silent[entry].append(branch)
            self._accepts[compiler.compile(f"({pattern})", branch)] = index
        self._start = self._state([entry])

    def longest(self, text: str, start: int) -> tuple[int, int] | None:
        """Index of the pattern with the longest match at `start` (the first among equals), and the end of the match."""
        state, best = self._start, None
        for at in range(start, len(text)):
            char = text[at]
            following = state.following
            if char not in following:
                following[char] = self._step(state, char)
            if (state := following[char]) is None:
                break
            if state.rule is not None:
                best = state.rule, at + 1
        return best

    def ends(self, text: str, start: int, stop: int) -> list[int]:
        """Every end of a match of text[start:stop] that begins at `start`."""
        state, ends = self._start, []
        for at in range(start, stop):
            if (state := self._step(state, text[at])) is None:
                break
            if state.rule is not None:
                ends.append(at + 1)
        return ends

    def _step(self, state: _State, char: str) -> _State | None:
        inside = self._compiler.sets_with(char)
        moves = self._compiler.moves
        targets = [moves[m][1] for m in state.members if m in moves and moves[m][0] in inside]
        return self._state(targets) if targets else None

    def _state(self, targets: Iterable[int]) -> _State:
        members = self._compiler.closure(targets)
        if members not in self._states:
            rules = [self._accepts[m] for m in members if m in self._accepts]
            self._states[members] = _State(members, min(rules, default=None))
        return self._states[members]


class _Compiler:
    """Patterns to a nondeterministic automaton (Thompson's): silent moves, and at most one move on a set per state."""

    def __init__(self, definitions: Mapping[str, str], named_sets: Mapping[str, CharSet]) -> None:
        self._definitions, self._named_sets = definitions, named_sets
        self._sets: list[CharSet] = []
        self._set_ids: dict[str, int] = {}
        self._inside: dict[str, frozenset[int]] = {}
        self.silent: list[list[int]] = []
        self.moves: dict[int, tuple[int, int]] = {}  # state -> (id of a set, next state)

    def new_state(self) -> int:
        self.silent.append([])
        return len(self.silent) - 1

    def closure(self, states: Iterable[int]) -> frozenset[int]:
        pending, seen = list(states), set()
        while pending:
            if (state := pending.pop()) not in seen:
                seen.add(state)
                pending += self.silent[state]
        return frozenset(seen)

    def sets_with(self, char: str) -> frozenset[int]:
        if char not in self._inside:
            self._inside[char] = frozenset(i for i, contains in enumerate(self._sets) if contains(char))
        return self._inside[char]

    def compile(self, pattern: str, start: int) -> int:
        """Add the alternatives of `pattern` after state `start`; returns the state where they meet."""
        end, at = self.new_state(), 0
        while True:
            branch = self.new_state()
            self.silent[start].append(branch)
            last, at = self._sequence(pattern, at, branch)
            self.silent[last].append(end)
            if at == len(pattern):
                return end
            at += 1

    def _sequence(self, pattern: str, at: int, start: int) -> tuple[int, int]:
        while at < len(pattern) and pattern[at] != "|":
            stop = _atom_end(pattern, at)
            low, high, after = _quantifier(pattern, stop)
            atom = pattern[at:stop]
            for _ in range(low):
                start = self._atom(atom, start)
            end = self.new_state()
            self.silent[start].append(end)
            if high is None:
                self.silent[self._atom(atom, end)].append(end)
            else:
                for _ in range(high - low):
                    start = self._atom(atom, start)
                    self.silent[start].append(end)
            start, at = end, after
        return start, at

    def _atom(self, atom: str, start: int) -> int:
        name = atom[1:-1]
        if atom[0] == "(":
            return self.compile(name, start)
        if atom[0] == "{" and name in self._definitions:
            return self.compile(self._definitions[name], start)
        entry, end = self.new_state(), self.new_state()
        self.silent[start].append(entry)
        self.moves[entry] = self._set_id(atom), end
        return end

    def _set_id(self, atom: str) -> int:
        if atom not in self._set_ids:
            self._set_ids[atom] = len(self._sets)
            self._sets.append(self._charset(atom))
            self._inside.clear()
        return self._set_ids[atom]

    def _charset(self, atom: str) -> CharSet:
        if atom[0] == "{":
            return self._named_sets[atom[1:-1]]
        if atom[0] == "[":
            return _bracket(atom[1:-1])
        char = atom[-1]
        same = {char, char.lower(), char.upper(), *_FOLDED.get(char.lower(), "")} if atom.isascii() else {char}
        return frozenset(same).__contains__


def _atom_end(pattern: str, at: int) -> int:
    if pattern[at] == "\\":
        return at + 2
    if pattern[at] == "{":
        return pattern.index("}", at) + 1
    if pattern[at] == "[":
        at += 1
        while pattern[at] != "]":
            at += 2 if pattern[at] == "\\" else 1
    elif pattern[at] == "(":
        at += 1
        while pattern[at] != ")":
            at = _atom_end(pattern, at)
    return at + 1


def _quantifier(pattern: str, at: int) -> tuple[int, int | None, int]:
    """Least, most (None: no limit), and the position after the quantifier; once, where there is none."""
    match pattern[at : at + 1]:
        case "*":
            return 0, None, at + 1
        case "+":
            return 1, None, at + 1
        case "?":
            return 0, 1, at + 1
        case "{" if pattern[at + 1].isdigit():
            stop = pattern.index("}", at)
            low, _, high = pattern[at + 1 : stop].partition(",")
            return int(low), int(high or low), stop + 1
    return 1, 1, at


def _bracket(body: str) -> CharSet:
    """`a-z0-9_`, `^...` for all others; a dash that comes first or last stands for itself."""
    negated = body.startswith("^")
    body = body[negated:]
    items: list[str | None] = []  # None: the dash of a range
    at = 0
    while at < len(body):
        if body[at] == "\\":
            at += 1
            items.append(body[at])
        else:
            items.append(None if body[at] == "-" and 0 < at < len(body) - 1 else body[at])
        at += 1
    chars = {item for item in items if item is not None}
    for i, item in enumerate(items):
        if item is None:
            chars |= set(map(chr, range(ord(items[i - 1] or ""), ord(items[i + 1] or "") + 1)))
    return (lambda char: char not in chars) if negated else chars.__contains__
