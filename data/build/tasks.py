"""Step 2: the built-in tasks and their domain-shift views, from the held-out icon sets.

    python tasks.py [--work work] [--sheets DIR]

--sheets also writes a contact sheet of every class, which is how the wrong labels in removed.tsv
were found.

What one set draws under one name, in all its styles and weights, falls on one side of a split; of
drawings of different origin that correlate by more than 0.95 only one is kept. The hand-written
template of each task is in TEMPLATES below, fixed before any few-shot run.
"""
import argparse
import csv
import fnmatch
import io
import json
import random
import re
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import to_tensor
from torchvision.utils import save_image

from icons import HERE, distinct_groups, read_sets, split_groups, thumbnails

# Sets in which "bold" is a thick line; in the others it is a solid drawing.
THICK = ("ph", "iconamoon")
DESIGNERS = {"ph": "Phosphor", "solar": "Solar", "carbon": "Carbon", "clarity": "Clarity",
             "bi": "Bootstrap", "basil": "Basil", "iconoir": "Iconoir",
             "majesticons": "Majesticons", "teenyicons": "Teenyicons", "twemoji": "Twemoji",
             "icon-park": "IconPark", "emojione-monotone": "EmojiOne"}
STYLES = {"outline": "outline", "solid": "solid", "thin": "thin line", "bold": "thick line",
          "two-tone": "two-tone", "colour": "colorful", "pixel": "pixel art",
          "sketch": "hand-drawn"}
ACTIONS = {
    "add": "plus|add|new",
    "remove": "minus|remove|subtract",
    "confirm": "check|checked|done|tick|success|approved|verified",
    "cancel": "x|close|cross|cancel|times|xmark",
    "turn off": "off|slash|disabled",
    "search": "search|magnifier|magnifying glass",
    "lock": "lock|locked|secure",
    "like": "heart|like|favorite|love",
    "rate": "star|rating",
    "download": "download|arrow down",
    "warn": "warning|alert|exclamation|error",
}
# Words with which an icon's name does not mean "this object, this action".
NO_ACTION = ("circle|square|arrows?|radio|caret|medical|health|hospital|aid|plus minus|code|forward"
             "|text|zoom")
TEMPLATES = {
    "objects": "an icon of a {}.",
    "pixels": "a pixel art {}.",
    "styles": "{} style.",
    "designers": "an icon by {}.",
    "actions": "an icon that says {}.",
    "things": "an icon of a {}.",
    "favicons": "a pixel art {}.",
}
# Drawings per class: train, val, test.
SIZES = {
    "objects": (20, 4, 22),
    "styles": (24, 6, 40),
    "designers": (24, 6, 40),
    "actions": (24, 6, 30),
    "things": (16, 4, 10),
}
SPLITS = ("train", "val", "test")


# ---------------------------------------------------------------- labelled drawings

def measured_style(gray):
    """(N, 64, 64) uint8 -> style of each drawing, read off its pixels: what is left of the ink when
    strokes are worn away."""
    ink = torch.from_numpy((gray < 128)[:, None].astype(np.float32))
    middle = torch.from_numpy(((gray > 70) & (gray < 235))[:, None].astype(np.float32))

    def worn(x, k):
        return (-F.max_pool2d(-x, k, 1, k // 2)).mean((1, 2, 3))

    amount = ink.mean((1, 2, 3)).clamp(min=1e-6)
    after_3 = (worn(ink, 3) / amount).tolist()
    after_7 = (worn(ink, 7) / amount).tolist()
    tone = (worn(middle, 5) > 0.02).tolist()
    styles = []
    for thin, thick, two_tone in zip(after_3, after_7, tone):
        if two_tone:
            styles.append("two-tone")
        elif thin < 0.12:
            styles.append("thin")
        else:
            styles.append("solid" if thick > 0.2 else "outline")
    return styles


def style_of(row, data, i, measured):
    """The style of drawing i of a set: what its name or its set says, else what was measured; None
    for the odd gray picture of a colour set, which has no style of its own."""
    style = str(data["styles"][i]) or row["style"]
    if data["colour"][i]:
        style = "colour"
    if style not in ("colour", "outline", "solid", "two-tone", "thin", "bold"):
        style = measured
    if row["kind"] == "colour" and style != "colour":
        return None
    if style == "bold" and row["set"] not in THICK:
        return "solid"
    return style


def held_out(work):
    """All drawings of the held-out sets: dicts with set, emoji (whether the set is of emoji), icon,
    name, style, picture, group and thumb."""
    drawings = []
    for row in [r for r in read_sets() if r["role"] == "held-out"]:
        prefix = row["set"]
        data = dict(np.load(work / f"drawn/{prefix}.npz"))
        pictures = data["pictures"]
        thumbs = thumbnails(pictures)
        measured = measured_style(pictures if pictures.ndim == 3 else pictures.mean(-1))
        for i, picture in enumerate(pictures):
            style = style_of(row, data, i, measured[i])
            if style is None:
                continue
            name = str(data["names"][i])
            drawings.append({"set": prefix, "emoji": row["style"] == "emoji", "name": name,
                             "icon": str(data["icons"][i]), "style": style, "picture": picture,
                             "group": (row["family"] or prefix, name), "thumb": thumbs[i]})
    return drawings


def stroke(style):
    """The styles of the domains: thin, regular and thick lines are all outlines."""
    return "outline" if style in ("thin", "bold") else style


def label_by_name(drawings, file):
    """The classes of a .tsv of names and patterns: drawings whose whole name fits the pattern."""
    labelled = {}
    for line in (HERE / file).read_text().splitlines():
        name, pattern = line.split("\t")
        fits = re.compile(pattern).fullmatch
        labelled[name] = [d for d in drawings if fits(d["name"])]
    return labelled


def generic(some, drawings):
    """Those of `some` drawings whose name at least two families of sets use: brand marks have names
    of one set alone."""
    families = defaultdict(set)
    for d in drawings:
        families[d["name"]].add(d["group"][0])
    return [d for d in some if len(families[d["name"]]) > 1 or d["set"].startswith("streamline")]


def label_styles(drawings):
    """How it is drawn."""
    of_set = {"pixel": "pixel", "streamline-freehand-color": "sketch"}
    left_out = ("meteocons", "icon-park")
    plain = [d for d in drawings if not d["emoji"] and d["set"] not in left_out]
    plain = generic(plain, drawings)
    result = {}
    for key, word in STYLES.items():
        result[word] = [d for d in plain if of_set.get(d["set"], d["style"]) == key]
    return result


def label_designers(drawings):
    """Whose set it is from."""
    common = generic(drawings, drawings)
    result = {}
    for prefix, name in DESIGNERS.items():
        result[name] = [d for d in common if d["set"] == prefix]
    return result


def label_actions(drawings):
    """What an icon does to its object, whatever that is: "folder plus", "user add" -> add."""
    plain = [d for d in drawings if not d["emoji"]]
    result = {}
    for action, words in ACTIONS.items():
        pattern = re.compile(rf"(?!.*\b({NO_ACTION})\b)[a-z]+( [a-z]+)? ({words})")
        result[action] = [d for d in plain if pattern.fullmatch(d["name"])]
    return result


# ---------------------------------------------------------------- splits

def is_removed(d, removed):
    """Whether removed.tsv names the drawing; its columns `set` and `icon` may hold * and ?."""
    return any(fnmatch.fnmatchcase(d["set"], row["set"])
               and fnmatch.fnmatchcase(d["icon"], row["icon"]) for row in removed)


def build(task, classes, removed, sizes, seed=0, pool=400):
    """Labelled drawings -> {"train": [(drawing, label)], "val": ..., "test": ..., "spare": what no
    split of them needs}."""
    # what is no clock among the objects is none among the things either
    of_tasks = (task, "objects") if task == "things" else (task,)
    removed = [row for row in removed if row["task"] in of_tasks]
    # the order in which split_groups fills them
    wanted = {"test": sizes[2], "val": sizes[1], "train": sizes[0], "spare": 0}
    splits = defaultdict(list)
    for label, drawings in enumerate(classes.values()):
        # a random part of the class, without wrong labels and near-duplicates
        drawings = [d for d in drawings if not is_removed(d, removed)]
        random.Random(seed).shuffle(drawings)
        drawings = drawings[:pool]
        thumbs = np.stack([d["thumb"] for d in drawings])
        keep = distinct_groups(thumbs, [d["group"] for d in drawings])
        drawings = [drawings[i] for i in keep]
        # whole groups into splits; what a test set has too many of is spare
        groups = [d["group"] for d in drawings]
        for split, members in split_groups(groups, wanted, seed).items():
            chosen = members if split == "spare" else members[: wanted[split]]
            splits[split] += [(drawings[i], label) for i in chosen]
            if split == "test":
                splits["spare"] += [(drawings[i], label) for i in members[len(chosen) :]]
    return splits


def make_domains(splits, n_classes):
    """Up to ten unseen drawings per class and style, and the outlines inverted -> {"outline":
    [(drawing, label, dark)], "solid": ..., ..., "dark": ...}."""
    by_style = defaultdict(list)
    for d, label in splits["test"] + splits["spare"]:
        by_style[stroke(d["style"]), label].append((d, label, False))
    domains = {}
    for style in ("outline", "solid", "two-tone", "colour"):
        domains[style] = []
        for label in range(n_classes):
            domains[style] += by_style[style, label][:10]
    domains["dark"] = [(d, label, True) for d, label, _ in domains["outline"]]
    return domains


def only_outlines(splits):
    """The outline drawings of every split."""
    outlines = {}
    for s in SPLITS:
        outlines[s] = [(d, label) for d, label in splits[s] if stroke(d["style"]) == "outline"]
    return outlines


# ---------------------------------------------------------------- files

def png(picture, pixels=None, dark=False):
    """A drawing as PNG bytes in 16 grays or 64 colours. pixels=10: as seen in 10 x 10 pixels. dark:
    inverted, as in dark mode."""
    picture = 255 - picture if dark else picture
    if pixels:
        small = Image.fromarray(picture).resize((pixels, pixels), Image.BOX)
        picture = np.asarray(small.resize((64, 64), Image.NEAREST))
    image = Image.fromarray(picture)
    out = io.BytesIO()
    few = image.quantize(64 if image.mode == "RGB" else 16, dither=Image.Dither.NONE)
    few.save(out, "PNG", optimize=True)
    return out.getvalue()


def file_name(d, dark=False):
    """<set>__<icon>.png, the name of a drawing's PNG in the archive."""
    return f"{d['set']}__{d['icon']}{'__dark' if dark else ''}.png"


def write_archive(path, splits, domains, pixels):
    """All drawings of the splits and domains as a zip of PNGs."""
    pictures = {}  # file name -> PNG
    for s in SPLITS:
        for d, _ in splits[s]:
            pictures[file_name(d)] = png(d["picture"], pixels)
    for rows in domains.values():
        for d, _, dark in rows:
            pictures[file_name(d, dark)] = png(d["picture"], pixels, dark)
    write_zip(path, pictures)


def write_zip(path, pictures):
    """A zip of {file name: PNG}."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for key in sorted(pictures):
            # a fixed date: the same archive every time
            file.writestr(zipfile.ZipInfo(key, (2026, 1, 1, 0, 0, 0)), pictures[key])


def write(task, folder, classnames, template, splits, domains=None, archive="images.zip",
          pixels=None):
    """data/<task>/dataset.json and, unless it shares another task's, its archive of PNGs."""
    folder.mkdir(parents=True, exist_ok=True)
    if "/" not in archive:
        write_archive(folder / archive, splits, domains or {}, pixels)
    data = {"template": template, "classnames": classnames,
            "images": archive, "splits": {}}
    for s in SPLITS:
        data["splits"][s] = [[file_name(d), label] for d, label in splits[s]]
    counts = [f"{len(rows)} {s}" for s, rows in data["splits"].items()]
    if domains:
        data["domains"] = {}
        for key, rows in domains.items():
            data["domains"][key] = [[file_name(d, dark), label] for d, label, dark in rows]
            counts.append(f"{len(rows)} {key}")
    write_json(folder, data)
    print(f"{task}: {len(classnames)} classes, {', '.join(counts)}")


def write_json(folder, data):
    """<folder>/dataset.json, one image per line."""
    text = json.dumps(data, ensure_ascii=False)
    text = text.replace('], ["', '],\n["').replace('": [[', '": [\n[')
    (folder / "dataset.json").write_text(text + "\n", encoding="utf-8")


def favicons(data):
    """`objects` and `outlines` again, their drawings in 16 x 16 pixels, the size of a favicon."""
    pictures = {}
    with zipfile.ZipFile(data / "objects/images.zip") as archive:
        for name in archive.namelist():
            picture = np.asarray(Image.open(archive.open(name)).convert("RGB"))
            pictures[name] = png(picture, pixels=16)
    for task, source, images in (("favicons", "objects", "images.zip"),
                                 ("favicon_outlines", "outlines", "../favicons/images.zip")):
        spec = json.loads((data / source / "dataset.json").read_text(encoding="utf-8"))
        spec |= {"template": TEMPLATES["favicons"], "images": images}
        if task == "favicons":
            del spec["domains"]
        (data / task).mkdir(exist_ok=True)
        write_json(data / task, spec)
        print(f"{task}: {source} in 16 x 16 pixels")
    write_zip(data / "favicons/images.zip", pictures)


def sheet(folder, classnames, splits, columns=32):
    """A contact sheet per class, <class>.png, of every drawing that any split holds, and a .tsv of
    their places, sets, icons and styles."""
    folder.mkdir(parents=True, exist_ok=True)
    members = defaultdict(list)
    for split in (*SPLITS, "spare"):
        for d, label in splits[split]:
            members[label].append(d)
    for label, name in enumerate(classnames):
        pictures = []
        lines = []
        for i, d in enumerate(members[label]):
            picture = Image.fromarray(d["picture"]).convert("RGB")
            pictures.append(to_tensor(picture))
            fields = [f"row {i // columns}, column {i % columns}", d["set"], d["icon"], d["style"]]
            lines.append("\t".join(fields))
        save_image(pictures, folder / f"{name}.png", nrow=columns)
        (folder / f"{name}.tsv").write_text("\n".join(lines))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE / "work")
    parser.add_argument("--out", type=Path, default=HERE.parent)
    parser.add_argument("--sheets", type=Path)
    args = parser.parse_args()
    with open(HERE / "removed.tsv", newline="") as file:
        removed = list(csv.DictReader(file, delimiter="\t"))
    drawings = held_out(args.work)
    objects = label_by_name(drawings, "concepts.tsv")
    things = objects | label_by_name(drawings, "things.tsv")  # the objects and as many again
    labelled = {
        "objects": objects,
        "styles": label_styles(drawings),
        "designers": label_designers(drawings),
        "actions": label_actions(drawings),
        "things": dict(sorted(things.items())),
    }
    for task, classes in labelled.items():
        names = list(classes)
        splits = build(task, classes, removed, SIZES[task])
        if args.sheets:
            sheet(args.sheets / task, names, splits)
        if task != "objects":
            write(task, args.out / task, names, TEMPLATES[task], splits)
            continue
        # the two views of the objects: outlines alone, and 10 x 10 pixels
        domains = make_domains(splits, len(names))
        write(task, args.out / task, names, TEMPLATES[task], splits, domains)
        write("outlines", args.out / "outlines", names, TEMPLATES[task], only_outlines(splits),
              domains, archive=f"../{task}/images.zip")
        write("pixels", args.out / "pixels", names, TEMPLATES["pixels"], splits, pixels=10)
        favicons(args.out)


if __name__ == "__main__":
    main()
