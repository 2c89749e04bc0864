"""data/build: names, captions, near-duplicates, splits, the training's parts, the card."""

import random
import re
import sys

import clip
import numpy as np
import pytest
import torch
from PIL import Image

from mini_coop import DATA, load_clip, load_dataset, open_image

sys.path.insert(0, str(DATA / "build"))
import captions  # noqa: E402
import card  # noqa: E402
import icons  # noqa: E402
import tasks  # noqa: E402
import train  # noqa: E402

# ---------------------------------------------------------------- names

@pytest.mark.parametrize("prefix, icon, suffixes, expected", [
    ("ph", "umbrella-duotone", {"duotone"}, ("umbrella", "two-tone", "")),
    ("ph", "umbrella-simple", {"duotone"}, ("umbrella simple", "", "")),
    ("mdi", "border-line", set(), ("border line", "", "")),  # no suffix of this set
    ("fluent", "add-circle-24-filled", {"filled"}, ("add circle", "solid", "24")),
    ("icon-park", "filter-one", set(), ("filter", "", "")),
    ("ic", "outline-alarm", set(), ("alarm", "outline", "")),
    ("ic", "twotone-alarm", set(), ("alarm", None, "")),
    ("solar", "card-2-bold-duotone", {"bold", "duotone"}, ("card", "two-tone", "")),
    ("uis", "line", set(), ("line", "", "")),  # never the whole name
])
def test_clean_name(prefix, icon, suffixes, expected):
    assert icons.clean_name(prefix, icon, suffixes) == expected


# ---------------------------------------------------------------- captions

def many(n=2000, **options):
    """n captions of an umbrella -> list of (text, told)."""
    rng = random.Random(0)
    options = {"name": "umbrella", "styles": ["outline"], **options}
    return [captions.caption(rng, **options) for _ in range(n)]


def says(text, words):
    """Whether the text holds one of the words or phrases."""
    return any(re.search(rf"\b{re.escape(word)}\b", text) for word in words)


def test_captions_are_varied_and_told_is_what_they_claim():
    outline = captions.SYNONYMS["outline"]
    assert len({text for text, _ in many()}) > 200
    for text, told in many():
        assert told <= {"name umbrella", "style outline"} and told
        assert ("name umbrella" in told) == says(text, ["umbrella"])
        assert ("style outline" in told) == says(text, outline), text
    # of several styles, the one that is mentioned
    seen = set()
    for text, told in many(styles=["pixel", "two-tone"]):
        for style in ("pixel", "two-tone"):
            assert (f"style {style}" in told) == says(text, captions.SYNONYMS[style]), text
        seen |= told
    assert seen == {"name umbrella", "style pixel", "style two-tone"}
    # an icon without a style has its name only
    assert all(told == {"name umbrella"} for _, told in many(styles=[]))
    for text, told in many(colour="red", inverted=True):
        assert {"colour red", "inverted"} <= told and says(text, ["red"])


def test_noise():
    rng = random.Random(0)
    filler = [5, 6, 7]
    drawn = [captions.noise(rng, filler, n_tokens=1000) for _ in range(4000)]
    noisy = [(before, after) for before, after in drawn if before or after]
    assert 0.46 < len(noisy) / 4000 < 0.54
    lengths = {len(before) + len(after) for before, after in noisy}
    assert lengths == set(range(1, 20))  # more than the 16 vectors of a context
    assert 0.71 < sum(not after for _, after in noisy) / len(noisy) < 0.79
    tokens = []
    for before, after in noisy:
        assert not after or 0 <= len(after) - len(before) <= 1  # else around the caption
        tokens += before + after
    assert all(token in filler or 256 <= token < 1000 for token in tokens)
    assert 0.37 < sum(token in filler for token in tokens) / len(tokens) < 0.43


def test_true_of_by_hand():
    known = [
        {"name cat", "style outline"},  # image 0
        {"name cat", "name kitten", "style solid", "colour red"},
        {"name dog", "style solid", "inverted"},
    ]
    told = [
        {"name cat"},  # caption 0
        {"name cat", "style outline"},
        {"style solid"},
        {"name kitten", "colour red"},
        {"name dog", "style outline"},  # true of no image
        set(),  # claims nothing: true of all
    ]
    pairs = captions.true_of(told, known)
    expected = [(0, 0), (1, 0), (0, 1), (1, 2), (2, 2), (1, 3), (0, 5), (1, 5), (2, 5)]
    assert sorted(pairs) == sorted(expected)


# ---------------------------------------------------------------- drawings

def drawing(seed):
    """Random black and white fields of 8 x 8 pixels."""
    fields = np.random.default_rng(seed).integers(0, 2, (8, 8))
    return fields.repeat(8, 0).repeat(8, 1).astype(np.uint8) * 255


def test_near_duplicates():
    a = np.stack([drawing(0), drawing(1)])
    b = np.stack([drawing(1), drawing(2)])
    b[0, :3] = 128  # almost the same
    close = icons.near_duplicates(icons.thumbnails(a), icons.thumbnails(b), 0.9)
    assert close.tolist() == [False, True]
    colour = np.repeat(a[..., None], 3, -1)
    assert np.allclose(icons.thumbnails(a), icons.thumbnails(colour), atol=1e-5)
    thumbs = icons.thumbnails(np.stack([drawing(0), drawing(0), drawing(1)]))
    assert icons.distinct_groups(thumbs, ["x", "y", "z"]) == [0, 2]


def test_split_groups_keeps_groups_together():
    groups = [("set", i // 3) for i in range(90)]
    sizes = {"test": 20, "val": 4, "train": 16, "spare": 0}
    splits = icons.split_groups(groups, sizes, seed=1)
    assert sorted(sum(splits.values(), [])) == list(range(90))
    owner = {}
    for name, members in splits.items():
        for i in members:
            assert owner.setdefault(groups[i], name) == name
    assert len(splits["test"]) >= 20 and len(splits["val"]) >= 4 and len(splits["train"]) >= 16
    assert splits == icons.split_groups(groups, sizes, seed=1)


# ---------------------------------------------------------------- training

CAPTIONS = ["an icon of a cat.", "a two-tone arrow right, inverted", "x" + " house" * 90]


def test_the_tokens_of_training_are_clips():
    tokenizer = train.Tokenizer()
    expected = clip.tokenize(CAPTIONS, truncate=True).long()
    tokens = tokenizer(CAPTIONS)
    assert torch.equal(tokens, expected[:, :tokens.shape[1]]) and tokens.shape[1] == 77
    # with noise: half of them are longer, by 19 tokens at most, and the caption is still in there
    own = tokenizer.tokens("cat")
    rows = [row[row > 0].tolist() for row in tokenizer(["cat"] * 400, random.Random(0))]
    longer = [len(row) - 3 for row in rows if len(row) > 3]
    assert 150 < len(longer) < 250 and min(longer) == 1 and max(longer) == 19
    assert all(own[0] in row and row[-1] == train.EOT for row in rows)
    assert 0.6 < sum(row[-2] == own[0] for row in rows if len(row) > 3) / len(longer) < 0.9


def test_the_text_encoder_of_training_is_clips():
    torch.manual_seed(0)
    model = train.new_model().eval()
    tokens = train.Tokenizer()(CAPTIONS)
    with torch.no_grad():
        expected = model.encode_text(clip.tokenize(CAPTIONS, truncate=True))
        assert torch.allclose(train.encode_text(model, tokens), expected, atol=1e-5)


def test_a_run_resumes_averages_and_is_written_whole(tmp_path):
    run = train.Run(tmp_path, "cpu")
    before = run.model.text_projection.detach().clone()
    run.update(run.model.text_projection.sum(), lr=0.1)
    moved = run.model.text_projection.detach() - before
    kept = 1 / 10  # of the first step: (1 + 0) / (10 + 0)
    assert moved.abs().max() > 0.05
    assert torch.allclose(run.average["text_projection"], before + (1 - kept) * moved, atol=1e-6)
    run.save()
    again = train.Run(tmp_path, "cpu")
    assert again.step == 1 and torch.equal(again.model.text_projection, run.model.text_projection)
    train.write(again, tmp_path / "new.pt")
    model, _ = load_clip(tmp_path / "new.pt", "cpu")
    assert torch.allclose(model.text_projection, run.average["text_projection"], atol=1e-3)
    with pytest.raises(SystemExit, match="started from other weights: move it away"):
        train.Run(tmp_path, "cpu", start=tmp_path / "new.pt")


# ---------------------------------------------------------------- the card

def test_the_cards_tables_are_those_of_the_results():
    text = (DATA / "README.md").read_text(encoding="utf-8")
    full = (DATA / "results.md").read_text(encoding="utf-8")
    shown = [page.partition(card.RESULTS)[2].partition(card.END)[0] for page in (text, full)]
    assert list(card.all_tables()) == shown
    readme = (DATA.parent / "README.md").read_text(encoding="utf-8").replace("\n", " ")
    average = card.report.average([card.kept(task) for task in card.TASKS])
    gains = card.gaps(average, card.UNIFIED)
    leads = card.gaps(average, card.UNIFIED, card.PROBE)
    assert f"by {gains[0][1:]} points with one label per class and by {gains[-1][1:]} " in readme
    assert f"the probe by {leads[0][1:]} and {leads[-1][1:]} points" in readme


def test_favicons_are_drawn_from_objects(tmp_path):
    for task in ("objects", "outlines"):
        (tmp_path / task).mkdir()
        for file in (DATA / task).iterdir():
            (tmp_path / task / file.name).write_bytes(file.read_bytes())
    tasks.favicons(tmp_path)
    for file in ("favicons/images.zip", "favicons/dataset.json", "favicon_outlines/dataset.json"):
        assert (tmp_path / file).read_bytes() == (DATA / file).read_bytes(), file
    image = open_image(load_dataset("favicons").train.images[0])
    small = image.resize((16, 16), Image.Resampling.NEAREST)
    assert image == small.resize((64, 64), Image.Resampling.NEAREST)  # 16 x 16 fields
