"""The built-in tasks and data/build, which made them: names, near-duplicates, splits, the card."""
import hashlib
import itertools
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from mini_coop import DATA, load_dataset, open_image

sys.path.insert(0, str(DATA / "build"))
import card  # noqa: E402
import icons  # noqa: E402
import tasks  # noqa: E402

# ---------------------------------------------------------------- names

@pytest.mark.parametrize("icon, suffixes, expected", [
    ("umbrella-duotone", {"duotone"}, ("umbrella", "two-tone")),
    ("umbrella-simple", {"duotone"}, ("umbrella simple", "")),
    ("border-line", set(), ("border line", "")),  # no suffix of this set
    ("filter-one", set(), ("filter", "")),
    ("card-2-bold-duotone", {"bold", "duotone"}, ("card", "two-tone")),
    ("line", {"line"}, ("line", "")),  # never the whole name
])
def test_clean_name(icon, suffixes, expected):
    assert icons.clean_name(icon, suffixes) == expected


# ---------------------------------------------------------------- drawings

def drawing(seed):
    """Random black and white fields of 8 x 8 pixels."""
    fields = np.random.default_rng(seed).integers(0, 2, (8, 8))
    return fields.repeat(8, 0).repeat(8, 1).astype(np.uint8) * 255


def test_of_near_duplicates_the_first_is_kept():
    pictures = np.stack([drawing(0), drawing(0), drawing(1)])
    pictures[1, :3] = 128  # almost the same
    thumbs = icons.thumbnails(pictures)
    assert icons.distinct_groups(thumbs, ["x", "y", "z"], 0.9) == [0, 2]
    colour = np.repeat(pictures[..., None], 3, -1)
    assert np.allclose(thumbs, icons.thumbnails(colour), atol=1e-5)


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


# ---------------------------------------------------------------- the tasks

PERMISSIVE = {"MIT", "ISC", "Apache-2.0", "CC0-1.0", "CC-BY-4.0", "CC-BY-3.0", "OFL-1.1",
              "BSD-3-Clause", "Unlicense"}


@pytest.mark.parametrize("task", [*card.TASKS, *card.SHIFTED])
def test_no_drawing_is_in_two_splits_and_none_was_seen_in_pretraining(task):
    data = load_dataset(task)
    names = {"domains": set()}
    for split in data.domains.values():
        names["domains"] |= {image.name.replace("__dark", "") for image in split.images}
    for part in tasks.SPLITS:
        split = getattr(data, part)
        names[part] = {image.name for image in split.images}
        least = {"train": 16, "val": 4, "test": 10}[part] if task not in card.SHIFTED else 1
        assert min(split.labels.count(k) for k in range(len(data.classnames))) >= least
    for a, b in itertools.combinations(names, 2):
        assert not names[a] & names[b] or {a, b} == {"test", "domains"}
    held_out = {row["set"] for row in icons.read_sets() if row["role"] == "held-out"}
    assert {name.split("__")[0] for name in set().union(*names.values())} <= held_out
    # every drawing's pixels, by their hash
    archive = data.train.images[0].root
    pixels = {}
    for name in archive.namelist():
        image = open_image(Image.open(archive.open(name)))
        assert image.size == (64, 64)
        pixels[name] = hashlib.sha256(image.tobytes()).digest()[:5]
    if task not in ("pixels", "favicons", "favicon_outlines"):  # small drawings can look the same
        for a, b in itertools.combinations(tasks.SPLITS, 2):
            assert not {pixels[name] for name in names[a]} & {pixels[name] for name in names[b]}
    seen = {row.tobytes() for row in np.load(DATA / "build/pretraining_hashes.npy")}
    assert not seen & set(pixels.values())


def test_the_card_names_every_set_with_a_licence():
    lines = (DATA / "LICENSES.md").read_text(encoding="utf-8").splitlines()
    for row in icons.read_sets():
        start = f"| {row['set']} | {row['version']} |"
        line = next(line for line in lines if line.startswith(start))
        assert any(f"| {licence} |" in line for licence in PERMISSIVE), line


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
        shutil.copytree(DATA / task, tmp_path / task)
    tasks.favicons(tmp_path)
    for file in ("favicons/images.zip", "favicons/dataset.json", "favicon_outlines/dataset.json"):
        assert (tmp_path / file).read_bytes() == (DATA / file).read_bytes(), file
    image = open_image(load_dataset("favicons").train.images[0])
    small = image.resize((16, 16), Image.Resampling.NEAREST)
    assert image == small.resize((64, 64), Image.Resampling.NEAREST)  # 16 x 16 fields
