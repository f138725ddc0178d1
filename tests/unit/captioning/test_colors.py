"""The colour filter: sentences stay sentences, other words stay whole, and every real caption comes out clean."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.paths import REGDB_CAPTIONS
from tvilfm.captioning.colors import find_colors, remove_colors
from tvilfm.datasets.synthetic.people import RGB
from tvilfm.datasets.synthetic.sentences import SYNONYMS

# What a removal could leave behind. A caption may have such a fault of its own, so the test counts.
BROKEN = [
    re.compile(pattern)
    for pattern in (
        r"^\s|\s$|  ",
        r" [,.;:]|,\s*[,.;]|\.\.",
        r"\band and\b|\bwith and\b|\band with a and\b",
        r"\b(?:an?|the|his|her|in|of|with|is|are|(?<!time )that|and|wearing|carrying|has|to)\s*(?:[,.;]|$)",
        r"\b(?:a|an|the|his|her|in|of|is|are) (?:and|with|in|paired|on|of|wearing|has)\b",
        r"\b(?:a [aeio]\w|an [^aeiouh\W]\w)",
        r"\b(?:long|short|straight|open|\w+-sleeved|\w+-length), (?:hair|top|jacket|dress|coat|jeans|pants|shoes)\b",
        r"-$|- -|--|-[,.]|[\0\1\2]",
        r"\(\s*\)|\"\"",
        r"^[^\w\"'(]",
    )
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # one phrase, however it is written
        ("a man with a sky-blue coat", "a man with a coat"),
        ("a half-black and half-white shirt", "a shirt"),
        ("dark blue jeans, white shoes", "jeans, shoes"),
        ("a black and white top", "a top"),
        ("black, straight, and open hair", "straight and open hair"),
        ("a multi - color t - shirt with blue - white colour jeggings", "a t - shirt with jeggings"),
        ("a red-colored hat, the color red, and socks", "a hat, and socks"),
        ("a shirt with red, white, and blue stripes", "a shirt with stripes"),
        ("a white-haired man with black-framed glasses", "a man with glasses"),
        ("a greyish-blue coat and off-white, baby pink shoes", "a coat and shoes"),
        ("a shirt in a soft shade of pink, a coat in shades of red and green", "a shirt, a coat"),
        ("a deep - neck dark purple top", "a deep - neck top"),
        # the article follows the next word
        ("an orange coat and a orange umbrella", "a coat and an umbrella"),
        ("A red umbrella, an 8-inch white hat, a blue uniform.", "An umbrella, an 8-inch hat, a uniform."),
        # colours that are no adjectives
        ("a man dressed in black", "a man"),
        ("a man dressed in black, carrying a bag", "a man, carrying a bag"),
        ("She is wearing all black with a red hat.", "She is wearing clothes with a hat."),
        ("her hair is black and her shoes are white.", "her hair is visible and her shoes are visible."),
        ("a coat that is red and has a hood", "a coat that has a hood"),
        ("a coat that is red and long", "a coat that is long"),
        ("a coat which is blue, paired with jeans", "a coat, paired with jeans"),
        ("jeans in a dark blue hue, shoes in white and a hat", "jeans, shoes and a hat"),
        ("A blonde wearing a hat.", "A person wearing a hat."),
        # one of several adjectives
        ("long, black hair", "long hair"),
        ("short and dark brown hair", "short hair"),
        ("short, black, open hair", "short, open hair"),
        ("a long-sleeved, light pink top and a red, hooded coat", "a long-sleeved top and a hooded coat"),
        ("jeans and black shoes, and white, casual socks", "jeans and shoes, and casual socks"),
        # brightness is visible in infrared
        ("a light shirt, dark pants, bright shoes", "a light shirt, dark pants, bright shoes"),
        ("light blue shirt, dark-colored pants", "shirt, dark pants"),
        # things
        ("a wine jacket, olive green pants, a cream and white scarf", "a jacket, pants, a scarf"),
        ("a glass of wine, an ice cream, an olive tree", "a glass of wine, an ice cream, an olive tree"),
        # sentences
        ("He wears a coat. Black shoes complete it.", "He wears a coat. Shoes complete it."),
        ("Red.", ""),
        ("", ""),
    ],
)
def test_colour_phrases_leave_and_the_sentence_stays(text: str, expected: str) -> None:
    assert remove_colors(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "a redressed man in a tank top, tanned, bored, scared of Brownlee's greenhouse",
        "infra-red  image ,of a man",
        "blackberries and Redmond's whiteboards, silverware, goldfish, pinky, navybase",
        "a man with short hair has worn and casual shoes",
    ],
)
def test_other_words_and_old_faults_are_left_alone(text: str) -> None:
    assert find_colors(text) == []
    assert remove_colors(text) == text


def test_colours_are_found_in_order_and_in_one_spelling() -> None:
    text = "Light GREY and half-white coat, multi-coloured scarf, a reddish bag, a rose dress but a rose in her hand"
    assert find_colors(text) == ["gray", "white", "multi-colored", "reddish", "rose"]


def test_the_benchmark_s_own_colours_are_known() -> None:
    for color in [*RGB, *SYNONYMS["gray"], *SYNONYMS["purple"]]:
        assert find_colors(f"a {color} coat") == [color.replace("grey", "gray")]


@pytest.mark.skipif(not REGDB_CAPTIONS.is_dir(), reason="the published RegDB captions are not on this machine")
@pytest.mark.parametrize("sensor", ["RGB", "IR"])
def test_every_real_caption_comes_out_without_colour_and_unbroken(sensor: str) -> None:
    entries = json.loads((REGDB_CAPTIONS / f"caption_llm_dict_Blip_{sensor}.json").read_text()).values()
    texts = {entry[key] for entry in entries for key in ("description", "aug_description")}
    colored = 0
    for text in texts:
        left = remove_colors(text)
        if not find_colors(text):
            assert left == text
            continue
        colored += 1
        assert find_colors(left) == [], (text, left)
        assert 0.4 < len(left) / len(text) < 1 and len(left.split()) >= 5, (text, left)
        for broken in BROKEN:
            assert len(broken.findall(left.strip())) <= len(broken.findall(text.strip())), (broken.pattern, text, left)
    assert colored == len(texts) if sensor == "RGB" else 5 < colored < 20


WORDS = """a an the man in with wearing and , . - is are that has coat jeans hair long striped long-sleeved dressed of
    black dark light blue grey red orange half sky multi colored color cream wine pastel umbrella She Black . also both
    paired t-shirt hue the in shade"""


@given(st.one_of(st.lists(st.sampled_from(WORDS.split()), max_size=14).map(" ".join), st.text(max_size=40)))
@example("in black red")
@example("light-colored color")
@example("\0red\1")
def test_any_text_loses_all_colours_once_and_for_all(text: str) -> None:
    left = remove_colors(text)
    assert find_colors(left) == []
    assert remove_colors(left) == left
    if not find_colors(text):
        assert left == text
