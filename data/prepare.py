"""Turns a public data set into mini-coop's one form: <name>/dataset.json, pointing at its images.

    python data/prepare.py eurosat dtd oxford_pets              downloads where a link lives, tells what to do where none does
    python data/prepare.py imagenet imagenetv2 --root /data     uses what lies under --root in the published code's layout

Splits, class names and templates are the paper's; counts are checked, and nothing is written unless they are right. The shifts
(imagenetv2, imagenet_sketch, imagenet_a, imagenet_r) become domains of imagenet, which has to be prepared first.
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
# The published split files, as they stand in this repository (MIT)
SPLITS = "https://raw.githubusercontent.com/linzhiqiu/cross_modal_adaptation/ac9077ee4e422f768c9b9109551468605e33ec9a/splits/"


class Source(NamedTuple):
    """A data set. images: where below the root they lie, in the published code's layout and in torchvision's. split: the split file,
    in the first folder of `images`. check: its SHA-256, or git's own hash of it ("blob ..."). counts: train, val, test."""

    images: tuple
    split: str
    check: str
    classes: int
    counts: tuple
    template: str
    torchvision: str = ""
    manual: str = ""


CARS = "cars_train/ and cars_test/ of Stanford Cars (cars_train.tgz, cars_test.tgz; the original link is dead, mirrors exist on Kaggle)"
SOURCES = {
    "caltech101": Source(
        ("caltech-101/101_ObjectCategories", "caltech101/101_ObjectCategories"),
        "split_zhou_Caltech101.json",
        "52ce83205ff8ff8a1a18119aad6376120ae35c36e783a984bc560cbf10e73fa5",
        100,
        (4128, 1649, 2465),
        "a photo of a {}.",
        "Caltech101",
        "101_ObjectCategories.tar.gz from https://data.caltech.edu/records/mzrjq-6wc02",
    ),
    "oxford_pets": Source(
        ("oxford_pets/images", "oxford-iiit-pet/images"),
        "split_zhou_OxfordPets.json",
        "d7f3ffe65b3919f95132e51422894ae18686b83c331fd8c0adcdc3dc2de6301e",
        37,
        (2944, 736, 3669),
        "a photo of a {}, a type of pet.",
        "OxfordIIITPet",
        "images.tar.gz from https://www.robots.ox.ac.uk/~vgg/data/pets/",
    ),
    "stanford_cars": Source(
        ("stanford_cars",),
        "split_zhou_StanfordCars.json",
        "40acee7aa65c8e4727a32d90e884b7c3f8960b523422317e163f7af65432959d",
        196,
        (6509, 1635, 8041),
        "a photo of a {}.",
        "",
        CARS,
    ),
    "flowers102": Source(
        ("oxford_flowers/jpg", "flowers-102/jpg"),
        "split_zhou_OxfordFlowers.json",
        "2f50c42fc1a17ca13c271cb4269b1347bdb43d2be672e34f74a4e4cbfbcca794",
        102,
        (4093, 1633, 2463),
        "a photo of a {}, a type of flower.",
        "Flowers102",
        "102flowers.tgz from https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
    ),
    "food101": Source(
        ("food-101/images",),
        "split_zhou_Food101.json",
        "blob 39557040ee6501bd32aa8b5dfd75f7941a32f0a7",
        101,
        (50500, 20200, 30300),
        "a photo of {}, a type of food.",
        "Food101",
        "food-101.tar.gz from https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
    ),
    "sun397": Source(
        ("sun397/SUN397",),
        "split_zhou_SUN397.json",
        "blob 8d5725db8f70bcf02245665304f863e68f96a24c",
        397,
        (15880, 3970, 19850),
        "a photo of a {}.",
        "",
        "SUN397.tar.gz (https://vision.princeton.edu/projects/2010/SUN/; torchvision's link answers 404)",
    ),
    "dtd": Source(
        ("dtd/images", "dtd/dtd/images"),
        "split_zhou_DescribableTextures.json",
        "f26ebeccd2b58e68d70f07a0dc39fe49bf7b69024bac34396b954dfd87969c38",
        47,
        (2820, 1128, 1692),
        "{} texture.",
        "DTD",
        "dtd-r1.0.1.tar.gz from https://www.robots.ox.ac.uk/~vgg/data/dtd/",
    ),
    "eurosat": Source(
        ("eurosat/2750",),
        "split_zhou_EuroSAT.json",
        "541503a77d0b26b735d85ec7a3e672804fe0aa466c2e5f07da772cc6c0af8ad2",
        10,
        (13500, 5400, 8100),
        "a centered satellite photo of {}.",
        "EuroSAT",
        "EuroSAT.zip from https://github.com/phelber/EuroSAT",
    ),
    "ucf101": Source(
        ("ucf101/UCF-101-midframes",),
        "split_zhou_UCF101.json",
        "d78cb834f7c5792ceaff2c5ee2d7c76a9e4086e48a3a6b01232989d29cbefdd8",
        101,
        (7639, 1898, 3783),
        "a photo of a person doing {}.",
        "",
        "UCF-101-midframes.zip, the middle frame of each video (linked in DATASETS.md of https://github.com/KaiyangZhou/CoOp)",
    ),
    "fgvc_aircraft": Source(
        ("fgvc_aircraft", "fgvc-aircraft-2013b/data"),
        "",
        "",
        100,
        (3334, 3333, 3333),
        "a photo of a {}, a type of aircraft.",
        "FGVCAircraft",
        "images/, variants.txt and images_variant_{train,val,test}.txt of fgvc-aircraft-2013b.tar.gz, from "
        "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
    ),
    "imagenet": Source(
        ("imagenet/images",),
        "",
        "",
        1000,
        (1281167, 0, 50000),
        "a photo of a {}.",
        "",
        "train/<wnid>/*.JPEG and val/<wnid>/*.JPEG from https://image-net.org, and beside images/ the file classnames.txt (lines "
        "'wnid name', from https://github.com/KaiyangZhou/CoOp, DATASETS.md)",
    ),
}
SHIFTS = {  # folder, images, classes, where it is had
    "imagenetv2": (
        "imagenetv2/imagenetv2-matched-frequency-format-val",
        10000,
        1000,
        "https://github.com/modestyachts/ImageNetV2",
    ),
    "imagenet_sketch": (
        "imagenet-sketch/images",
        50889,
        1000,
        "https://github.com/HaohanWang/ImageNet-Sketch",
    ),
    "imagenet_a": (
        "imagenet-adversarial/imagenet-a",
        7500,
        200,
        "https://github.com/hendrycks/natural-adv-examples",
    ),
    "imagenet_r": (
        "imagenet-rendition/imagenet-r",
        30000,
        200,
        "https://github.com/hendrycks/imagenet-r",
    ),
}


class Unprepared(Exception):
    """What is missing or wrong, and the cure, in one message."""


def find_images(name, source, root):
    """The folder of the images below `root`; downloads them through torchvision where that has a living link."""

    def found():
        return next((root / folder for folder in source.images if (root / folder).is_dir()), None)

    place = f"unpack it so that {root / source.images[0]} holds it"
    if found() is None and source.torchvision:
        from torchvision import datasets

        print(f"{name}: downloading through torchvision to {root}", flush=True)
        try:
            getattr(datasets, source.torchvision)(str(root), download=True)
        except (
            Exception
        ) as error:  # any of a dozen: no network, a dead link, a missing gdown, a broken archive
            raise Unprepared(
                f"{name}: the download failed ({type(error).__name__}: {error}). By hand: {source.manual}; {place}"
            ) from error
    if found() is None:
        raise Unprepared(f"{name}: no images under {root}. Needed: {source.manual}; {place}")
    return found()


def digest(content, like):
    """SHA-256, or, where `like` starts with "blob", git's hash of the file, which a repository's listing tells without the file."""
    return (
        "blob " + hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if like.startswith("blob")
        else hashlib.sha256(content).hexdigest()
    )


def read_split(name, source, root):
    """The published split file: in the data set's folder or <root>/splits, else downloaded; {"train": [[path, label, name], ...], ...}."""
    own = root / source.images[0].split("/")[0] / source.split
    path = next((p for p in (own, root / "splits" / source.split) if p.is_file()), None)
    if path:
        content = path.read_bytes()
    else:
        try:
            with urllib.request.urlopen(SPLITS + source.split, timeout=60) as answer:
                content = answer.read()
        except OSError as error:
            raise Unprepared(
                f"{name}: could not download the split file ({error}). Put it there by hand: {own} (from {SPLITS + source.split})"
            ) from error
    if (got := digest(content, source.check)) != source.check:
        raise Unprepared(
            f"{name}: {path or SPLITS + source.split} is not the published split file: its hash is {got}, expected {source.check}"
        )
    if not path:
        own.parent.mkdir(parents=True, exist_ok=True)
        write_whole(own, content)
    return json.loads(content)


def write_whole(path, content):
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def aircraft(folder):
    """FGVCAircraft's own variant splits -> the form of a split file."""
    names = (folder / "variants.txt").read_text(encoding="utf-8").splitlines()
    splits = {}
    for split in ("train", "val", "test"):
        rows = [
            line.split(" ", 1)
            for line in (folder / f"images_variant_{split}.txt")
            .read_text(encoding="utf-8")
            .splitlines()
        ]
        splits[split] = [
            [f"images/{image}.jpg", names.index(variant), variant] for image, variant in rows
        ]
    return splits


def imagenet_names(root):
    """wnid -> name, in the order of classnames.txt."""
    lines = (root / "imagenet/classnames.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.strip().split(" ", 1) for line in lines if line.strip())


def class_folders(folder, label_of):
    """[[path, label]] of the images in `folder`/<class folder>/, in order; a class folder that label_of does not know is an error."""
    rows = []
    for sub in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        if (label := label_of(sub.name)) is None:
            raise Unprepared(f"{folder} holds a folder {sub.name!r} that is no class of ImageNet")
        rows += [
            [f"{sub.name}/{image}", label]
            for image in sorted(os.listdir(sub))
            if not image.startswith(".")
        ]
    return rows


def check_counts(name, counts, expected, where):
    if counts != expected:
        raise Unprepared(
            f"{name}: {where} gives {counts}, expected {expected}: an incomplete or changed copy? Remove it and unpack it again"
        )


def prepare(name, source, root, out):
    """Writes <out>/<name>/dataset.json, or raises Unprepared."""
    folder = find_images(name, source, root)
    try:
        if name == "imagenet":
            names = imagenet_names(root)
            wnids = sorted(names)
            labels = {wnid: label for label, wnid in enumerate(wnids)}
            splits = {"train": [], "val": [], "test": []}
            for split, part in (("train", "train"), ("test", "val")):
                splits[split] = [
                    [f"{part}/{path}", label, names[wnids[label]]]
                    for path, label in class_folders(folder / part, labels.get)
                ]
        else:
            splits = read_split(name, source, root) if source.split else aircraft(folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Unprepared(f"{name}: {error.filename} is missing. Needed: {source.manual}") from error
    except (ValueError, KeyError) as error:
        raise Unprepared(f"{name}: a list of {folder} cannot be read ({error})") from error
    counts = tuple(len(splits[s]) for s in ("train", "val", "test"))
    classnames = {label: classname for rows in splits.values() for _, label, classname in rows}
    check_counts(
        name,
        {"train, val, test": counts, "classes": len(classnames)},
        {"train, val, test": source.counts, "classes": source.classes},
        "the split",
    )
    if name != "imagenet":  # whose lists were just read off the folders
        missing = [
            path for rows in splits.values() for path, *_ in rows if not (folder / path).is_file()
        ]
        if missing:
            raise Unprepared(
                f"{name}: {len(missing)} of {sum(counts)} images that the split names are not under {folder}, first "
                f"{', '.join(missing[:3])}: a half-unpacked archive? Remove {folder} and run this again, or unpack it again"
            )
    below = folder.relative_to(root).as_posix()
    data = {
        "format": 1,
        "name": name,
        "template": source.template,
        "classnames": [classnames[k] for k in sorted(classnames)],
        "images": where(root, out, name),
        "splits": {
            s: [[f"{below}/{path}", label] for path, label, _ in rows] for s, rows in splits.items()
        },
    }
    try:  # domains that were added before stay, if their images lie under the same root
        before = json.loads((out / name / "dataset.json").read_text(encoding="utf-8"))
        data |= {"domains": before["domains"]} if before["images"] == data["images"] else {}
    except (OSError, ValueError, KeyError):
        pass
    write(out / name, data)
    print(
        f"{name}: {source.classes} classes, train / val / test {' / '.join(map(str, counts))} -> {out / name / 'dataset.json'}"
    )


def where(root, out, name):
    """The images' root as dataset.json says it: relative where the file lies under the root itself, so that the folder can be mounted anywhere."""
    return os.path.relpath(root, out / name) if out == root else str(root)


def write(folder, data):
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "dataset.json", json.dumps(data, ensure_ascii=False).encode())


def add_shift(name, root, out):
    """Adds a domain to <out>/imagenet/dataset.json."""
    below, n_images, n_classes, address = SHIFTS[name]
    if not (out / "imagenet/dataset.json").is_file():
        raise Unprepared(
            f"{name} is a domain of imagenet: prepare imagenet first ({out / 'imagenet/dataset.json'} is not there)"
        )
    if not (root / below).is_dir():
        raise Unprepared(
            f"{name}: no folder {root / below}. Get it from {address} and unpack it there"
        )
    try:
        data = json.loads((out / "imagenet/dataset.json").read_text(encoding="utf-8"))
        if data["images"] != where(root, out, "imagenet"):
            raise Unprepared(
                f"{name}: imagenet was prepared with --root {data['images']}, so its domains must lie there too"
            )
        labels = {wnid: label for label, wnid in enumerate(sorted(imagenet_names(root)))}
    except (OSError, ValueError, KeyError) as error:
        raise Unprepared(
            f"{name}: {out / 'imagenet/dataset.json'} or classnames.txt cannot be read ({error}): prepare imagenet again"
        ) from error
    rows = class_folders(
        root / below,
        (lambda folder: int(folder) if folder.isdecimal() else None)
        if name == "imagenetv2"
        else labels.get,
    )
    check_counts(
        name,
        {"images": len(rows), "classes": len({label for _, label in rows})},
        {"images": n_images, "classes": n_classes},
        root / below,
    )
    data.setdefault("domains", {})[name] = [[f"{below}/{path}", label] for path, label in rows]
    write(out / "imagenet", data)
    print(
        f"{name}: {n_images} images of {n_classes} classes, a domain of {out / 'imagenet/dataset.json'}"
    )


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names",
        nargs="+",
        choices=[*SOURCES, *SHIFTS],
        metavar="NAME",
        help=", ".join([*SOURCES, *SHIFTS]),
    )
    parser.add_argument(
        "--root",
        type=Path,
        default=HERE / "downloads",
        help="where the images lie or are put (default: data/downloads)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=HERE,
        help="where <NAME>/dataset.json is written (default: data; the root itself, for a shared folder)",
    )
    args = parser.parse_args(argv)
    root, out, failed = args.root.resolve(), args.out.resolve(), []
    if args.root == HERE / "downloads":
        root.mkdir(exist_ok=True)
    elif not root.is_dir():
        parser.error(f"--root {args.root} is no folder")
    for name in sorted(
        args.names, key=list([*SOURCES, *SHIFTS]).index
    ):  # imagenet before its domains
        try:
            add_shift(name, root, out) if name in SHIFTS else prepare(
                name, SOURCES[name], root, out
            )
        except Unprepared as error:
            print(f"error: {error}", file=sys.stderr)
            failed.append(name)
    if failed:
        sys.exit(f"not prepared: {', '.join(failed)}")


if __name__ == "__main__":
    main()
