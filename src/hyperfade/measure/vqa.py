"""VQA accuracy: an answer counts as much as people agree with it.

Ten people answered every question of VQA v2. Leave one of them out: an answer is worth min(1, matches / 3), where
`matches` counts how many of the other nine gave it; VQA accuracy is the mean over the ten ways to leave one out. Before
that, answers are evened out: no capitals, no punctuation, no articles, digits for number words, apostrophes where
contractions lack them. Rule: https://visualqa.org/evaluation.html; order and corners as in the evaluation code that
goes with it (`vqaEval.py`), with one difference: the code evens out people's answers only where they are not all
spelled alike, the rule does it always, and so does this.
"""

import re
from collections.abc import Sequence

_FEWEST_PEOPLE = 3
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS_AND_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_ARTICLES = ("a", "an", "the")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
# Each is recognised with any one of its apostrophes missing.
_CONTRACTIONS = re.findall(
    r"\S+",
    """
    ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't needn't oughtn't
    shan't shouldn't wasn't weren't won't wouldn't couldn't've hadn't've mightn't've shouldn't've wouldn't've could've
    might've must've not've should've they've we've what've where've who've would've you've he'd how'd it'd someone'd
    something'd there'd they'd where'd who'd you'd he'd've it'd've she'd've somebody'd've someone'd've something'd've
    there'd've they'd've we'd've who'd've you'd've how'll it'll somebody'll someone'll something'll they'll what'll
    who'll why'll you'll there're they're what're why're you're he's how's somebody's someone's that's there's what's
    when's where's who's why's ma'am o'clock 'twas 'ow's'at y'all y'all'll y'all'd've
    """,
)
_APOSTROPHES = {
    form[:place] + form[place + 1 :]: form for form in _CONTRACTIONS for place, sign in enumerate(form) if sign == "'"
} | {"somebody'd": "somebodyd"}  # the official table goes the other way here


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """What `answer` is worth, 0 to 1, by `references`, one per person, repeated where people agree.

    Four people or more who agree with it make 1; three of ten make 0.9. With one or two references there are no people
    to agree, so they are taken as equally right, and an answer that equals any of them (both evened out) is worth 1.
    With three the rule applies as it stands, and gives at most 2/3.
    """
    given = even_out(answer)
    people = [even_out(reference) for reference in references]
    matches, count = people.count(given), len(people)
    if count < _FEWEST_PEOPLE:
        return float(matches > 0)
    without_a_match, without_another = min(1.0, (matches - 1) / 3), min(1.0, matches / 3)
    return (matches * without_a_match + (count - matches) * without_another) / count


def even_out(answer: str) -> str:
    """`answer` as VQA accuracy compares it."""
    text = kept = answer.replace("\n", " ").replace("\t", " ").strip()
    joins = _DIGITS_AND_COMMA.search(text) is not None  # 100,978 becomes one number
    for sign in _PUNCTUATION:
        beside_space = sign + " " in text or " " + sign in text
        kept = kept.replace(sign, "" if joins or beside_space else " ")
    words = (_DIGITS.get(word, word) for word in _PERIOD.sub("", kept).lower().split())
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)
