"""Data sets and images, as mini_coop.py reads them: `mini_coop.datasets` is this file.

One form on disk for all, documented in data/README.md, and plain folders of images; few-shot samples; features kept on disk.
"""
import functools
import hashlib
import json
import math
import os
import random
import re
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageOps

DATA = Path(__file__).resolve().parent
SHARED = Path(os.environ.get("MINI_COOP_ROOT") or DATA)  # a lab's folder: clip/*.pt, <data set>/
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}


class Split(NamedTuple):
    """Images (paths; inside an archive: archive.zip/name.png) and their labels, a list of class indices."""
    images: list
    labels: list


class Dataset(NamedTuple):
    """What load_dataset gives. `domains` are further test sets of the same classes, by name."""
    name: str
    classnames: list
    template: str
    train: Split
    val: Split
    test: Split
    domains: dict


def load_dataset(name_or_folder):
    """Reads a Dataset; images are opened only when they are encoded.

    name_or_folder: the name of a folder in data/ or in $MINI_COOP_ROOT, or the path of a folder that holds either dataset.json
    (the form is in data/README.md) or one folder a class, `root/<class name>/*.jpg`, with or without `train/`, `val/`, `test/`
    above. Without them each class's images are dealt 50 / 20 / 30 by a fixed seed, as the paper does where there are no splits.
    A known name goes before a folder of the same name here: write "./actions" for that.
    Raises ValueError for an unknown name, a folder without images, and a dataset.json that is broken or names missing files.
    """
    known = {p.parent.name: p.parent for place in (SHARED, DATA) for p in sorted(place.glob("*/dataset.json"))}
    folder = known.get(str(name_or_folder), Path(name_or_folder))
    if not folder.is_dir():
        raise ValueError(f"no data set {str(name_or_folder)!r}: neither a folder nor one of {', '.join(sorted(known))}")
    file, parts = folder / "dataset.json", ("train", "val", "test")
    if not file.exists():
        return _image_folder(folder, parts)
    try:
        data = json.loads(file.read_text(encoding="utf-8-sig"))
        if data.get("format", 1) != 1:
            raise ValueError(f"format {data['format']!r}, but this version reads 1: prepare it again")
        classnames, template, domains = data["classnames"], data["template"], data.get("domains", {})
        root, K = folder / data.get("images", "."), len(classnames)
        if wrong := set(data["splits"]) - set(parts) or set(domains) & set(parts):
            raise ValueError(f"splits are train, val and test, domains have other names; {', '.join(sorted(wrong))} is neither")
        splits = {name: Split([root / image for image, _ in rows], [label for _, label in rows])
                  for name, rows in [*data["splits"].items(), *domains.items()]}
        if not isinstance(template, str) or "{}" not in template:
            raise ValueError("the template must be a text with {} in it")
        if not isinstance(classnames, list) or not classnames or not all(isinstance(name, str) for name in classnames):
            raise ValueError("the class names must be a list of texts")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{file} is not in our form (data/README.md): {type(error).__name__} {error}") from error
    inside = {root / name for name in zipfile.ZipFile(root).namelist()} if zipfile.is_zipfile(root) else None
    for name, (images, labels) in splits.items():
        if missing := [path for path in images if not (path.is_file() if inside is None else path in inside)]:
            raise ValueError(f"{folder}: {len(missing)} of {len(images)} images of {name!r} are missing, first {missing[0]}")
        if wrong := [label for label in labels if type(label) is not int or not 0 <= label < K]:
            raise ValueError(f"{folder}: label {wrong[0]!r} in {name!r}, but there are {K} classes (0 to {K - 1})")
    return Dataset(folder.resolve().name, classnames, template, *(splits.get(part, Split([], [])) for part in parts),
                   {name: splits[name] for name in domains})


def _image_folder(root, parts):
    def images_of(folder):  # none where there is no such folder
        return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES
                      and not any(name.startswith((".", "__MACOSX")) for name in path.relative_to(root).parts))

    given = any(images_of(folder) for part in parts for folder in (root / part).glob("*"))
    tops = [root / part for part in parts] if given else [root]
    classes = sorted({folder.name for top in tops for folder in top.glob("*") if images_of(folder)})
    if not classes:
        raise ValueError(f"{root} holds no images: expected {root}/<class name>/*.jpg, or train/, val/, test/ above the class folders")
    splits = [Split([], []) for _ in parts]
    for label, name in enumerate(classes):
        if given:
            dealt = [images_of(root / part / name) for part in parts]
        else:
            images = images_of(root / name)
            random.Random(0).shuffle(images)
            a, b = math.ceil(0.5 * len(images)), math.ceil(0.7 * len(images))
            dealt = images[:a], images[a:b], images[b:]
        for (split_images, split_labels), images in zip(splits, dealt):
            split_images += images
            split_labels += [label] * len(images)
    for part, split in zip(parts, splits):
        without = [name for label, name in enumerate(classes) if label not in split.labels]
        if without and part != "val":
            warnings.warn(f"{root}: no {part} images of {len(without)} of {len(classes)} classes: {', '.join(without[:5])}", stacklevel=3)
    if ignored := [folder.name for folder in root.glob("*") if given and folder.name not in parts and images_of(folder)]:
        warnings.warn(f"{root}: beside train, val and test these folders are not read: {', '.join(ignored[:5])}", stacklevel=3)
    if nested := [name for name in classes if not given and name.lower().startswith(("train", "val", "test"))
                  and all(image.parent.name != name for image in images_of(root / name))]:
        warnings.warn(f"{root}: {', '.join(nested)} read as classes; if they are splits, call them train, val and test", stacklevel=3)
    return Dataset(root.resolve().name, classes, "a photo of a {}.", *splits, {})


def few_shot(train_labels, shots, seed, val_labels=None):
    """The published few-shot sample: `shots` images a class (all of them, with a warning, where there are fewer).

    Returns indices into train_labels, or (train, val) indices if val_labels are given: min(shots, 4) validation images a class,
    drawn after the training images from the same generator. Seeds 1, 2, 3 give the paper's own images on its own splits.
    """
    if shots < 1:
        raise ValueError(f"shots must be 1 or more, not {shots}")
    rng = random.Random(seed)

    def draw(labels, shots, kind):
        members = {}  # in the order of first appearance, which the published sample depends on
        for index, label in enumerate(torch.as_tensor(labels).tolist()):
            members.setdefault(label, []).append(index)
        if short := {k: len(m) for k, m in members.items() if len(m) < shots}:
            warnings.warn(f"{len(short)} classes have fewer than {shots} {kind} images and give all they have (label: images): "
                          f"{dict(list(short.items())[:5])}", stacklevel=3)
        return [i for m in members.values() for i in (rng.sample(m, shots) if len(m) >= shots else m)]

    train = draw(train_labels, shots, "training")
    return train if val_labels is None else (train, draw(val_labels, min(shots, 4), "validation"))


def _archive_of(path):
    """The archive that an image is in, or None."""
    return next((parent for parent in path.parents if parent.suffix == ".zip" and parent.is_file()), None)


@functools.lru_cache(maxsize=16)
def _opened(archive, _process, _time):
    return zipfile.ZipFile(archive)


def open_image(image):
    """An RGB image from a path, from inside an archive (`images.zip/name.png`) or from a PIL image: upright by its EXIF tag,
    transparent parts white, 16 bits scaled to 8."""
    if not isinstance(image, Image.Image):
        path = Path(image)
        if archive := _archive_of(path):
            path = _opened(archive, os.getpid(), archive.stat().st_mtime_ns).open(path.relative_to(archive).as_posix())
        image = Image.open(path)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # PIL itself would cut 16 bits off at 255, which makes nearly all of them white
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


class Views(torch.utils.data.Dataset):
    """Image i -> (V, 3, n_px, n_px), V applications of the transform, and ""; of one that cannot be read NaN, and the reason."""

    def __init__(self, images, transform, views, seed, n_px):
        self.images, self.transform, self.views, self.seed, self.n_px = images, transform, views, seed, n_px

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        try:
            image = open_image(self.images[i])
            name = i if isinstance(self.images[i], Image.Image) else Path(self.images[i]).name
            with torch.random.fork_rng(devices=[]):  # a file's views are the same whatever the batch size, workers and other files
                torch.default_generator.manual_seed(random.Random(f"{self.seed} {name}").getrandbits(32))
                return torch.stack([self.transform(image) for _ in range(self.views)]), ""
        except Exception as error:  # broken files and archives raise anything
            return torch.full((self.views, 3, self.n_px, self.n_px), math.nan), f"{self.images[i]} ({error})"


@contextmanager
def atomic(path):
    """A binary file that appears under `path` only when it is whole."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            yield file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def stamp(image):
    """What an image's features depend on: its pixels, or its path and its file's size and time (an archive's, if it is in one)."""
    if isinstance(image, Image.Image):
        try:
            image = open_image(image)
            return hashlib.sha256(image.tobytes()).hexdigest(), image.size
        except Exception as error:  # unreadable; its features are NaN and not kept
            return str(error)
    file = _archive_of(Path(image)) or Path(image)
    return os.path.abspath(image), *((file.stat().st_size, file.stat().st_mtime_ns) if file.exists() else ())


def fingerprint(module, skip=()):
    """Tells frozen weights apart, on any device: a hash of all values."""
    digest = hashlib.sha256()
    for key, tensor in module.state_dict().items():
        if not key.startswith(skip):
            digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def effect(transform):
    """What a transform makes of noise: two lambdas print alike, but do not do the same."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        noise = torch.randint(256, (150, 200, 3), dtype=torch.uint8).numpy()
        return hashlib.sha256(transform(Image.fromarray(noise)).numpy().tobytes()).hexdigest()


def digest(*key):
    """A name for whatever prints the same; the address of a function, another one in every process, does not count."""
    return hashlib.sha256(re.sub(" at 0x[0-9a-f]+", "", repr(key)).encode()).hexdigest()


def kept(folder, key, images, compute):
    """compute() or, if the folder keeps features of the same key and images, those; kept are features without a NaN."""
    file = Path(folder) / f"{digest(key, [stamp(image) for image in images])[:32]}.pt"
    try:
        return torch.load(file, "cpu", weights_only=True)
    except Exception:  # not there, or cut off, which can raise anything: computed anew
        features = compute()
    if features.isfinite().all():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic(file) as part:
                torch.save(features, part)
        except (OSError, RuntimeError) as error:  # no space: torch says RuntimeError
            warnings.warn(f"the features could not be kept in {folder} ({error}); they are returned all the same", stacklevel=3)
    return features
