"""mini-coop: Context Optimization (CoOp) for CLIP, the whole method in one module.

CLIP compares an image with texts, one prompt per class ("a photo of a cat."), by the cosine of
their features. A prompt is a list of tokens between two marks, SOS and EOT. The text encoder reads
it from left to right, so what stands at the EOT has seen all: it is the feature of the text. CoOp
replaces the hand-written words by M learnable vectors, the context. CLIP stays frozen, so images
are encoded once and training sees features only. "The paper" is Zhou, Yang, Loy, Liu: Learning to
Prompt for Vision-Language Models, IJCV 2022.

    images -----------------> image encoder --> features (N, E) --+
                                                                  +--> cosines --> softmax --> loss
    SOS V1 .. VM cat . EOT --> text encoder --> features (K, E) --+                              |
        ^------------------- gradients reach the context, nothing else is trained <--------------+

Shapes: N images, B of them in a batch, A augmented views of an image, K classes, M context vectors,
D text width, E joint embedding (the width of both features).

For the method read the last part, `CoOp`, and then "the text side"; what stands above them reads
data, images and CLIP, and checks what users pass.
"""
import hashlib
import io
import json
import math
import numbers
import os
import random
import sys
import tempfile
import threading
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

with warnings.catch_warnings():  # clip-anytorch imports pkg_resources, which is deprecated
    warnings.simplefilter("ignore")
    import clip

    # _MODELS: name -> address of OpenAI's weights; a part of the address is their SHA-256
    from clip.clip import _MODELS, _download, _tokenizer, _transform

__all__ = ["load_clip", "load_dataset", "few_shot", "open_image", "encode_images",
           "zero_shot_weights", "linear_probe", "learning_rate", "n_epochs", "CoOp"]

DATA = Path(__file__).resolve().with_name("data")
MINI_SHA256 = "ba4cbc1c51294f1d0122cf11c6ace601126949b043595b3e79a0a62aa2c89000"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
SOS = _tokenizer.encoder["<|startoftext|>"]
EOT = _tokenizer.encoder["<|endoftext|>"]  # the last id of CLIP's vocabulary
CONTEXT = EOT + 1  # in our prompts the id CONTEXT + i stands for context vector i

_PIL_LOCK = threading.Lock()  # a PIL image must not be read by two threads at once


# ---------------------------------------------------------------- small helpers

def _check(ok, message):
    if not ok:
        raise ValueError(message)


def _whole(name, value, least=1):
    """A whole number as an int (NumPy's too), or an error that names the argument."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    _check(whole and least <= value < 2**63,  # where torch's integers end
           f"{name} must be a whole number of {least} or more, not {value!r}")
    return int(value)


def _array(values):
    """A tensor on any device, a list or a pandas Series as a NumPy array."""
    return np.asarray(values.cpu() if torch.is_tensor(values) else values)


def _check_images(images):
    for image in images:
        _check(isinstance(image, (str, os.PathLike, Image.Image)), "an image is a path or a PIL "
               f"image, not a {type(image).__name__}: of a split of load_dataset take .images, of "
               "an array make one with PIL.Image.fromarray")


def data_folder():
    """Our own data/, beside this file."""
    _check(DATA.is_dir(), f"no folder {DATA}: install with `pip install -e .`, in a clone")
    return DATA


def shared_folder():
    """A lab's folder of weights and data sets, $MINI_COOP_ROOT; without it our own data/."""
    folder = Path(os.environ.get("MINI_COOP_ROOT") or data_folder()).expanduser()
    _check(folder.is_dir(), f"MINI_COOP_ROOT is set to {folder}, which is no folder")
    return folder


def sha256_of(state, skip=None):
    """Tells weights apart, on any device: the SHA-256 of a state dict's values in float32.

    skip: the start of names to leave out."""
    digest = hashlib.sha256()
    for key, value in state.items():
        if skip is None or not key.startswith(skip):
            digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def whole_file(path):
    """A binary file that appears under `path` only when it is whole."""
    path = Path(path).expanduser().resolve()  # a link stays, the file behind it is replaced
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
    part = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        with open(part, "wb") as file:
            yield file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@lru_cache(maxsize=16)
def _opened(path, changed, process):  # the last two are there for the cache to compare
    return zipfile.ZipFile(path)


def _archive(path):
    """The zip archive at `path`, kept open by each process; a rewritten file is opened anew."""
    path = path.resolve()
    try:
        return _opened(path, path.stat().st_mtime_ns, os.getpid())
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path} is no zip archive, or is damaged ({error})") from error


# ---------------------------------------------------------------- data sets

class Split(NamedTuple):
    """Images (paths; inside an archive: archive.zip/name.png) and their labels."""
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

    name_or_folder: a folder's name in data/ or in $MINI_COOP_ROOT, or the path of a folder with a
    dataset.json (data/README.md has its form) or one folder per class, `<root>/<class>/*.jpg`, with
    or without train/, val/, test/ above. Without them each class is dealt 50 / 20 / 30 by a fixed
    seed, rounded as in the published code. A known name wins over a folder of that name here; write
    "./actions" for the folder. Raises ValueError for what is unknown, empty or broken.
    """
    known = {}
    for place in (data_folder(), shared_folder()):
        known |= {file.parent.name: file.parent for file in sorted(place.glob("*/dataset.json"))}
    folder = known.get(name_or_folder, Path(name_or_folder).expanduser())
    _check(folder.is_dir(), f"no data set {str(name_or_folder)!r}: neither a folder nor one of "
           + ", ".join(sorted(known)))
    data = _read_json(folder) if (folder / "dataset.json").exists() else _read_folders(folder)
    for part, split in (("train", data.train), ("test", data.test)):
        present = set(split.labels)
        missing = [name for k, name in enumerate(data.classnames) if k not in present]
        if missing and split.images:
            warnings.warn(f"{folder}: no {part} images of {len(missing)} of {len(data.classnames)} "
                          f"classes: {', '.join(missing[:5])}", stacklevel=2)
    return data


def _read_json(folder):
    """A folder with a dataset.json -> Dataset."""
    file = folder / "dataset.json"
    splits = {"train": Split([], []), "val": Split([], []), "test": Split([], [])}
    try:
        data = json.loads(file.read_text(encoding="utf-8-sig"))
        names = data["classnames"]
        domains = data.get("domains", {})
        root = folder / data.get("images", ".")  # a folder or an archive
        _check(data.get("format", 1) == 1,
               f"format {data.get('format')!r}, but this version reads 1: prepare it again")
        _check(isinstance(names, list) and names and all(isinstance(name, str) for name in names),
               "the class names must be a list of texts")
        _check(isinstance(data["template"], str) and "{}" in data["template"],
               "the template must be a text with {} in it")
        wrong = [part for part in data["splits"] if part not in splits]
        wrong += [part for part in domains if part in splits]
        _check(not wrong, "splits are train, val and test, domains have other names; "
               f"{', '.join(wrong)} is neither")
        for part, rows in (data["splits"] | domains).items():
            splits[part] = Split([root / image for image, _ in rows], [label for _, label in rows])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{file} is not in our form (data/README.md): {type(error).__name__} "
                         f"{error}") from error
    members = _archive(root).namelist() if root.is_file() else []
    inside = {root / name for name in members}
    for part, (images, labels) in splits.items():
        lost = [image for image in images if image not in inside and not image.is_file()]
        if lost:
            raise ValueError(f"{folder}: {len(lost)} of {len(images)} images of {part!r} are "
                             f"missing, first {lost[0]}")
        wrong = [label for label in labels if type(label) is not int or not 0 <= label < len(names)]
        if wrong:
            raise ValueError(f"{folder}: label {wrong[0]!r} in {part!r}, but there are "
                             f"{len(names)} classes (0 to {len(names) - 1})")
    train, val, test = (splits.pop(part) for part in ("train", "val", "test"))
    return Dataset(folder.resolve().name, names, data["template"], train, val, test, splits)


def _read_folders(root):
    """A folder of class folders, or of train/, val/ and test/ with class folders -> Dataset."""
    parts = ("train", "val", "test")

    def hidden(path):
        return any(part.startswith((".", "__MACOSX")) for part in path.relative_to(root).parts)

    def images_of(folder):  # none where there is no such folder
        paths = [path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES]
        return sorted(path for path in paths if path.is_file() and not hidden(path))

    def classes_of(folder):
        return {sub.name for sub in folder.glob("*") if sub.is_dir() and images_of(sub)}

    in_splits = set().union(*(classes_of(root / part) for part in parts))  # below train/, ...
    classes = sorted(in_splits or classes_of(root))
    _check(classes, f"{root} holds no images: expected {root}/<class name>/*.jpg, or train/, val/, "
           "test/ above the class folders")
    splits = [Split([], []), Split([], []), Split([], [])]
    for label, name in enumerate(classes):
        dealt = [images_of(root / part / name) for part in parts]
        if not in_splits:  # as the published code deals a data set without splits
            own = images_of(root / name)
            random.Random(0).shuffle(own)
            n_train = round(0.5 * len(own))
            n_val = round(0.2 * len(own))
            dealt = own[:n_train], own[n_train:n_train + n_val], own[n_train + n_val:]
        for split, images in zip(splits, dealt):
            split.images.extend(images)
            split.labels.extend([label] * len(images))
    # what a user might miss: files that are not read, misnamed splits
    read = set().union(*(split.images for split in splits))
    below = [path for path in root.glob("*/**/*") if not path.is_dir() and not hidden(path)]
    if unread := sorted(str(path) for path in below if path not in read):
        warnings.warn(f"{root}: {len(unread)} files are not read, first {', '.join(unread[:3])} "
                      f"(read are {', '.join(sorted(IMAGE_SUFFIXES))} in class folders)",
                      stacklevel=3)
    like_splits = [name for name in classes if name.lower().startswith(parts)]
    if not in_splits and (nested := [name for name in like_splits if classes_of(root / name)]):
        warnings.warn(f"{root}: {', '.join(nested)} read as classes; if they are splits, call them "
                      "train, val and test", stacklevel=3)
    return Dataset(root.resolve().name, classes, "a photo of a {}.", *splits, {})


def few_shot(train_labels, shots, seed, val_labels=None):
    """The published few-shot sample: `shots` images per class, or all, with a warning, if fewer.

    Returns indices into train_labels, or (train, val) indices if val_labels are given: then
    min(shots, 4) validation images per class are drawn after the training images. Seeds 1, 2 and 3
    give the paper's own images on its own splits. Raises ValueError for less than one shot.
    """
    shots = _whole("shots", shots)
    rng = random.Random(_whole("seed", seed, least=0))

    def draw(labels, n, kind):
        members = {}  # classes in the order of first appearance, on which the sample depends
        labels = _array(labels)
        _check(labels.ndim == 1, "labels are one number per image: of a split take .labels")
        for index, label in enumerate(labels.tolist()):
            members.setdefault(label, []).append(index)
        if short := {label: len(own) for label, own in members.items() if len(own) < n}:
            some = dict(list(short.items())[:5])
            warnings.warn(f"{len(short)} classes have fewer than {n} {kind} images and give all "
                          f"they have (label: images): {some}", stacklevel=3)
        drawn = []
        for own in members.values():
            drawn += rng.sample(own, n) if len(own) >= n else own
        return drawn

    train = draw(train_labels, shots, "training")
    return train if val_labels is None else (train, draw(val_labels, min(shots, 4), "validation"))


# ---------------------------------------------------------------- images

def open_image(image):
    """An RGB image from a path, from inside an archive (`images.zip/name.png`) or a PIL image.

    Upright by its EXIF tag, transparent parts white; images of 16 bits, or of floats up to 1 or
    255, become 8-bit ones.
    """
    _check_images([image])
    if not isinstance(image, Image.Image):
        source = Path(image).expanduser()
        # a path that leads through a file leads into an archive
        if archive := next((parent for parent in source.parents if parent.is_file()), None):
            source = _archive(archive).open(source.relative_to(archive).as_posix())
        image = Image.open(source)
    _check(image.format != "EPS", "a PostScript file is a program, which is not run")
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # integers or floats, which PIL itself would cut off at 255
        values = np.asarray(image, np.float64)
        _check(np.isfinite(values).all(), "an image with values that are NaN or infinite")
        largest = 65535
        if image.mode == "F":
            largest = 1 if values.max() <= 1 else 255
        values = (values * (255 / largest)).round().clip(0, 255)
        image = Image.fromarray(values.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _random_view(image, n_px, rng):
    """The paper's augmentation: a random crop of 8 to 100 % of the area, sides 3 : 4 to 4 : 3,
    resized, and flipped half of the time. (torchvision draws from the global generator.)"""
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w = round(math.sqrt(area * ratio))
        h = round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            break
    else:  # none fits into a very long image
        w = h = min(width, height)
    x = rng.randint(0, width - w)
    y = rng.randint(0, height - h)
    view = image.crop((x, y, x + w, y + h))
    view = view.resize((n_px, n_px), Image.Resampling.BICUBIC)
    return ImageOps.mirror(view) if rng.random() < 0.5 else view


def _pixels(image, preprocess, views, n_px, key):
    """An RGB image -> pixels (A, 3, n_px, n_px), of views that `key` draws if A > 1."""
    crops = [image]
    if views > 1:  # of the right size: preprocess neither resizes nor crops them again
        rng = random.Random(os.fsencode(key))  # a file name need not be UTF-8
        crops = [_random_view(image, n_px, rng) for _ in range(views)]
    return torch.stack([preprocess(crop) for crop in crops]).float()


# ---------------------------------------------------------------- CLIP, frozen

def weights_file(name):
    """OpenAI's weights: in the lab's shared folder, or in ~/.cache/clip, where downloads go."""
    shared = shared_folder() / "clip" / Path(_MODELS[name]).name
    return shared if shared.is_file() else Path("~/.cache/clip").expanduser() / shared.name


@torch.random.fork_rng(devices=[])  # building a CLIP draws weights, which are overwritten
@torch.inference_mode(False)  # what a caller's inference mode makes could not be trained with
def load_clip(name="mini", device=None):
    """Loads a frozen CLIP: (model in eval mode and float32, transform of a PIL image to pixels).

    name: "mini" (ours, which knows icons), a name of `clip.available_models()` (OpenAI's, from
    $MINI_COOP_ROOT/clip or ~/.cache/clip, downloaded once) or a checkpoint: a state dict in
    OpenAI's layout, or OpenAI's own TorchScript archive. device: None takes CUDA where there is
    one. No code from a file is run. Raises ValueError for an unknown name or device and for a file
    that is no CLIP or damaged, RuntimeError if a download fails.
    """
    name = str(name)
    try:
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {str(device)!r} cannot be used here; try 'cpu', or 'cuda' where "
                         "torch sees a GPU") from error
    model = _read_checkpoint(*_weights(name))
    model = model.float().eval().requires_grad_(False).to(device)
    model.visual.to(memory_format=torch.channels_last)  # a ResNet is a sixth faster on a CPU
    return model, _transform(model.visual.input_resolution)


def _weights(name):
    """A name or a path -> (file, the SHA-256 it must have or None); OpenAI's are downloaded."""
    shared_folder()  # a wrong MINI_COOP_ROOT is said at once
    if name == "mini":
        return data_folder() / "mini_clip.pt", MINI_SHA256
    if name not in _MODELS:
        _check(Path(name).expanduser().is_file(), f"no CLIP called {name!r}: neither 'mini', nor "
               f"one of {', '.join(_MODELS)}, nor a file")
        return Path(name).expanduser(), None
    file = weights_file(name)
    try:
        if not file.is_file():  # which it becomes only when it is whole
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=file.parent) as folder:
                os.replace(_download(_MODELS[name], folder), file)  # which checks the SHA-256
    except (OSError, RuntimeError) as error:
        raise RuntimeError(f"could not download CLIP {name!r} ({error}). Put the file there by "
                           f"hand: {file} (from {_MODELS[name]}), or use 'mini', which needs no "
                           "download") from error
    return file, _MODELS[name].split("/")[-2]


def _read_checkpoint(path, sha256):
    """A file -> CLIP. TorchScript can hold code: only OpenAI's own is opened."""
    content = path.read_bytes()  # read once, so that what is checked is what is used
    digest = hashlib.sha256(content).hexdigest()
    file = io.BytesIO(content)
    try:
        _check(sha256 in (None, digest), "its SHA-256 is wrong. Delete it: OpenAI's are downloaded "
               "again, `git checkout data` restores ours")
        if any(digest in url for url in _MODELS.values()):
            state = torch.jit.load(file, "cpu").state_dict()
        else:
            members = zipfile.ZipFile(file).namelist() if zipfile.is_zipfile(file) else []
            script = any(member.endswith("/constants.pkl") for member in members)
            _check(not script, "TorchScript that is not OpenAI's could run code. Where you trust "
                   f"it: torch.save(torch.jit.load({str(path)!r}).state_dict(), 'clip.pt')")
            file.seek(0)
            state = torch.load(file, "cpu", weights_only=True)
        model = clip.model.build_model(dict(state)).float()  # which deletes from its dict
        # build_model went through float16: put the exact values back
        model.load_state_dict({key: state[key] for key in model.state_dict()})
        finite = all(weight.isfinite().all() for weight in model.state_dict().values())
        _check(finite, "some weights are NaN or infinite")
        return model
    except Exception as error:  # a file that is no checkpoint can raise anything
        # torch's own words would advise to switch the protection off
        reason = error if type(error) is ValueError else type(error).__name__
        raise ValueError(f"{path} is no CLIP checkpoint in OpenAI's layout, or is damaged: "
                         f"{reason}") from None


def _check_encoded(features, images, unreadable):
    """NaN is a warning where the image could not be read, else an error."""
    finite = features.isfinite().flatten(1).all(1)
    bad = set((~finite).nonzero()[:, 0].tolist()) - set(unreadable)
    if bad:
        raise RuntimeError(f"CLIP gives NaN or infinity for {len(bad)} images that can be read: "
                           "are its weights damaged?")
    if unreadable:
        some = "; ".join(unreadable[i] for i in sorted(unreadable)[:3])
        warnings.warn(f"{len(unreadable)} of {len(images)} images cannot be read and are rows of "
                      f"NaN: {some}. keep = features.isfinite().flatten(1).all(1) selects the "
                      "others", stacklevel=4)


@torch.no_grad()
def encode_images(model, preprocess, images, views=1, batch_size=64, seed=0, workers=None,
                  progress=True):
    """CLIP's image features, not normalised, in float32 on the model's device: (N, E).

    images: paths or PIL images. views=1 uses `preprocess`, the test transform; views=A > 1 gives
    (N, A, E), features of random crops (the paper's augmentation), drawn once by `seed`: the
    encoder is frozen, so training picks among them. batch_size: views at a time. workers: threads
    that read images, one per core if None. An image that cannot be read is named in a warning and
    becomes a row of NaN. Raises ValueError without images, RuntimeError if the model gives NaN.
    """
    _check_clip(model)
    images = [images] if isinstance(images, (str, os.PathLike, Image.Image)) else list(images)
    _check(images, "no images to encode")
    _check_images(images)
    views = _whole("views", views)
    batch_size = max(1, _whole("batch_size", batch_size) // views)
    seed = _whole("seed", seed, least=0)
    workers = os.cpu_count() if workers is None else _whole("workers", workers)
    n_px = model.visual.input_resolution
    device = model.text_projection.device
    # a file's views depend on its name and its folder's, not on its place; a PIL image has none
    names = [i if isinstance(image, Image.Image) else "/".join(Path(image).parts[-2:])
             for i, image in enumerate(images)]
    unreadable = {}  # place -> what is wrong

    def pixels_of(i):  # (A, 3, n_px, n_px)
        guard = _PIL_LOCK if isinstance(images[i], Image.Image) else nullcontext()
        try:
            with guard:
                image = open_image(images[i])
        except Exception as error:  # broken files and archives raise anything
            unreadable[i] = f"{images[i]} ({error})"
            return torch.full((views, 3, n_px, n_px), math.nan)
        return _pixels(image, preprocess, views, n_px, f"{seed} {names[i]}")

    features = []
    bar = tqdm(total=len(images), desc="encoding images", disable=not progress, leave=False)
    with ThreadPoolExecutor(workers) as threads, bar:
        for batch in torch.arange(len(images)).split(batch_size):
            pixels = torch.cat(list(threads.map(pixels_of, batch.tolist())))
            with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
                x = model.encode_image(pixels.to(device)).float()  # (B * A, E)
            features.append(x.unflatten(0, (-1, views)))  # (B, A, E)
            bar.update(len(batch))
    features = torch.cat(features)
    _check_encoded(features, images, unreadable)
    return features if views > 1 else features[:, 0]


# ---------------------------------------------------------------- checks of what users pass

def _class_names(classnames):
    """-> (the names as given, the names as prompts say them); warns of duplicates."""
    _check(not isinstance(classnames, (str, bytes, dict, set, frozenset)),
           f"classnames must be a list of texts, not a {type(classnames).__name__}")
    given = list(classnames)
    _check(given, "the list of class names is empty")
    names = []
    groups = {}  # tokens -> the names that have them
    for k, name in enumerate(given):
        _check(isinstance(name, str), f"class {k} must be a text, not {name!r}")
        text = name.replace("_", " ").strip()
        names.append(text)
        tokens = _tokenizer.encode(text)
        _check(tokens, f"class {k} has an empty name ({name!r})")
        groups.setdefault(tuple(tokens), []).append(name)
    if same := [" = ".join(group) for group in groups.values() if len(group) > 1]:
        warnings.warn("classes of the same name cannot be told apart by their prompts: "
                      + "; ".join(same), stacklevel=4)
    return given, names


def _prompt(model, tokens, text):
    """[SOS, *tokens, EOT], if CLIP can read it."""
    length = len(tokens) + 2
    _check(length <= model.context_length, f"{text!r} makes a prompt of {length} tokens, but CLIP "
           f"reads {model.context_length}: shorten the name or the context")
    _check(not {SOS, EOT} & set(tokens), f"{text!r} holds CLIP's own marks of start and end")
    return [SOS, *tokens, EOT]


def _check_clip(model):
    _check(isinstance(model, torch.nn.Module), f"a CLIP is needed, not a {type(model).__name__}: "
           "model, preprocess = load_clip()")
    wrong = [p for p in model.parameters() if p.requires_grad or p.dtype != torch.float32]
    _check(not wrong and not model.training, "CLIP must be frozen, in eval mode and in float32, as "
           "load_clip gives it: call model.float().eval().requires_grad_(False)")


def _context_words(model, ctx_init):
    """Token ids of the words that a context starts from."""
    _check(isinstance(ctx_init, str), f"ctx_init must be a text, not {ctx_init!r}")
    _check("{}" not in ctx_init, "ctx_init takes words, not a template: pass "
           + repr(ctx_init.replace("{}", "").strip(" .")))
    tokens = _tokenizer.encode(ctx_init.replace("_", " "))
    _check(tokens, f"ctx_init has no words: {ctx_init!r}")
    _prompt(model, tokens, ctx_init)  # is it too long?
    return tokens


def _templates(templates):
    """One template or several -> a list of them, each with a place for the class name."""
    templates = [templates] if isinstance(templates, str) else list(templates)
    _check(templates, "no template to write the class names into")
    for template in templates:
        _check("{}" in template, f"the template {template!r} has no {{}} for the class name")
    return templates


def _check_options(names, class_specific, class_position):
    _check(len(names) > 1, f"there is one class only ({names[0]!r}): nothing to tell apart")
    _check(class_specific in (True, False), f"class_specific is a bool, not {class_specific!r}")
    _check(class_position in ("end", "middle", "front"),
           f"class_position must be 'end', 'middle' or 'front', not {class_position!r}")


def _features(coop, features, views=False):
    """Image features on the context's device in float32, or one clear error."""
    E = coop.clip_model.text_projection.shape[1]
    try:
        features = features if torch.is_tensor(features) else _array(features)
        x = torch.as_tensor(features).detach().to(coop.ctx.device, torch.float32)
    except (TypeError, ValueError) as error:
        raise ValueError("image features are numbers, from encode_images") from error
    shapes = f"(N, {E}) or (N, views, {E})" if views else f"(N, {E})"
    fits = x.ndim in ((2, 3) if views else (2,)) and x.shape[-1] == E and x.numel()
    _check(fits, f"image features must be {shapes}, not {tuple(x.shape)}: are they from "
           "encode_images with the same model?")
    finite = x.isfinite().flatten(1).all(1)
    bad = (~finite).nonzero()[:, 0].tolist()
    if bad:
        raise ValueError(f"{len(bad)} of {len(x)} image features are NaN or infinite, first row "
                         f"{bad[0]} (an image that could not be read?)")
    x = x.clone() if x.is_inference() else x  # autograd refuses what inference mode made
    return x.reshape(len(x), -1, E) if views else x


def _labels(coop, labels, N):
    """Labels (N,) as int64 on the context's device, or one clear error."""
    K = len(coop.classnames)
    y = _array(labels)
    _check(y.dtype.kind in "iu" and y.shape == (N,), f"labels must be {N} integers, the places of "
           f"the classes, one per image, not {y.dtype} {y.shape}")
    y = torch.as_tensor(y.astype(np.int64), device=coop.ctx.device)
    outside = y[(y < 0) | (y >= K)].tolist()
    if outside:
        raise ValueError(f"label {outside[0]} is outside of the {K} classes (0 to {K - 1})")
    return y


def _recipe(labels, epochs, lr, batch_size):
    """-> epochs and batch size that fit trains with."""
    if epochs is None:
        epochs = n_epochs(int(labels.bincount().max()))
    epochs = _whole("epochs", epochs, least=0)
    _check(isinstance(lr, numbers.Real) and not isinstance(lr, bool) and 0 <= lr < math.inf,
           f"lr must be a number of 0 or more, not {lr!r}")
    return epochs, min(_whole("batch_size", batch_size), len(labels))


# ---------------------------------------------------------------- the text side

# The text transformer is causal: a token sees only what stands before it. So the tokens that all
# prompts share at their start, the trunk, mean the same in each and are computed once; nothing
# after an EOT counts. A row begins with the trunk; the rest of every prompt hangs behind it:
#
#     token     SOS V1 V2 .. VM | cat  .   EOT | sea  horse .   EOT | ...
#     position   0   1  2 ..  M | M+1  M+2 M+3 | M+1  M+2   M+3 M+4 | ...
#
# A token sees the trunk and what stands before it in its own branch. Many prompts fill several
# rows, each with a copy of the trunk: a batch like any other. This is exact, gradients too.
# Shapes: R rows of L tokens, the first P of which are the trunk.

def pack(prompts, device, row_tokens=None, part_tokens=6400):
    """K prompts, lists of token ids -> (parts, order).

    A part is up to `part_tokens` in rows of one length: tokens (R, L), position (R, L), visible
    (R, 1, L, L), the same for all heads: whether token i of a row sees token j; and eot, the places
    of the ends in the flattened rows. order (K,): of each prompt, its place among all ends.
    row_tokens: those of branches in a row; short rows cost less attention, long ones repeat the
    trunk less often."""
    K = len(prompts)
    shortest = min(map(len, prompts))
    P = 0  # length of the trunk; every prompt keeps at least its EOT
    while P < shortest - 1 and len({prompt[P] for prompt in prompts}) == 1:
        P += 1
    row_tokens = row_tokens or 72 + 8 * P  # the fastest of those tried on CPUs
    n_rows = math.ceil(sum(len(prompt) - P for prompt in prompts) / row_tokens)
    trunk = [(prompts[0][p], p, -1) for p in range(P)]  # token, position, owner
    rows = [list(trunk) for _ in range(n_rows)]
    # the longest branches first, each into the emptiest row, so that all become about as long
    for k in sorted(range(K), key=lambda k: len(prompts[k]), reverse=True):
        emptiest = min(rows, key=len)
        emptiest += [(prompts[k][p], p, k) for p in range(P, len(prompts[k]))]
    rows = [torch.tensor(row, device=device) for row in rows]
    # zeros pad short rows at the end, where tril() lets no token see them
    tokens, position, owner = pad_sequence(rows, batch_first=True).unbind(2)  # (R, L) each
    visible = owner[:, :, None] == owner[:, None, :]  # (R, L, L): its own branch
    visible[:, :, :P] = True  # and the trunk
    visible = visible.tril()[:, None]
    per_part = max(1, part_tokens // tokens.shape[1])
    parts = []
    for r in range(0, n_rows, per_part):
        some = slice(r, r + per_part)
        eot = (tokens[some] == EOT).flatten().nonzero()[:, 0]
        parts.append((tokens[some], position[some], visible[some], eot))
    whose = owner[tokens == EOT]  # (K,): the prompt that an end belongs to
    return parts, whose.argsort()  # turned around: where each prompt's end is


def encode_rows(model, ctx, tokens, position, visible, eot):
    """CLIP's text encoder on the rows of a part -> features at their ends, not normalised.

    ctx: (M, D) or (K, M, D); in place of the id CONTEXT + i stands its i-th vector, counted through
    all classes. None: the prompts hold no such ids. The blocks are CLIP's own, written out because
    CLIP's code has one mask for all rows, and no positions."""
    x = model.token_embedding(tokens.clamp(max=EOT))  # (R, L, D); at context ids a stand-in
    if ctx is not None:  # all tokens look up a context vector, and those at context ids are taken
        vectors = F.embedding((tokens - CONTEXT).clamp(min=0), ctx.flatten(0, -2))  # (R, L, D)
        x = torch.where(tokens[:, :, None] < CONTEXT, x, vectors)
    x = x + model.positional_embedding[position]
    for block in model.transformer.resblocks:
        attn = block.attn
        qkv = F.linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias)  # (R, L, 3 D)
        qkv = qkv.unflatten(2, (3, attn.num_heads, -1))  # (R, L, 3, heads, D / heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (R, heads, L, D / heads) each
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)  # as v
        attended = attended.transpose(1, 2).flatten(2)  # (R, L, D)
        if block is model.transformer.resblocks[-1]:  # only the EOTs are read
            x = x.flatten(0, 1)[eot]  # (ends, D)
            attended = attended.flatten(0, 1)[eot]
        x = x + attn.out_proj(attended)
        x = x + block.mlp(block.ln_2(x))
    return model.ln_final(x) @ model.text_projection


def encode_prompts(model, packed, ctx=None):
    """Unit-norm text features (K, E), float32, of packed prompts. On cards that have bfloat16 the
    frozen encoder runs in it, in training and prediction alike."""
    parts, order = packed
    device = model.text_projection.device
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        if len(parts) == 1:
            features = encode_rows(model, ctx, *parts[0])
        else:  # keep no part's activations: they are computed again in the backward pass
            features = torch.cat([checkpoint(encode_rows, model, ctx, *part, use_reentrant=False)
                                  for part in parts])
    return F.normalize(features[order].float(), dim=-1)


@torch.no_grad()
def zero_shot_weights(model, classnames, templates):
    """Zero-shot classifier (K, E), unit-norm, of a template ("a photo of a {}.") or an ensemble.

    Each template's features are normalised, summed over templates and normalised again. The score
    of class k is the cosine of an image feature with row k. Raises ValueError for a template
    without {}.
    """
    _check_clip(model)
    _, names = _class_names(classnames)
    features = []
    for template in _templates(templates):
        texts = [template.replace("{}", name) for name in names]
        prompts = [_prompt(model, _tokenizer.encode(text), text) for text in texts]
        packed = pack(prompts, model.text_projection.device)
        features.append(encode_prompts(model, packed))
    return F.normalize(torch.stack(features).sum(0), dim=-1)


# ---------------------------------------------------------------- the linear probe

def linear_probe(train, train_labels, val, val_labels):
    """The paper's baseline: scikit-learn's logistic regression on image features (N, E).

    C is searched on a validation set: a coarse grid from 1e6 to 1e-6, then 8 steps that halve the
    range around the best in log space. Returns the LogisticRegression of the last step (`.C`;
    `.predict` and `.score` take NumPy features). The published probe draws its own images, with
    NumPy and over several runs, and takes C of ImageNet from Caltech101; ours does neither.
    """
    from sklearn.exceptions import ConvergenceWarning  # here, as it takes a second to import
    from sklearn.linear_model import LogisticRegression
    x, y, x_val, y_val = map(_array, (train, train_labels, val, val_labels))

    @lru_cache(None)  # the search comes back to one end of its range in every step
    def fitted(log_C):
        probe = LogisticRegression(C=10 ** log_C, max_iter=1000).fit(x, y)
        return probe.score(x_val, y_val), probe

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # max_iter is the paper's
        warnings.filterwarnings("ignore", "The number of unique classes")  # fine: one shot
        best = max((6, 4, 2, 0, -2, -4, -6), key=lambda log_C: fitted(log_C)[0])
        low = best - 1
        high = best + 1
        for _ in range(8):
            middle = (low + high) / 2
            if fitted(low)[0] < fitted(high)[0]:
                best = high
                low = middle
            else:
                best = low
                high = middle
    return fitted(best)[1]


# ---------------------------------------------------------------- CoOp

def learning_rate(epoch, epochs, lr=0.002):
    """The paper's schedule: epoch 0 at 1e-5, to warm up, then a cosine that starts at `lr`."""
    if epoch == 0:
        return min(1e-5, lr)
    # the published code divides by `epochs`, so the last rate is a little above zero
    return 0.5 * lr * (1 + math.cos(math.pi * (epoch - 1) / epochs))


def n_epochs(shots):
    """The paper's epochs: 50 for 1 shot, 100 for 2 and 4, 200 for more. (It takes 50 for ImageNet
    at all shots: pass epochs=50.)"""
    return 50 if shots == 1 else 100 if shots <= 4 else 200


def _batches(x, batch_size, generator):
    """One epoch of training images (N, A, E) in random order -> for each batch the places of its
    images (B,) and a random view of each (B,). A last, short batch is dropped."""
    N, A, _ = x.shape
    order = torch.randperm(N, generator=generator, device="cpu")
    views = torch.zeros_like(order)
    if A > 1:
        views = torch.randint(A, (N,), generator=generator, device="cpu")
    images = order[:N - N % batch_size].to(x.device)
    views = views.to(x.device)[images]
    return zip(images.split(batch_size), views.split(batch_size))


class CoOp(torch.nn.Module):
    """The prompt learner (section 3.2 of the paper): prompts "[V1] ... [VM] class name ."

    model: a CLIP of load_clip; kept, but `ctx` is the only parameter and all of the state dict.
    classnames: K >= 2 names. n_ctx: M. class_specific: one context for each class, ctx (K, M, D),
    instead of one for all, (M, D). class_position: "end", "middle" (of an odd M the smaller half
    stands before the name) or "front". ctx_init: words to start from ("a photo of a"), one vector
    per token; n_ctx is then ignored. Otherwise they are drawn from N(0, 0.02^2) by `seed`, which
    also orders the training. Raises ValueError for bad input; warns of classes of the same name.

    For a method of your own override `loss` or `forward`; `text_features(ctx)` takes another
    context, say one shifted by an image's feature. `fit` trains every parameter of the subclass.
    """

    @torch.inference_mode(False)  # as in load_clip
    def __init__(self, model, classnames, n_ctx=16, class_specific=False, class_position="end",
                 ctx_init=None, seed=0):
        super().__init__()
        _check_clip(model)
        self.classnames, names = _class_names(classnames)
        words = None if ctx_init is None else _context_words(model, ctx_init)
        self.n_ctx = M = _whole("n_ctx", n_ctx) if words is None else len(words)
        self.seed = _whole("seed", seed, least=0)
        _check_options(names, class_specific, class_position)
        object.__setattr__(self, "clip_model", model)  # not registered: not in the state dict
        self.class_specific = bool(class_specific)
        self.class_position = class_position
        self.history_ = {"loss": [], "accuracy": [], "lr": []}

        # the context: embeddings of words, or small random vectors
        device = model.text_projection.device
        D = model.ln_final.weight.shape[0]
        shape = (len(names), M, D) if class_specific else (M, D)
        if words:
            ctx = model.token_embedding(torch.tensor(words, device=device))  # (M, D)
            ctx = ctx.expand(shape).clone()
        else:
            generator = torch.Generator("cpu").manual_seed(self.seed)
            ctx = 0.02 * torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
        self.ctx = torch.nn.Parameter(ctx.to(device))

        # the prompts (equations 2 and 3): ids of context vectors around the tokens of the name
        n_before = {"end": M, "middle": M // 2, "front": 0}[class_position]
        prompts = []
        for k, name in enumerate(names):
            first = CONTEXT + (k * M if class_specific else 0)
            v = list(range(first, first + M))
            tokens = _tokenizer.encode(name + ".")
            # the name's tokens are counted without the period, as published: of "bat (animal).",
            # whose last token is ").", all stand before the vectors behind the name
            n = len(_tokenizer.encode(name))
            tokens = [*v[:n_before], *tokens[:n], *v[n_before:], *tokens[n:]]
            prompts.append(_prompt(model, tokens, name))
        self.packed = pack(prompts, device)

    def _apply(self, fn, *args, **options):
        """to(), cuda(), half(), double(): refused if they would separate the context from CLIP."""
        moved = fn(self.ctx.detach())
        _check(moved.device == self.ctx.device and moved.dtype == self.ctx.dtype, "the context "
               "stays in float32 on CLIP's device: choose it with load_clip(name, device)")
        return super()._apply(fn, *args, **options)

    def text_features(self, ctx=None):
        """Unit-norm features (K, E) of the prompts with `ctx`, or another context of its shape."""
        ctx = self.ctx if ctx is None else ctx
        _check(ctx.shape == self.ctx.shape, f"a context of shape {tuple(ctx.shape)} instead of "
               f"{tuple(self.ctx.shape)}")
        return encode_prompts(self.clip_model, self.packed, ctx)

    def forward(self, image_features, text_features=None):
        """Logits (B, K) of image features (B, E): the exponents of equation 1, cosines times
        exp(logit_scale), CLIP's frozen 1 / temperature. text_features: if already computed."""
        text_features = self.text_features() if text_features is None else text_features
        with torch.autocast(self.ctx.device.type, enabled=False):  # float32, whatever surrounds it
            cosines = F.normalize(image_features, dim=-1) @ text_features.T
        return self.clip_model.logit_scale.exp() * cosines

    def loss(self, logits, labels, text_features):
        """The training loss: cross-entropy, minus the log of equation 1 at the labels. A method of
        your own may also use the text features (K, E), for instance to regularise them."""
        return F.cross_entropy(logits, labels)

    @torch.inference_mode(False)  # also for a caller who switched gradients off
    @torch.enable_grad()
    def fit(self, image_features, labels, epochs=None, lr=0.002, batch_size=32, progress=True):
        """Learns the context by the paper's recipe (section 4.1), from where it is; returns self.

        image_features: (N, E), or (N, A, E): then each epoch takes a random view of each image.
        labels: (N,) integers. epochs: if None, `n_epochs` of the largest class's images. `history_`
        holds loss, accuracy (%) and lr of every epoch. Ctrl-C keeps what is learned and sets
        `interrupted_`. Raises RuntimeError when the loss is no longer finite.
        """
        x = _features(self, image_features, views=True)  # (N, A, E)
        y = _labels(self, labels, len(x))
        epochs, batch_size = _recipe(y, epochs, lr, batch_size)
        optimizer = torch.optim.SGD(self.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
        generator = torch.Generator("cpu").manual_seed(self.seed)  # the same order on every device
        self.history_ = {"loss": [], "accuracy": [], "lr": []}
        self.interrupted_ = False
        try:
            for epoch in tqdm(range(epochs), desc="learning the context", disable=not progress):
                optimizer.param_groups[0]["lr"] = learning_rate(epoch, epochs, lr)
                losses = []
                hits = []
                for batch, view in _batches(x, batch_size, generator):
                    text_features = self.text_features()  # (K, E)
                    logits = self(x[batch, view], text_features)  # (B, K)
                    loss = self.loss(logits, y[batch], text_features)
                    optimizer.zero_grad()
                    # a caller's autocast must not reach into the backward pass
                    with torch.autocast(x.device.type, enabled=False):
                        loss.backward()
                    optimizer.step()
                    losses.append(loss.detach())
                    hits.append(logits.argmax(1) == y[batch])
                self._note(torch.stack(losses), torch.cat(hits), optimizer.param_groups[0]["lr"])
        except KeyboardInterrupt:
            self.interrupted_ = True
            print(f"interrupted after {len(self.history_['loss'])} of {epochs} epochs",
                  file=sys.stderr)
        optimizer.zero_grad()  # leave no gradient behind
        return self

    def _note(self, losses, hits, lr):
        """Writes an epoch into `history_`, or stops a training that diverges."""
        loss = losses.mean().item()
        if not math.isfinite(loss):
            raise RuntimeError(f"the loss is {loss} in epoch {len(self.history_['loss'])}: "
                               "training diverges; start anew with a smaller lr")
        self.history_["loss"].append(loss)
        self.history_["accuracy"].append(100 * hits.float().mean().item())
        self.history_["lr"].append(lr)

    @torch.no_grad()
    def predict_proba(self, image_features):
        """Class probabilities (N, K) of image features (N, E), equation 1."""
        _check(self.ctx.isfinite().all(), "the context holds NaN or infinity: train it anew")
        return self(_features(self, image_features)).softmax(1)

    def predict(self, image_features):
        """Class indices (N,) of image features (N, E)."""
        return self.predict_proba(image_features).argmax(1)

    def score(self, image_features, labels):
        """Micro accuracy in [0, 1]: all images count alike."""
        predicted = self.predict(image_features)
        hits = predicted == _labels(self, labels, len(predicted))
        return hits.float().mean().item()

    @torch.no_grad()
    def nearest_words(self, k=3):
        """The k nearest rows of CLIP's token embedding (the paper's table 4; Euclidean).

        Returns for each of the M vectors a list of k pairs (word, distance); class-specific: K such
        lists. They say little: random vectors have nearest words, too.
        """
        embedding = self.clip_model.token_embedding.weight
        result = []
        for ctx in self.ctx.reshape(-1, *self.ctx.shape[-2:]):  # (M, D)
            distances, ids = torch.cdist(ctx, embedding).topk(k, largest=False)  # (M, k) each
            of_class = []
            for row, far in zip(ids.tolist(), distances.tolist()):
                words = [_tokenizer.decode([i]).strip() for i in row]
                of_class.append(list(zip(words, far)))
            result.append(of_class)
        return result if self.class_specific else result[0]

    def save(self, path):
        """Writes the context and what it needs (kilobytes; class-specific, K times as many)."""
        _check(len(self.state_dict()) == 1, "save keeps ctx only, but this variant has more "
               "parameters: save its state_dict()")
        _check(self.ctx.isfinite().all(), "the context holds NaN or infinity: not saved")
        state = {"format": "mini-coop 1", "ctx": self.ctx.detach().cpu(), "seed": self.seed,
                 "classnames": list(map(str, self.classnames)),
                 "class_specific": self.class_specific, "class_position": self.class_position,
                 "text_encoder": sha256_of(self.clip_model.state_dict(), skip="visual.")}
        state["sha256"] = _seal(state)
        with whole_file(path) as file:
            torch.save(state, file)

    @classmethod
    def load(cls, path, model, classnames=None):
        """Reads a saved context for the CLIP that it was learned with. A unified one can be used
        with other class names. Raises ValueError for a damaged file and for another CLIP."""
        _check_clip(model)
        path = Path(path).expanduser()
        with open(path, "rb") as file:
            try:
                state = torch.load(file, "cpu", weights_only=True)
                sealed = state.get("sha256") in (None, _seal(state))  # None: before there was one
                whole = state["format"] == "mini-coop 1" and sealed
            except Exception:  # a file that is not ours can raise anything
                whole = False
        _check(whole, f"{path} was not written by CoOp.save, or is damaged")
        same = state["text_encoder"] == sha256_of(model.state_dict(), skip="visual.")
        _check(same, f"{path} was learned with another text encoder: load the CLIP that it was "
               "learned with")
        names = state["classnames"] if classnames is None else classnames
        coop = cls(model, names, state["ctx"].shape[-2], state["class_specific"],
                   state["class_position"], seed=state["seed"])
        _check(not coop.class_specific or list(map(str, coop.classnames)) == state["classnames"],
               f"{path} is class-specific: it serves only the {len(state['ctx'])} classes that it "
               "was learned for, in this order")
        coop.load_state_dict({"ctx": state["ctx"]})  # which checks the shape
        return coop


def _seal(state):
    """The SHA-256 of a saved context and its settings."""
    keys = ("class_position", "class_specific", "classnames", "format", "seed", "text_encoder")
    settings = [(key, state[key]) for key in keys]
    text = f"{sha256_of({'ctx': state['ctx']})} {settings}"
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":  # python mini_coop.py: the main job, which imports this module
    sys.modules["mini_coop"] = sys.modules["__main__"]
    sys.path.insert(0, str(data_folder()))
    from grid import main
    main()
