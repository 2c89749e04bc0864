"""mini-coop: Context Optimization for CLIP, the whole of it in one module.

Zhou, Yang, Loy, Liu: *Learning to Prompt for Vision-Language Models*, IJCV 2022 (doi 10.1007/s11263-022-01653-1), "the paper"
below. The words of a prompt ("a photo of a") become learnable vectors; CLIP itself stays frozen. Since the image encoder never
changes, images are encoded once (`encode_images`) and training sees features only. Left out on purpose: checkpoint resuming
inside a fit, validation during training (the paper tests the last step's context) and everything that is not CoOp.

Shapes, in every comment: B images, K classes, M context vectors, L tokens of a prompt, D text width, E joint embedding;
P tokens at the start of a prompt that all classes share, at most R tokens that are a class's own, N of all classes together.
"""
import argparse
import functools
import hashlib
import itertools
import json
import math
import os
import pickle
import random
import re
import statistics
import sys
import time
import warnings
import zipfile
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.checkpoint import checkpoint
from torchvision import transforms
from tqdm.auto import tqdm

with warnings.catch_warnings():  # the registry's copy imports pkg_resources, which warns of its own end
    warnings.simplefilter("ignore")
    import clip
    from clip.clip import _MODELS, _tokenizer, _transform  # the same names in both distributions of CLIP

DATA = Path(__file__).resolve().parent / "data"
SHARED = Path(os.environ["MINI_COOP_ROOT"]) if os.environ.get("MINI_COOP_ROOT") else None  # a lab's folder: clip/*.pt, <data set>/
SOS, EOT = _tokenizer.encoder["<|startoftext|>"], _tokenizer.encoder["<|endoftext|>"]
TOKENS_AT_ONCE = 6000  # of the classes' own tokens; beyond, they are encoded in chunks: less memory, a third more time
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
# Hand-written templates that the main job compares beside a data set's own; the last four are the paper's, for other data sets.
TEMPLATES = ["{}", "an icon of a {}.", "a photo of a {}.", "a photo of {}, a type of food.", "{} texture.",
             "a centered satellite photo of {}."]


@contextmanager
def _atomic(path):
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


def _fingerprint(tensors):
    """Tells frozen weights apart, on any device: a hash of all values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------- CLIP, frozen

def load_clip(name="mini", device=None):
    """Loads a frozen CLIP in fp32.

    name: "mini" (the small one in data/, which knows icons), a name of `clip.available_models()` (OpenAI's, looked for in
    $MINI_COOP_ROOT/clip, else downloaded to ~/.cache/clip) or a path to a checkpoint: a state dict in OpenAI's layout, or a
    TorchScript archive as OpenAI ships.
    device: "cuda", "cpu", ... ; None takes CUDA where there is one, else the CPU. ("mps" is accepted but was never tried.)
    Returns (model, preprocess): the module in eval mode and the transform PIL image -> (3, n_px, n_px).
    Raises ValueError for an unknown name or device and for a file that is no CLIP, RuntimeError if a download fails.
    """
    device = _device(device)
    if name in clip.available_models():
        file = weights_file(name)
        try:
            model, _ = clip.load(name, device="cpu", download_root=str(file.parent))  # checks the SHA-256
        except (OSError, RuntimeError) as error:  # URLError is an OSError, a wrong SHA-256 a RuntimeError
            raise RuntimeError(f"could not download CLIP {name!r} ({error}). Put the file there by hand: {file} "
                               f"(from {_MODELS[name]}), or use 'mini', which needs no download") from error
    else:
        path = DATA / "mini_clip.pt" if name == "mini" else Path(name)
        if not path.is_file():
            raise ValueError(f"no CLIP called {str(name)!r}: neither 'mini', nor one of {', '.join(clip.available_models())}, nor a file")
        try:
            scripted = zipfile.is_zipfile(path) and any(n.endswith("/constants.pkl") for n in zipfile.ZipFile(path).namelist())
            state = torch.jit.load(path, "cpu").state_dict() if scripted else torch.load(path, "cpu", weights_only=True)
            model = clip.model.build_model(dict(state)).float()
            model.load_state_dict({key: state[key] for key in model.state_dict()})  # build_model rounds to fp16 on its way
        except Exception as error:  # a file that is no checkpoint can raise anything
            raise ValueError(f"{path} is no CLIP checkpoint in OpenAI's layout, or is damaged ({type(error).__name__}: "
                             f"{str(error).strip().splitlines()[0] if str(error).strip() else ''})") from error
    model = model.float().eval().requires_grad_(False).to(device)
    return model, _transform(model.visual.input_resolution)


def weights_file(name):
    """Where OpenAI's weights of a name lie, or will: the lab's shared folder if they are there, else ~/.cache/clip."""
    file = Path(_MODELS[name]).name
    shared = SHARED / "clip" / file if SHARED else None
    return shared if shared and shared.is_file() else Path("~/.cache/clip").expanduser() / file


def _device(device):
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {str(device)!r} cannot be used here; "
                         f"try 'cpu'{' or cuda' if torch.cuda.is_available() else ' (torch sees no CUDA)'}") from error
    return device


def _device_of(model):
    return model.text_projection.device


# ---------------------------------------------------------------- images and labels

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
    """Reads a data set; images are opened only when they are encoded.

    name_or_folder: the name of a folder in data/ or in $MINI_COOP_ROOT, or the path of a folder that holds either dataset.json (the form is in
    data/README.md) or one folder a class, `root/<class name>/*.jpg`, with or without `train/`, `val/`, `test/` above. Without
    them each class's images are dealt 50 / 20 / 30 by a fixed seed, as the paper does where a data set has no splits.
    Raises ValueError for an unknown name, a folder without images, and a dataset.json that is broken or names missing files.
    """
    known = {p.parent.name: p.parent for place in (SHARED, DATA) if place for p in sorted(place.glob("*/dataset.json"))}
    folder = known.get(str(name_or_folder), Path(name_or_folder))
    if not folder.is_dir():
        raise ValueError(f"no data set {str(name_or_folder)!r}: neither a folder nor one of {', '.join(sorted(known))}")
    if not (folder / "dataset.json").exists():
        return _image_folder(folder)
    try:
        data = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        if data.get("format", 1) != 1:
            raise ValueError(f"format {data['format']!r}, but this version reads 1: prepare it again")
        root, K, parts = folder / data.get("images", "."), len(data["classnames"]), ("train", "val", "test")
        if wrong := set(data["splits"]) - set(parts) or set(data.get("domains", {})) & set(parts):
            raise ValueError(f"splits are train, val and test, domains have other names; {', '.join(sorted(wrong))} is neither")
        splits = {name: Split([root / image for image, _ in rows], [label for _, label in rows])
                  for name, rows in [*data["splits"].items(), *data.get("domains", {}).items()]}
        template = data["template"]
        if not isinstance(template, str) or "{}" not in template or not all(isinstance(name, str) for name in data["classnames"]):
            raise ValueError("the template must be a text with {} in it, the class names a list of texts")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder / 'dataset.json'} is not in our form (data/README.md): {type(error).__name__} {error}") from error
    inside = {root / name for name in zipfile.ZipFile(root).namelist()} if zipfile.is_zipfile(root) else None
    for name, split in splits.items():
        missing = [p for p in split.images if not (p in inside if inside is not None else p.is_file())]
        if missing:
            raise ValueError(f"{folder}: {len(missing)} of {len(split.images)} images of {name!r} are missing, first {missing[0]}")
        if wrong := [label for label in split.labels if type(label) is not int or not 0 <= label < K]:
            raise ValueError(f"{folder}: label {wrong[0]!r} in {name!r}, but there are {K} classes (0 to {K - 1})")
    domains = {name: splits[name] for name in data.get("domains", {})}
    return Dataset(folder.resolve().name, data["classnames"], template, *(splits.get(s, Split([], [])) for s in parts), domains)


def _image_folder(root):
    def images_of(folder):
        return sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES) if folder.is_dir() else []
    parts = [s for s in ("train", "val", "test") if (root / s).is_dir() and any(images_of(d) for d in (root / s).iterdir() if d.is_dir())]
    classes = sorted({d.name for top in ([root / s for s in parts] or [root]) for d in top.iterdir() if d.is_dir() and images_of(d)})
    if not classes:
        raise ValueError(f"{root} holds no images: expected {root}/<class name>/*.jpg, or train/, val/, test/ above the class folders")
    splits = {s: Split([], []) for s in ("train", "val", "test")}
    for label, name in enumerate(classes):
        if parts:
            dealt = {s: images_of(root / s / name) for s in parts}
        else:
            images = images_of(root / name)
            random.Random(0).shuffle(images)
            a, b = math.ceil(0.5 * len(images)), math.ceil(0.7 * len(images))
            dealt = {"train": images[:a], "val": images[a:b], "test": images[b:]}
        for s, images in dealt.items():
            splits[s].images.extend(images)
            splits[s].labels.extend([label] * len(images))
    if untested := [name for label, name in enumerate(classes) if label not in splits["test"].labels]:
        warnings.warn(f"{root}: no test images of {len(untested)} of {len(classes)} classes: {', '.join(untested[:5])}", stacklevel=3)
    return Dataset(root.resolve().name, classes, "a photo of a {}.", **splits, domains={})


def few_shot(train_labels, shots, seed, val_labels=None):
    """The published few-shot sample: `shots` images a class (all of them, with a warning, where there are fewer).

    Returns indices into train_labels, or (train, val) indices if val_labels are given: min(shots, 4) validation images a class,
    drawn after the training images from the same generator. Seeds 1, 2, 3 give the paper's own images on its own splits.
    """
    if shots < 1:
        raise ValueError(f"shots must be 1 or more, not {shots}")
    rng = random.Random(seed)

    def draw(labels, shots):
        members = {}  # in the order of first appearance, which the published sample depends on
        for index, label in enumerate(torch.as_tensor(labels).tolist()):
            members.setdefault(label, []).append(index)
        if short := {k: len(m) for k, m in members.items() if len(m) < shots}:
            warnings.warn(f"{len(short)} classes have fewer than {shots} images and give all they have (label: images): "
                          f"{dict(list(short.items())[:5])}", stacklevel=3)
        return [i for m in members.values() for i in (rng.sample(m, shots) if len(m) >= shots else m)]

    train = draw(train_labels, shots)
    return train if val_labels is None else (train, draw(val_labels, min(shots, 4)))


@functools.lru_cache(maxsize=16)
def _archive(path, _process, _time):
    return zipfile.ZipFile(path)


def open_image(image):
    """An RGB image from a path, from inside an archive (`images.zip/name.png`) or from a PIL image: upright by its EXIF tag,
    transparent parts white, 16 bits scaled to 8."""
    if not isinstance(image, Image.Image):
        path = Path(image)
        archive = next((p for p in path.parents if p.suffix == ".zip" and p.is_file()), None)
        image = Image.open(_archive(archive, os.getpid(), archive.stat().st_mtime_ns).open(path.relative_to(archive).as_posix()) if archive else path)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # PIL itself would cut 16 bits off at 255, which makes nearly all of them white
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


class _Views(torch.utils.data.Dataset):
    """Image i -> (V, 3, n_px, n_px) and "" or, for an image that cannot be read, NaN and the reason."""

    def __init__(self, images, transform, views, seed, n_px):
        self.images, self.transform, self.views, self.seed, self.n_px = images, transform, views, seed, n_px

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        try:
            image = open_image(self.images[i])
            name = i if isinstance(self.images[i], Image.Image) else Path(self.images[i]).name
            with torch.random.fork_rng(devices=[]):  # the same views whatever the batch size, the workers and the other images
                torch.default_generator.manual_seed(random.Random(f"{self.seed} {name}").getrandbits(32))
                return torch.stack([self.transform(image) for _ in range(self.views)]), ""
        except Exception as error:  # broken files and archives raise anything
            return torch.full((self.views, 3, self.n_px, self.n_px), math.nan), f"{self.images[i]} ({error})"


def encode_images(model, preprocess, images, views=1, batch_size=256, seed=0, workers=None, progress=True, cache=None):
    """Unit-norm float32 image features on the model's device, (N, E); with views=V > 1 (N, V, E).

    images: paths or PIL images. views=1 uses `preprocess` (the test transform); V > 1 draws V random resized crops and flips an
    image, the paper's augmentation, once: the encoder is frozen, so training picks among them. workers: processes that read
    images; by default none, except on Linux with more than two cores and thousands of images, where they pay. cache: a folder
    that keeps the features; they are taken from there only if weights, transform, views, seed and every file are the same.
    An image that cannot be read is named in a warning and becomes a row of NaN; the others are not lost (nor cached).
    """
    images = [images] if isinstance(images, (str, Path, Image.Image)) else list(images)
    if not images or views < 1:
        raise ValueError("no images to encode" if not images else f"views must be 1 or more, not {views}")
    device, kept = _device_of(model), None
    if cache is not None and "ambda" not in str(preprocess):  # lambdas all print alike
        key = repr([_fingerprint(model.visual.state_dict().values()), _described(preprocess), views, seed * (views > 1), [_stamp(image) for image in images]])
        kept = Path(cache) / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.pt"
        try:
            return torch.load(kept, device, weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
            pass  # not there, or damaged: encoded anew
    features, unreadable = _encode(model, preprocess, images, views, batch_size, seed, workers, progress)
    if unreadable:
        warnings.warn(f"{len(unreadable)} of {len(images)} images cannot be read and are rows of NaN: {'; '.join(unreadable[:3])}. "
                      "keep = features.isfinite().flatten(1).all(1) selects the others", stacklevel=2)
    elif kept:
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with _atomic(kept) as file:
                torch.save(features, file)
        except (OSError, RuntimeError) as error:  # no space: torch says RuntimeError
            warnings.warn(f"the features could not be kept in {kept.parent} ({error}); they are returned all the same", stacklevel=2)
    return features


def _described(preprocess):
    return re.sub(" at 0x[0-9a-f]+", "", str(preprocess))  # a function's address is another one in every process


def _stamp(image):
    """What a cached feature depends on: an image's pixels, or its path and its file's size and time (an archive's, if it is in one)."""
    if isinstance(image, Image.Image):
        image = open_image(image)
        return hashlib.sha256(image.tobytes()).hexdigest(), image.size
    path = Path(image)
    file = next((p for p in path.parents if p.suffix == ".zip" and p.is_file()), path)
    return str(path), *((file.stat().st_size, file.stat().st_mtime_ns) if file.exists() else ())


@torch.no_grad()
def _encode(model, preprocess, images, views, batch_size, seed, workers, progress):
    n_px, device = model.visual.input_resolution, _device_of(model)
    transform = preprocess if views == 1 else transforms.Compose([
        transforms.RandomResizedCrop(n_px, scale=(0.08, 1), interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(), *preprocess.transforms[-2:]])  # the last two: to tensor, CLIP's mean and std
    if workers is None:
        workers = min(8, os.cpu_count()) if sys.platform == "linux" and os.cpu_count() > 2 and len(images) * views > 4000 else 0
    loader = torch.utils.data.DataLoader(_Views(images, transform, views, seed, n_px), max(1, batch_size // views), num_workers=workers,
                                         multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
                                         generator=torch.Generator(), pin_memory=device.type == "cuda")
    features, unreadable = [], []
    for pixels, reasons in tqdm(loader, desc="encoding images", disable=not progress, leave=False):
        with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):  # as OpenAI's weights were trained
            x = model.encode_image(pixels.flatten(0, 1).to(device, non_blocking=True)).float()  # (B * V, E)
        features.append(F.normalize(x, dim=-1).unflatten(0, (-1, views)))
        unreadable += [r for r in reasons if r]
    features = torch.cat(features)
    return features[:, 0] if views == 1 else features, unreadable


# ---------------------------------------------------------------- the text side

def encode_prompts(model, shared, rest, place, where):
    """CLIP's text encoder on token embeddings, computing what is needed and no more.

    The text transformer is causal: a token sees only those before it. So what all classes share at the start of their prompts
    has the same keys and values for each of them and is computed once, not K times; and nothing after a class's EOT counts.
    shared: (P, D) embeddings of the tokens that all classes share; rest: (N, D) of each class's own, up to its EOT, one class
    after another; place, where: their layout, from `_layout`. The linear layers see the N tokens, only attention sees them
    padded to (K, R). Returns (K, E) features, not normalised; exact, gradients too (tests hold it to the 77-token way).
    """
    P, D, (K, R) = len(shared), shared.shape[1], place.shape
    x = torch.cat([shared + model.positional_embedding[:P], rest + model.positional_embedding[P + where % R]])  # (P + N, D)
    future = torch.full((R, R), -math.inf, device=x.device).triu(1)
    for block in model.transformer.resblocks:
        heads = block.attn.num_heads
        qkv = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias).unflatten(1, (3, heads, -1))
        q, k, v = qkv[:P].permute(1, 2, 0, 3)  # of the shared tokens: (heads, P, D / heads) each
        first = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        own_q, own_k, own_v = qkv[P:].index_select(0, place.flatten()).permute(1, 2, 0, 3).unflatten(2, (K, R))  # (heads, K, R, D / heads)
        own_q = own_q / own_q.shape[-1] ** 0.5
        to_shared = own_q.flatten(1, 2) @ k.mT  # (heads, K * R, P)
        to_own = own_q @ own_k.mT + future  # (heads, K, R, R): what pads a class stands after its EOT, so it is never seen
        weights = torch.cat([to_shared, to_own.flatten(1, 2)], 2).softmax(2)  # (heads, K * R, P + R)
        second = weights[..., :P] @ v + (weights[..., P:].unflatten(1, (K, R)) @ own_v).flatten(1, 2)  # (heads, K * R, D / heads)
        seen = torch.cat([first, second.index_select(1, where)], 1).transpose(0, 1).flatten(1)  # (P + N, D)
        if block is model.transformer.resblocks[-1]:  # only the EOTs, a class's last tokens, are read: 15 % of the mini-CLIP's step
            x, seen = x[P + place[:, -1]], seen[P + place[:, -1]]  # (K, D)
        x = x + block.attn.out_proj(seen)
        x = x + block.mlp(block.ln_2(x))
    return model.ln_final(x) @ model.text_projection


def _layout(lengths, device):
    """K runs of tokens, one after another -> place (K, R), the token at each place of a padded table (a run's last repeated to
    the longest, R), and where (N,), the place in that table, flattened, of each token."""
    R, starts = max(lengths), [0, *itertools.accumulate(lengths)]
    place = [[start + min(r, n - 1) for r in range(R)] for start, n in zip(starts, lengths)]
    return torch.tensor(place, device=device), torch.tensor([k * R + r for k, n in enumerate(lengths) for r in range(n)], device=device)


def _clean(classnames):
    """Class names as a prompt says them; the errors and the warning that belong to them."""
    if isinstance(classnames, str):
        raise ValueError("classnames must be a list of class names")
    classnames = list(classnames)
    names = [str(name).replace("_", " ").strip() for name in classnames]
    if not names:
        raise ValueError("the list of class names is empty")
    if "" in names:
        raise ValueError(f"class {names.index('')} has an empty name ({classnames[names.index('')]!r})")
    if twice := [name for name, n in Counter(names).items() if n > 1]:
        warnings.warn(f"classes of the same name cannot be told apart by their prompts: {', '.join(twice)}", stacklevel=3)
    return names


def _check_length(model, what, n_tokens):
    if n_tokens + 2 > model.context_length:  # + SOS and EOT
        raise ValueError(f"{what} makes a prompt of {n_tokens + 2} tokens, but CLIP reads {model.context_length}: shorten it")


def _embed(model, tokens):
    """Token ids, a list -> their embeddings (N, D)."""
    return model.token_embedding(torch.tensor(tokens, device=_device_of(model)))


@torch.no_grad()
def zero_shot_weights(model, classnames, templates):
    """Zero-shot classifier (K, E), unit-norm, from one hand-written template ("a photo of a {}.") or an ensemble (a list).

    Each template's features are normalised, averaged over templates and normalised again. Class k scores `image @ weights[k]`.
    """
    names, weights, templates = _clean(classnames), 0, [templates] if isinstance(templates, str) else list(templates)
    if not templates:
        raise ValueError("no template to write the class names into")
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"the template {template!r} has no {{}} for the class name")
        rows = [_tokenizer.encode(template.replace("{}", name)) + [EOT] for name in names]
        for name, row in zip(names, rows):
            _check_length(model, repr(template.replace("{}", name)), len(row) - 1)
        layout = _layout([len(row) for row in rows], _device_of(model))
        weights = weights + F.normalize(encode_prompts(model, _embed(model, [SOS]), _embed(model, sum(rows, [])), *layout), dim=-1)
    return F.normalize(weights, dim=-1)


# ---------------------------------------------------------------- the linear probe

def linear_probe(train, train_labels, val, val_labels):
    """The paper's baseline: scikit-learn's logistic regression on image features (N, E), C searched on a validation set.

    A coarse grid of C from 1e6 to 1e-6, then 8 steps that halve the range around the best in log space; returns the fitted
    LogisticRegression of the last step (`.C` tells what was chosen, `.predict` and `.score` take NumPy features).
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    train, train_labels, val, val_labels = (torch.as_tensor(t).cpu().numpy() for t in (train, train_labels, val, val_labels))

    def accuracy(log_C):
        classifier = LogisticRegression(C=10 ** log_C, max_iter=1000).fit(train, train_labels)
        return classifier.score(val, val_labels), classifier

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # max_iter is the paper's
        best = max((6, 4, 2, 0, -2, -4, -6), key=lambda log_C: accuracy(log_C)[0])  # the first of equals
        low, high = best - 1, best + 1
        for _ in range(8):
            (at_low, low_fit), (at_high, high_fit), middle = accuracy(low), accuracy(high), (low + high) / 2
            low, high, chosen = (middle, high, high_fit) if at_low < at_high else (low, middle, low_fit)
    return chosen


# ---------------------------------------------------------------- CoOp

def learning_rate(epoch, epochs, lr=0.002):
    """The paper's schedule: one epoch at 1e-5, then a cosine over `epochs` that is never finished (epoch 1 runs at `lr`)."""
    return 1e-5 if epoch == 0 else 0.5 * lr * (1 + math.cos(math.pi * (epoch - 1) / epochs))


def _text_fingerprint(model):
    return _fingerprint(value for key, value in model.state_dict().items() if not key.startswith("visual."))


def n_epochs(shots, epochs=None):
    """The paper's number of epochs, unless given: 50 for 1 shot, 100 for up to 4, else 200 (it takes 50 on ImageNet always)."""
    return epochs if epochs is not None else 50 if shots == 1 else 100 if shots <= 4 else 200


class CoOp(torch.nn.Module):
    """The prompt learner (section 3.2 of the paper): prompts "[V1] ... [VM] class name ." whose vectors V are learned.

    model: a CLIP of load_clip, kept but not registered: `ctx` is the only parameter and all of the state dict.
    classnames: K >= 2 names. n_ctx: M. class_specific: one context a class, ctx (K, M, D), instead of one for all, (M, D).
    class_position: "end", "middle" or "front". ctx_init: words to start from ("a photo of a"), one vector a token, which
    override n_ctx; without them the vectors are drawn from N(0, 0.02^2) by `seed`, which also orders the training.
    Raises ValueError for bad class names, positions, lengths; warns of classes of the same name.
    """

    def __init__(self, model, classnames, n_ctx=16, class_specific=False, class_position="end", ctx_init=None, seed=0):
        super().__init__()
        classnames = classnames if isinstance(classnames, str) else list(classnames)
        names = _clean(classnames)
        if len(names) < 2:
            raise ValueError(f"there is one class only ({names[0]!r}): nothing to tell apart")
        if class_position not in ("end", "middle", "front"):
            raise ValueError(f"class_position must be 'end', 'middle' or 'front', not {class_position!r}")
        words = _tokenizer.encode(ctx_init.replace("_", " ")) if ctx_init else []
        M, K, D = len(words) or n_ctx, len(names), model.ln_final.weight.shape[0]
        if type(M) is not int or M < 1:
            raise ValueError(f"n_ctx must be 1 or more, not {n_ctx!r}")
        object.__setattr__(self, "clip_model", model)  # not registered: frozen, and no part of the state dict
        self.classnames, self.n_ctx, self.class_specific, self.class_position = classnames, M, bool(class_specific), class_position
        self.seed, self.history_ = seed, {"loss": [], "accuracy": [], "lr": []}

        # Each prompt is a list of places in `source`: the context vectors, then the tokens of all names, "name", ".", EOT each.
        tokens = [_tokenizer.encode(name + ".") + [EOT] for name in names]
        n_before = {"end": M, "middle": M // 2, "front": 0}[class_position]  # context vectors before the name
        self.n_shared, order, start = 0 if class_specific else n_before, [], K * M if class_specific else M
        for k, (name, row) in enumerate(zip(names, tokens)):
            _check_length(model, f"class {name!r} with {M} context vectors", M + len(row) - 1)
            n_name = len(_tokenizer.encode(name))  # as published; "(...)" + "." may merge, then the period goes with the name
            own, ctx = range(start, start + len(row)), range(k * M, k * M + M) if class_specific else range(M)
            order.append([*ctx[self.n_shared:n_before], *own[:n_name], *ctx[n_before:], *own[n_name:]])
            start += len(row)
        device, self._chunks, chunk = _device_of(model), [], []
        for k, row in enumerate(order):  # as many classes at a time as TOKENS_AT_ONCE allows
            chunk.append(row)
            if k + 1 == K or sum(map(len, chunk)) + len(order[k + 1]) > TOKENS_AT_ONCE:
                self._chunks.append((torch.tensor(sum(chunk, []), device=device), *_layout([len(row) for row in chunk], device)))
                chunk = []
        self._sos, self._tokens = _embed(model, [SOS]), _embed(model, sum(tokens, []))  # (1, D), (all names' tokens, D)
        if words:
            ctx = _embed(model, words)  # (M, D)
            ctx = ctx.repeat(K, 1, 1) if class_specific else ctx
        else:
            ctx = 0.02 * torch.randn((K, M, D) if class_specific else (M, D), generator=torch.Generator().manual_seed(seed))
        self.ctx = torch.nn.Parameter(ctx.to(device))

    def text_features(self):
        """Unit-norm text features of the prompts as they are now, (K, E); gradients reach `ctx`."""
        shared = torch.cat([self._sos, self.ctx[:self.n_shared]]) if self.n_shared else self._sos  # (P, D)
        source = torch.cat([self.ctx.flatten(0, -2), self._tokens])
        device, run = source.device.type, encode_prompts
        if len(self._chunks) > 1:  # many classes: keep no chunk's activations, compute them again in the backward pass
            run = functools.partial(checkpoint, encode_prompts, use_reentrant=False)
        # mixed precision where the device has bf16; context and optimiser stay fp32
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)):
            features = [run(self.clip_model, shared, source.index_select(0, rows), *layout) for rows, *layout in self._chunks]
        return F.normalize(torch.cat(features).float(), dim=-1)

    def forward(self, image_features):
        """Logits (B, K) of image features (B, E): exp(logit_scale) * cosine, the scale frozen at CLIP's value."""
        return self.clip_model.logit_scale.exp() * F.normalize(image_features, dim=-1) @ self.text_features().T

    def fit(self, image_features, labels, epochs=None, lr=0.002, batch_size=32, progress=True):
        """Learns the context by the paper's recipe (section 4.1) and returns self; goes on from the context as it is.

        image_features: (N, E), or (N, V, E): then each epoch takes a random view of each image. labels: (N,) integers.
        SGD, momentum 0.9, weight decay 5e-4, the schedule of `learning_rate`; a last short batch is dropped unless it is the
        only one. epochs=None: `n_epochs` of the largest number of images a class.
        `history_` holds loss, accuracy (%) and lr of every epoch. Ctrl-C keeps what is learned so far and sets `interrupted_`.
        """
        features, labels = self._check(image_features, labels, views=True)
        if batch_size < 1 or (epochs is not None and epochs < 0):
            raise ValueError(f"batch_size must be 1 or more and epochs 0 or more, not {batch_size} and {epochs}")
        N = len(features)
        epochs = n_epochs(labels.bincount().max().item(), epochs)
        batch_size = min(batch_size, N)
        optimizer = torch.optim.SGD([self.ctx], lr=lr, momentum=0.9, weight_decay=5e-4)
        generator = torch.Generator().manual_seed(self.seed)  # on the CPU: the same order on every device
        self.history_, self.interrupted_ = {"loss": [], "accuracy": [], "lr": []}, False
        bar = tqdm(range(epochs), desc="learning the context", disable=not progress)
        try:
            for epoch in bar:
                optimizer.param_groups[0]["lr"] = learning_rate(epoch, epochs, lr)
                order = torch.randperm(N, generator=generator).to(features.device)
                epoch_features = features
                if features.ndim == 3:
                    view = torch.randint(features.shape[1], (N,), generator=generator).to(features.device)
                    epoch_features = features[torch.arange(N, device=features.device), view]  # (N, E)
                total_loss, total_right, steps = 0, 0, N // batch_size
                for batch in order[:steps * batch_size].split(batch_size):
                    logits = self(epoch_features[batch])  # (B, K)
                    loss = F.cross_entropy(logits, labels[batch])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    total_loss, total_right = total_loss + loss.detach(), total_right + (logits.argmax(1) == labels[batch]).sum()
                self.history_["loss"].append(float(total_loss) / steps)
                self.history_["accuracy"].append(100 * float(total_right) / (steps * batch_size))
                self.history_["lr"].append(optimizer.param_groups[0]["lr"])
                bar.set_postfix(loss=f"{self.history_['loss'][-1]:.3f}", refresh=False)
        except KeyboardInterrupt:
            self.interrupted_ = True
            print(f"interrupted after {len(self.history_['loss'])} of {epochs} epochs: the context learned so far is kept", file=sys.stderr)
        return self

    def _check(self, features, labels=None, views=False):
        """Features and labels on our device, or one clear error."""
        device, E = self.ctx.device, self.clip_model.text_projection.shape[1]
        features = torch.as_tensor(features).detach().to(device, torch.float32)
        if features.ndim not in ((2, 3) if views else (2,)) or features.shape[-1] != E or not len(features):
            raise ValueError(f"image features must be (N, {E}){f' or (N, views, {E})' if views else ''}, not {tuple(features.shape)}: "
                             "are they from encode_images with the same model?")
        if not (finite := features.isfinite().flatten(1).all(1)).all():
            raise ValueError(f"{int((~finite).sum())} of {len(features)} image features are NaN or infinite, first row "
                             f"{int((~finite).nonzero()[0])} (an image that could not be read?)")
        if labels is None:
            return features
        try:
            labels = torch.as_tensor(labels, device=device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"labels must be {len(features)} integers, the places of the classes in classnames ({error})") from error
        if labels.shape != (len(features),) or labels.is_floating_point() or labels.is_complex():
            raise ValueError(f"labels must be {len(features)} integers, one a feature, not {labels.dtype} {tuple(labels.shape)}")
        labels = labels.long()
        if (wrong := labels[(labels < 0) | (labels >= len(self.classnames))]).numel():
            raise ValueError(f"label {int(wrong[0])} is outside of the {len(self.classnames)} classes (0 to {len(self.classnames) - 1})")
        return features, labels

    @torch.no_grad()
    def predict_proba(self, image_features):
        """Class probabilities (N, K) of image features (N, E)."""
        return self(self._check(image_features)).softmax(1)

    def predict(self, image_features):
        """Class indices (N,) of image features (N, E)."""
        return self.predict_proba(image_features).argmax(1)

    def score(self, image_features, labels):
        """Micro accuracy in [0, 1]: all images count alike."""
        features, labels = self._check(image_features, labels)
        return (self.predict(features) == labels).float().mean().item()

    @torch.no_grad()
    def nearest_words(self, k=3):
        """The k nearest rows of CLIP's token embedding (the paper's interpretation; Euclidean), always of the CLIP trained with.

        Returns for each of the M vectors a list of k pairs (word, distance); class-specific: K such lists. Do not read much
        into them: the paper could not, and neither can we.
        """
        embedding, result = self.clip_model.token_embedding.weight, []
        for ctx in self.ctx.view(-1, self.n_ctx, self.ctx.shape[-1]):  # (M, D)
            distances, ids = torch.cdist(ctx, embedding).topk(k, largest=False)  # (M, k)
            result.append([[(_tokenizer.decode([i]).strip(), d) for d, i in zip(*pair)] for pair in zip(distances.tolist(), ids.tolist())])
        return result if self.class_specific else result[0]

    def save(self, path):
        """Writes the context and what it needs (tens of kilobytes), whole or not at all."""
        state = {"format": "mini-coop 1", "ctx": self.ctx.detach().cpu(), "classnames": [str(n) for n in self.classnames], "seed": self.seed,
                 "class_specific": self.class_specific, "class_position": self.class_position, "text_encoder": _text_fingerprint(self.clip_model)}
        with _atomic(path) as file:
            torch.save(state, file)

    @classmethod
    def load(cls, path, model, classnames=None):
        """Reads a saved context for the CLIP it was learned with; a unified one may be put before other class names."""
        try:
            state = torch.load(path, "cpu", weights_only=True)
            if not isinstance(state, dict) or state.get("format") != "mini-coop 1":
                raise ValueError("not written by CoOp.save")
            names, ctx, specific = state["classnames"] if classnames is None else list(classnames), state["ctx"], state["class_specific"]
            position, seed, text_encoder = state["class_position"], state["seed"], state["text_encoder"]
            if ctx.ndim != 2 + specific or not ctx.isfinite().all():
                raise ValueError(f"a context of shape {tuple(ctx.shape)}, or one that is not finite")
        except FileNotFoundError:
            raise
        except Exception as error:  # a file that is not ours can raise anything
            raise ValueError(f"{path} holds no context of ours, or is damaged ({type(error).__name__}: {str(error).strip()[:200]})") from error
        if text_encoder != _text_fingerprint(model):
            raise ValueError(f"{path} was learned with another text encoder: load the CLIP that it was learned with")
        if specific and [str(name) for name in names] != state["classnames"]:
            raise ValueError(f"{path} is class-specific: it serves only the {len(state['classnames'])} classes that it was learned for")
        coop = cls(model, names, ctx.shape[-2], specific, position, seed=seed)
        coop.ctx.data.copy_(ctx)
        return coop


# ---------------------------------------------------------------- the main job

METHODS = ("linear probe", "CoOp unified", "CoOp class-specific")


def _seconds_a_step(coop):
    """How long a training step of this context takes here: three are timed, after two to warm up."""
    features, labels = torch.randn(32, coop.clip_model.text_projection.shape[1]), torch.arange(32) % len(coop.classnames)
    for epochs in (2, 3):
        start = time.perf_counter()
        if coop.fit(features, labels, epochs, progress=False).interrupted_:
            raise KeyboardInterrupt
    return (time.perf_counter() - start) / 3


def experiment(model, preprocess, data, folder, shots, seeds, methods, n_ctx=16, class_position="end", ctx_init=None, epochs=None, views=1):
    """Zero-shot with every template, then every cell, a method x shots x seed, on one data set; contexts are saved in `folder`.

    A finished cell is kept in `folder` too and not run again, unless weights, images or settings changed. Features are cached
    in `folder`/features. Returns {"zero_shot": {template: {split: %}}, "few_shot": {method: {shots: [{split: %} a seed]}}};
    splits: test and the domains.
    """
    if not data.train.images or not data.test.images:
        raise ValueError(f"{data.name} has no {'test' if data.train.images else 'training'} images: the comparison needs both")
    tests, K = {"test": data.test, **data.domains}, len(data.classnames)
    key = [_fingerprint(model.state_dict().values()), _described(preprocess), list(tests), data.classnames, n_ctx, class_position, ctx_init, epochs, views]
    key += [(s.labels, [_stamp(i) for i in s.images]) for s in (data.train, data.val, *tests.values())]
    key = hashlib.sha256(repr(key).encode()).hexdigest()
    picks = {(n, seed): few_shot(data.train.labels, n, seed, data.val.labels) for n in shots for seed in seeds}

    def finished(cell):
        try:
            kept = json.loads(cell.with_name(cell.name + ".json").read_text())
            whole = "linear_probe" in cell.name or cell.with_name(cell.name + ".pt").is_file()
            return kept["accuracy"] if kept["key"] == key and whole else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    cells = {(n, seed, method): folder / f"{method.replace(' ', '_')}_{n}_shots_seed_{seed}" for n, seed in picks for method in methods}
    done = {which: accuracy for which, cell in cells.items() if (accuracy := finished(cell)) is not None}
    used = [sorted({i for pick in picks.values() for i in pick[part]}) if len(done) < len(cells) else [] for part in (0, 1)]

    def new(method, seed):
        return CoOp(model, data.classnames, n_ctx, method == "CoOp class-specific", class_position, ctx_init, seed)

    def encode(split, indices, views=1):
        """{index: features} of the images that can be read."""
        images = [split.images[i] for i in indices]
        features = encode_images(model, preprocess, images, views, cache=folder / "features") if images else []
        return {i: x for i, x in zip(indices, features) if x.isfinite().all()}

    def gather(split, features, indices):
        indices = [i for i in indices if i in features]
        if not indices:
            raise ValueError(f"{data.name}: a split or a draw of it has no image that can be read")
        return torch.stack([features[i] for i in indices]), torch.tensor([split.labels[i] for i in indices])

    # The plan: what has to be computed, and how long that takes here, from a few steps and images
    n_steps = {method: sum(n_epochs(n, epochs) * max(1, len(picks[n, seed][0]) // 32) for n, seed, m in cells.keys() - done.keys() if m == method)
               for method in methods if method != "linear probe"}
    n_images = len(used[0]) * (1 + views * (views > 1)) + len(used[1]) + sum(len(s.images) for s in tests.values())
    seconds = sum(steps * _seconds_a_step(new(method, 0)) for method, steps in n_steps.items() if steps)
    start = time.perf_counter()
    _encode(model, preprocess, data.test.images[:32], 1, 32, 0, 0, False)
    seconds += n_images * (time.perf_counter() - start) / len(data.test.images[:32])
    print(f"plan: {len(cells) - len(done)} of {len(cells)} cells are to be run, {sum(n_steps.values()):,} training steps; {n_images:,} images to encode "
          f"where they are not cached; about {seconds / 60:.1f} minutes", flush=True)

    train, val = encode(data.train, used[0]), encode(data.val, used[1])
    train_views = encode(data.train, used[0], views) if views > 1 else train
    tests = {name: gather(split, encoded := encode(split, range(len(split.images))), encoded) for name, split in tests.items()}

    def accuracies(scores):
        """scores: features -> (N, K). A domain that holds some of the classes only is a task of those (ImageNet-A and -R)."""
        result = {}
        for name, (x, y) in tests.items():
            classes = torch.arange(K) if name == "test" else y.unique()
            result[name] = 100 * (classes[scores(x).cpu()[:, classes].argmax(1)] == y).float().mean().item()
        return result

    zero_shot, templates = {}, list(dict.fromkeys([data.template, *TEMPLATES]))
    for name, template in [*zip(templates, templates), ("ensemble of these", templates)]:
        weights = zero_shot_weights(model, data.classnames, template)
        zero_shot[name] = accuracies(lambda x: x @ weights.T)
    bar = tqdm([which for which in cells if which not in done], desc=data.name, disable=len(done) == len(cells))
    for n, seed, method in bar:
        bar.set_postfix_str(f"{method}, {n} shots, seed {seed}")
        (chosen, validation), cell = picks[n, seed], cells[n, seed, method]
        if method == "linear probe":
            probe = linear_probe(*gather(data.train, train, chosen), *gather(data.val, val, validation))
            columns = F.one_hot(torch.from_numpy(probe.classes_), K).double()  # it may have seen some of the classes only
            accuracy = accuracies(lambda x: torch.from_numpy(probe.predict_proba(x.cpu().numpy())).double() @ columns)
        else:
            coop = new(method, seed)
            if coop.fit(*gather(data.train, train_views, chosen), n_epochs(n, epochs), progress=False).interrupted_:
                raise KeyboardInterrupt  # a half-learned context is no result
            Path(f"{cell}.json").unlink(missing_ok=True)  # an older result must not stand beside a newer context
            coop.save(f"{cell}.pt")
            accuracy = accuracies(coop.predict_proba)
        done[n, seed, method] = accuracy
        with _atomic(f"{cell}.json") as file:
            file.write(json.dumps({"key": key, "accuracy": accuracy}).encode())
    return {"zero_shot": zero_shot, "few_shot": {m: {str(n): [done[n, seed, m] for seed in seeds] for n in shots} for m in methods}}


def run_folder(out, model, dataset):
    """Where the main job saves what it learns with a model (a name or a checkpoint) on a data set, below its --out."""
    return Path(out) / f"{Path(model).stem if Path(model).is_file() else model.replace('/', '-').replace('@', '-')}_{dataset}"


def mean_std(rows, split="test"):
    """Mean and standard deviation over seeds of one split's accuracies."""
    values = [row[split] for row in rows]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def report(result, published=None):
    """The tables of the main job, as text; `published`: figures of the paper's setting to stand below ours."""
    zero_shot, few, template, published = result["zero_shot"], result["few_shot"], result["template"], published or {}
    shots = list(next(iter(few.values())))
    lines = [f"{'zero-shot, hand-written templates':40}  accuracy %"]
    for name, row in zero_shot.items():
        lines.append(f"  {name + ('  <- declared' if name == template else ''):40}{row['test']:10.1f}")
    if "zero-shot" in published:
        lines.append(f"  {'  published, declared template':40}{published['zero-shot']['0']:10.1f}")
    lines += ["", f"{'few-shot, mean ± std over seeds; shots:':42}" + "".join(f"{n:>12}" for n in shots)]
    for method, row in few.items():
        lines.append(f"  {method:40}" + "".join(f"{'{:.1f} ± {:.1f}'.format(*mean_std(row[n])):>12}" for n in shots))
        if method in published:
            lines.append(f"  {'  published':40}" + "".join(f"{published[method].get(n, ''):>12}" for n in shots))
    if domains := list(zero_shot[template])[1:]:
        most = max(shots, key=int)
        lines += ["", f"{f'domains, {most} shots:':42}" + "".join(f"{name:>12}" for name in domains)]
        rows = {t: {d: (zero_shot[t][d], 0.0) for d in domains} for t in dict.fromkeys([template, "a photo of a {}."])}
        rows |= {method: {d: mean_std(row[most], d) for d in domains} for method, row in few.items()}
        for name, row in rows.items():
            lines.append(f"  {name:40}" + "".join(f"{'{:.1f} ± {:.1f}'.format(*row[d]):>12}" for d in domains))
            if theirs := published.get("domains", {}).get("zero-shot" if name == template else name):
                lines.append(f"  {'  published':40}" + "".join(f"{theirs.get(d, ''):>12}" for d in domains))
    return "\n".join(lines)


def average_report(results):
    """The averages over data sets, as text."""
    few = [r["few_shot"] for r in results.values()]
    lines = [f"{f'average of {len(results)} data sets; shots:':42}" + "".join(f"{n:>8}" for n in (0, *next(iter(few[0].values()))))]
    lines.append(f"  {'zero-shot, declared templates':40}{statistics.mean(r['zero_shot'][r['template']]['test'] for r in results.values()):8.1f}")
    for method in [m for m in METHODS if all(m in row for row in few)]:
        means = [statistics.mean(mean_std(row[method][n])[0] for row in few) for n in few[0][method]]
        lines.append(f"  {method:40}{'':8}" + "".join(f"{mean:8.1f}" for mean in means))
    return "\n".join(lines)


def figure(results, title, path):
    """The paper's figure: test accuracy over shots, zero-shot as a star at 0, a panel a data set and, of several, their average."""
    from matplotlib.figure import Figure
    curves = {name: {m: [mean_std(rows) for rows in row.values()] for m, row in r["few_shot"].items()} for name, r in results.items()}
    stars = {name: r["zero_shot"][r["template"]]["test"] for name, r in results.items()}
    if len(results) > 1:
        shared = [m for m in METHODS if all(m in row for row in curves.values())]
        curves = {"average": {m: [tuple(map(statistics.mean, zip(*points))) for points in zip(*(row[m] for row in curves.values()))]
                              for m in shared}, **curves}
        stars["average"] = statistics.mean(stars.values())
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    fig = Figure((max(5.5, 3.4 * columns), max(4, 2.9 * rows)), layout="constrained")
    fig.suptitle(title)
    for ax, (name, row) in zip(fig.subplots(rows, columns, squeeze=False).flat, curves.items()):
        ax.axhline(stars[name], color="gray", linestyle=":", linewidth=1)
        ax.plot(0, stars[name], "*", color="black", markersize=12, label="zero-shot, declared template")
        for method, points in row.items():
            color, style = dict(zip(METHODS, [("#0072B2", "s--"), ("#D55E00", "o-"), ("#009E73", "^-.")]))[method]
            ax.errorbar(range(1, len(points) + 1), *zip(*points), fmt=style, color=color, capsize=3, label=method)
        shots = list(next(iter(next(iter(results.values()))["few_shot"].values())))
        ax.set(title=name, xlabel="labelled images a class (shots)", ylabel="test accuracy, %", xticks=range(len(shots) + 1), xticklabels=[0, *shots])
        ax.grid(alpha=0.3)
        if name == next(iter(curves)):
            ax.legend(fontsize=8)
    with _atomic(path) as file:
        fig.savefig(file, format="png", dpi=100)


def check(name="mini", device=None):
    """Prints what a bug report needs: versions, device, what weights and data sets are found, one forward pass."""
    import platform
    import torchvision
    found = [n for n in _MODELS if weights_file(n).is_file()]
    places = [place for place in (SHARED, DATA) if place]
    datasets = sorted(p.parent.name for place in places for p in place.glob("*/dataset.json"))
    model, preprocess = load_clip(name, device)
    start = time.perf_counter()
    features = encode_images(model, preprocess, [Image.new("RGB", (64, 64), "white")], progress=False)
    spread = zero_shot_weights(model, ["cat", "dog"], "a photo of a {}.").std().item()
    for what, value in {
            "python": f"{platform.python_version()} on {platform.platform()}", "torch": torch.__version__, "torchvision": torchvision.__version__,
            "CLIP's code": "OpenAI's repository" if clip.tokenize("a").dtype == torch.int32 else "the registry's copy",
            "CUDA": torch.cuda.get_device_name() if torch.cuda.is_available() else "none", "MINI_COOP_ROOT": SHARED or "not set",
            "OpenAI's weights found": ", ".join(found) or f"none ({weights_file('RN50').parent})", "data sets found": ", ".join(datasets),
            f"one forward pass of {name}": f"{'fine' if features.isfinite().all() and spread > 0 else 'WRONG: ' + str(features)} on "
                                           f"{features.device}, {time.perf_counter() - start:.2f} s"}.items():
        print(f"{what:28} {value}")


def main(argv=None):
    """Zero-shot, linear probe and CoOp, unified and class-specific, on few labels: tables, and under --out a figure, a JSON with
    every figure and setting, and the learned contexts. The same command goes on where it was stopped."""
    parser = argparse.ArgumentParser(description=main.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def positive(text):
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
        return int(text)

    add = parser.add_argument
    add("--model", default="mini", help="mini, a name of clip.available_models(), or a checkpoint")
    add("--dataset", nargs="+", default=["actions"], help="folders of data/, or folders of images")
    add("--shots", nargs="+", type=positive, default=[1, 2, 4, 16], help="labelled images a class")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3], help="each draws the images and the first context")
    add("--n-ctx", type=positive, default=16, help="context vectors (M)")
    add("--class-specific", choices=["yes", "no", "both"], default="both", help="one context a class, one for all, or each in turn")
    add("--class-position", choices=["end", "middle", "front"], default="end", help="where the class name stands")
    add("--ctx-init", metavar="WORDS", help="words to start from; they set --n-ctx")
    add("--epochs", type=positive, help="as in the paper, by shots (50 on imagenet), if not given")
    add("--views", type=positive, default=1, help="random crops a training image; 1: the plain image")
    add("--device", help="CUDA where there is one, if not given")
    add("--out", type=Path, default=Path("runs"), help="folder for what is saved")
    add("--check", action="store_true", help="only print versions, device, weights and data sets found, for a bug report")
    args = parser.parse_args(argv)
    try:
        if args.check:
            return check(args.model, args.device)
        datasets, results = [load_dataset(name) for name in args.dataset], {}
        model, preprocess = load_clip(args.model, args.device)
        if len({data.name for data in datasets}) < len(datasets):
            raise ValueError("two data sets of the same name would be saved in one folder: give one of them another name, or run it with another --out")
        device = _device_of(model)
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"
        published = json.loads((DATA / "published.json").read_text()).get(args.model, {})
        for data in datasets:
            folder, start = run_folder(args.out, args.model, data.name), time.perf_counter()
            folder.mkdir(parents=True, exist_ok=True)
            print(f"\n{data.name}: {len(data.classnames)} classes, {len(data.test.images)} test images; CLIP {args.model} on {where}", flush=True)
            methods = METHODS[not data.val.images:3 - (args.class_specific == "no")]
            methods = [m for m in methods if m != "CoOp unified" or args.class_specific != "yes"]
            result = experiment(model, preprocess, data, folder, args.shots, args.seeds, methods, args.n_ctx, args.class_position,
                                args.ctx_init, args.epochs or (50 if data.name == "imagenet" else None), args.views)
            settings = {**vars(args), "dataset": data.name, "out": str(args.out), "device": where, "torch": torch.__version__}
            result = {"settings": settings, "seconds": round(time.perf_counter() - start, 1), "template": data.template, **result}
            results[data.name] = result
            with _atomic(folder / "results.json") as file:
                file.write(json.dumps(result, indent=1).encode())
            figure({data.name: result}, f"CLIP {args.model}", folder / "figure.png")
            print(f"\n{report(result, published.get(data.name))}\n\n{result['seconds']:.0f} s. Saved in {folder}: results.json, figure.png and the contexts")
        if len(results) > 1:
            path = run_folder(args.out, args.model, "figure.png")
            figure(results, f"CLIP {args.model}", path)
            print(f"\n{average_report(results)}\n\nThe figure of all data sets: {path}")
    except (ValueError, OSError, RuntimeError, zipfile.BadZipFile) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted; what was finished is kept under {args.out}, and the same command goes on from there\n")


if __name__ == "__main__":
    main()
