"""What is said of a picture: captions drawn from its names and keywords, and lines of text about the same things."""

import random
from collections.abc import Iterator, Sequence

from bank_format import Concept

CAPTIONS = 8  # drawn for each picture; the loader draws one of them for each visit
NAME_ALONE = 0.6  # the share of captions that are the name; the others add keywords
ENGLISH = 0.5  # the share of captions in English; the others share the rest evenly
MAX_KEYWORDS = 5
LANGUAGES = (
    "en",
    "de",
    "fr",
    "es",
    "pt",
    "it",
    "ru",
    "ar",
    "hi",
    "ja",
    "ko",
    "zh",
    "tr",
    "sw",
)  # of a sample's `names`
CALLED = {  # English names of the languages that text lines translate into
    "de": "German", "fr": "French", "es": "Spanish", "pt": "Portuguese", "it": "Italian", "nl": "Dutch", "pl": "Polish",
    "ru": "Russian", "tr": "Turkish", "ar": "Arabic", "hi": "Hindi", "ja": "Japanese", "ko": "Korean", "zh": "Chinese",
    "sw": "Swahili",
}  # fmt: skip
PICTURE_OF = {  # "a picture: cow", so that no article or case is needed
    "en": "a picture: {}",
    "de": "ein Bild: {}",
    "fr": "une image : {}",
    "es": "una imagen: {}",
    "pt": "uma imagem: {}",
    "it": "un'immagine: {}",
    "nl": "een plaatje: {}",
    "pl": "obrazek: {}",
    "ru": "картинка: {}",
    "tr": "bir resim: {}",
    "sw": "picha: {}",
    "zh": "图片：{}",
    "ja": "絵：{}",
}


def captions(concept: Concept, rng: random.Random) -> list[str]:
    """`CAPTIONS` draws of a name, or a name with shuffled keywords, each in a language of its own; no two are equal."""
    drawn = []
    for _ in range(CAPTIONS):
        language = "en" if rng.random() < ENGLISH else rng.choice(other_languages(concept) or ["en"])
        name = concept.names[language]
        drawn.append(name if rng.random() < NAME_ALONE else with_keywords(name, concept, language, rng))
    return list(dict.fromkeys(drawn))


def other_languages(concept: Concept) -> list[str]:
    return [language for language in concept.names if language != "en"]


def with_keywords(name: str, concept: Concept, language: str, rng: random.Random) -> str:
    """`cow, farm, milk`: the name and some keywords, shuffled."""
    words = [word for word in concept.keywords.get(language, ()) if word.casefold() != name.casefold()]
    return ", ".join([name, *rng.sample(words, k=min(len(words), rng.randint(1, MAX_KEYWORDS)))])


def text_lines(concepts: Sequence[Concept], count: int, rng: random.Random) -> Iterator[str]:
    """Up to `count` lines, no two alike: names with keywords, translations, and the kinds that things belong to."""
    seen: set[str] = set()
    for _ in range(10 * count):  # a small bank has fewer lines in it than asked for
        if len(seen) == count:
            return
        line = text_line(rng.choice(concepts), rng)
        if line not in seen:
            seen.add(line)
            yield line


def text_line(concept: Concept, rng: random.Random) -> str:
    form = rng.choice(("keywords", "keywords", "picture", "translation", "kind"))
    if form == "translation" and (known := [language for language in CALLED if language in concept.names]):
        chosen = rng.sample(known, k=min(len(known), rng.randint(1, 3)))
        said = ", ".join(f"in {CALLED[language]} {concept.names[language]}" for language in chosen)
        return f"English {concept.name}, {said}."
    if form == "picture":
        language = rng.choice([language for language in PICTURE_OF if language in concept.names])
        return PICTURE_OF[language].format(concept.names[language])
    if form == "kind":
        return f"{concept.name}: one of the {concept.group.replace('-', ' ')}, {concept.subgroup.replace('-', ' ')}."
    language = rng.choice(list(concept.names))
    return with_keywords(concept.names[language], concept, language, rng)
