"""What a bug report needs: `python mini_coop.py --check`."""
import os
import platform
import time

import torch
import torchvision
from PIL import Image

from mini_coop import (
    DATA,
    CoOp,
    clip,
    encode_images,
    load_clip,
    shared_folder,
    weights_file,
    zero_shot_weights,
)


def hardware(device):
    """The card's name, or the number of CPU threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def main(name="mini", device=None):
    """Prints versions, device, what is found and two steps of training; False if they go wrong."""
    found = [model for model in clip.available_models() if weights_file(model).is_file()]
    files = [*DATA.glob("*/dataset.json"), *shared_folder().glob("*/dataset.json")]
    model, preprocess = load_clip(name, device)
    start = time.perf_counter()
    image = Image.new("RGB", (64, 64), "white")
    features = encode_images(model, preprocess, [image], progress=False).expand(2, -1)
    names = ["cat", "dog"]
    fine = zero_shot_weights(model, names, "a photo of a {}.").std().item() > 0
    coop = CoOp(model, names, 4)
    before = coop.ctx.detach().clone()
    coop.fit(features, [0, 1], epochs=2, progress=False)
    fine = fine and bool(coop.ctx.isfinite().all()) and not torch.equal(before, coop.ctx)
    seconds = time.perf_counter() - start
    for what, value in {
            "python": f"{platform.python_version()} on {platform.platform()}",
            "torch": torch.__version__, "torchvision": torchvision.__version__,
            "CLIP's code": "OpenAI's repository" if clip.tokenize("a").dtype == torch.int32
            else "the registry's copy",
            "CUDA": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
            "MINI_COOP_ROOT": os.environ.get("MINI_COOP_ROOT") or "not set",
            "OpenAI's weights found": ", ".join(found) or f"none in {weights_file('RN50').parent}",
            "data sets found": ", ".join(sorted({file.parent.name for file in files})),
            f"two steps with {name}": f"{'fine' if fine else 'WRONG'} on {features.device}, "
            f"{seconds:.2f} s"}.items():
        print(f"{what:28} {value}")
    return fine
