"""Procedural instructions with exactly one right answer each, as short chats."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from data.example import Example

WORDS = (
    "apple", "river", "stone", "green", "cloud", "window", "garden", "silver", "bread", "music",
    "paper", "winter", "orange", "letter", "mountain", "candle", "forest", "bridge", "summer", "pencil",
    "water", "kitchen", "flower", "island", "coffee", "shadow", "market", "yellow", "travel", "doctor",
)  # fmt: skip
DAYS = (
    "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday",
)  # fmt: skip
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
    "November", "December",
)  # fmt: skip
UNITS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen",
)  # fmt: skip
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo",
    "Egypt": "Cairo", "Norway": "Oslo", "Greece": "Athens", "Portugal": "Lisbon", "Poland": "Warsaw",
    "Austria": "Vienna", "Ireland": "Dublin", "Finland": "Helsinki", "Peru": "Lima", "Cuba": "Havana",
    "Kenya": "Nairobi", "China": "Beijing", "Russia": "Moscow", "Sweden": "Stockholm",
    "Hungary": "Budapest",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "early": "late", "happy": "sad", "full": "empty",
    "hard": "soft", "light": "dark", "old": "young", "rich": "poor", "strong": "weak", "wet": "dry",
    "high": "low", "open": "closed", "near": "far", "up": "down", "first": "last", "loud": "quiet",
    "clean": "dirty", "true": "false",
}  # fmt: skip
_ASKING = (
    "{}",
    "Please do this: {}",
    "{} Give only the answer.",
    "Can you help me? {}",
    "Hello! {}",
    "{} Thanks!",
)

Maker = Callable[[random.Random], tuple[str, str]]


def _words(rng: random.Random, count: int) -> list[str]:
    return rng.sample(WORDS, count)


def _between(low: int, high: int, rng: random.Random) -> tuple[int, int]:
    return rng.randint(low, high), rng.randint(low, high)


def _addition(rng: random.Random) -> tuple[str, str]:
    a, b = _between(1, 99, rng)
    return f"What is {a} + {b}?", str(a + b)


def _subtraction(rng: random.Random) -> tuple[str, str]:
    b, rest = _between(1, 99, rng)
    return f"What is {b + rest} - {b}?", str(rest)


def _product(rng: random.Random) -> tuple[str, str]:
    a, b = _between(2, 12, rng)
    return f"What is {a} times {b}?", str(a * b)


def _larger(rng: random.Random) -> tuple[str, str]:
    a, b = rng.sample(range(1, 500), 2)
    return f"Which number is larger, {a} or {b}?", str(max(a, b))


def _smaller(rng: random.Random) -> tuple[str, str]:
    a, b = rng.sample(range(1, 500), 2)
    return f"Which number is smaller, {a} or {b}?", str(min(a, b))


def _repeat(rng: random.Random) -> tuple[str, str]:
    word, times = rng.choice(WORDS), rng.randint(2, 5)
    return f"Write the word {word} {UNITS[times]} times.", " ".join([word] * times)


def _capitals(rng: random.Random) -> tuple[str, str]:
    words = " ".join(_words(rng, rng.randint(1, 3)))
    return f"Write in capital letters: {words}", words.upper()


def _reverse_words(rng: random.Random) -> tuple[str, str]:
    words = _words(rng, rng.randint(2, 4))
    return f"Write these words in reverse order: {' '.join(words)}", " ".join(reversed(words))


def _alphabet(rng: random.Random) -> tuple[str, str]:
    words = _words(rng, rng.randint(2, 4))
    return f"Sort these words by the alphabet: {' '.join(words)}", " ".join(sorted(words))


def _first_word(rng: random.Random) -> tuple[str, str]:
    words = _words(rng, rng.randint(3, 5))
    return f"What is the first word here: {' '.join(words)}?", words[0]


def _last_word(rng: random.Random) -> tuple[str, str]:
    words = _words(rng, rng.randint(3, 5))
    return f"What is the last word here: {' '.join(words)}?", words[-1]


def _count_words(rng: random.Random) -> tuple[str, str]:
    words = _words(rng, rng.randint(2, 7))
    return f"How many words are these: {' '.join(words)}?", str(len(words))


def _first_letter(rng: random.Random) -> tuple[str, str]:
    words = _words(rng, 2)
    return (
        f"With which letters do the words {words[0]} and {words[1]} begin?",
        f"{words[0][0]} and {words[1][0]}",
    )


def _join(rng: random.Random) -> tuple[str, str]:
    words = _words(rng, rng.randint(2, 4))
    return f"Join these words with commas: {' '.join(words)}", ", ".join(words)


def _greeting(rng: random.Random) -> tuple[str, str]:
    word = rng.choice(WORDS).title()
    return f"Say hello to my friend {word}.", f"Hello, {word}!"


def _capital_city(rng: random.Random) -> tuple[str, str]:
    country = rng.choice(list(CAPITALS))
    return f"What is the capital of {country}?", f"The capital of {country} is {CAPITALS[country]}."


def _opposite(rng: random.Random) -> tuple[str, str]:
    word = rng.choice(list(OPPOSITES))
    return f"What is the opposite of {word}?", f"The opposite of {word} is {OPPOSITES[word]}."


def _next_day(rng: random.Random) -> tuple[str, str]:
    day = rng.randrange(7)
    return f"Which day comes after {DAYS[day]}?", f"After {DAYS[day]} comes {DAYS[(day + 1) % 7]}."


def _next_month(rng: random.Random) -> tuple[str, str]:
    month = rng.randrange(12)
    return (
        f"Which month comes after {MONTHS[month]}?",
        f"After {MONTHS[month]} comes {MONTHS[(month + 1) % 12]}.",
    )


def _number_word(rng: random.Random) -> tuple[str, str]:
    number = rng.randrange(16)
    return f"Write the number {number} as a word.", UNITS[number]


def _even(rng: random.Random) -> tuple[str, str]:
    number = rng.randint(1, 999)
    return f"Is {number} even or odd?", f"{number} is {'odd' if number % 2 else 'even'}."


def _spell(rng: random.Random) -> tuple[str, str]:
    word = rng.choice(WORDS)
    return f"Spell the word {word} with dashes.", "-".join(word)


MAKERS: tuple[Maker, ...] = (
    _addition, _subtraction, _product, _larger, _smaller, _repeat, _capitals, _reverse_words, _alphabet,
    _first_word, _last_word, _count_words, _first_letter, _join, _greeting, _capital_city, _opposite,
    _next_day, _next_month, _number_word, _even, _spell,
)  # fmt: skip


def instructions(per_template: int = 120, seed: int = 0) -> Iterator[Example]:
    """Up to `per_template` distinct instructions of each template, in an order that mixes the templates."""
    made = []
    for maker in MAKERS:
        template = maker.__name__.lstrip("_")
        rng = random.Random(f"{seed}/{template}")
        asked: dict[str, str] = {}
        for _ in range(3 * per_template):
            if len(asked) < per_template:
                question, answer = maker(rng)
                asked[rng.choice(_ASKING).format(question)] = answer
        made += [
            Example(
                family="chat",
                messages=[{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
                dataset="instructions",
                template=template,
            )
            for question, answer in asked.items()
        ]
    random.Random(seed).shuffle(made)
    yield from made
