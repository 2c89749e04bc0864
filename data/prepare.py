"""Converts public data sets to mini-coop's format: <name>/dataset.json, which lists the images.

    python data/prepare.py eurosat dtd oxford_pets
    python data/prepare.py imagenet imagenetv2 --root /data

The first line downloads what can still be downloaded, and says what to get by hand for the rest.
The second uses images that are already below --root, in the layout of the published code.

Splits, class names and templates are the paper's. If images are missing, nothing is written.
The shifts imagenetv2, imagenet_sketch, imagenet_a and imagenet_r become domains of imagenet.
"""
import argparse
import hashlib
import json
import os
import sys
import urllib.request
from pathlib import Path
from typing import NamedTuple

from torchvision import datasets

HERE = Path(__file__).resolve().parent
OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"
DATASETS_MD = "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"
# The published split files, from a fixed commit of a repository under the MIT licence.
SPLITS = ("https://raw.githubusercontent.com/linzhiqiu/cross_modal_adaptation/"
          "ac9077ee4e422f768c9b9109551468605e33ec9a/splits/")


class Source(NamedTuple):
    """One data set: where its images lie, and what belongs to them."""

    folders: tuple  # below the root: the published layout, then torchvision's
    manual: str  # what to get by hand
    template: str = ""  # a shift has none, it uses ImageNet's
    split: tuple = ()  # the X of its split_zhou_X.json, and git's hash of that file
    counts: dict = None  # images and classes, where no split file fixes them
    torchvision: str = ""  # the class that downloads it, where there is one


SOURCES = {
    "caltech101": Source(
        folders=("caltech-101/101_ObjectCategories", "caltech101/101_ObjectCategories"),
        template="a photo of a {}.", torchvision="Caltech101",
        split=("Caltech101", "8be694a80de04a39fb159c462bea9696aa47ccf1"),
        manual="101_ObjectCategories.tar.gz from https://data.caltech.edu/records/mzrjq-6wc02"),
    "oxford_pets": Source(
        folders=("oxford_pets/images", "oxford-iiit-pet/images"),
        template="a photo of a {}, a type of pet.", torchvision="OxfordIIITPet",
        split=("OxfordPets", "fa821d9f9e7d32fdf3640bf74fa7491ed04f37da"),
        manual=f"images.tar.gz from {OXFORD}/pets/"),
    "stanford_cars": Source(
        folders=("stanford_cars",), template="a photo of a {}.",
        split=("StanfordCars", "dcdb8264712e9940e74cfb0f06ddb8f9cc239b81"),
        manual="both cars_train/ and cars_test/ (Kaggle has mirrors, the first link is dead)"),
    "flowers102": Source(
        folders=("oxford_flowers/jpg", "flowers-102/jpg"),
        template="a photo of a {}, a type of flower.", torchvision="Flowers102",
        split=("OxfordFlowers", "8d10037b0690b6c65e307a354b039efb0f42404c"),
        manual=f"102flowers.tgz from {OXFORD}/flowers/102/"),
    "food101": Source(
        folders=("food-101/images",),
        template="a photo of {}, a type of food.", torchvision="Food101",
        split=("Food101", "39557040ee6501bd32aa8b5dfd75f7941a32f0a7"),
        manual="food-101.tar.gz from https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/"),
    "sun397": Source(
        folders=("sun397/SUN397",), template="a photo of a {}.",
        split=("SUN397", "8d5725db8f70bcf02245665304f863e68f96a24c"),
        manual="SUN397.tar.gz from https://vision.princeton.edu/projects/2010/SUN/"),
    "dtd": Source(
        folders=("dtd/images", "dtd/dtd/images"),
        template="{} texture.", torchvision="DTD",
        split=("DescribableTextures", "8dd197a94b598fa44ee3c9e35c486dd017ab00a7"),
        manual=f"dtd-r1.0.1.tar.gz from {OXFORD}/dtd/"),
    "eurosat": Source(
        folders=("eurosat/2750",),
        template="a centered satellite photo of {}.", torchvision="EuroSAT",
        split=("EuroSAT", "6bdc847a5d5c49dcc78e8cb8707b87198cbfa5a4"),
        manual="EuroSAT.zip from https://github.com/phelber/EuroSAT"),
    "ucf101": Source(
        folders=("ucf101/UCF-101-midframes",),
        template="a photo of a person doing {}.",
        split=("UCF101", "ea87e3de7b4f6f00fdd77618e34a23508b4c5590"),
        manual=f"UCF-101-midframes.zip, the middle frame of each video, from {DATASETS_MD}"),
    "fgvc_aircraft": Source(
        folders=("fgvc_aircraft", "fgvc-aircraft-2013b/data"),
        template="a photo of a {}, a type of aircraft.", torchvision="FGVCAircraft",
        counts={"train": 3334, "val": 3333, "test": 3333, "classes": 100},
        manual=f"what is in data/ of fgvc-aircraft-2013b.tar.gz from {OXFORD}/fgvc-aircraft/"),
    "imagenet": Source(
        folders=("imagenet/images",), template="a photo of a {}.",
        counts={"train": 1281167, "val": 0, "test": 50000, "classes": 1000},
        manual="train/<wnid>/*.JPEG and val/<wnid>/*.JPEG from https://image-net.org"),
}

SHIFTS = {
    "imagenetv2": Source(
        folders=("imagenetv2/imagenetv2-matched-frequency-format-val",),
        counts={"images": 10000, "classes": 1000},
        manual="the folders 0/ to 999/ from https://github.com/modestyachts/ImageNetV2"),
    "imagenet_sketch": Source(
        folders=("imagenet-sketch/images",), counts={"images": 50889, "classes": 1000},
        manual="what is in sketch/ from https://github.com/HaohanWang/ImageNet-Sketch"),
    "imagenet_a": Source(
        folders=("imagenet-adversarial/imagenet-a",), counts={"images": 7500, "classes": 200},
        manual="what is in imagenet-a/ from https://github.com/hendrycks/natural-adv-examples"),
    "imagenet_r": Source(
        folders=("imagenet-rendition/imagenet-r",), counts={"images": 30000, "classes": 200},
        manual="what is in imagenet-r/ from https://github.com/hendrycks/imagenet-r"),
}


def find_images(source, root):
    """The folder of the images, below the root; downloads them if torchvision still can."""
    for folder in source.folders:
        if (root / folder).is_dir():
            return folder
    if not source.torchvision:
        raise FileNotFoundError(f"no images under {root}")
    print(f"downloading {source.torchvision} to {root}", flush=True)
    getattr(datasets, source.torchvision)(str(root), download=True)
    return source.folders[-1]


def read_split(source, root, folder):
    """Class names and splits from the published split file, which is downloaded if need be."""
    name, expected = source.split
    url = f"{SPLITS}split_zhou_{name}.json"
    path = root / source.folders[0].split("/")[0] / f"split_zhou_{name}.json"
    if path.is_file():
        content = path.read_bytes()
    else:
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                content = answer.read()
        except OSError as error:
            raise OSError(f"no split file ({error}). Save {url} as {path}") from error
    # The hash under which git stores the file.
    found = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if found != expected:
        raise ValueError(f"the split file ({path}) is not the published one: its git hash is "
                         f"{found}, expected {expected}. Remove it and run this again")
    # Keep a downloaded file only now that it is known to be right.
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    # {"train": [[path, label, class name], ...], "val": ..., "test": ...}
    classnames = {}
    splits = {}
    for split, rows in json.loads(content).items():
        classnames |= {label: classname for _, label, classname in rows}
        splits[split] = [[f"{folder}/{image}", label] for image, label, _ in rows]
    return [classnames[label] for label in sorted(classnames)], splits


def read_aircraft(root, folder):
    """Class names and splits from FGVC-Aircraft's own lists of variants."""
    variants = (root / folder / "variants.txt").read_text(encoding="utf-8").splitlines()
    splits = {"train": [], "val": [], "test": []}
    for split, rows in splits.items():
        path = root / folder / f"images_variant_{split}.txt"
        for line in path.read_text(encoding="utf-8").splitlines():
            image, variant = line.split(" ", 1)
            rows.append([f"{folder}/images/{image}.jpg", variants.index(variant)])
    return variants, splits


def imagenet_names(root):
    """{wnid: class name} from classnames.txt."""
    path = root / "imagenet/classnames.txt"
    names = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            wnid, _, classname = line.strip().partition(" ")
            names[wnid] = classname
    # Labels, and ImageNetV2's folder numbers, are positions in the order sorted by wnid.
    if not names or list(names) != sorted(names) or not all(names.values()):
        raise ValueError(f"{path} must have lines 'wnid name', sorted by wnid. The published "
                         f"file is linked in {DATASETS_MD}")
    return names


def read_class_folders(root, folder, classes):
    """[[path, label], ...] of the images in class folders; `classes` are the folders' names."""
    rows = []
    for name in sorted(os.listdir(root / folder)):
        if name.startswith(".") or not (root / folder / name).is_dir():
            continue
        if name not in classes:
            raise ValueError(f"{root / folder / name} is no class of ImageNet")
        label = classes.index(name)
        for image in sorted(os.listdir(root / folder / name)):
            if not image.startswith("."):
                rows.append([f"{folder}/{name}/{image}", label])
    return rows


def read_imagenet(root, folder):
    """Class names and splits from ImageNet's folders; its validation images are the test set."""
    names = imagenet_names(root)
    train = read_class_folders(root, f"{folder}/train", list(names))
    test = read_class_folders(root, f"{folder}/val", list(names))
    return list(names.values()), {"train": train, "val": [], "test": test}


def write_dataset(path, data):
    """Writes the file completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name("dataset.json.part")
    part.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    part.replace(path)


def prepare(name, root, out, images):
    """Writes <out>/<name>/dataset.json."""
    source = SOURCES[name]
    folder = find_images(source, root)
    # Splits are {"train": [[path below the root, label], ...], "val": ..., "test": ...}.
    if source.split:
        classnames, splits = read_split(source, root, folder)
    elif name == "imagenet":
        classnames, splits = read_imagenet(root, folder)
    else:
        classnames, splits = read_aircraft(root, folder)
    # Nothing is written if the counts are wrong or images are missing.
    counts = {split: len(rows) for split, rows in splits.items()} | {"classes": len(classnames)}
    if source.counts and counts != source.counts:
        raise ValueError(f"found {counts}, expected {source.counts}: is the copy complete?")
    paths = [path for path, _ in splits["train"] + splits["val"] + splits["test"]]
    missing = [path for path in paths if not (root / path).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} images are missing under {root}, first "
            f"{', '.join(missing[:3])}. If {root / folder.split('/')[0]} is only half unpacked, "
            "remove it and run this again")
    data = {"template": source.template, "classnames": classnames,
            "images": images, "splits": splits}
    # Domains that were added before stay, if they lie under the same root.
    path = out / name / "dataset.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "domains" in before and before["images"] == images:
        data["domains"] = before["domains"]
    write_dataset(path, data)
    print(f"{name}: {counts} -> {path}")


def add_shift(name, root, out, images):
    """Adds a shift's images to <out>/imagenet/dataset.json, as a domain."""
    source = SHIFTS[name]
    path = out / "imagenet/dataset.json"
    data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if data.get("images") != images:
        raise ValueError("prepare imagenet first, with the same --root and --out")
    # ImageNetV2's folders are called 0 to 999, those of the other shifts by wnid.
    classes = list(imagenet_names(root))
    if name == "imagenetv2":
        classes = [str(label) for label in range(len(classes))]
    rows = read_class_folders(root, find_images(source, root), classes)
    counts = {"images": len(rows), "classes": len({label for _, label in rows})}
    if counts != source.counts:
        raise ValueError(f"found {counts}, expected {source.counts}: is the copy complete?")
    data.setdefault("domains", {})[name] = rows
    write_dataset(path, data)
    print(f"{name}: {counts}, a domain of {path}")


def main(argv=None):
    known = SOURCES | SHIFTS
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=known, metavar="NAME", help=", ".join(known))
    parser.add_argument("--root", type=Path, default=HERE / "downloads",
                        help="where the images lie or are put (default: data/downloads)")
    parser.add_argument("--out", type=Path, default=HERE,
                        help="where <NAME>/dataset.json is written (default: data)")
    args = parser.parse_args(argv)
    root = args.root.resolve()
    out = args.out.resolve()
    root.mkdir(parents=True, exist_ok=True)
    # As dataset.json names the root: relative if both are one folder, which can then be moved.
    images = ".." if out == root else str(root)
    failed = []
    # In the order of the tables: imagenet before its domains.
    for name in sorted(args.names, key=list(known).index):
        convert = add_shift if name in SHIFTS else prepare
        try:
            convert(name, root, out, images)
        except Exception as error:  # no network, a dead link, a broken archive, a missing file
            folder = root / known[name].folders[0]
            advice = f"The images belong in {folder}/: get {known[name].manual}"
            print(f"error: {name}: {error}\n  {advice}", file=sys.stderr)
            failed.append(name)
    if failed:
        sys.exit(f"not prepared: {', '.join(failed)}")


if __name__ == "__main__":
    main()
