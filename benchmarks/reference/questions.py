"""Questions about pictures whose wording does not give the answer away.

Every wrong name in a question is the name of another picture of the same split, and over a split every name is asked
for as often when it is wrong as chance makes it right: "the name never met in training" is no clue, nor is the name
of a frequent picture.
"""

import random
from collections import defaultdict
from collections.abc import Iterator

from drawings import OVERLAPS
from pictures import Picture

YES_NO = ("Is this {}?", "Does the image show {}?", "Is {} shown here?", "Is it {}?")
CHOICE = ("Which is shown: {}?", "What is this: {}?", "Which name fits the picture: {}?", "Choose what is shown: {}.")
EMOJI_CATEGORY = (
    "Which group does this emoji belong to: {}?",
    "Which group does this emoji belong to? Options: {}.",
    "Choose the group of this emoji: {}.",
)
DRAWING_CATEGORY = (
    "Which category does this drawing belong to: {}?",
    "What is the drawing's category? Options: {}.",
    "Choose the category of the drawing: {}.",
)
MAX_ANSWER_WORDS = 3
Asked = tuple[Picture, str, str, str]
"""Picture, question, answer, kind."""


def with_article(name: str) -> str:
    """`name` as it stands in a sentence."""
    if name.startswith("flag of "):
        return f"the {name}"
    if name.endswith("s") and not name.endswith(("ss", "us")):
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _one_of(options: list[str]) -> str:
    return ", ".join(options[:-1]) + f" or {options[-1]}"


def may_be(picture: Picture, other: Picture) -> bool:
    """Whether the name of `other` could be true of `picture`."""
    if picture.source == "drawing":
        return not picture.words.isdisjoint(other.titles[0].split())
    names = [set(title.split()) for title in picture.titles]
    return any(name <= set(title.split()) or name >= set(title.split()) for name in names for title in other.titles)


def _others(pictures: list[Picture], groups: dict[str, str], chance: random.Random) -> dict[str, list[Picture]]:
    """For every picture up to three others it is not, close ones first, each picture used about equally often."""
    rings = defaultdict(list)
    for picture in pictures:
        rings[picture.near].append(picture)
    everyone = list(pictures)
    for ring in (*rings.values(), everyone):
        chance.shuffle(ring)
    place = {picture.name: number for number, picture in enumerate(everyone)}
    found = {}
    for near in sorted(rings):
        for number, picture in enumerate(rings[near]):
            ring = rings[near][number + 1 :] + rings[near][:number]
            start = place[picture.name]
            chosen: list[Picture] = []
            for other in (*ring, *everyone[start + 1 :], *everyone[:start]):
                taken = {groups[picture.name], *(groups[one.name] for one in chosen)}
                if (
                    groups[other.name] in taken
                    or may_be(picture, other)
                    or other.titles[0] in {one.titles[0] for one in chosen}
                ):
                    continue
                chosen.append(other)
                if len(chosen) == 3:
                    break
            found[picture.name] = chosen
    return found


def ask_names(pictures: list[Picture], groups: dict[str, str], chance: random.Random) -> Iterator[Asked]:
    """Endless rounds over `pictures` (all named, of one source and split): yes, no, and a choice for each."""
    asked = -1
    while asked:  # a round without a question, for want of other pictures, is the last
        asked = 0
        order = list(pictures)
        chance.shuffle(order)
        others = _others(order, groups, chance)
        for number, picture in enumerate(order):
            wrong = others[picture.name]
            if len(wrong) < 3:
                continue
            # The two questions of a pair share nothing but the picture, and each round draws new wrong names.
            if number % 2:
                right = chance.random() < 0.5
                name = (picture if right else wrong[0]).titles[0]
                text = chance.choice(YES_NO).format(with_article(name))
                asked += 1
                yield picture, text, "yes" if right else "no", f"{picture.source}-yes/no"
            elif len(picture.titles[0].split()) <= MAX_ANSWER_WORDS:
                options = [one.titles[0] for one in (picture, *wrong[: chance.choice((2, 3))])]
                chance.shuffle(options)
                text = chance.choice(CHOICE).format(_one_of(options))
                asked += 1
                yield picture, text, picture.titles[0], f"{picture.source}-choice"


def ask_categories(pictures: list[Picture], chance: random.Random) -> Iterator[Asked]:
    """Endless questions for the category, every category equally often the answer."""
    shelves = defaultdict(list)
    for picture in pictures:
        if picture.category:
            shelves[picture.category].append(picture)
    names = sorted(shelves)
    while len(names) > 3:
        chance.shuffle(names)
        for category in list(names):
            picture = chance.choice(shelves[category])
            clear = [name for name in names if name != category]
            if picture.source == "drawing":
                unclear = set().union(*(overlap for overlap in OVERLAPS if category in overlap))
                clear = [name for name in clear if name not in unclear]
            options = [category, *chance.sample(sorted(clear), min(3, len(clear)))]
            chance.shuffle(options)
            wordings = DRAWING_CATEGORY if picture.source == "drawing" else EMOJI_CATEGORY
            text = chance.choice(wordings).format(_one_of(options))
            yield picture, text, category, f"{picture.source}-category"
