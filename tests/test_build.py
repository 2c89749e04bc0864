"""The pure-Python parts of data/build: names, captions, near-duplicates, splits."""

import random
import sys

import numpy as np
import pytest

from mini_coop import DATA

sys.path.insert(0, str(DATA / "build"))
icons = pytest.importorskip("icons")


@pytest.mark.parametrize(
    "prefix, icon, suffixes, expected",
    [
        ("ph", "umbrella-duotone", {"duotone"}, ("umbrella", "two-tone", "")),
        ("ph", "umbrella-simple", {"duotone"}, ("umbrella simple", "", "")),
        (
            "mdi",
            "border-line",
            set(),
            ("border line", "", ""),
        ),  # no suffix of this set: part of the name
        ("fluent", "add-circle-24-filled", {"filled"}, ("add circle", "solid", "24")),
        ("icon-park", "filter-one", set(), ("filter", "", "")),
        ("ic", "outline-alarm", set(), ("alarm", "outline", "")),
        ("ic", "twotone-alarm", set(), ("alarm", None, "")),
        ("solar", "card-2-bold-duotone", {"bold", "duotone"}, ("card", "two-tone", "")),
        ("uis", "line", set(), ("line", "", "")),  # never the whole name
    ],
)
def test_clean_name(prefix, icon, suffixes, expected):
    assert icons.clean_name(prefix, icon, suffixes) == expected


def test_style_suffixes_need_to_be_common():
    names = [f"n{i}-outline" for i in range(20)] + [f"n{i}" for i in range(300)] + ["border-line"]
    assert icons.style_suffixes(names) == {"outline"}


def test_select_keeps_one_size_and_leaves_out_brands_and_skin_tones():
    others = [
        f"{word}-24-{style}"
        for word in ("ant", "bee", "cat", "dog")
        for style in ("filled", "regular")
    ]  # makes them style words
    rows = icons.select(
        "fluent",
        [
            "add-16-filled",
            "add-24-filled",
            "add-20-filled",
            "add-24-regular",
            "logo-github",
            "acme",
            "user-1",
            *others,
        ],
        {"acme"},
    )
    assert [row[0] for row in rows] == ["add-24-filled", "add-24-regular", "user-1", *others]
    assert [row[0] for row in icons.select("noto", ["woman", "woman-dark-skin-tone"])] == ["woman"]


def test_captions_are_true_and_varied():
    rng = random.Random(0)
    captions = [icons.caption(rng, "umbrella", ["outline"]) for _ in range(2000)]
    named = [c for c in captions if "umbrella" in c]
    assert len(set(captions)) > 500 and 0.95 < len(named) / 2000 < 1
    assert not any(
        word in c
        for c in captions
        for word in ("solid", "filled", "photo", "thin", "red", " a umbrella")
    )
    assert 0.15 < sum(c.strip(".") == "umbrella" for c in captions) / 2000 < 0.25
    far = [c.split().index(next(w for w in c.split() if w.startswith("umbrella"))) for c in named]
    assert max(far) >= 17  # positions where a context of 16 vectors puts the name
    assert any("red" in icons.caption(rng, "umbrella", ["solid"], "red") for _ in range(5))
    assert icons.an("umbrella") == "an umbrella" and icons.an("key") == "a key"


def drawing(seed):
    return (
        np.random.default_rng(seed)
        .integers(0, 2, (8, 8))
        .repeat(8, 0)
        .repeat(8, 1)
        .astype(np.uint8)
        * 255
    )


def test_near_duplicates():
    a, b = np.stack([drawing(0), drawing(1)]), np.stack([drawing(1), drawing(2)])
    b[0, :3] = 128  # almost the same
    assert icons.near_duplicates(icons.thumbnails(a), icons.thumbnails(b), 0.9).tolist() == [
        False,
        True,
    ]
    colour = np.repeat(a[..., None], 3, -1)
    assert np.allclose(icons.thumbnails(a), icons.thumbnails(colour), atol=1e-5)
    thumbs = icons.thumbnails(np.stack([drawing(0), drawing(0), drawing(1)]))
    assert icons.distinct_groups(thumbs, ["x", "y", "z"]) == [0, 2]


def test_split_groups_keeps_groups_together():
    groups = [("set", i // 3) for i in range(90)]
    splits = icons.split_groups(groups, {"test": 20, "val": 4, "train": 16, "spare": 0}, seed=1)
    assert sorted(i for part in splits.values() for i in part) == list(range(90))
    owner = {}
    for name, members in splits.items():
        for i in members:
            assert owner.setdefault(groups[i], name) == name
    assert len(splits["test"]) >= 20 and len(splits["val"]) >= 4 and len(splits["train"]) >= 16
    assert splits == icons.split_groups(
        groups, {"test": 20, "val": 4, "train": 16, "spare": 0}, seed=1
    )


def test_the_hash_sees_a_drawing_again():
    gray = drawing(3)
    assert (
        icons.picture_hash(gray)
        == icons.picture_hash(gray.copy())
        != icons.picture_hash(drawing(4))
    )
    assert icons.picture_hash(gray) == icons.picture_hash(
        np.asarray(icons.few_colours(gray).convert("L"))
    )
