"""Training captions: an icon's name said in many ways, with style, colour and idle words.

Nothing here draws, trains or reads the network; `tests/test_build.py` covers this file.

OpenAI's CLIP was trained on captions full of words that have nothing to do with the picture, and
its text encoder looks past them. A CLIP that only ever saw "an icon of a cat" does not: sixteen
meaningless vectors in front of a name ruin its text feature. So half of our captions carry noise.
"""
import json
import re
from collections import defaultdict
from pathlib import Path

# What a style may be called. The keys are the styles that icons.py and train.py tell apart.
SYNONYMS = {
    "outline": ["outline", "outlined", "line", "linear"],
    "solid": ["solid", "filled", "fill", "solid black"],
    "thin": ["thin", "thin line", "light", "fine"],
    "bold": ["bold", "thick", "heavy"],
    "two-tone": ["two-tone", "duotone", "two tone"],
    "colour": ["color", "colorful", "colour", "flat color"],
    "emoji": ["emoji", "emoji style"],
    "pixel": ["pixel", "pixel art", "pixelated"],
    "sketch": ["hand-drawn", "sketched"],
}
COLOURS = {
    "red": (208, 32, 38), "blue": (28, 84, 200), "green": (24, 140, 60), "orange": (232, 120, 16),
    "purple": (116, 44, 160), "pink": (226, 70, 140), "brown": (118, 74, 40),
    "gray": (120, 120, 120), "yellow": (216, 172, 0), "teal": (0, 132, 132),
}
NOUNS = ["icon", "symbol", "drawing", "pictogram", "sign", "glyph", "picture"]
PLAIN = ["{a_noun} of {a_name}", "{a_noun} of {a_name}", "{name} {noun}", "{a_name} {noun}",
         "{noun} of {name}", "{a_noun} of {name}"]
STYLED = ["{style} {name}", "{a_style} {name}", "{name}, {style}", "{name} {style}",
          "{style} {noun} of {a_name}", "{a_style} {noun} of {a_name}", "{a_style} {noun}, {name}",
          "{a_name} {noun} in {style} style", "{a_style} {noun} of {a_name} on white"]
NAMELESS = ["{style} {noun}", "{a_style} {noun}"]
INVERTED = ["{} on black", "{}, white on black", "{} in dark mode", "{}, inverted",
            "{} on a dark background"]
FILLER = ("the of to and in for with on by from at as is it this that these those its our my your "
          "their one some any each all more most very just only also here there now then new old "
          "good big small little simple plain nice clean common shown seen made drawn used called "
          "named about like which what photo image view").split()
MOST_NOISE = 19  # tokens: more than the 16 vectors of a learned context
# Packages that publish other words for an icon's name: the file, and what its entries look like.
TAG_FILES = ("lucide-static/tags.json", "@tabler/icons/icons.json", "emojibase-data/en/data.json",
             "@mdi/svg/meta.json")


def an(word):
    """'umbrella' -> 'an umbrella'."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def caption(rng, name, styles, colour="", inverted=False):
    """One caption of an icon called `name` -> (text, told).

    styles: the icon's style keys. colour: the colour it was given, to be mentioned. inverted: light
    on dark. told: what the text claims, a set like {"name umbrella", "style outline", "inverted"}.
    """
    key = rng.choice(styles) if styles else ""
    style = rng.choice(SYNONYMS[key]) if key else ""
    told = {f"style {key}"} if key else set()
    if colour:  # the colour alone, or with the style
        alone = not style or rng.random() < 0.5
        style = colour if alone else f"{colour} {style}"
        told = {f"colour {colour}"} if alone else told | {f"colour {colour}"}
    noun = rng.choice(NOUNS)
    kind = rng.random()
    if not colour and (kind < 0.35 or not style):
        pattern = rng.choice(["{name}", "{name}", "{a_name}"])
    elif not colour and kind < 0.55:
        pattern = rng.choice(PLAIN)
    else:
        pattern = rng.choice(STYLED if kind < 0.96 else NAMELESS)
    told = told if "style" in pattern else set()
    told = told | ({f"name {name}"} if "name" in pattern else set())
    text = pattern.format(name=name, a_name=an(name), noun=noun, a_noun=an(noun),
                          style=style, a_style=an(style or "?"))
    if inverted:
        text = rng.choice(INVERTED).format(text)
        told = told | {"inverted"}
    return text + rng.choice(["", "."]), told


def noise(rng, filler, n_tokens=49406):
    """Tokens that say nothing -> (before, after): lists to put before and after a caption's own.

    Half of the captions get none. Of the others, three quarters carry all of their noise in front,
    where CoOp's context stands, the rest around the caption. filler: token ids of common words;
    60 % of the noise comes from the whole vocabulary instead, most of which no icon is named after.
    """
    if rng.random() < 0.5:
        return [], []
    tokens = []
    for _ in range(rng.randint(1, MOST_NOISE)):
        tokens.append(rng.randrange(256, n_tokens) if rng.random() < 0.6 else rng.choice(filler))
    cut = len(tokens) if rng.random() < 0.75 else len(tokens) // 2
    return tokens[:cut], tokens[cut:]


def true_of(told, known):
    """Which captions are true of which images -> list of (image, caption) pairs.

    told: of each caption, what it claims. known: of each image, everything that is true of it, in
    the same words. The loss must not push a caption away from an image that it describes.
    """
    holders = defaultdict(set)
    for image, facts in enumerate(known):
        for fact in facts:
            holders[fact].add(image)
    everyone = set(range(len(known)))
    pairs = []
    for caption_, claims in enumerate(told):
        images = everyone.intersection(*(holders[claim] for claim in claims))
        pairs += [(image, caption_) for image in images]
    return pairs


def _plain(text):
    """'Home-Outline' -> 'home outline': lower case, letters and single spaces."""
    return re.sub(r"[^a-z]+", " ", str(text).lower()).strip()


def _entries(data):
    """The entries of a tag file, in any of the four forms -> pairs (name, words)."""
    items = data.items() if isinstance(data, dict) else [(None, entry) for entry in data]
    for key, entry in items:
        if isinstance(entry, list):  # lucide: {name: [words]}
            yield key, entry
        elif "aliases" in entry:  # Material Design Icons
            yield entry["name"], entry["aliases"]
        else:  # Tabler has a name, Emojibase a label
            yield entry.get("name") or entry["label"], entry.get("tags", [])


def read_tags(modules):
    """{name: sorted list of other words for it}, from the packages of TAG_FILES in node_modules."""
    tags = defaultdict(set)
    for file in TAG_FILES:
        data = json.loads((Path(modules) / file).read_text(encoding="utf-8"))
        for name, words in _entries(data):
            name = _plain(name)
            words = {_plain(word) for word in words} - {name, "svg", "icon"}
            tags[name] |= {word for word in words if 2 < len(word) < 24}
    return {name: sorted(words) for name, words in tags.items() if words}
