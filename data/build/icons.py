"""The parts of the recipe that need no drawing: names, styles, near-duplicates, splits.
`tests/test_build.py` covers them."""
import csv
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
# A trailing word of an icon's name that tells the style of the drawing, not what is drawn.
STYLE_WORDS = {"outline": "outline", "line": "outline", "linear": "outline", "broken": "outline",
               "fill": "solid", "filled": "solid", "solid": "solid", "bold": "bold",
               "thin": "thin", "light": "thin", "duotone": "two-tone", "sharp": ""}  # "": none
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


def clean_name(icon, suffixes):
    """('umbrella-duotone', {...}) -> ('umbrella', 'two-tone'): the name and the style, which is ""
    where the name tells none."""
    words = icon.lower().replace("_", "-").split("-")
    style = ""
    # styles and numbers are taken off the end, but never the whole name
    while len(words) > 1:
        word = words[-1]
        if word in suffixes:
            style = style or STYLE_WORDS[word]
        elif not re.fullmatch(r"\d{1,2}|alt|one|two", word):
            break
        words.pop()
    return " ".join(words), style


def select(icons, brands=(), emoji=False):
    """The icons of one set that the recipe draws -> list of (icon, name, style): no brands, no skin
    tones of emoji. brands: those that the set itself files under brands or logos."""
    suffixes = style_suffixes(icons)
    rows = []
    for icon in icons:
        name, style = clean_name(icon, suffixes)
        brand = icon in brands or BRAND.search(name)
        skin_tone = emoji and SKIN.search(icon)
        if not brand and not skin_tone and re.search("[a-z]", name):
            rows.append((icon, name, style))
    return rows


# ---------------------------------------------------------------- drawings

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
