"""Find colour words in a sentence, and remove them so that the rest is still a sentence.

Infrared cameras see no colour, so an infrared caption must not name any (METHOD 5). A colour phrase is a sequence of
colour words with their modifiers: degrees ("dark blue"), compounds ("sky-blue", "multi - color"), lists ("red, white
and blue"), and the word colour itself ("red colour", "a soft shade of pink"). Each phrase is replaced by a mark. A list
of rewriting rules then edits only the neighbours of a mark: commas, "and", articles, "that is", "in a". Words further
away do not change, and a text without a colour word is returned unchanged, including its errors.

"light", "dark" and "bright" alone are not colours, because infrared cameras see brightness.
"""

from __future__ import annotations

import re

_COLORS = (
    "amber|aqua|aquamarine|auburn|azure|beige|black|blonde?|blue|bluish|bronze|brown|brunette|burgundy|charcoal|cobalt|"
    "copper|crimson|cyan|ebony|fuchsia|gold|golden|gr[ae]y|green|indigo|ivory|khaki|lavender|lilac|magenta|maroon|mauve|"
    "mustard|navy|ochre|orange|pastel|pink|purple|purplish|red|reddish|rosy|scarlet|silver|tan|taupe|teal|turquoise|"
    "vermilion|violet|white|whitish|yellow"
)
# Words for both a thing and a colour: a colour in the place of an adjective ("a wine jacket"), but not as a noun
# ("a glass of wine").
_THINGS = (
    "chestnut|chocolate|coral|cream|emerald|ginger|honey|lemon|lime|mint|olive|peach|plum|rose|ruby|rust|salmon|wine"
)
_THINGS_BEFORE = "and|bar|bottle|bush|cake|cone|cup|flower|glass|jar|juice|leaf|leaves|mug|oil|or|plant|tree"
# Words about colour that do not name a colour.
_UNNAMED = r"colou?r-block(?:ed)?|multi\s?-?\s?colou?r(?:ed|s)?|(?:\w+-)?colou?r(?:s|ed|ful|less|ation)?"
# Words that belong to a colour word before it (degrees, heads) or after it (tails).
_DEGREES = (
    "all|army|baby|blood|bottle|bright|dark|darkish|deep|dusty|electric|entirely|fiery|forest|fully|half|hot|jet|light|lightish|medium|"
    "midnight|mild|milky|mostly|muted|neon|neutral|off|pale|predominantly|pure|rich|royal|seaweed|sky|soft|steel|sunny|"
    "vibrant|vivid|warm|yale"
)
_TAILS = "hues?|hued|shade|tones?|toned|tints?|tinted|tinge"
_COMPOUND_TAILS = "framed|haired|rimmed|shaded|soled"
_HEADS = "accents?|blend|colou?rs?|combination|hints?|hues?|mix|mixture|pop|shades?|splash|tints?|tones?|touch"

_FUNCTION_WORDS = (
    "above|across|adding|also|along|around|as|at|because|beneath|but|by|carries|carrying|coordinated|down|during|for|from|"
    "had|has|have|having|he|holding|holds|in|inside|is|are|it|like|matched|matching|near|next|of|off|on|onto|over|paired|"
    "she|so|sporting|standing|styled|that|there|they|through|throughout|to|under|underneath|up|was|wearing|wears|were|"
    "when|where|which|while|who|with|without|worn"
)
_DETERMINERS = "an?|the|his|her|their|its|this|these|some"
_QUANTIFIERS = r"a\s+variety\s+of|many|multiple|various|several|different|two|three|matching|same|similar|neutral"
# Adjectives such as "long-sleeved" and "knee - length", but not the noun "t-shirt".
_ADJECTIVE = (
    r"(?:[\w-]+\s?-\s?(?:bald|collar|collared|cut|fit|fitting|length|neck|necked|sleeved?|waisted)|"
    "bald|beautiful|big|bold|brief|casual|checked|checkered|clean|collared|crisp|cropped|curly|dark|elegant|fitted|"
    "flowing|formal|hooded|large|lengthy|light|long|loose|luscious|matte|medium|modern|necked|open|oversized|plain|printed|"
    "quick|short|silky|sleek|sleeved|sleeveless|slim|small|soft|straight|striped|stylish|tall|thick|thin|tied|tight|trendy|"
    r"uncovered|unkempt|untamed|vibrant|warm|wavy)\b"
)

_JOINT = r"(?:\s?[-/]\s?|\s+)"
_THING = (
    rf"(?:(?<=\bin )(?:{_THINGS})\b|(?<!\bice )(?<!\bice-)\b(?:{_THINGS})\b(?="
    rf"{_JOINT}(?!(?:{_FUNCTION_WORDS}|{_THINGS_BEFORE})\b)\w|(?:,|,?\s+and|\s+or)\s+(?:{_COLORS})\b))"
)
_COLOR = rf"(?:(?<!\binfra-)\b(?:(?:{_COLORS})(?:ish|s)?|{_UNNAMED})\b|{_THING})"
_DEGREE = rf"\b(?:(?:{_DEGREES})\s+and\s+)?(?:(?:{_DEGREES})(?:,\s+|{_JOINT}))+"
_HEAD = rf"(?:(?:\b(?:{_DEGREES}),?\s+)?\b(?:{_HEADS})\s+of\s+(?:the\s+)?|\bthe\s+colou?r\s+)"
_ATOM = (
    rf"(?:{_HEAD})?(?:{_DEGREE})?{_COLOR}"
    rf"(?:{_JOINT}(?:{_TAILS})\b|\s?-\s?(?:{_COMPOUND_TAILS})\b)?(?:\s+in\s+colou?r\b)?"
)
_LIST = rf"(?:\s*,\s*(?:and\s+|or\s+)?|\s+(?:and|or|as well as|in addition to)\s+|{_JOINT})"
_PHRASE = re.compile(rf"{_ATOM}(?:{_LIST}{_ATOM})*", re.IGNORECASE)
_WORD = re.compile(rf"\b(?:(?:{_COLORS})(?:ish|s)?|{_UNNAMED}|{_THINGS})\b", re.IGNORECASE)
_UNNAMED_WORD = re.compile(_UNNAMED, re.IGNORECASE)
_BRIGHTNESS = re.compile(r"(?:light|dark|bright)\b", re.IGNORECASE)
_NOUN_PHRASE = re.compile(rf"{_HEAD}|.*\b(?:hues?|shade|tones?|tints?|tinge|colou?r(?:s|ation)?)$", re.IGNORECASE)

# A phrase is replaced by one of three marks: it begins with a capital letter, it is a noun ("red hue"), or neither.
_CAPITAL, _NOUN, _OTHER = "\0", "\1", "\2"
_MARK = f"[{_CAPITAL}{_NOUN}{_OTHER}]"
# Text after a phrase that is used as a noun, as in "dressed in black, ..." or "shoes that are white".
_END = (
    rf"(?=\s*(?:[.;:!?)]|$)|\s*,?\s+(?:and\s+)?(?:{_FUNCTION_WORDS})\b"
    rf"|(?:\s*,|\s*,?\s+and)\s+(?:{_DETERMINERS})\b)"
)
_BE = r"(?:is|are|was|were|be)"
_RULES = tuple(
    (re.compile(pattern, re.IGNORECASE), replacement)
    for pattern, replacement in (
        (rf"\(\s*({_MARK})\s*\)|[\"'“]({_MARK})[\"'”]", r"\1\2"),
        (rf"(?<=\w)-(?={_MARK})", " "),
        # A person: "a blonde wearing a hat".
        (rf"(^|[.!?]\s+)(a)n?\s+{_MARK}\s+(?=(?:wearing|with|in|is|has|who|carrying|holding)\b)", r"\1\2 person "),
        # Predicates: "that is red and long" -> "that is long", "her shoes are red" -> "her shoes are visible".
        (rf"\b({_BE}(?:\s+also)?)\s+(?:both\s+)?{_MARK}(?:\s*,|,?\s+and)\s+(?={_ADJECTIVE})", r"\1 "),
        (rf"\b{_BE}\s+{_MARK}\s+and\s+(?=(?:has|have|extends?|features?|reaches|falls|covers|comes|{_BE})\b)", ""),
        (rf",?\s+(?:that|which)\s+(?:{_BE}|appears?\s+to\s+be)(?:\s+(?:also|both|all|an?|the))*\s+{_MARK}{_END}", ""),
        (rf"\b({_BE}(?:\s+also)?)\s+(?:(?:all|both|an?|the)\s+)*{_MARK}{_END}", r"\1 visible"),
        (rf"\bboth\s+([\w-]+)\s+and\s+{_MARK}{_END}", r"\1"),
        # Clothes ("wearing red"), and phrases after a preposition ("in red").
        (rf"(?<!\bis)(?<!\bare)\s+(?:dressed|clad|attired|outfitted)\s+in\s+{_MARK}{_END}", ""),
        (rf"\b(wearing|wears|wore|sporting|dons|donning)\s+{_MARK}{_END}", r"\1 clothes"),
        (
            rf"\s+(?:also\s+)?(?:in|of|to|with)\s+(?:(?:{_DETERMINERS}|{_QUANTIFIERS})\s+)*"
            rf"(?:{_MARK}{_END}|{_NOUN}(?=\s*,))",
            "",
        ),
        (rf"\s+in\s+{_MARK}(?=\s+and\b|\s*,\s+(?!{_ADJECTIVE}))", ""),
        (rf"\b({_QUANTIFIERS})\s+{_MARK}{_END}", r"\1 details"),
        # One of several adjectives.
        (rf"\b({_ADJECTIVE}),?\s+and\s+{_MARK}", r"\1"),
        (rf"\b({_ADJECTIVE})\s*,\s*{_MARK}(?:\s*,)?(\s+and)(?=\s)", r"\1\2"),
        (rf"\b({_ADJECTIVE})\s*,\s*{_MARK}(\s*,)?(?=\s)", r"\1\2"),
        (rf"{_MARK}\s*,\s+([\w-]+)\s*,\s+and\s+(?=[\w-]+\s)", rf"{_OTHER} \1 and "),
        (rf"\band\s+{_MARK}\s*,\s+(?!(?:and|{_FUNCTION_WORDS}|{_DETERMINERS})\b)", "and "),
        (
            rf"\b({_DETERMINERS}|with|in|of|on|wearing|has|have|sporting|carrying|holding)\s+{_MARK}(?:\s*,|,?\s+and)"
            r"(?=\s+\w)",
            rf"\1 {_OTHER}",
        ),
        # Remains of lists and articles.
        (rf"\s*,\s*{_MARK}\s*,", ","),
        (rf",?\s+(?:and|as\s+well\s+as)\s+(?:an?\s+)?{_MARK}(?=\s*(?:[,.;:!?)]|$))", ""),
        (rf"\b(?:an?|the)\s+{_MARK}{_END}", _OTHER),
    )
)
_ARTICLE = re.compile(rf"\b(a)n?\s+{_MARK}\s*(?=([\w-]+))", re.IGNORECASE)
_SOUNDS_AS_VOWEL = re.compile(r"[aei]|o(?!ne\b|nce\b)|u(?!ni|se|su|\W|$)|hour|honest", re.IGNORECASE)


def find_colors(text: str) -> list[str]:
    """Return the colour words of a text, in order, in lower case and American spelling.

    Parts of other words ("redressed", "greenhouse") do not count. A word for both a thing and a colour counts as a
    colour ("a wine jacket") but not as a thing ("a glass of wine"). The words colour, coloured, multicolored and
    colourful also count.

    Args:
        text: one or more sentences.
    """
    words = [word.group() for phrase in _PHRASE.finditer(text) for word in _WORD.finditer(phrase.group())]
    return [word.lower().replace("grey", "gray").replace("colour", "color") for word in words]


def remove_colors(text: str) -> str:
    """Return a text without its colour words, as complete sentences.

    The function is idempotent. A text without a colour word is returned unchanged, byte for byte. A text that consists
    only of colour words becomes empty.

    Args:
        text: one or more sentences.

    Source: METHOD 5. Differs: the published filter left conjunctions behind ("has worn and casual shoes") and did not
        know crimson; ours keeps light, dark and bright where no colour follows them.
    """
    # Repeat: after a removal, a remaining noun can be in the place of an adjective and then counts as a colour.
    while _PHRASE.search(text):
        text = _repair(_PHRASE.sub(_mark, re.sub(_MARK, " ", text)))
    return text


def indefinite_article(word: str, *, capital: bool = False) -> str:
    """Return the indefinite article (a or an) of a word, chosen by the sound of its first letters."""
    return ("A" if capital else "a") + ("n" if _SOUNDS_AS_VOWEL.match(word) else "")


def _mark(phrase: re.Match[str]) -> str:
    text = phrase.group()
    brightness = _BRIGHTNESS.match(text)
    if brightness and all(_UNNAMED_WORD.fullmatch(word.group()) for word in _WORD.finditer(text)):
        return brightness.group()
    if text[0].isupper():
        return _CAPITAL
    return _NOUN if _NOUN_PHRASE.match(text) else _OTHER


def _repair(text: str) -> str:
    """Rewrite the neighbours of all marks, then remove the marks."""
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    text = _ARTICLE.sub(_article, text)
    text = re.sub(rf"{_CAPITAL}[\s,-]*(\w)", lambda match: match[1].upper(), text)
    text = re.sub(rf"\s*{_MARK}(?=\s|[.,;:!?)]|$)", "", text)
    text = re.sub(rf"{_MARK}[\s-]*", "", text)
    return text.strip() if re.search(r"\w", text) else ""


def _article(match: re.Match[str]) -> str:
    return f"{indefinite_article(match[2], capital=match[1] == 'A')} "
