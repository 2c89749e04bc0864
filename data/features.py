"""Image features kept on disk, so that a resumed grid does not encode its images again."""
import hashlib
import os
import re
import warnings
from pathlib import Path

import torch
from PIL import Image

from mini_coop import encode_images, sha256_of, whole_file


def digest(*key):
    """A name for what prints the same; the addresses of functions, always new, are cut out."""
    return hashlib.sha256(re.sub(" at 0x[0-9a-f]+", "", repr(key)).encode()).hexdigest()


def stamp(image):
    """What an image's features depend on: its path; its file's (or archive's) size and time, and
    whether it may be read."""
    path = Path(os.path.abspath(image))
    file = next((p for p in (path, *path.parents) if p.is_file()), None)
    readable = os.access(file, os.R_OK) if file else False
    return str(path), file and (file.stat().st_size, file.stat().st_mtime_ns, readable)


def effect(preprocess):
    """What a transform makes of a fixed image: two that print alike may not do the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        noise = torch.randint(256, (150, 200, 3), dtype=torch.uint8).numpy()
        return sha256_of({"x": preprocess(Image.fromarray(noise))})


def cached_features(folder, model, preprocess, images, views=1):
    """encode_images of paths, kept in `folder`.

    Features are taken from there only if weights, device, transform, views and every file (its
    path, size and time) are the same. Features with a row of NaN are not kept.
    """
    weights = sha256_of(model.visual.state_dict())
    device = model.text_projection.device.type  # CUDA encodes in half precision
    key = digest(weights, device, effect(preprocess), views, *map(stamp, images))
    file = Path(folder) / f"{key[:32]}.pt"
    try:
        kept = torch.load(file, "cpu", weights_only=True)
        if kept["sha256"] == sha256_of({"features": kept["features"]}):
            return kept["features"].to(model.text_projection.device)
    except Exception:  # not there, or cut off, which can raise anything
        pass
    features = encode_images(model, preprocess, images, views)
    if features.isfinite().all():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(file) as part:
                kept = {"features": features.cpu(), "sha256": sha256_of({"features": features})}
                torch.save(kept, part)
        except (OSError, RuntimeError) as error:  # no space: torch says RuntimeError
            warnings.warn(f"the features could not be kept in {folder} ({error})", stacklevel=2)
    return features


def result_key(model, preprocess, data, options):
    """What results depend on: weights, device, images, labels, names and options."""
    device = model.text_projection.device.type
    key = [sha256_of(model.state_dict()), device, effect(preprocess), data.classnames, options]
    splits = {"train": data.train, "val": data.val, "test": data.test, **data.domains}
    for name, split in splits.items():
        key += [name, split.labels, *map(stamp, split.images)]
    return digest(key)
