"""Finds the phrases of a question: things, colours, numbers, relations, styles, backgrounds, and the words left over.

Design choices
- Fixed phrases become one symbol each ("to the left of" is "R"), things become "N". What a question means is then
  decided from the order of few symbols and words (`mm.world.asking.parse`), so that a wording need not be foreseen.
- A word that neither names anything nor belongs to English grammar is unknown and is reported, never passed over.

Symbols: N thing, C colour, # number, R relation, S style, G background, T time of day, P the picture.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from mm.world import vocabulary as v
from mm.world.asking.query import CATEGORIES, Thing
from mm.world.demand_symbols import nouns

_NUMBERS = {"zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}
_NUMBERS |= {"nine": 9, "ten": 10, "couple": 2, "pair": 2} | {str(n): n for n in range(21)}
_CATEGORY_WORDS = {
    "animals": "animal animals creature creatures beast beasts critter critters",
    "vehicles": "vehicle vehicles",
    "things": "thing things object objects item items element elements something anything everything nothing stuff",
    "fruits": "fruit fruits",
    "instruments": "instrument instruments",
    "buildings": "building buildings",
    "plants": "plant plants",
    "foods": "food foods",
}
_SINGULAR_CATEGORIES = frozenset(
    "animal creature beast critter vehicle thing object item element fruit instrument".split()
)
_RELATIONS = {
    "left of": r"left(?= or right (?:of|from))|(?:to |on |at )?(?:the )?left(?:[ -]hand)?(?: side)? (?:of|from)"
    r"|(?:further|farther|more) (?:to the )?left than",
    "right of": r"(?:to |on |at |towards )?(?:the )?right(?:[ -]hand)?(?: side)? (?:of|from)"
    r"|(?:further|farther|more) (?:to the )?right than",
    "above": r"above|over(?! all)|(?:on )?(?:the )?top of|atop|(?:higher|further up)(?: up)?(?: than)?",
    "below": r"below|underneath|beneath|under|(?:lower|further down)(?: down)?(?: than)?",
}
_STYLES = {
    "pixel art": r"pixel[ -]?art|pixelated|8-bit",
    "watercolor": r"water[ -]?colou?rs?|aquarelle",
    "cartoon": r"cartoons?|cartoonish|comic",
    "sketch": r"sketch(?:ed|es|y)?|pencil",
    "neon": r"neon",
    "mosaic": r"mosaics?",
    "blueprint": r"blueprints?",
    "sepia": r"sepia",
}
_GROUNDS = {
    "day": r"day[ -]?time|daylight|(?:the |a )?day|(?:bright|light)(?: outside| out)?",
    "night": r"(?:under |at |in |during )?(?:the |a )?night(?:[ -]?time| sky)?|dark(?:ness)?(?: outside)?|midnight",
    "snow": r"snow(?:y|ing|fall|-covered)?(?: landscape| ground)?|winter(?:y)?|wintry",
    "beach": r"beach|sand|sandy|sea|seaside|seashore|shore|coast|ocean",
    "grass": r"grass|grassy|meadow|lawn|(?:green )?field|grassland",
    "sky": r"(?:blue )?sky|clouds?|cloudy|(?<=in the )air",
    "plain": r"plain(?: paper)?|blank",
}
_PICTURE = (
    r"(?:picture|image|photo|photograph|pic|drawing|scene|painting|illustration|artwork|canvas|frame|shot|graphic)"
)
_FIXED: tuple[tuple[str, str], ...] = (
    (r"(?:the )?time of (?:the )?day|(?:day|night)(?:[ -]?time)? or (?:day|night)(?:[ -]?time)?", "T"),
    (r"(?:did you|have you) (?:draw|drawn|paint|make|create)", ""),
    (r"how (?:many|much)", "howmany"),
    (r"going on|happening", "goingon"),
    (r"pine tree", "pine"),
    (r"pine trees", "pines"),
    (r"the same (?:number|amount|count) of|equally many|as many|as much", "asmany"),
    (r"more than(?= (?:zero|one|two|three|four|five|six|\d+)\b)", "morethan"),
    (r"(?:fewer|less) than(?= (?:zero|one|two|three|four|five|six|\d+)\b)", "fewerthan"),
    (r"(?P<n>zero|one|two|three|four|five|six|\d+) or more", r"atleast \g<n>"),
    (r"(?P<n>zero|one|two|three|four|five|six|\d+) or (?:less|fewer)", r"atmost \g<n>"),
    (r"in front of (?:us|me|you)", ""),
    (r"at least", "atleast"),
    (r"at most", "atmost"),
    (r"left|right hand|leftmost|rightmost|top|bottom|middle|cent(?:er|re)|corners?|edges?", "side"),
    (r"(?:next|close) to|beside|near|between|in front of|inside|touching|around(?= the)|beyond", "elsewhere"),
    (r"(?:the |this |that |these |those |your |my |our |an? )?(?:whole |given |entire )?" + _PICTURE + "s?", "P"),
)
BOUNDS = {"morethan": "more than", "fewerthan": "fewer than", "atleast": "at least", "atmost": "at most"}
FILLER = frozenset(
    """i you we me us he she my your our it its this that these those they them one ones someone
    is are was were be been being am do does did has have had having can could will would shall should may might must
    a an the some any all every each single of in on at to from with within into by for about around as if whether than
    see sees seen seeing spot find finds found show shows shown showing contain contains include includes included
    feature features featured display displays displayed appear appears visible present exist exists hold holds get got
    give gives look looks looking seem seems think say says said tell know check believe notice observe detect make out
    stand stands standing sit sits sitting lie lies lying located placed positioned set take takes place happen happens
    here there now then anywhere somewhere currently really actually exactly precisely truly certainly just also too
    altogether overall together please kindly maybe perhaps so well right correct true fine yes like kind kinds sort
    sorts type types use used using covered cover covers consist consists during outside up down let mention identify
    coloured colored look come comes used called call art artistic made only alone big small little large beautiful
    name list enumerate caption describe explain give answer question order case both either painted drawn done
    rendered created produced
    depicted taken write detail detailed briefly short did drew
    recognise recognize compared often coloured colored but and or not no per""".split()
)
OPERATORS = frozenset(
    """what which where how who why when whose howmany number count counts amount quantity total colour color colours
    colors hue hues shade shades tint tints style styles technique medium background backdrop setting scenery
    surroundings environment landscape ground location behind description depict depicts goingon contents content
    summarize summarise summary report coloured colored without lack lacks lacking free missing absent neither nor
    never none more less fewer most same equal equally outnumber outnumbers numerous greater larger asmany
    morethan fewerthan atleast atmost elsewhere empty else besides except different many season weather side""".split()
)
_SKIPPED = frozenset("any some single big small little large".split())
_ARTICLES = frozenset("a an the any some no of many these those this that".split())


@dataclass(kw_only=True)
class Clause:
    """The phrases of a question in order, and what is left.

    Attributes:
        words: Symbols, operators and grammar words in order.
        things: Of the symbols N.
        colours: Of C.
        numbers: Of #.
        relations: Of R.
        styles: Of S.
        grounds: Of G; "day" is every background but night.
        unknown: Words that are not known, each with whether it stands in a noun's place.
    """

    words: list[str] = field(default_factory=list)
    things: list[Thing] = field(default_factory=list)
    colours: list[str] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    relations: list[str] = field(default_factory=list)
    styles: list[str] = field(default_factory=list)
    grounds: list[str] = field(default_factory=list)
    unknown: list[tuple[str, bool]] = field(default_factory=list)

    def has(self, *words: str) -> bool:
        """Whether any of these words or symbols occurs."""
        return any(word in self.words for word in words)

    @property
    def line(self) -> str:
        """Words and symbols as one line."""
        return " ".join(self.words)


def _nouns() -> dict[str, tuple[str, bool]]:
    """Words to the object or category that they name, and whether the word is a plural."""
    out = {word: (name, bool(plural)) for word, (name, plural) in nouns().items() if name in v.OBJECTS}
    for name, words in _CATEGORY_WORDS.items():
        out |= {word: (name, word not in _SINGULAR_CATEGORIES) for word in words.split()}
    return out


NOUNS = _nouns()
_COLOURS = {colour: colour for colour in (*v.COLOURS, "black", "white", "gray", "grey")}
_SYMBOLS = re.compile(r"@([RSG]):(\w+)")


def _marked(text: str) -> str:
    """The text with its fixed phrases replaced by symbols."""
    line = re.sub(r"\bunder (?:a|the) night sky\b|\bin the dark\b", "@G:night", f" {text} ")
    for letter, table in (("R", _RELATIONS), ("S", _STYLES)):
        for name, pattern in table.items():
            line = re.sub(rf"(?<![\w-])(?:{pattern})(?![\w-])", f"@{letter}:{name.replace(' ', '_')}", line)
    for pattern, symbol in _FIXED:
        line = re.sub(rf"(?<![\w@:-])(?:{pattern})(?![\w-])", symbol, line)
    for name, pattern in _GROUNDS.items():
        line = re.sub(rf"(?<![\w@:-])(?:{pattern})(?![\w-])", f"@G:{name}", line)
    return line


def clause_of(text: str, extra: frozenset[str] = frozenset()) -> Clause:
    """The phrases of a normalized question.

    Args:
        text: From `mm.world.asking.normalise`.
        extra: Names that the model was given later ("<mug>").
    """
    out = Clause()
    tokens = re.findall(r"<[^<>\s]+>|@\w:\w+|[a-z0-9#]+(?:-[a-z0-9]+)*|[TP]\b", _marked(text))
    for at, word in enumerate(tokens):
        if symbol := _SYMBOLS.fullmatch(word):
            row = {"R": out.relations, "S": out.styles, "G": out.grounds}[symbol[1]]
            row.append(symbol[2].replace("_", " "))
            out.words.append(symbol[1])
        elif word in NOUNS or word in extra:
            _add_thing(out, word, *NOUNS.get(word, (word, False)))
        elif word in _COLOURS:
            out.colours.append(_COLOURS[word])
            out.words.append("C")
        elif word in _NUMBERS and not (word == "one" and _is_pronoun(tokens, at)):
            out.numbers.append(_NUMBERS[word])
            out.words.append("#")
        elif word in FILLER or word in OPERATORS or word in "TP":
            out.words.append(word)
        elif not word.endswith("ly"):
            before = next((w for w in reversed(tokens[:at]) if w not in ("other", "single", "big", "small")), "")
            out.unknown.append((word, before in _ARTICLES or before in _NUMBERS or before == "howmany"))
    return out


def _is_pronoun(tokens: list[str], at: int) -> bool:
    """Whether "one" stands for a thing ("which one", "one in the picture"), and is no number."""
    following = tokens[at + 1] if at + 1 < len(tokens) else ""
    return (at > 0 and tokens[at - 1] in ("which", "the", "this", "that")) or following not in (
        *NOUNS,
        *_COLOURS,
        "single",
    )


def _add_thing(out: Clause, word: str, name: str, plural: bool) -> None:
    """Appends a thing with the colour, the number and the negation just before it."""
    colour = count = None
    bound, negated = "exactly", False
    if word == "nothing":
        negated = True
    while out.words:
        last = out.words[-1]
        if last == "C" and colour is None:
            colour = out.colours.pop()
        elif last == "#" and count is None:
            count = out.numbers.pop()
        elif last in BOUNDS and count is not None:
            bound = BOUNDS[last]
        elif last == "no":
            negated = True
        elif last == "N" and colour is None and count is None and out.things[-1].name not in CATEGORIES:
            out.things.pop()  # two nouns in a row name one thing
        elif last not in _SKIPPED and not (last == "of" and out.words[-2:-1] == ["#"]):  # "a pair of cats"
            break
        out.words.pop()
    out.things.append(Thing(name=name, colour=colour, count=count, bound=bound, plural=plural, negated=negated))  # type: ignore[arg-type]
    out.words.append("N")
