"""The slow twin of the scene builder's language: reads the finished text and looks up in the boxes whether it is true.

It shares no code with the builder: words are matched with regular expressions, and facts are counted from the json.
"""

import re
from collections import Counter
from dataclasses import dataclass

NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7}
COLORS = "red|orange|yellow|green|blue|purple|pink|brown|black|white|gray"
FAMILY_PLURALS = {"animals": "animal", "birds": "bird", "fruits": "fruit", "vegetables": "vegetable"}
FAMILY_PLURALS |= {"vehicles": "vehicle", "musical instruments": "musical instrument"}
FAMILIES = set(FAMILY_PLURALS.values())
WAYS = "to the left of|to the right of|above|below"
ENDS = {"on the far left": (0, min), "on the far right": (0, max), "at the top": (1, min), "at the bottom": (1, max)}
PLACES = {"leftmost": (0, min), "rightmost": (0, max), "topmost": (1, min), "lowest": (1, max)}
YES_NO = {True: "yes", False: "no"}


@dataclass(frozen=True)
class Words:
    """English of the kinds: any word for a kind -> (name, whether it is a plural); name -> families."""

    forms: dict[str, tuple[str, bool]]
    families: dict[str, set[str]]


def centre(thing: dict, axis: int) -> float:
    return thing["box"][axis] + thing["box"][axis + 2] / 2


def area(thing: dict) -> int:
    return thing["box"][2] * thing["box"][3]


def counts(objects: list[dict]) -> Counter[str]:
    return Counter(thing["name"] for thing in objects)


def beyond(a: dict, b: dict, way: str) -> bool:
    if way in ("to the left of", "above"):
        return centre(a, way == "above") < centre(b, way == "above")
    return centre(a, way == "below") > centre(b, way == "below")


def at_end(objects: list[dict], axis: int, choose) -> dict:
    return choose(objects, key=lambda thing: centre(thing, axis))


@dataclass
class Truth:
    words: Words
    objects: list[dict]
    size: int

    def members(self, family: str) -> int:
        return sum(family in self.words.families[thing["name"]] for thing in self.objects)

    def phrase(self, text: str) -> tuple[int, str | None, str]:
        """ "two red dogs" -> (2, "red", "dog"); asserts that article and number are right English."""
        match = re.fullmatch(rf"({'|'.join(NUMBERS)}) (?:({COLORS}|large|big) )?(.+)", text)
        assert match, text
        number, adjective, noun = match.groups()
        count = NUMBERS[number]
        if noun in FAMILIES or noun in FAMILY_PLURALS:
            name, plural = FAMILY_PLURALS.get(noun, noun), noun in FAMILY_PLURALS
        else:
            assert noun in self.words.forms, text
            name, plural = self.words.forms[noun]
            singular_equals_plural = noun in ("sheep", "deer")
            plural = plural if not singular_equals_plural else count > 1
        assert plural is (count > 1), text
        if number in ("a", "an"):
            assert (number == "an") is (text.split(" ", 1)[1][0] in "aeiou"), text
        return count, adjective, name

    def check_list(self, text: str, expected: Counter[str]) -> None:
        """A list that names all of `expected`."""
        left = Counter(expected)
        for part in re.split(r", | and ", text):
            count, color, name = self.phrase(part)
            if name in FAMILIES:
                assert self.members(name) == count, text
                inside = [kind for kind in left if name in self.words.families[kind]]
                assert sum(left[kind] for kind in inside) == count, text
                for kind in inside:
                    del left[kind]
                continue
            assert left.pop(name, 0) == count, (text, part)
            if color:
                assert [t["color"] for t in self.objects if t["name"] == name] == [color], text
        assert not left, (text, left)

    def check_caption(self, caption: str) -> None:
        assert caption[0].isupper() and caption.endswith("."), caption
        text = caption[0].lower() + caption[1:-1]
        everything, total = counts(self.objects), len(self.objects)
        if match := re.fullmatch(r"the largest of (\w+) objects is (.+)", text):
            assert NUMBERS[match[1]] == total
            self.check_largest(self.phrase(match[2])[2])
        elif match := re.fullmatch(r"(.+), the largest object, and (.+)|(an? (?:large|big) .+?) with (.+)", text):
            match = list(filter(None, match.groups()))
            self.check_largest(self.phrase(match[0])[2])
            self.check_list(match[1], everything - Counter([self.phrase(match[0])[2]]))
        elif match := re.fullmatch(r"(.+), (\w+) objects in all", text):
            assert NUMBERS[match[2]] == total
            self.check_list(match[1], everything)
        elif match := re.fullmatch(r"(?:a picture of )?(\w+) (?:things|objects): (.+)", text):
            assert NUMBERS[match[1]] == total
            self.check_list(match[2], everything)
        elif any(end in text for end in ENDS):
            self.check_ends(text)
        elif match := re.fullmatch(rf"(.+) ({WAYS}) (.+?)(?:, with (.+)|, and also (.+))?", text):
            self.check_relation(*match.groups())
        elif match := re.fullmatch(r"(.+) and (\w+) other objects?", text):
            count, _, name = self.phrase(match[1])
            assert everything[name] == count and total - count == NUMBERS[match[2]], caption
        else:
            head = re.match(r"a picture of |there (is|are) |this picture shows |an image with |you can see ", text)
            rest = text[head.end() :] if head else text
            if head and head[1]:
                assert (head[1] == "is") is (NUMBERS[rest.split()[0]] == 1), caption
            self.check_list(rest, everything)

    def check_largest(self, name: str) -> None:
        assert max(self.objects, key=area)["name"] == name

    def check_ends(self, text: str) -> None:
        found = re.fullmatch(r"(.+?)(?:, and (\w+) more objects?)?", text)
        assert found
        parts = re.split(r" and (?=an? )", found[1])
        for part in parts:
            end = next(end for end in ENDS if part.endswith(end))
            axis, choose = ENDS[end]
            thing = at_end(self.objects, axis, choose)
            assert thing["name"] == self.phrase(part[: -len(end) - 1])[2], text
            assert centre(thing, axis) < 0.34 * self.size if choose is min else centre(thing, axis) > 0.66 * self.size
        assert len(self.objects) - len(parts) == (NUMBERS[found[2]] if found[2] else 0), text

    def check_relation(self, one: str, way: str, other: str, *rest: str | None) -> None:
        first, second = self.phrase(one), self.phrase(other)
        everything = counts(self.objects)
        assert everything[first[2]] == first[0] and everything[second[2]] == second[0]
        for a in (thing for thing in self.objects if thing["name"] == first[2]):
            for b in (thing for thing in self.objects if thing["name"] == second[2]):
                assert beyond(a, b, way), (one, way, other)
        others = next(filter(None, rest), None)
        left = Counter({name: n for name, n in everything.items() if name not in (first[2], second[2])})
        if others:
            self.check_list(others, left)
        else:
            assert not left

    def answer(self, question: str) -> str:
        """The answer, from the boxes alone. Asserts that no other answer could be argued for."""
        here = counts(self.objects)
        if match := re.fullmatch(r"How many (.+) (?:are there|are in the picture|can you see)\?", question):
            if match[1] in ("objects", "things"):
                return str(len(self.objects))
            if match[1] in FAMILY_PLURALS:
                return str(self.members(FAMILY_PLURALS[match[1]]))
            return str(here[self.words.forms[match[1]][0]])
        if match := re.fullmatch(r"(?:Is there|Can you see) an? (.+?)(?: in the picture)?\?", question):
            return YES_NO[here[match[1]] > 0]
        if match := re.fullmatch(r"Are there any (.+)\?", question):
            return YES_NO[here[self.words.forms[match[1]][0]] > 0]
        if match := re.fullmatch(r"(?:What|Which) (.+) is (?:shown|in the picture|this)\?", question):
            [name] = [t["name"] for t in self.objects if match[1] in self.words.families[t["name"]]]
            return name
        if match := re.fullmatch(rf"Is the (.+) ({WAYS}) the (.+)\?", question):
            a, b = self.one(match[1]), self.one(match[3])
            axis = int(match[2] in ("above", "below"))
            assert abs(centre(a, axis) - centre(b, axis)) > 0.15 * self.size, question
            return YES_NO[beyond(a, b, match[2])]
        if match := re.fullmatch(rf"What is ({WAYS}) the (.+)\?", question):
            reference, axis = self.one(match[2]), int(match[1] in ("above", "below"))
            beside = [
                thing
                for thing in self.objects
                if beyond(thing, reference, match[1])
                and abs(centre(thing, axis) - centre(reference, axis)) > 0.07 * self.size
            ]
            assert len(beside) == 1, question
            return beside[0]["name"]
        if match := re.fullmatch(r"Are there (more|fewer) (.+) than (.+)\?", question):
            first, second = (here[self.words.forms[word][0]] for word in match.groups()[1:])
            return YES_NO[first > second if match[1] == "more" else first < second]
        if match := re.fullmatch(r"Are there as many (.+) as (.+)\?", question):
            return YES_NO[here[self.words.forms[match[1]][0]] == here[self.words.forms[match[2]][0]]]
        if match := re.fullmatch(r"Is the (.+) (?:larger|bigger) than the (.+)\?", question):
            areas = area(self.one(match[1])), area(self.one(match[2]))
            assert max(areas) > 1.4 * min(areas), question
            return YES_NO[areas[0] > areas[1]]
        match = re.fullmatch(r"What (color )?is the (\w+) object\?", question)
        assert match, question
        if match[2] in ("largest", "smallest"):
            thing = (max if match[2] == "largest" else min)(self.objects, key=area)
        else:
            thing = at_end(self.objects, *PLACES[match[2]])
        return thing["color"] if match[1] else thing["name"]

    def one(self, name: str) -> dict:
        [thing] = [thing for thing in self.objects if thing["name"] == name]
        return thing


def statement_holds(sentence: str, left: Counter[str], right: Counter[str], words: Words) -> bool:
    """Whether a sentence about two pictures is true of what they hold."""
    patterns = {
        r"There (?:is|are) exactly (\w+) (.+) in total\.": lambda n, a, b: a + b == n,
        r"The two pictures show (\w+) (.+) altogether\.": lambda n, a, b: a + b == n,
        r"There is at least (one) (.+) in each picture\.": lambda n, a, b: a >= 1 and b >= 1,
        r"Both pictures contain (an?) (.+)\.": lambda n, a, b: a >= 1 and b >= 1,
        r"There are (more )(.+) in the left picture than in the right picture\.": lambda n, a, b: a > b,
        r"The left picture contains (more )(.+) than the right one\.": lambda n, a, b: a > b,
        r"One picture contains exactly (one) (.+) and the other contains none\.": lambda n, a, b: {a, b} == {0, 1},
        r"Both pictures contain the (same) number of (.+)\.": lambda n, a, b: a == b,
        r"There are (as) many (.+) in the left picture as in the right picture\.": lambda n, a, b: a == b,
        r"The right picture contains exactly (\w+) (.+)\.": lambda n, a, b: b == n,
        r"There (?:is|are) exactly (\w+) (.+) in the right picture\.": lambda n, a, b: b == n,
        r"Only one of the pictures contains (an?) (.+)\.": lambda n, a, b: (a > 0) + (b > 0) == 1,
        r"(An?) (.+) can be seen in just one of the two pictures\.": lambda n, a, b: (a > 0) + (b > 0) == 1,
    }
    for pattern, holds in patterns.items():
        if match := re.fullmatch(pattern, sentence):
            name, plural = words.forms[match[2]]
            if (number := match[1].lower().strip()) in NUMBERS and not pattern.startswith("There are (as)"):
                assert plural is (NUMBERS[number] > 1), sentence
            return holds(NUMBERS.get(number, 0), left[name], right[name])
    raise AssertionError(sentence)
