"""Noto emoji from the npm package `emoji-datasource-google`: names, categories, and one group per base name."""

import json
import re
from pathlib import Path

from pictures import Picture

CATEGORIES = {
    "Smileys & Emotion": "smileys",
    "People & Body": "people",
    "Animals & Nature": "animals and nature",
    "Food & Drink": "food and drink",
    "Travel & Places": "travel and places",
    "Activities": "activities",
    "Objects": "objects",
    "Symbols": "symbols",
    "Flags": "flags",
}
PEOPLE_WORDS = {"man", "woman", "men", "women", "person", "people", "male", "female", "boy", "girl", "child"}
# Unicode names of symbols describe the glyph of an old printed font, not what an emoji font draws
OLD_STYLE = re.compile(r"^(black|white|heavy|white heavy|heavy black) ")
UNCLEAR = re.compile(r"cjk|katakana|squared|keycap|variation|negative|ideograph|type-|symbol for|signs?$")
MAX_WORDS = 6
TONES_PER_EMOJI = 2


def read_emoji(cache: Path) -> list[Picture]:
    """Every emoji with an image; for those with skin tones two of the tones as well."""
    package = cache / "emoji" / "package"
    pictures = []
    for entry in json.loads((package / "emoji.json").read_text(encoding="utf-8")):
        category = CATEGORIES.get(entry["category"])
        if category is None or not entry["has_img_google"]:
            continue
        titles = _titles(entry)
        name = titles[0] if titles else entry["name"].lower()
        keys = (f"emoji {base_name(name, entry['subcategory'])}",)
        words = frozenset(word for title in titles for word in title.split())
        near = f"emoji {entry['subcategory']}"
        tones = [tone for key, tone in sorted(entry.get("skin_variations", {}).items()) if "-" not in key]
        # the first and the last tone differ most
        chosen = [tones[0], tones[-1]][:TONES_PER_EMOJI] if len(tones) > 1 else tones
        for variant, image in [(False, entry["image"]), *((True, tone["image"]) for tone in chosen)]:
            file = package / "img" / "google" / "64" / image
            if file.exists():
                place = f"emoji/{Path(image).stem}"
                pictures.append(Picture(file, place, "emoji", titles, category, near, keys, words, variant))
    return pictures


def _titles(entry: dict) -> tuple[str, ...]:
    name = entry["name"].lower().replace("“", "").replace("”", "").strip()
    flag = re.fullmatch(r"(.+) flag", name)
    if entry["category"] == "Flags" and flag:
        place = flag[1].replace(" & ", " and ")
        return (f"flag of {place}", f"{place} flag", place)
    name = re.sub(r"clock face (\w+?)(-thirty)? oclock", lambda m: f"clock at {m[1]} {'thirty' if m[2] else ''}", name)
    name = re.sub(r"\s+", " ", name.replace("-", " ").replace(":", "").replace(",", "")).strip()
    shorts = []
    for short in entry["short_names"]:
        words = re.sub(r"[_-]+", " ", short).strip(" 0123456789")
        if len(words) > 2 and re.fullmatch(r"[a-z ]+", words):
            shorts.append(words)
    if UNCLEAR.search(entry["name"].lower()) or not re.fullmatch(r"[a-z' .]+", name):
        return ()
    if OLD_STYLE.match(name) and entry["subcategory"] not in ("geometric", "heart"):
        plain = OLD_STYLE.sub("", name)
        name, shorts = (shorts[0], [plain, *shorts]) if shorts else (plain, shorts)
    if len(name.split()) > MAX_WORDS:
        if not shorts:
            return ()
        name = shorts[0]
    return tuple(dict.fromkeys([name, *shorts]))


def base_name(name: str, subcategory: str) -> str:
    """What emoji of one motif share: `name` without the words for a gender; families and clocks are one motif each."""
    if subcategory in ("family", "alphanum", "keycap"):
        return subcategory
    if name.startswith("clock"):
        return "clock"
    words = [word for word in re.split(r"[^a-z]+", name.lower()) if word and word not in PEOPLE_WORDS]
    return " ".join(words) or "person"
