"""Converts public data sets to mini-coop's format: <name>/dataset.json, which lists the images.

    python data/prepare.py eurosat dtd oxford_pets
    python data/prepare.py imagenet imagenetv2 --root /data

The first line downloads what can still be downloaded, and says what to do by hand for the rest.
The second uses images that are already below --root, in the layout of the published code.

Splits, class names and templates are those of the paper. A file is written only if all counts are
right. The shifts (imagenetv2, imagenet_sketch, imagenet_a, imagenet_r) become domains of imagenet,
which has to be prepared first.
"""

import argparse
import hashlib
import json
import os
import sys
import urllib.request
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
COOP = "https://github.com/KaiyangZhou/CoOp"
OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"
# The published split files, from a fixed commit of a repository under the MIT licence.
SPLITS = ("https://raw.githubusercontent.com/linzhiqiu/cross_modal_adaptation/"
          "ac9077ee4e422f768c9b9109551468605e33ec9a/splits/")


class Source(NamedTuple):
    """One data set.

    images       where its images lie below the root: in the published layout, in torchvision's
    split        its split file, which belongs in the first folder of images[0]
    check        the split file's SHA-256, or git's hash of it ("blob ...")
    counts       the number of images in train, val and test
    torchvision  torchvision's class that downloads it, where there is one
    manual       what to get by hand
    """

    images: tuple
    classes: int
    counts: tuple
    template: str
    manual: str
    split: str = ""
    check: str = ""
    torchvision: str = ""


SOURCES = {
    "caltech101": Source(
        images=("caltech-101/101_ObjectCategories", "caltech101/101_ObjectCategories"),
        split="split_zhou_Caltech101.json", classes=100, counts=(4128, 1649, 2465),
        check="52ce83205ff8ff8a1a18119aad6376120ae35c36e783a984bc560cbf10e73fa5",
        template="a photo of a {}.", torchvision="Caltech101",
        manual="the class folders of 101_ObjectCategories.tar.gz from "
               "https://data.caltech.edu/records/mzrjq-6wc02"),
    "oxford_pets": Source(
        images=("oxford_pets/images", "oxford-iiit-pet/images"),
        split="split_zhou_OxfordPets.json", classes=37, counts=(2944, 736, 3669),
        check="d7f3ffe65b3919f95132e51422894ae18686b83c331fd8c0adcdc3dc2de6301e",
        template="a photo of a {}, a type of pet.", torchvision="OxfordIIITPet",
        manual=f"the images of images.tar.gz from {OXFORD}/pets/"),
    "stanford_cars": Source(
        images=("stanford_cars",),
        split="split_zhou_StanfordCars.json", classes=196, counts=(6509, 1635, 8041),
        check="40acee7aa65c8e4727a32d90e884b7c3f8960b523422317e163f7af65432959d",
        template="a photo of a {}.",
        manual="the folders cars_train/ and cars_test/ (the original link is dead, mirrors exist "
               "on Kaggle) and the file split_zhou_StanfordCars.json"),
    "flowers102": Source(
        images=("oxford_flowers/jpg", "flowers-102/jpg"),
        split="split_zhou_OxfordFlowers.json", classes=102, counts=(4093, 1633, 2463),
        check="2f50c42fc1a17ca13c271cb4269b1347bdb43d2be672e34f74a4e4cbfbcca794",
        template="a photo of a {}, a type of flower.", torchvision="Flowers102",
        manual=f"the images of 102flowers.tgz from {OXFORD}/flowers/102/"),
    "food101": Source(
        images=("food-101/images",),
        split="split_zhou_Food101.json", classes=101, counts=(50500, 20200, 30300),
        check="blob 39557040ee6501bd32aa8b5dfd75f7941a32f0a7",
        template="a photo of {}, a type of food.", torchvision="Food101",
        manual="the class folders of food-101.tar.gz from "
               "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/"),
    "sun397": Source(
        images=("sun397/SUN397",),
        split="split_zhou_SUN397.json", classes=397, counts=(15880, 3970, 19850),
        check="blob 8d5725db8f70bcf02245665304f863e68f96a24c",
        template="a photo of a {}.",
        manual="the folders of SUN397.tar.gz from https://vision.princeton.edu/projects/2010/SUN/ "
               "(torchvision's link answers 404)"),
    "dtd": Source(
        images=("dtd/images", "dtd/dtd/images"),
        split="split_zhou_DescribableTextures.json", classes=47, counts=(2820, 1128, 1692),
        check="f26ebeccd2b58e68d70f07a0dc39fe49bf7b69024bac34396b954dfd87969c38",
        template="{} texture.", torchvision="DTD",
        manual=f"the class folders of dtd-r1.0.1.tar.gz from {OXFORD}/dtd/"),
    "eurosat": Source(
        images=("eurosat/2750",),
        split="split_zhou_EuroSAT.json", classes=10, counts=(13500, 5400, 8100),
        check="541503a77d0b26b735d85ec7a3e672804fe0aa466c2e5f07da772cc6c0af8ad2",
        template="a centered satellite photo of {}.", torchvision="EuroSAT",
        manual="the class folders of EuroSAT.zip from https://github.com/phelber/EuroSAT"),
    "ucf101": Source(
        images=("ucf101/UCF-101-midframes",),
        split="split_zhou_UCF101.json", classes=101, counts=(7639, 1898, 3783),
        check="d78cb834f7c5792ceaff2c5ee2d7c76a9e4086e48a3a6b01232989d29cbefdd8",
        template="a photo of a person doing {}.",
        manual="the class folders of UCF-101-midframes.zip, the middle frame of each video (linked "
               f"in DATASETS.md of {COOP})"),
    "fgvc_aircraft": Source(
        images=("fgvc_aircraft", "fgvc-aircraft-2013b/data"),
        classes=100, counts=(3334, 3333, 3333),
        template="a photo of a {}, a type of aircraft.", torchvision="FGVCAircraft",
        manual="images/, variants.txt and images_variant_{train,val,test}.txt of "
               f"fgvc-aircraft-2013b.tar.gz, from {OXFORD}/fgvc-aircraft/"),
    "imagenet": Source(
        images=("imagenet/images",),
        classes=1000, counts=(1281167, 0, 50000),
        template="a photo of a {}.",
        manual="train/<wnid>/*.JPEG and val/<wnid>/*.JPEG from https://image-net.org, and beside "
               "that folder classnames.txt (lines 'wnid name', linked in DATASETS.md of "
               f"{COOP})"),
}


class Shift(NamedTuple):
    """A test set under distribution shift; `unpack` says how to get `folder` from its archive."""

    folder: str
    images: int
    classes: int
    address: str
    unpack: str = "unpack it there"


SHIFTS = {
    "imagenetv2": Shift("imagenetv2/imagenetv2-matched-frequency-format-val", 10000, 1000,
                        "https://github.com/modestyachts/ImageNetV2"),
    "imagenet_sketch": Shift("imagenet-sketch/images", 50889, 1000,
                             "https://github.com/HaohanWang/ImageNet-Sketch",
                             "move or rename its folder sketch/ to imagenet-sketch/images"),
    "imagenet_a": Shift("imagenet-adversarial/imagenet-a", 7500, 200,
                        "https://github.com/hendrycks/natural-adv-examples"),
    "imagenet_r": Shift("imagenet-rendition/imagenet-r", 30000, 200,
                        "https://github.com/hendrycks/imagenet-r"),
}


class Unprepared(Exception):
    """Says in one message what is missing or wrong, and what to do about it."""


# ---------------------------------------------------------------- finding and reading


def needed(source, root):
    """What to get by hand, and where to put it."""
    return f"Needed in {root / source.images[0]}/: {source.manual}"


def find_images(name, source, root):
    """The folder of the images below `root`; downloads them if torchvision still can."""
    folders = [root / folder for folder in source.images]
    if source.torchvision and not any(folder.is_dir() for folder in folders):
        from torchvision import datasets

        print(f"{name}: downloading through torchvision to {root}", flush=True)
        try:
            getattr(datasets, source.torchvision)(str(root), download=True)
        # Any of a dozen errors: no network, a dead link, a missing gdown, a broken archive.
        except Exception as error:
            raise Unprepared(f"{name}: the download failed ({type(error).__name__}: {error}). "
                             f"{needed(source, root)}") from error
    for folder in folders:
        if folder.is_dir():
            return folder
    raise Unprepared(f"{name}: no images under {root}. {needed(source, root)}")


def digest(content, like):
    """SHA-256; if `like` starts with "blob", git's hash, which repository listings show."""
    if like.startswith("blob"):
        return "blob " + hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return hashlib.sha256(content).hexdigest()


def read_split(name, source, root):
    """The published split file, {"train": [[path, label, class name], ...], "val": ...}.

    Read from the data set's folder or from <root>/splits, else downloaded and kept.
    """
    own = root / source.images[0].split("/")[0] / source.split
    shared = root / "splits" / source.split
    url = SPLITS + source.split
    path = next((p for p in (own, shared) if p.is_file()), None)
    if path:
        content = path.read_bytes()
    else:
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                content = answer.read()
        except OSError as error:
            raise Unprepared(f"{name}: could not download the split file ({error}). "
                             f"Put it there by hand: {own} (from {url})") from error
    found = digest(content, source.check)
    if found != source.check:
        raise Unprepared(f"{name}: {path or url} is not the published split file: "
                         f"its hash is {found}, expected {source.check}")
    # Keep a downloaded file only now that it is known to be right.
    if not path:
        own.parent.mkdir(parents=True, exist_ok=True)
        write_whole(own, content)
    return json.loads(content)


def read_aircraft(folder):
    """FGVC-Aircraft's own variant lists, in the form of a split file."""
    variants = (folder / "variants.txt").read_text(encoding="utf-8").splitlines()
    splits = {"train": [], "val": [], "test": []}
    for split, rows in splits.items():
        text = (folder / f"images_variant_{split}.txt").read_text(encoding="utf-8")
        for line in text.splitlines():
            image, variant = line.split(" ", 1)
            rows.append([f"images/{image}.jpg", variants.index(variant), variant])
    return splits


def imagenet_names(root):
    """{wnid: class name} in the order of classnames.txt, which must be sorted by wnid."""
    path = root / "imagenet/classnames.txt"
    cure = f"Put the published file there (linked in DATASETS.md, section ImageNet, of {COOP})"
    if not path.is_file():
        raise Unprepared(f"imagenet: {path} is missing. {cure}; its lines are 'wnid name'")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [line.strip().split(" ", 1) for line in lines if line.strip()]
        names = dict(rows)
    except (OSError, ValueError) as error:
        raise Unprepared(f"imagenet: {path} cannot be read as lines 'wnid name' ({error}). "
                         f"{cure}") from error
    # Labels, and ImageNetV2's folder numbers, are positions in the order sorted by wnid.
    wnids = [row[0] for row in rows]
    if wnids != sorted(wnids):
        raise Unprepared(f"imagenet: the lines of {path} are not sorted by wnid, as labels and "
                         f"ImageNetV2's folder numbers are. {cure}, or sort its lines")
    return names


def class_folders(folder, label_of):
    """[[path, label], ...] of the images in the class folders of `folder`, in order."""
    rows = []
    for sub in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        label = label_of(sub.name)
        if label is None:
            raise Unprepared(f"{folder} holds a folder {sub.name!r} that is no class of ImageNet")
        images = sorted(image for image in os.listdir(sub) if not image.startswith("."))
        rows += [[f"{sub.name}/{image}", label] for image in images]
    return rows


def read_imagenet(folder, root):
    """ImageNet's folders, in the form of a split file; its validation images are the test set."""
    names = imagenet_names(root)
    labels = {wnid: label for label, wnid in enumerate(names)}
    splits = {"train": [], "val": [], "test": []}
    for split, part in (("train", "train"), ("test", "val")):
        for path, label in class_folders(folder / part, labels.get):
            wnid = path.split("/")[0]
            splits[split].append([f"{part}/{path}", label, names[wnid]])
    return splits


def read_splits(name, source, folder, root):
    """{"train": [[path below `folder`, label, class name], ...], "val": ..., "test": ...}"""
    try:
        if name == "imagenet":
            return read_imagenet(folder, root)
        if source.split:
            return read_split(name, source, root)
        return read_aircraft(folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Unprepared(f"{name}: {error.filename} is missing. {needed(source, root)}") from error
    except (ValueError, KeyError) as error:
        raise Unprepared(f"{name}: a list of {folder} cannot be read ({error})") from error


# ---------------------------------------------------------------- checking


def check_counts(name, counts, expected, where):
    if counts != expected:
        raise Unprepared(f"{name}: {where} gives {counts}, expected {expected}: an incomplete or "
                         "changed copy? Remove it and unpack it again")


def check_images(name, source, folder, root, splits):
    """Raises Unprepared if an image that the split names is not there."""
    paths = []
    for rows in splits.values():
        paths += [row[0] for row in rows]
    missing = [path for path in paths if not (folder / path).is_file()]
    if not missing:
        return
    cure = f"Remove {folder} and run this again, or unpack it again"
    if not source.torchvision:
        cure = needed(source, root)
    raise Unprepared(f"{name}: {len(missing)} of {len(paths)} images that the split names are not "
                     f"under {folder}, first {', '.join(missing[:3])}: a half-unpacked archive? "
                     f"{cure}")


# ---------------------------------------------------------------- writing


def write_whole(path, content):
    """Writes a file completely or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_dataset(folder, data):
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "dataset.json", json.dumps(data, ensure_ascii=False).encode())


def images_root(root, out, name):
    """The root as dataset.json names it: relative if `out` is the root, so that it can be moved."""
    return os.path.relpath(root, out / name) if out == root else str(root)


def old_domains(path, images):
    """{"domains": ...} of a dataset.json written before, if its images lie under the same root."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        if before["images"] == images:
            return {"domains": before["domains"]}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {}


def prepare(name, source, root, out):
    """Writes <out>/<name>/dataset.json, or raises Unprepared."""
    folder = find_images(name, source, root)
    splits = read_splits(name, source, folder, root)
    # Nothing is written unless the counts are right and every image is there.
    counts = tuple(len(splits[split]) for split in ("train", "val", "test"))
    classnames = {}
    for rows in splits.values():
        classnames |= {label: classname for _, label, classname in rows}
    check_counts(name, {"train, val, test": counts, "classes": len(classnames)},
                 {"train, val, test": source.counts, "classes": source.classes}, "the split")
    # ImageNet's lists were just read from its folders, so its images are there.
    if name != "imagenet":
        check_images(name, source, folder, root, splits)
    # Paths are stored relative to the root.
    below = folder.relative_to(root).as_posix()
    stored = {}
    for split, rows in splits.items():
        stored[split] = [[f"{below}/{path}", label] for path, label, _ in rows]
    path = out / name / "dataset.json"
    images = images_root(root, out, name)
    data = {"format": 1, "name": name, "template": source.template,
            "classnames": [classnames[label] for label in sorted(classnames)],
            "images": images, "splits": stored, **old_domains(path, images)}
    write_dataset(out / name, data)
    print(f"{name}: {source.classes} classes, "
          f"train / val / test {' / '.join(map(str, counts))} -> {path}")


def add_shift(name, root, out):
    """Adds a domain to <out>/imagenet/dataset.json, or raises Unprepared."""
    shift = SHIFTS[name]
    folder = root / shift.folder
    path = out / "imagenet/dataset.json"
    if not path.is_file():
        raise Unprepared(f"{name} is a domain of imagenet: prepare imagenet first "
                         f"({path} is not there)")
    if not folder.is_dir():
        raise Unprepared(f"{name}: no folder {folder}. Get it from {shift.address} and "
                         f"{shift.unpack}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        images = data["images"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Unprepared(f"{name}: {path} cannot be read ({error}): "
                         "prepare imagenet again") from error
    if images != images_root(root, out, "imagenet"):
        raise Unprepared(f"{name}: imagenet was prepared with --root {images}, "
                         "so its domains must lie there too")
    # ImageNetV2's folders are called 0 to 999, those of the other shifts by wnid.
    label_of = {wnid: label for label, wnid in enumerate(imagenet_names(root))}.get
    if name == "imagenetv2":
        label_of = folder_number
    rows = class_folders(folder, label_of)
    n_classes = len({label for _, label in rows})
    check_counts(name, {"images": len(rows), "classes": n_classes},
                 {"images": shift.images, "classes": shift.classes}, folder)
    domains = data.setdefault("domains", {})
    domains[name] = [[f"{shift.folder}/{image}", label] for image, label in rows]
    write_dataset(out / "imagenet", data)
    print(f"{name}: {shift.images} images of {shift.classes} classes, a domain of {path}")


def folder_number(folder):
    return int(folder) if folder.isdecimal() and int(folder) < 1000 else None


def main(argv=None):
    names = [*SOURCES, *SHIFTS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--root", type=Path, default=HERE / "downloads",
                        help="where the images lie or are put (default: data/downloads)")
    parser.add_argument("--out", type=Path, default=HERE,
                        help="where <NAME>/dataset.json is written (default: data; "
                             "for a shared folder, the root itself)")
    args = parser.parse_args(argv)
    root = args.root.resolve()
    out = args.out.resolve()
    if args.root == HERE / "downloads":
        root.mkdir(exist_ok=True)
    elif not root.is_dir():
        parser.error(f"--root {args.root} is no folder")
    failed = []
    # In the order of the tables: imagenet before its domains.
    for name in sorted(args.names, key=names.index):
        try:
            if name in SHIFTS:
                add_shift(name, root, out)
            else:
                prepare(name, SOURCES[name], root, out)
        except (Unprepared, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            failed.append(name)
    if failed:
        sys.exit(f"not prepared: {', '.join(failed)}")


if __name__ == "__main__":
    main()
