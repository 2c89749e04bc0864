"""How much faster than the published way? `python tests/benchmark.py`, 20 minutes on two CPU cores.

RN50's sizes (text tower of width 512 with 12 layers) and random weights, as speed does not depend
on the values. The published way is tests/reference.py, 77 tokens for every class, and encodes the
images in every step; float32 on a CPU, float16 on CUDA. Not a test: all that is asserted is that
both ways give the same gradient.

On two cores of a virtual machine on a busy host, torch 2.14.1, November 2026 (published / ours):

    text step, both passes           seconds             memory in MB
    100 classes, unified             27.4 / 0.88 = 31.0      3824 / 242   = 15.8
    100 classes, class-specific      19.8 / 4.37 =  4.5      3845 / 1101  =  3.5
    1000 classes, unified             197 / 11.2 = 17.6     (ours in a run of its own)

In quieter runs on AVX-512 cores the ratios were 22 to 28, 4.7 to 5.7 and 20 to 22. With 2000
unified classes Parts of 6400 tokens take 3978 MB, Parts of 3200 tokens 1914 MB.
"""
import argparse
import copy
import ctypes
import random
import re
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import clip
import torch

import mini_coop
from mini_coop import CoOp
from reference import reference_features

M = 16  # context vectors
SLICE = 100  # classes that the published way computes at a time: 1000 would need 45 GB
LINE = "{:30}{:>12}{:>9}{:>7}{:>14}{:>9}{:>7}{:>14}"


def class_names(K):
    """K names of 1 to 11 tokens, 2 on average, as ImageNet's: prompts of 21 tokens, 30 at most."""
    words = [word for token in mini_coop.tokenizer.encoder
             if token.endswith("</w>") and (word := token[:-4]).isalpha() and word.isascii()]
    rng = random.Random(0)
    names = []
    for k in range(K):
        more = 10 if k == 0 else min(10, int(rng.expovariate(0.7)))
        names.append(" ".join([words[k], *rng.choices(words, k=more)]))
    return names


def resident(key):
    """This process's memory in MB, on Linux: VmRSS, or VmHWM, its peak."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{key}:\s+(\d+)", status)[1]) / 1e3


def with_peak(run, device):
    """-> the result of `run`, and the peak of memory above what was there before, in MB: the
    allocator's on a CUDA device, else the process's."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        torch.cuda.synchronize(device)
        return result, (torch.cuda.max_memory_allocated(device) - before) / 1e6
    if sys.platform != "linux":
        return run(), float("nan")
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    return run(), resident("VmHWM") - before


def timed(run, repeats, device):
    """-> median seconds of `run` after a first time (repeats=0: of that), its result, peak MB."""
    start = time.perf_counter()
    result, mb = with_peak(run, device)
    seconds = [] if repeats else [time.perf_counter() - start]
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[len(seconds) // 2], result, mb


def text_step(model, model16, K, class_specific, repeats=3):
    """Times one forward and backward pass of the text side; prints a line."""
    coop = CoOp(model, class_names(K), M, class_specific)
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(K, model.text_projection.shape[1], generator=generator).to(coop.ctx.device)
    at_once = min(K, SLICE)

    def ours():
        return torch.autograd.grad(coop.text_features(), coop.ctx, target)[0]

    def theirs():
        total = 0
        for start in range(0, K, at_once):
            classes = list(range(start, min(K, start + at_once)))
            features = reference_features(coop, classes, model16)
            total = total + torch.autograd.grad(features, coop.ctx, target[classes])[0]
        return total

    our_s, our_gradient, our_mb = timed(ours, repeats, coop.ctx.device)
    # a run in slices is long enough to be warm
    slow = repeats if at_once == K else 0
    their_s, gradient, their_mb = timed(theirs, slow, coop.ctx.device)
    their_mb *= K / at_once
    differs = ((our_gradient - gradient).norm() / gradient.norm()).item()
    kind = "class-specific" if class_specific else "unified"
    star = "*" if at_once < K else ""
    print(LINE.format(f"{K} classes, {kind}", f"{their_s:.3f}", f"{our_s:.3f}",
                      f"{their_s / our_s:.1f}", f"{their_mb:.0f}{star}", f"{our_mb:.0f}",
                      f"{their_mb / our_mb:.1f}", f"{differs:.1e}"), flush=True)
    assert differs < (0.1 if coop.ctx.is_cuda else 1e-4)


def rows_and_parts(model, K, sizes):
    """Times ours with rows of other lengths, `pack`'s row_tokens, and with other part_tokens."""
    pack = mini_coop.pack
    for what, size in sizes:
        mini_coop.pack = partial(pack, **{what: size})
        coop = CoOp(model, class_names(K), M)
        target = torch.randn(K, model.text_projection.shape[1], device=coop.ctx.device)

        def step():
            return torch.autograd.grad(coop.text_features(), coop.ctx, target)

        seconds, _, mb = timed(step, 3, coop.ctx.device)
        print(f"{K} classes, {what} {size}: {seconds:.3f} s, {mb:.0f} MB", flush=True)
    mini_coop.pack = pack


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--device")
    parser.add_argument("--row-tokens", type=int, nargs="+", help="only ours, with such rows")
    parser.add_argument("--part-tokens", type=int, nargs="+", help="only ours, with such parts")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # two of the words are the same for CLIP
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(0)
    model = clip.model.CLIP(1024, 224, (3, 4, 6, 3), 64, None, 77, 49408, 512, 8, 12)
    model = model.float().eval().requires_grad_(False).to(device)
    model16 = copy.deepcopy(model)  # the published way's: float16 on CUDA
    if device.type == "cuda":
        clip.model.convert_weights(model16)
    model.visual.to(memory_format=torch.channels_last)  # as load_clip does
    name = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    print(f"{name}; torch {torch.__version__}; RN50's sizes, M = {M}, class token at the end\n")
    sizes = [("row_tokens", size) for size in args.row_tokens or ()]
    sizes += [("part_tokens", size) for size in args.part_tokens or ()]
    if sizes:
        for K in args.classes:
            rows_and_parts(model, K, sizes)
        return
    print(LINE.format("text step, both passes", "published s", "ours s", "ratio", "published MB",
                      "ours MB", "ratio", "gradient off"))
    for K in args.classes:
        for class_specific in (False, True):
            text_step(model, model16, K, class_specific)
    if max(args.classes) > SLICE:
        print(f"* in slices of {SLICE} classes: the memory of one, times their number")


if __name__ == "__main__":
    main()
