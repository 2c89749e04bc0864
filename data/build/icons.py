"""The pure-Python parts of the recipe: names, styles, near-duplicates, splits.

Nothing here draws, trains or reads the network; `tests/test_build.py` covers this file.
"""

import csv
import hashlib
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
SIZES = (
    "24",
    "20",
    "16",
    "32",
    "28",
    "48",
    "12",
    "10",
    "96",
)  # of one drawing at several sizes we keep the first
# A trailing word of an icon's name that tells the style of the drawing, not what is drawn.
STYLE_WORDS = {
    "outline": "outline",
    "outlined": "outline",
    "line": "outline",
    "linear": "outline",
    "stroke": "outline",
    "o": "outline",
    "r": "outline",
    "broken": "outline",
    "regular": "outline",
    "fill": "solid",
    "filled": "solid",
    "solid": "solid",
    "f": "solid",
    "baseline": "solid",
    "bold": "bold",
    "thin": "thin",
    "light": "thin",
    "duotone": "two-tone",
    "twotone": "two-tone",
    "sharp": "",
    "rounded": "",
    "round": "",
    "remix": "",
    "loop": "",
    "transition": "",
    "24px": "",
}
SET_STYLES = {  # what the whole set is
    **dict.fromkeys(
        [
            "emojione",
            "fluent-emoji",
            "fluent-emoji-flat",
            "fxemoji",
            "noto",
            "noto-v1",
            "streamline-emojis",
            "twemoji",
            "emojione-monotone",
            "fluent-emoji-high-contrast",
        ],
        "emoji",
    ),
    **dict.fromkeys(["pixel", "pixelarticons", "streamline-pixel"], "pixel"),
    **dict.fromkeys(["streamline-freehand-color"], "sketch"),
    **dict.fromkeys(["icon-park-solid", "bxs", "fa6-solid", "fa7-solid", "uis"], "solid"),
    **dict.fromkeys(
        ["icon-park-outline", "bx", "fa6-regular", "fa7-regular", "feather", "lucide", "tabler"],
        "outline",
    ),
    **dict.fromkeys(["uit", "simple-line-icons", "mdi-light"], "thin"),
    **dict.fromkeys(["icon-park-twotone", "uim", "duo-icons"], "two-tone"),
}
PREFIX_STYLES = {
    "ic": {
        "baseline": "solid",
        "outline": "outline",
        "round": "solid",
        "sharp": None,
        "twotone": None,
    }
}  # None: dropped
BRAND = re.compile(
    r"\b(logo|logos|brand|brands|social|facebook|twitter|google|microsoft|amazon|instagram|youtube|github|gitlab|"
    r"linkedin|whatsapp|tiktok|android|slack|discord|spotify|paypal|visa|mastercard|figma|dribbble|pinterest|reddit|"
    r"telegram|wechat|alipay|skype|snapchat|tumblr|vimeo|twitch|steam|playstation|xbox|ubuntu|docker|ibm|aws|azure|chrome|"
    r"firefox|safari|dropbox|weibo|qq|tesla|netflix|adobe|bitcoin|ethereum|behance|codepen|npm|react|vue|angular|"
    r"python|java|javascript|typescript|html5|css3|openai|stripe|shopify|wordpress|trello|airbnb|uber)\b"
)
SKIN = re.compile(r"-(light|medium|dark)(-skin-tone)?$|skin-tone")


def read_sets(path=HERE / "sets.tsv"):
    """The rows of sets.tsv: dicts with set, version, role ("pretrain" or "held-out") and kind ("mono" or "colour")."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def style_suffixes(names):
    """The style words that this set really uses as a suffix: at least 20 of its icons, or 4 % of them, end in it."""
    last = Counter(name.rsplit("-", 1)[-1] for name in names if "-" in name)
    return {word for word in STYLE_WORDS if last[word] >= min(20, max(4, 0.04 * len(names)))}


def clean_name(prefix, icon, suffixes):
    """('ph', 'umbrella-duotone', {...}) -> ('umbrella', 'two-tone', ''): what is drawn, its style, its size.

    The style is None for variants that the recipe leaves out, "" where the name tells nothing.
    """
    words, style, size = icon.lower().replace("_", "-").split("-"), "", ""
    if words[0] in PREFIX_STYLES.get(prefix, {}):
        style = PREFIX_STYLES[prefix][words.pop(0)]
    while len(words) > 1 and (
        words[-1] in suffixes
        or words[-1] in SIZES
        or re.fullmatch(r"\d{1,2}|alt|one|two", words[-1])
    ):
        word = words.pop()
        if word in suffixes:
            if word in ("sharp", "24px", "loop", "transition") and prefix not in (
                "ion",
                "famicons",
            ):
                style = None
            elif style == "":
                style = STYLE_WORDS[word]
        elif word in SIZES:
            size = word
    return re.sub(r"\s+", " ", " ".join(words)).strip(), style, size


def select(prefix, icons, brands=()):
    """The icons of one set that the recipe draws -> list of (icon, name, style), one size each, no brands, no skin tones.

    icons: icon names in the set's order; brands: those that the set itself files under brands or logos.
    """
    suffixes, best = style_suffixes(icons), {}
    for icon in icons:
        name, style, size = clean_name(prefix, icon, suffixes)
        emoji = SET_STYLES.get(prefix) == "emoji"
        if (
            style is None
            or icon in brands
            or BRAND.search(name)
            or (emoji and SKIN.search(icon))
            or not re.search("[a-z]", name)
        ):
            continue
        rank = SIZES.index(size) if size in SIZES else -1
        # numbered variants ("user-1", "user-2") are drawings of their own, sizes ("user-16", "user-24") are not
        key = re.sub(rf"-{size}(?=-|$)", "", icon, count=1) if size and prefix in SIZED else icon
        if key not in best or rank < best[key][0]:
            best[key] = (rank, icon, name, style)
    return [row[1:] for row in best.values()]


SIZED = {"fluent", "fluent-color", "octicon", "qlementine-icons", "garden", "heroicons"}


def few_colours(picture):
    """A drawing (64, 64[, 3]) uint8 as a palette image: 16 grays or 64 colours, the form in which the tasks keep it."""
    image = Image.fromarray(picture)
    return image.quantize(64 if image.mode == "RGB" else 16, dither=Image.Dither.NONE)


def picture_hash(picture):
    """First 5 bytes of the SHA-256 of a drawing's RGB pixels in few colours: enough to tell 100,000 drawings apart."""
    return hashlib.sha256(few_colours(picture).convert("RGB").tobytes()).digest()[:5]


def thumbnails(pictures):
    """(N, 64, 64[, 3]) uint8 -> (N, 256) float32: 16x16 gray means, zero mean and unit norm, so that a dot is a correlation."""
    gray = pictures.mean(-1) if pictures.ndim == 4 else pictures
    small = (
        gray.reshape(len(gray), 16, 4, 16, 4).mean((2, 4), dtype=np.float32).reshape(len(gray), 256)
    )
    small -= small.mean(1, keepdims=True)
    return (small / np.maximum(np.linalg.norm(small, axis=1, keepdims=True), 1e-6)).astype(
        np.float32
    )


def near_duplicates(a, b, threshold=0.95):
    """Which rows of `a` have a correlation above the threshold with any row of `b`; thumbnails both -> bool (len(a),)."""
    return np.concatenate(
        [(part @ b.T).max(1) > threshold for part in np.array_split(a, max(1, len(a) // 2048))]
    )


def distinct_groups(thumbs, groups, threshold=0.95, same_group=0.985):
    """Indices of a subset without near-duplicates, the earlier of each pair kept; within a group only near-copies count."""
    close, keep = thumbs @ thumbs.T, []
    for i, group in enumerate(groups):
        if all(close[i, j] <= (same_group if groups[j] == group else threshold) for j in keep):
            keep.append(i)
    return keep


def split_groups(groups, sizes, seed):
    """Deals whole groups into splits: groups = one hashable a drawing, sizes = {"train": 16, ...} -> {"train": indices, ...}.

    All drawings of one group (the weights and styles of one set's icon) land in one split; what is left over goes to the last split.
    """
    members = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    order = sorted(members)
    random.Random(seed).shuffle(order)
    splits = {name: [] for name in sizes}
    for group in order:
        name = next((n for n in sizes if len(splits[n]) < sizes[n]), list(sizes)[-1])
        splits[name] += members[group]
    return splits
