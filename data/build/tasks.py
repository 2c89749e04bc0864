"""Step 3: the five embedded tasks (and `outlines`, the domain-shift view of `objects`), from the held-out icon sets.

    python tasks.py [--work work] [--sheets DIR]

--sheets also writes a contact sheet of every class, which is how the wrong labels in removed.tsv were found. What is drawn by one
set under one name, in all its styles and weights, falls on one side of a split; drawings of different origin that correlate by
more than 0.95 are not both kept. The hand-written template of each task is TEMPLATES below, fixed before any few-shot run.
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
from PIL import Image

from icons import (
    HERE,
    SET_STYLES,
    distinct_groups,
    few_colours,
    read_sets,
    split_groups,
    thumbnails,
)
from train import measured_style

FAMILY = {
    "icon-park-outline": "icon-park",
    "icon-park-solid": "icon-park",
    "icon-park-twotone": "icon-park",
    "famicons": "ion",
    "emojione-monotone": "emojione",
    "streamline-ultimate-color": "streamline-ultimate",
}  # the same drawings in another style
THICK = (
    "ph",
    "iconamoon",
)  # sets in which "bold" is a thick line; in the others it is a solid drawing
DESIGNERS = {
    "ph": "Phosphor",
    "solar": "Solar",
    "carbon": "Carbon",
    "clarity": "Clarity",
    "bi": "Bootstrap",
    "basil": "Basil",
    "iconoir": "Iconoir",
    "majesticons": "Majesticons",
    "teenyicons": "Teenyicons",
    "twemoji": "Twemoji",
    "icon-park": "IconPark",
    "emojione-monotone": "EmojiOne",
}
STYLES = {
    "outline": "outline",
    "solid": "solid",
    "thin": "thin line",
    "bold": "thick line",
    "two-tone": "two-tone",
    "colour": "colorful",
    "pixel": "pixel art",
    "sketch": "hand-drawn",
}
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
TEMPLATES = {
    "objects": "an icon of a {}.",
    "pixels": "an icon of a {}.",
    "styles": "{} style.",
    "designers": "an icon by {}.",
    "actions": "an icon of {}.",
}
SIZES = {
    "objects": (20, 4, 22),
    "styles": (24, 6, 40),
    "designers": (24, 6, 40),
    "actions": (24, 6, 30),
}  # a class: train, val, test


def held_out(work):
    """All drawings of the held-out sets: dicts with set, icon, name, style, group, picture and thumb."""
    drawings = []
    for row in [r for r in read_sets() if r["role"] == "held-out"]:
        data = dict(np.load(work / f"drawn/{row['set']}.npz"))
        thumbs, pictures, prefix = thumbnails(data["pictures"]), data["pictures"], row["set"]
        measured = measured_style(pictures if pictures.ndim == 3 else pictures.mean(-1))
        for i, picture in enumerate(pictures):
            style = (
                "colour"
                if data["colour"][i]
                else str(data["styles"][i]) or SET_STYLES.get(prefix, "")
            )
            style = (
                style
                if style in ("colour", "outline", "solid", "two-tone", "thin", "bold")
                else measured[i]
            )
            if row["kind"] == "colour" and style != "colour":
                continue  # the odd gray picture of a colour set: no style of its own
            if style == "bold" and prefix not in THICK:
                style = "solid"
            drawings.append(
                {
                    "set": prefix,
                    "icon": str(data["icons"][i]),
                    "name": str(data["names"][i]),
                    "style": style,
                    "picture": picture,
                    "group": (FAMILY.get(prefix, prefix), str(data["names"][i])),
                    "thumb": thumbs[i],
                }
            )
    return drawings


def stroke(style):
    """The styles of the domains: thin, regular and thick lines are all outlines."""
    return "outline" if style in ("thin", "bold") else style


def label_objects(drawings):
    concepts = [line.split("\t") for line in (HERE / "concepts.tsv").read_text().splitlines()]
    patterns = [(concept, re.compile(pattern)) for concept, pattern in concepts]
    return {
        concept: [d for d in drawings if pattern.fullmatch(d["name"])]
        for concept, pattern in patterns
    }


def generic(some, drawings):
    """Those of `some` drawings whose name at least two families of sets use: no brand marks, whose names one set alone has."""
    families = defaultdict(set)
    for d in drawings:
        families[d["name"]].add(d["group"][0])
    return [d for d in some if len(families[d["name"]]) > 1 or d["set"].startswith("streamline")]


def label_styles(drawings):
    def style(d):
        return {"pixel": "pixel", "streamline-freehand-color": "sketch"}.get(d["set"], d["style"])

    plain = [
        d
        for d in drawings
        if d["set"] not in ("twemoji", "emojione", "emojione-monotone", "meteocons", "icon-park")
    ]
    plain = generic(plain, drawings)
    return {word: [d for d in plain if style(d) == key] for key, word in STYLES.items()}


def label_designers(drawings):
    return {
        name: [d for d in generic(drawings, drawings) if d["set"] == prefix]
        for prefix, name in DESIGNERS.items()
    }


def label_actions(drawings):
    """What an icon does to its object: "folder plus", "user add" -> add. The object before the action's word is never the label."""
    result = {}
    for action, words in ACTIONS.items():
        pattern = re.compile(
            rf"(?!.*\b(circle|square|arrows?|radio|caret|medical|health|hospital|aid|plus minus|code|forward|text|zoom)\b)[a-z]+( [a-z]+)? ({words})"
        )
        result[action] = [
            d
            for d in drawings
            if pattern.fullmatch(d["name"])
            and d["set"] not in ("twemoji", "emojione", "emojione-monotone")
        ]
    return result


def build(task, classes, removed, sizes, seed=0, pool=400):
    """Labelled drawings -> {"train": [(drawing, label)], "val": ..., "test": ..., "spare": ...}; spare: what no split of them needs."""
    splits, removed = (
        defaultdict(list),
        [(r["set"], r["icon"]) for r in removed if r["task"] == task],
    )
    for label, (name, drawings) in enumerate(classes.items()):
        drawings = [
            d
            for d in drawings
            if not any(
                fnmatch.fnmatchcase(d["set"], s) and fnmatch.fnmatchcase(d["icon"], i)
                for s, i in removed
            )
        ]
        random.Random(seed).shuffle(drawings)
        drawings = drawings[:pool]
        keep = distinct_groups(
            np.stack([d["thumb"] for d in drawings]), [d["group"] for d in drawings]
        )
        drawings = [drawings[i] for i in keep]
        wanted = dict(zip(("test", "val", "train", "spare"), (sizes[2], sizes[1], sizes[0], 0)))
        for split, members in split_groups([d["group"] for d in drawings], wanted, seed).items():
            chosen = members if split == "spare" else members[: wanted[split]]
            splits[split] += [(drawings[i], label) for i in chosen]
            splits["spare"] += [
                (drawings[i], label) for i in members[len(chosen) :] if split == "test"
            ]
        counts = {s: sum(k == label for _, k in splits[s]) for s in ("train", "val", "test")}
        if counts["train"] < 16 or counts["val"] < 4 or counts["test"] < 20:
            print(f"  {task}: too few drawings of {name!r}: {len(drawings)} give {counts}")
    return splits


def png(picture, pixels=None, dark=False):
    """A drawing as PNG bytes in few colours; pixels=10: as seen in 10 x 10 pixels; dark: inverted, as in dark mode."""
    picture, out = 255 - picture if dark else picture, io.BytesIO()
    if pixels:
        picture = np.asarray(
            Image.fromarray(picture)
            .resize((pixels, pixels), Image.BOX)
            .resize((64, 64), Image.NEAREST)
        )
    few_colours(picture).save(out, "PNG", optimize=True)
    return out.getvalue()


def write(
    task, folder, classnames, template, splits, domains=None, archive="images.zip", pixels=None
):
    """data/<task>/dataset.json and, unless it shares another task's, its archive of PNGs named <set>__<icon>.png."""
    folder.mkdir(parents=True, exist_ok=True)
    name = lambda d, dark=False: f"{d['set']}__{d['icon']}{'__dark' if dark else ''}.png"  # noqa: E731
    if "/" not in archive:
        pictures = {
            name(d): png(d["picture"], pixels)
            for s in ("train", "val", "test")
            for d, _ in splits[s]
        }
        for rows in (domains or {}).values():
            pictures |= {name(d, dark): png(d["picture"], pixels, dark) for d, _, dark in rows}
        with zipfile.ZipFile(folder / archive, "w", zipfile.ZIP_STORED) as file:
            for key in sorted(pictures):
                file.writestr(
                    zipfile.ZipInfo(key, (2026, 1, 1, 0, 0, 0)), pictures[key]
                )  # a fixed date: the same archive every time
    data = {
        "format": 1,
        "name": task,
        "template": template,
        "classnames": classnames,
        "images": archive,
        "splits": {
            s: [[name(d), label] for d, label in splits[s]] for s in ("train", "val", "test")
        },
    }
    if domains:
        data["domains"] = {
            key: [[name(d, dark), label] for d, label, dark in rows]
            for key, rows in domains.items()
        }
    text = json.dumps(data, ensure_ascii=False)
    (folder / "dataset.json").write_text(
        text.replace('], ["', '],\n["').replace('": [[', '": [\n[') + "\n", encoding="utf-8"
    )
    print(
        f"{task}: {len(classnames)} classes, "
        + ", ".join(
            f"{len(rows)} {s}" for s, rows in {**data["splits"], **data.get("domains", {})}.items()
        )
    )


def sheet(path, classnames, splits):
    """Contact sheets: a row a class, every drawing that any split holds, numbered in the order of contact.tsv."""
    rows = defaultdict(list)
    for split in ("train", "val", "test", "spare"):
        for d, label in splits[split]:
            rows[label].append(d)
    lines = []
    for start in range(0, len(classnames), 8):
        width = max(len(rows[k]) for k in range(start, min(start + 8, len(classnames))))
        columns = 34
        height = sum(
            -(-len(rows[k]) // columns) for k in range(start, min(start + 8, len(classnames)))
        )
        canvas, y = Image.new("RGB", (columns * 48, height * 48), "white"), 0
        for k in range(start, min(start + 8, len(classnames))):
            for n, d in enumerate(rows[k]):
                canvas.paste(
                    Image.fromarray(d["picture"]).convert("RGB").resize((44, 44)),
                    (n % columns * 48, (y + n // columns) * 48),
                )
                lines.append(
                    f"{classnames[k]}\t{n // columns}\t{n % columns}\t{d['set']}\t{d['icon']}\t{d['style']}"
                )
            y += -(-len(rows[k]) // columns)
            print(f"   sheet {start // 8}: {classnames[k]} ends above row {y}", width)
        canvas.save(path.with_name(f"{path.name}_{start // 8}.png"))
    path.with_suffix(".tsv").write_text("\n".join(lines))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=HERE / "work")
    parser.add_argument("--out", type=Path, default=HERE.parent)
    parser.add_argument("--sheets", type=Path)
    args = parser.parse_args()
    with open(HERE / "removed.tsv", newline="") as file:
        removed = list(csv.DictReader(file, delimiter="\t"))
    drawings = held_out(args.work)
    labelled = {
        "objects": label_objects(drawings),
        "styles": label_styles(drawings),
        "designers": label_designers(drawings),
        "actions": label_actions(drawings),
    }
    for task, classes in labelled.items():
        splits, names = build(task, classes, removed, SIZES[task]), list(classes)
        if args.sheets:
            args.sheets.mkdir(exist_ok=True)
            sheet(args.sheets / task, names, splits)
        if task != "objects":
            write(task, args.out / task, names, TEMPLATES[task], splits)
            continue
        by_style, rng = defaultdict(list), random.Random(0)
        for d, label in splits["test"] + splits["spare"]:
            by_style[stroke(d["style"]), label].append((d, label, False))
        domains = {
            style: [row for label in range(len(names)) for row in by_style[style, label][:10]]
            for style in ("outline", "solid", "two-tone", "colour")
        }
        domains["dark"] = [(d, label, True) for d, label, _ in domains["outline"]]
        write(task, args.out / task, names, TEMPLATES[task], splits, domains)
        outline = {
            s: [(d, label) for d, label in splits[s] if stroke(d["style"]) == "outline"]
            for s in ("train", "val", "test")
        }
        write(
            "outlines",
            args.out / "outlines",
            names,
            TEMPLATES[task],
            outline,
            domains,
            archive=f"../{task}/images.zip",
        )
        write("pixels", args.out / "pixels", names, TEMPLATES["pixels"], splits, pixels=10)


if __name__ == "__main__":
    main()
