"""OpenClipart drawings (Debian `openclipart-png` and `-svg`): clean captions out of titles written by many hands."""

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pictures import Picture

DC = "{http://purl.org/dc/elements/1.1/}"
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
# the longest folder that matches decides; folders that are not listed say little about what is drawn
CATEGORIES = {
    "animals": "animals",
    "buildings": "buildings",
    "buildings/furniture": "furniture",
    "computer/hardware": "computer hardware",
    "computer/icons/flat-theme": "computer icons",
    "computer/icons/lemon-theme": "computer icons",
    "computer/icons/etiquette-theme": "computer icons",
    "education/books": "books",
    "food": "food",
    "food/beverages": "drinks",
    "food/fruit": "fruit",
    "geography": "maps",
    "geography/astronomy": "space",
    "people": "people",
    "people/clothing": "clothing",
    "people/smilies": "smileys",
    "plants": "plants",
    "recreation/games/cards": "playing cards",
    "recreation/music": "music",
    "recreation/sports": "sports",
    "shapes/arrows": "arrows",
    "shapes/callouts": "speech bubbles",
    "shapes/jigsaw": "jigsaw pieces",
    "shapes/stars": "stars",
    "signs_and_symbols/clocks": "clocks",
    "signs_and_symbols/flags": "flags",
    "signs_and_symbols/weather": "weather",
    "special/gradients": "gradients",
    "special/patterns": "patterns",
    "tools": "tools",
    "tools/weapons": "weapons",
    "transportation/boating": "boats",
    "transportation/roadsigns": "road signs",
    "transportation/vehicles": "vehicles",
}
OVERLAPS = (
    {"plants", "fruit", "food", "drinks"},
    {"people", "clothing", "smileys", "sports", "music"},
    {"tools", "weapons"},
    {"boats", "vehicles", "sports"},
    {"buildings", "furniture"},
    {"space", "weather", "maps"},
    {"computer hardware", "computer icons"},
    {"arrows", "road signs", "computer icons"},
    {"stars", "space", "patterns"},
)
FOREIGN_AUTHORS = re.compile(r"rollandin|guillou|gondouin|tanguy|bersac|guziec|rinc[oó]n|andrei z", re.IGNORECASE)
NOISE = {"clipart", "svg", "png", "unsorted", "hash", "icons", "icon", "symbol", "sym", "various", "bw", "alt", "aj"}
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
RANKS = {"a": "ace", "j": "jack", "q": "queen", "k": "king"} | {str(n): word for n, word in enumerate(NUMBERS, 2)}
SUITS = {"c": "clubs", "d": "diamonds", "h": "hearts", "s": "spades"}
MAX_WORDS = 7
MAX_STARS = 60
MAX_STAR_POINTS = 24  # with more points it looks like a ring


@dataclass(frozen=True)
class Metadata:
    """What an SVG file says about itself."""

    title: str
    keywords: tuple[str, ...]
    author: str
    language: str


def read_metadata(svg: Path) -> Metadata:
    """The first Work of the file's RDF; empty if there is none or the file cannot be parsed."""
    try:
        with svg.open("rb") as file:
            for _, element in ElementTree.iterparse(file, events=("end",)):
                if element.tag.endswith("}Work"):
                    keywords = tuple(item.text.strip().lower() for item in element.iter(RDF + "li") if item.text)
                    authors = (name.text or "" for made in element.iter(DC + "creator") for name in made.iter())
                    language = (element.findtext(DC + "language") or "en").lower()
                    title = element.findtext(DC + "title") or ""
                    return Metadata(title.strip(), keywords, " ".join(authors).strip(), language)
    except (OSError, ElementTree.ParseError):
        pass  # the drawing then has its file name alone, which is counted among the untitled
    return Metadata("", (), "", "en")


def has_linked_image(svg: Path) -> bool:
    """Whether the drawing shows another file, which its PNG reports as "Linked Image Not Found"."""
    return svg.exists() and bool(re.search(rb"<image\b[^>]*href\s*=\s*[\"'](?!data:)", svg.read_bytes()))


def read_drawings(cache: Path, more_words: set[str]) -> list[Picture]:
    """Every drawing that is a file of its own. `more_words` are English words besides the drawings' keywords."""
    root = cache / "openclipart" / "usr" / "share" / "openclipart"
    files, also_in = [], {}
    for file in sorted((root / "png").rglob("*.png")):
        if file.is_symlink():
            place = category_of(file.relative_to(root / "png"))
            also_in.setdefault(file.resolve(), set()).add(place)
        else:
            files.append(file)
    stars = [file for file in files if file.parent.name == "stars"]
    files = sorted(set(files) - set(stars)) + stars[:: max(1, len(stars) // MAX_STARS)]
    svgs = {file: (root / "svg" / file.relative_to(root / "png")).with_suffix(".svg") for file in files}
    known = [(file, read_metadata(svg)) for file, svg in svgs.items()]
    counts = Counter(meta.title.lower() for _, meta in known)
    english = english_words([meta for _, meta in known]) | more_words
    pictures = []
    taken: Counter[str] = Counter()
    for file, meta in known:
        path = file.relative_to(root / "png")
        category = category_of(path)
        others = also_in.get(file.resolve(), set()) - {""}
        titles = captions(path, meta, counts[meta.title.lower()], english)
        stem = " ".join(stem_words(path.stem, meta.author)) or path.stem
        keys = [f"stem {stem}"] + ([f"title {titles[0]}"] if titles else [])
        words = {word for text in (*titles, *meta.keywords, stem) for word in re.findall(r"[a-z]+", text)}
        name = "drawing/" + re.sub(r"[^A-Za-z0-9]+", "-", str(path.with_suffix("")))
        taken[name] += 1  # "view+.png" and "view-.png" are two drawings
        name += f"_{taken[name]}" if taken[name] > 1 else ""
        # a drawing that is filed twice has no single category to ask for
        only = category if not others or others == {category} else ""
        near = f"drawing {category or path.parts[0]}"
        fields = (file, name, "drawing", titles, only, near, tuple(keys), frozenset(words))
        pictures.append(Picture(*fields, spoilt=has_linked_image(svgs[file])))
    return pictures


def category_of(path: Path) -> str:
    """The category of a drawing's folder, or ""."""
    for folder in path.parents:
        if str(folder) in CATEGORIES:
            return CATEGORIES[str(folder)]
    return ""


def english_words(listed: list[Metadata]) -> set[str]:
    """Words of keywords and of titles that several authors use; authors who write another language do not count."""
    authors: dict[str, set[str]] = {}
    words: set[str] = set()
    for meta in listed:
        if FOREIGN_AUTHORS.search(meta.author) or not meta.language.startswith(("en", "all")):
            continue
        for keyword in meta.keywords:
            words.update(re.findall(r"[a-z]{3,}", keyword))
        for word in re.findall(r"[a-z]{3,}", meta.title.lower()):
            authors.setdefault(word, set()).add(meta.author)
    return words | {word for word, used_by in authors.items() if len(used_by) > 1}


def stem_words(stem: str, author: str) -> list[str]:
    """The words of a file name without numbers, noise and the (often cut off) author's name at its end."""
    words = [word for word in re.split(r"[^a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", stem).lower()) if word]
    names = re.findall(r"[a-z]+", author.lower())
    while words and any(name.startswith(words[-1]) for name in [*names, "ganson", "aiga"]):
        words.pop()
    return [word for word in words if word not in NOISE and word != "aiga"]


def captions(path: Path, meta: Metadata, uses: int, english: set[str]) -> tuple[str, ...]:
    """Accepted captions of a drawing, or none: a false caption is worse than a drawing without."""
    if star := re.fullmatch(r"star_(\d+)pt\d+step", path.stem):
        return ("star",) if int(star[1]) <= MAX_STAR_POINTS else ()
    if not {"applications", "apps"}.isdisjoint(path.parts):  # icons of programs, which are named but not drawn
        return ()
    if "cards" in path.parts and (card := re.fullmatch(r"[a-z]+_([cdhs])_([a-z0-9]+)", path.stem)):
        if card[2] in RANKS:
            return (f"{RANKS[card[2]]} of {SUITS[card[1]]}", f"playing card {RANKS[card[2]]} of {SUITS[card[1]]}")
        return ()
    if FOREIGN_AUTHORS.search(meta.author) or not meta.language.startswith(("en", "all")):
        return ()
    stem = stem_words(path.stem, meta.author)
    title = re.sub(r"^clipart by .+? - ", "", meta.title.strip(), flags=re.IGNORECASE)
    # collections give one title to all their drawings; the file name is then the better witness
    shared = title != meta.title.strip() or uses > 3
    words = re.findall(r"[a-z']+", re.sub(r"\(.*?\)|_", " ", title.lower()))
    words = [word for word in words if word not in NOISE]
    choices = [words] if words and (not shared or set(words) <= set(stem)) else []
    if stem and stem != words:
        choices.append(stem)
    if "flags" in path.parts and "semaphore" not in path.parts and "flag" not in words:
        place = " ".join(stem) if shared or not words else re.split(r" - ", title)[-1].lower().replace("_", " ")
        if "flag" not in place and re.fullmatch(r"[a-z .,']+", place):
            return tuple(dict.fromkeys((f"flag of {place}", f"{place} flag", place)))
    good = [" ".join(choice) for choice in choices if _is_english(choice, english)]
    if good and "roadsigns" in path.parts:
        good = [f"{text} road sign" if "sign" not in text else text for text in good]
    if not good:
        return ()
    keywords = [word for word in meta.keywords if word in english and word not in NOISE and len(word) > 2]
    keywords = [word for word in keywords if not word.endswith("sym")]
    phrases = [keyword for keyword in keywords if keyword in good[0].split()] + [" ".join(sorted(set(keywords))[:3])]
    return tuple(dict.fromkeys([*good, *(phrase for phrase in phrases if phrase)]))


def _is_english(words: list[str], english: set[str]) -> bool:
    long = [word for word in words if len(word) > 2]
    return 0 < len(words) <= MAX_WORDS and bool(long) and all(word in english for word in long)
