"""English word lists of semantic lookup. What is in none of them counts as meaning something, which is the careful side: in
another language two questions agree only if their words are the same."""

from __future__ import annotations

import re


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


NEGATIONS = _words(
    "not no never none nobody nothing neither nor without cannot cant dont wont isnt except unless hardly barely rarely "
    "seldom lacking lack fail fails failed refuse avoid stop prevent exclude excluding false wrong"
)

# Words that turn a question round when one is put for another, or that say which side something stands on.
OPPOSITES = _words(
    "on off in out up down before after above below over under more less most least fewer greater smaller larger bigger "
    "max maximum min minimum first last next previous earliest latest newest oldest old new increase decrease raise lower "
    "reduce grow shrink enable disable allow deny block unblock lock unlock open close start stop begin end add remove "
    "create delete insert drop install uninstall mount unmount connect disconnect encrypt decrypt encode decode compress "
    "decompress zip unzip import export upload download buy sell borrow lend give take send receive push pull win lose "
    "pass fail accept reject true false yes no safe unsafe dangerous legal illegal possible impossible positive negative "
    "left right north south east west hot cold warm cool fast slow high low long short big small good bad best worst right "
    "wrong cheap expensive easy hard rich poor young male female man woman men women boy girl husband wife father mother "
    "son daughter black white day night morning evening summer winter always never all some any none every both either "
    "only also even with without for against love hate like dislike include exclude advantages disadvantages pros cons "
    "benefits drawbacks causes effects before since until than"
)

# They order what stands beside them: "from Euro to Dollar" is not "from Dollar to Euro".
ORDER_WORDS = _words("from to into onto by via versus vs per of instead rather")

_COUNTING = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
_OTHER_NUMBERS = (
    "thirty=30 forty=40 fifty=50 sixty=60 seventy=70 eighty=80 ninety=90 hundred=100 thousand=1000 million=1000000 "
    "billion=1000000000 half=1/2 quarter=1/4 third=1/3 once=x1 twice=x2 double=x2 triple=x3 dozen=12 first=1. second=2. "
    "fourth=4. fifth=5. sixth=6. tenth=10."
)
NUMBER_WORDS = {word: str(value) for value, word in enumerate(_COUNTING.split())}
NUMBER_WORDS |= dict(pair.split("=") for pair in _OTHER_NUMBERS.split())

# Names of one unit by one name; the unit belongs to its number.
UNITS = {
    name: names.split()[0]
    for names in (
        "% percent pct", "$ usd dollar dollars", "€ eur euro euros", "£ gbp pound pounds", "s sec second seconds",
        "min minute minutes", "h hr hour hours", "d day days", "week weeks", "month months", "year years yr yrs",
        "mm", "cm", "m meter meters metre metres", "km kilometer kilometers kilometre kilometres", "mile miles mi",
        "ft foot feet", "inch inches", "mg", "g gram grams", "kg kilo kilos kilogram kilograms", "lb lbs", "oz ounce ounces",
        "ml", "l liter liters litre litres", "kb", "mb", "gb", "tb", "k thousand", "million", "billion",
        "am", "pm", "c celsius", "f fahrenheit", "january jan", "february feb", "march mar", "april apr", "may", "june jun",
        "july jul", "august aug", "september sep", "october oct", "november nov", "december dec",
    )
    for name in names.split()
}  # fmt: skip

# They can come and go without a change of meaning. No pronoun and no form of "to be": who is asked about, and when, matters.
FILLERS = _words("a an the please kindly just hi hello hey thanks thank well ok okay so then")
# How people begin to ask, with nothing of what they ask in it.
OPENING = re.compile(
    r"^\W*(?:(?:hi|hello|hey|please|so|ok|okay)\b\W*)*"
    r"(?:(?:can|could|would|will) you (?:please |kindly |just )?(?=\w))?"
    r"(?:(?:tell|let) me(?: know)?,? (?=\w)|i(?:'d| would) like to know,? (?=\w)|i want to know,? (?=\w)"
    r"|do you know,? (?=\w)|i was wondering,? (?=\w))?",
    re.IGNORECASE,
)


def stem(word: str) -> str:
    """A plural or a verb's -s off: enough to make `cat` of `cats`, never so much that two words become one."""
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word
