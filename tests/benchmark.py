"""How much faster than the published way? `python tests/benchmark.py` (about 11 minutes on two CPU cores, minutes on a GPU).

Real sizes (RN50's text tower: width 512, 12 layers), random weights, as speed does not depend on the values. The published way is written
from the paper: 77 tokens for every class, every class on its own, images encoded in every step; fp32 on a CPU, fp16 on CUDA.
Not a test: nothing here is asserted but that both ways give the same gradient.
"""

import argparse
import copy
import ctypes
import functools
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import mini_coop  # noqa: E402
from mini_coop import CoOp, clip  # noqa: E402

M, SLICE = (
    16,
    100,
)  # context vectors; classes that the published way computes at a time where memory is short (CPU)


def class_names(K):
    """K names of 1 to 11 tokens, 2 on average, as ImageNet's are (prompts of 30 tokens at most, 21 on average)."""
    words = [
        token[:-4]
        for token in mini_coop._tokenizer.encoder
        if token.endswith("</w>") and token[:-4].isalpha() and token.isascii()
    ]
    rng = random.Random(0)
    return [
        " ".join(
            [words[k], *rng.choices(words, k=10 if k == 0 else min(10, int(rng.expovariate(0.7))))]
        )
        for k in range(K)
    ]


def published(coop, rows):
    """Text features of classes `rows` the published way: prompts of 77 tokens through CLIP's own transformer (class token at the end)."""
    model = coop.clip_model
    tokens = (
        clip.tokenize([" ".join(["X"] * M) + f" {coop.classnames[k]}." for k in rows])
        .long()
        .to(coop.ctx.device)
    )
    embedding = model.token_embedding(tokens)  # (K, 77, D)
    ctx = (coop.ctx[rows] if coop.class_specific else coop.ctx.expand(len(rows), -1, -1)).to(
        embedding.dtype
    )
    x = torch.cat(
        [embedding[:, :1], ctx, embedding[:, 1 + M :]], 1
    ) + model.positional_embedding.to(embedding.dtype)
    x = model.ln_final(model.transformer(x.permute(1, 0, 2)).permute(1, 0, 2))
    return F.normalize(
        (x[torch.arange(len(rows)), tokens.argmax(1)] @ model.text_projection).float(), dim=-1
    )


class Peak:
    """Peak memory of a block above what was there before, in MB: the allocator's on CUDA, the process's resident set on Linux."""

    def __enter__(self):
        self.cuda = torch.cuda.is_available()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        elif sys.platform == "linux":
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self.before = self.status("VmRSS")
        return self

    def __exit__(self, *_):
        if self.cuda:
            self.mb = (torch.cuda.max_memory_allocated() - self.before) / 1e6
        else:
            self.mb = (
                (self.status("VmHWM") - self.before) / 1e3
                if sys.platform == "linux"
                else float("nan")
            )

    @staticmethod
    def status(key):
        return int(
            next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]
        )


def timed(run, repeats):
    """Median seconds of `run` after a first time, its last result and its peak memory; repeats=0: the first time is all."""
    start = time.perf_counter()
    with Peak() as peak:
        result = run()
    seconds = [] if repeats else [time.perf_counter() - start]
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[len(seconds) // 2], result, peak.mb


def text_step(model, model16, K, class_specific, device, repeats):
    """-> (published s, ours s, published MB, ours MB, relative difference of the gradients)"""
    coop = CoOp(model, class_names(K), M, class_specific)
    cotangent = torch.randn(
        K, model.text_projection.shape[1], generator=torch.Generator().manual_seed(0)
    ).to(device)
    at_once = K if device.type == "cuda" else min(K, SLICE)

    def theirs():
        gradient = 0
        for start in range(0, K, at_once):
            rows = list(range(start, min(K, start + at_once)))
            gradient = (
                gradient + torch.autograd.grad(published(coop, rows), coop.ctx, cotangent[rows])[0]
            )
        return gradient

    graph = functools.cache(
        coop._recorded
        if device.type == "cuda" and len(coop._chunks) == 1
        else lambda: coop.text_features
    )  # as fit does
    ours_s, ours, ours_mb = timed(
        lambda: torch.autograd.grad(graph()(), coop.ctx, cotangent)[0], repeats
    )
    object.__setattr__(coop, "clip_model", model16)
    theirs_s, gradient, theirs_mb = timed(
        theirs, repeats if at_once == K else 0
    )  # a run in slices is long enough to be warm
    return (
        theirs_s,
        ours_s,
        theirs_mb * K / at_once,
        ours_mb,
        ((ours - gradient).norm() / gradient.norm()).item(),
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--device")
    args = parser.parse_args()
    device = mini_coop.load_clip(device=args.device)[0].text_projection.device
    torch.manual_seed(0)
    model = (
        clip.model.CLIP(1024, 224, (3, 4, 6, 3), 64, None, 77, 49408, 512, 8, 12)
        .float()
        .eval()
        .requires_grad_(False)
        .to(device)
    )
    model16 = copy.deepcopy(model)  # the published way's: fp16 on CUDA
    if device.type == "cuda":
        clip.model.convert_weights(model16)
    model.visual.to(memory_format=torch.channels_last)  # as load_clip does
    name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    print(f"{name}; torch {torch.__version__}; RN50's sizes, M = {M}, class token at the end\n")
    print(
        f"{'text step, forward and backward':34}{'published s':>12}{'ours s':>9}{'ratio':>8}{'published MB':>14}{'ours MB':>9}{'ratio':>7}{'gradient differs by':>21}"
    )
    steps = {}
    for K in args.classes:
        for specific in (False, True):
            a, b, mb_a, mb_b, difference = steps[K, specific] = text_step(
                model, model16, K, specific, device, 3
            )
            note = "*" if device.type == "cpu" and K > SLICE else ""
            print(
                f"{f'{K} classes, ' + ('class-specific' if specific else 'unified'):34}{a:12.3f}{b:9.3f}{a / b:8.1f}{f'{mb_a:.0f}{note}':>14}{mb_b:9.0f}"
                f"{mb_a / mb_b:7.1f}{difference:21.1e}",
                flush=True,
            )
            assert difference < (1e-3 if device.type == "cpu" else 0.1)
    if device.type == "cpu" and max(args.classes) > SLICE:
        print(
            f"* computed in slices of {SLICE} classes, as it does not fit; the memory is that of one slice times their number"
        )

    a, b = torch.randn(4096, 512, device=device), torch.randn(512, 2048, device=device)
    if device.type == "cuda":
        a, b = a.bfloat16(), b.bfloat16()
    rate = 2 * 4096 * 512 * 2048 * 10 / timed(lambda: [a @ b for _ in range(10)], 5)[0]

    def floor(coop):
        """-> (tokens that must be computed, seconds at this rate): 24 D^2 operations a token and layer, as many back to the inputs."""
        n_tokens = sum(len(rows) for rows, *_ in coop._chunks) + coop.n_shared + 1
        return n_tokens, 2 * 24 * 512**2 * 12 * n_tokens / rate

    if 100 in args.classes:
        n_steps, images = (
            200 * (1600 // 32),
            torch.randn(32, 3, 224, 224, device=device),
        )  # 100 classes x 16 shots, 200 epochs
        with torch.no_grad():
            encode = timed(lambda: model16.encode_image(images.to(model16.dtype)), 3)[0]
            with torch.autocast(
                device.type, torch.float16, enabled=device.type == "cuda"
            ):  # as in encode_images
                encode_64 = timed(lambda: model.encode_image(torch.cat([images, images])), 3)[0]
        features, labels = F.normalize(torch.randn(1600, 1024), dim=-1), torch.arange(1600) % 100
        coop, epochs = CoOp(model, class_names(100), M), 200 if device.type == "cuda" else 1
        coop.fit(features[:64], labels[:64], 1, progress=False)
        start = time.perf_counter()
        coop.fit(features, labels, epochs, progress=False)
        training, views = (time.perf_counter() - start) * 200 / epochs, 1600 * 8 / 64 * encode_64
        theirs = n_steps * (steps[100, False][0] + encode)
        print(
            f"\nwhole training, 100 classes x 16 shots, 200 epochs: published {theirs / 3600:.2f} h (from the step and a batch of images, "
            f"{encode:.3f} s), ours {(training + views) / 60:.1f} min ({epochs} of 200 epochs run; 8 views of each image encoded once, 64 in "
            f"{encode_64:.3f} s), ratio {theirs / (training + views):.1f}; with a text step at the floor (below) it would be "
            f"{theirs / (n_steps * floor(coop)[1] + views):.1f}"
        )

    K = max(args.classes)
    n_tokens, seconds = floor(CoOp(model, class_names(K), M))
    print(
        f"\nfloor at {K} classes, unified: {n_tokens} tokens that must be computed, {rate / 1e9:.0f} GFLOP/s measured for matrices of this width: "
        f"{seconds:.3f} s; ours is {steps[K, False][1] / seconds:.2f} times that"
    )


if __name__ == "__main__":
    main()
