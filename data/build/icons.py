"""The pure-Python parts of the recipe: names, styles, near-duplicates, splits.

Nothing here draws, trains or reads the network; `tests/test_build.py` covers this file.
"""
import csv
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
# Of a drawing that a set holds at several sizes, the first of these is kept.
SIZES = ("24", "20", "16", "32", "28", "48", "12", "10", "96")
# Sets in which a number in an icon's name is a size ("user-16", "user-24").
SIZED = {"fluent", "fluent-color", "octicon", "qlementine-icons", "garden", "heroicons"}
# A trailing word of an icon's name that tells the style of the drawing, not what is drawn.
STYLE_WORDS = {
    **dict.fromkeys(["outline", "outlined", "line", "linear", "stroke", "o", "r", "broken",
                     "regular"], "outline"),
    **dict.fromkeys(["fill", "filled", "solid", "f", "baseline"], "solid"),
    "bold": "bold",
    **dict.fromkeys(["thin", "light"], "thin"),
    **dict.fromkeys(["duotone", "twotone"], "two-tone"),
    **dict.fromkeys(["sharp", "rounded", "round", "remix", "loop", "transition", "24px"], ""),
}
# Words of variants that the recipe leaves out, except in these two sets.
DROPPED_WORDS = ("sharp", "24px", "loop", "transition")
DROPPED_NOT_IN = ("ion", "famicons")
# Sets that put the style in front of the name; None: the recipe leaves the variant out.
PREFIX_STYLES = {"ic": {"baseline": "solid", "outline": "outline", "round": "solid", "sharp": None,
                        "twotone": None}}
BRANDS = """
    logo logos brand brands social facebook twitter google microsoft amazon instagram youtube
    github gitlab linkedin whatsapp tiktok android slack discord spotify paypal visa mastercard
    figma dribbble pinterest reddit telegram wechat alipay skype snapchat tumblr vimeo twitch steam
    playstation xbox ubuntu docker ibm aws azure chrome firefox safari dropbox weibo qq tesla
    netflix adobe bitcoin ethereum behance codepen npm react vue angular python java javascript
    typescript html5 css3 openai stripe shopify wordpress trello airbnb uber
""".split()
BRAND = re.compile(rf"\b({'|'.join(BRANDS)})\b")
SKIN = re.compile(r"-(light|medium|dark)(-skin-tone)?$|skin-tone")


def read_sets():
    """The rows of sets.tsv: dicts with set, version, role ("pretrain" or "held-out"), kind ("mono"
    or "colour"), style (of a whole set, where it has one) and family (of sets that show the same
    drawings in another style)."""
    with open(HERE / "sets.tsv", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


# ---------------------------------------------------------------- names

def style_suffixes(names):
    """The style words that this set really uses as a suffix. At least 20 of its icons, or 4 % of
    them, end in such a word."""
    last = Counter(name.rsplit("-", 1)[-1] for name in names if "-" in name)
    least = min(20, max(4, 0.04 * len(names)))
    return {word for word in STYLE_WORDS if last[word] >= least}


def clean_name(prefix, icon, suffixes):
    """('ph', 'umbrella-duotone', {...}) -> ('umbrella', 'two-tone', ''): the name, style and size.
    The style is None for variants that the recipe leaves out, "" where the name tells nothing."""
    words = icon.lower().replace("_", "-").split("-")
    style = ""
    size = ""
    if words[0] in PREFIX_STYLES.get(prefix, {}):
        style = PREFIX_STYLES[prefix][words.pop(0)]
    # styles, sizes and numbers are taken off the end, but never the whole name
    while len(words) > 1:
        word = words[-1]
        numbered = re.fullmatch(r"\d{1,2}|alt|one|two", word)
        if not (word in suffixes or word in SIZES or numbered):
            break
        words.pop()
        if word in suffixes:
            if word in DROPPED_WORDS and prefix not in DROPPED_NOT_IN:
                style = None
            elif style == "":
                style = STYLE_WORDS[word]
        elif word in SIZES:
            size = word
    return re.sub(r"\s+", " ", " ".join(words)).strip(), style, size


def select(prefix, icons, brands=(), emoji=False):
    """The icons of one set that the recipe draws -> list of (icon, name, style). One size of each,
    no brands, no skin tones of emoji. icons: icon names in the set's order; brands: those that the
    set itself files under brands or logos."""
    suffixes = style_suffixes(icons)
    best = {}
    for icon in icons:
        name, style, size = clean_name(prefix, icon, suffixes)
        brand = icon in brands or BRAND.search(name)
        skin_tone = emoji and SKIN.search(icon)
        if style is None or brand or skin_tone or not re.search("[a-z]", name):
            continue
        # numbered variants ("user-1", "user-2") are drawings of their own, sizes are not
        key = icon
        if size and prefix in SIZED:
            key = re.sub(rf"-{size}(?=-|$)", "", icon, count=1)
        rank = SIZES.index(size) if size in SIZES else -1
        if key not in best or rank < best[key][0]:
            best[key] = (rank, icon, name, style)
    return [row[1:] for row in best.values()]


# ---------------------------------------------------------------- drawings

def few_colours(picture):
    """A drawing (64, 64[, 3]) uint8 as a palette image, the form in which the tasks keep it. 16
    grays, or 64 colours."""
    image = Image.fromarray(picture)
    return image.quantize(64 if image.mode == "RGB" else 16, dither=Image.Dither.NONE)


def thumbnails(pictures):
    """(N, 64, 64[, 3]) uint8 -> (N, 256) float32: the gray means of 16 x 16 fields. Each row has
    zero mean and unit norm, so the dot product of two rows is their correlation."""
    gray = pictures.mean(-1) if pictures.ndim == 4 else pictures
    fields = gray.reshape(len(gray), 16, 4, 16, 4)
    small = fields.mean((2, 4), dtype=np.float32).reshape(len(gray), 256)
    small -= small.mean(1, keepdims=True)
    norm = np.maximum(np.linalg.norm(small, axis=1, keepdims=True), 1e-6)
    return (small / norm).astype(np.float32)


def distinct_groups(thumbs, groups, threshold=0.95, same_group=0.985):
    """Indices of a subset without near-duplicates; the earlier of each pair is kept. Within a group
    only near-copies (same_group) count."""
    close = thumbs @ thumbs.T
    keep = []
    for i, group in enumerate(groups):
        limits = [same_group if groups[j] == group else threshold for j in keep]
        if all(close[i, j] <= limit for j, limit in zip(keep, limits)):
            keep.append(i)
    return keep


def split_groups(groups, sizes, seed):
    """Deals whole groups into splits -> {"train": indices, ...}. groups: one hashable per drawing;
    sizes: {"train": 16, ...}. All drawings of one group (the weights and styles of one set's icon)
    land in one split; the rest goes to the last split."""
    members = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    order = sorted(members)
    random.Random(seed).shuffle(order)
    splits = {name: [] for name in sizes}
    last = list(sizes)[-1]
    for group in order:
        name = next((n for n in sizes if len(splits[n]) < sizes[n]), last)
        splits[name] += members[group]
    return splits
