"""Which objects scenes are made of, and how English speaks of them.

A rule proposes (the subgroups below; one or two words; no face, no pair, no colon), the lists mend it; they were
chosen by looking at a contact sheet of every drawing of every name (`bank.py --sheet`). What is left out: heads where
the whole animal exists (`horse face`), kinds of another kind (`ox` beside `cow`; no `automobile`, since there are taxis
and "how many cars?" must have one answer), words without a plural (`bread`), and what each style draws differently.
"""

import re

SUBGROUPS = frozenset({
    "animal-mammal", "animal-bird", "animal-amphibian", "animal-reptile", "animal-marine", "animal-bug",
    "food-fruit", "food-vegetable", "food-prepared", "food-sweet", "transport-ground", "transport-air",
    "transport-water", "musical-instrument", "clothing", "tool", "sport",
})  # fmt: skip

DROPPED = frozenset(
    re.split(
        r",\s*",
        """guide dog, service dog, poodle, black cat, orangutan, moose, unicorn, bison, ox, water buffalo, boar,
        pig nose, ram, two-hump camel, mammoth, polar bear, rat, paw prints, chicken, bird, feather, wing,
        black bird, phoenix, hatching chick, dragon, T-Rex, spouting whale, orca, fish, tropical fish,
        spiral shell, coral, oyster, cockroach, spider web, microbe, grapes, melon, lime, green apple, cherries,
        blueberries, leafy green, broccoli, garlic, peanuts, beans, ginger root, brown mushroom, root vegetable,
        olive, bread, flatbread, pancakes, meat on bone, poultry leg, cut of meat, bacon, french fries, tamale,
        stuffed flatbread, falafel, cooking, pot of food, fondue, green salad, popcorn, butter, salt, canned food,
        ice cream, shaved ice, shortcake, custard, railway car, high-speed train, bullet train, train, metro,
        light rail, station, monorail, mountain railway, tram car, oncoming bus, trolleybus, minibus,
        oncoming police car, oncoming taxi, automobile, oncoming automobile, articulated lorry, manual wheelchair,
        motorized wheelchair, skateboard, roller skate, bus stop, motorway, railway track, oil drum, fuel pump,
        wheel, stop sign, construction, anchor, ring buoy, passenger ship, motor boat, ship, small airplane,
        airplane departure, airplane arrival, parachute, seat, suspension railway, mountain cableway,
        aerial tramway, satellite, trombone, long drum, maracas, glasses, sunglasses, goggles, lab coat, necktie,
        jeans, gloves, socks, briefs, shorts, woman’s clothes, purse, clutch bag, shopping bags, thong sandal,
        man’s shoe, flat shoe, woman’s sandal, ballet shoes, woman’s boot, hair pick, woman’s hat, prayer beads,
        lipstick, gem stone, bomb, crossed swords, link, broken chain, chains, softball, rugby football, bowling,
        cricket game, field hockey, ice hockey, lacrosse, tennis, ping pong, badminton, martial arts uniform,
        goal net, running shirt, skis""",
    )
)

RENAMED = {  # CLDR's name -> what people say
    "ewe": "sheep",
    "baby chick": "chick",
    "blowfish": "pufferfish",
    "bug": "caterpillar",
    "honeybee": "bee",
    "lady beetle": "ladybug",
    "sauropod": "dinosaur",
    "red apple": "apple",
    "kiwi fruit": "kiwi",
    "ear of corn": "corn cob",
    "baguette bread": "baguette",
    "soft ice cream": "ice cream",
    "sport utility vehicle": "SUV",
    "musical keyboard": "piano keyboard",
    "one-piece swimsuit": "swimsuit",
    "billed cap": "baseball cap",
    "military helmet": "helmet",
    "high-heeled shoe": "high heel",
    "pick": "pickaxe",
    "carpentry saw": "saw",
    "american football": "American football",
    "flying disc": "frisbee",
}

WRONG_PICTURES = {  # (style, concept): the set means something else by the name, or draws several
    ("streamline-emojis", "turkey"),  # the flag
    ("emojione", "cricket"),  # the game
    ("noto-v1", "cricket"),
    ("fxemoji", "clamp"),  # compression
    ("emojione", "clamp"),
    ("fxemoji", "banana"),  # a bunch
    ("noto-v1", "baguette-bread"),  # two
    ("emojione", "water-pistol"),  # a revolver
    ("fxemoji", "water-pistol"),
    ("noto-v1", "water-pistol"),
    ("streamline-emojis", "water-pistol"),
    ("fxemoji", "sailboat"),  # on a coloured square
}
WRONG_PICTURES |= {  # icons, likewise
    (style, concept)
    for concept, styles in {
        "basketball": ["emojione-monotone"],  # in its basket
        "bug": ["mdi", "icon-park-outline", "ph", "fa7-solid", "lucide", "tabler"],  # a beetle
        "clamp": ["emojione-monotone", "icon-park-outline"],
        "cricket": ["emojione-monotone", "game-icons", "mdi", "ph", "tabler"],
        "locomotive": ["mdi"],  # a tram
        "mouse": ["mdi", "icon-park-outline", "ph", "fa7-solid", "lucide", "tabler"],
        "one-piece-swimsuit": ["icon-park-outline"],
        "pie": ["icon-park-outline"],  # a chart
        "red-apple": ["mdi", "icon-park-outline", "hugeicons", "fa7-solid"],  # a trade mark
        "ring": ["icon-park-outline"],
        "seal": ["mdi", "icon-park-outline", "hugeicons", "ph"],  # of wax
        "soft-ice-cream": ["fluent-emoji-high-contrast", "emojione-monotone"],  # a bowl
        "trumpet": ["icon-park-outline"],
        "turkey": ["hugeicons"],  # roasted
    }.items()
    for style in styles
}

PLURALS = {
    "deer": "deer",
    "sheep": "sheep",
    "goose": "geese",
    "mouse": "mice",
    "wolf": "wolves",
    "octopus": "octopuses",
    "squid": "squid",
    "jellyfish": "jellyfish",
    "pufferfish": "pufferfish",
    "fly": "flies",
    "shrimp": "shrimp",
    "tomato": "tomatoes",
    "potato": "potatoes",
    "mango": "mangoes",
    "mosquito": "mosquitoes",
    "scarf": "scarves",
    "banjo": "banjos",
    "taco": "tacos",
    "burrito": "burritos",
}


def scene_name(label: str, subgroup: str) -> str | None:
    """The English name under which scenes use the emoji with this CLDR label; None when they do not."""
    if subgroup not in SUBGROUPS or label in DROPPED:
        return None
    if label in RENAMED:
        return RENAMED[label]
    words = label.split()
    if len(words) > 2 or ":" in label or "face" in words or words[-1] in {"light", "person"}:
        return None
    return label


def plural(name: str) -> str:
    """The English plural of a scene name (its last word's)."""
    *before, last = name.split()
    return " ".join([*before, PLURALS.get(last) or _regular_plural(last)])


def _regular_plural(word: str) -> str:
    if re.search(r"(s|x|z|ch|sh)$", word):
        return word + "es"
    if re.search(r"[^aeiou]y$", word):
        return word[:-1] + "ies"
    return word + "s"


def article(name: str) -> str:
    """`a` or `an`, by sound."""
    return "an" if name[0].lower() in "aeiou" or name == "SUV" else "a"
