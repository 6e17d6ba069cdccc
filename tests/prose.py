"""Self-written English for tests: a small grammar over a fixed vocabulary, the same every time.

Each document keeps to one place, two people and a few things, and its sentences follow one
another (pronouns, "then", "the next day"), so that a model can learn which words go together and
which sentence follows which.
"""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stacking_ds.data.prepare import preparation
from stacking_ds.data.prepare.folder import PrepareOptions
from stacking_ds.data.prepare.preparation import Prepared

__all__ = ["documents", "prepare", "tiny_shards", "write_text"]

_PEOPLE = {
    "she": "anna clara edith freda greta hilda irene julia laura maria nora olive",
    "he": "albert bruno carl david edgar frank george henry ivan jacob leo martin",
}
_TRADES = {
    "baker": ("bakery", "bread flour oven cake dough", "bakes kneads sells warms weighs"),
    "farmer": ("farm", "wheat cow barn field plough", "feeds waters mends counts cleans"),
    "sailor": ("harbour", "ship sail rope anchor map", "ties paints repairs loads guards"),
    "teacher": ("school", "book lesson chalk desk bell", "reads opens writes explains holds"),
    "doctor": ("hospital", "bandage bottle needle lamp bed", "washes boils carries checks moves"),
    "miller": ("mill", "wheel stone sack grain door", "turns grinds lifts oils watches"),
    "gardener": ("garden", "rose spade hedge apple seed", "plants waters trims digs gathers"),
    "tailor": ("workshop", "coat thread button cloth mirror", "sews cuts folds irons measures"),
    "smith": ("forge", "hammer iron fire horseshoe nail", "heats bends strikes cools shapes"),
    "painter": ("studio", "brush canvas frame colour portrait", "mixes dries signs hangs covers"),
    "fisher": ("lake", "boat net trout hook basket", "rows casts empties pulls drags"),
    "printer": ("press", "page ink paper letter drawer", "sorts stacks binds trims spreads"),
}
_TIMES = "in the morning|at noon|in the evening|before sunrise|after the rain|on market day"
_SEASONS = "winter spring summer autumn"
_QUALITIES = "old new heavy small large broken clean good"
_FEELINGS = "tired happy worried proud patient hungry calm curious"
_WEATHER = "cold warm windy quiet wet bright dark foggy"
_NUMBERS = "two three four five six seven eight nine ten twelve twenty"
_KIN = "brother sister cousin neighbour friend uncle aunt"

_OPENINGS = (
    "{Name} is a {trade} and works in the {place} near the river.",
    "In the {season} {name} came to the {place} to learn how a {trade} works.",
    "Everyone in the village knows {name}, the {trade} of the {place}.",
)
_SENTENCES = (
    "{Time} {pronoun} {verb} the {quality} {thing} and looks for the {other}.",
    "{Pronoun} {verb} the {thing} because the {other} is {quality}.",
    "When the day is {weather}, {name} {verb} the {thing} in the {place}.",
    "The {thing} stands beside the {other}, and {pronoun} never forgets it.",
    "{Possessive} {kin} brings {number} coins for the {quality} {thing}.",
    'The {kin} asks, "Where is the {thing}?" and {name} points at the {other}.',
    "{Pronoun} is {feeling} when the {thing} is {quality} again.",
    "Then {name} {verb} the {other} for {number} hours and goes home {feeling}.",
    "The next day the {place} is {weather}, but {pronoun} {verb} the {thing} as before.",
    "There are {number} {quality} places for the {thing} and only one for the {other}.",
)
_ENDINGS = (
    "At the end of the {season} the {place} is closed and {name} rests.",
    "That is why people say that a {trade} is never {feeling} for long.",
    "So the {thing} stayed in the {place}, and {name} was {feeling}.",
)


def documents(count: int, *, seed: int = 0, sentences: tuple[int, int] = (8, 40)) -> Iterator[str]:
    """`count` documents of a number of sentences drawn from `sentences`, in paragraphs."""
    random_source = random.Random(seed)
    for _ in range(count):
        yield _document(random_source, random_source.randint(*sentences))


def write_text(path: Path, count: int, *, seed: int = 0) -> Path:
    """Writes `count` documents as a .txt file, a blank line after each."""
    texts = (text.replace("\n", " ") for text in documents(count, seed=seed))
    path.write_text("".join(f"{text}\n\n" for text in texts), "utf-8")
    return path


def prepare(
    sources: str | Sequence[str],
    out_dir: Path,
    *,
    progress: Any = lambda _: None,
    say: Any = preparation.logger.info,
    **options: Any,
) -> Prepared:
    """`prepare` with these options in words."""
    names = (sources,) if isinstance(sources, str) else tuple(sources)
    asked = PrepareOptions(names, out_dir, **options)
    return preparation.prepare(asked, progress=progress, say=say)


def tiny_shards(tmp_path: Path, *, vocab_size: int = 512, documents: int = 200) -> Path:
    """A prepared folder of self-written text, a tenth of it held out."""
    text = write_text(tmp_path / f"prose-{documents}.txt", documents)
    folder = tmp_path / f"shards-{documents}-{vocab_size}"
    prepare(str(text), folder, vocab_size=vocab_size, heldout_fraction=0.1)
    return folder


def _document(random_source: random.Random, num_sentences: int) -> str:
    pick = random_source.choice
    pronoun = pick(("she", "he"))
    trade = pick(tuple(_TRADES))
    place, things, verbs = _TRADES[trade]
    fixed = {
        "name": pick(_PEOPLE[pronoun].split()).capitalize(),
        "pronoun": pronoun,
        "possessive": {"she": "her", "he": "his"}[pronoun],
        "trade": trade,
        "place": place,
        "season": pick(_SEASONS.split()),
    }
    text = []
    for index in range(num_sentences):
        templates = _OPENINGS if index == 0 else _SENTENCES
        template = pick(_ENDINGS if index == num_sentences - 1 else templates)
        thing, other = random_source.sample(things.split(), 2)
        words = fixed | {
            "thing": thing,
            "other": other,
            "verb": pick(verbs.split()),
            "time": pick(_TIMES.split("|")),
            "quality": pick(_QUALITIES.split()),
            "feeling": pick(_FEELINGS.split()),
            "weather": pick(_WEATHER.split()),
            "number": pick(_NUMBERS.split()),
            "kin": pick(_KIN.split()),
        }
        capitals = {key.capitalize(): word.capitalize() for key, word in words.items()}
        text.append(template.format_map(words | capitals))
        text.append("\n" if random_source.random() < 0.2 else " ")
    return "".join(text).strip()
