"""mini-coop: Context Optimization (CoOp) for CLIP, the whole method in one module.

CLIP compares an image with texts, one prompt per class ("a photo of a cat."), by the cosine of
their features. A prompt is a list of tokens between two marks, SOS and EOT. The text encoder reads
it from left to right, so its output at the EOT has seen the whole prompt; the projection of this
output is the text's feature. CoOp replaces the hand-written words by M learnable vectors, the
context. CLIP stays frozen, so images are encoded once and training sees features only. "The paper"
is Zhou, Yang, Loy, Liu: Learning to Prompt for Vision-Language Models, IJCV 2022.

    images -----------------> image encoder --> features (N, E) --+
                                                                  +--> cosines --> softmax --> loss
    SOS V1 .. VM cat . EOT --> text encoder --> features (K, E) --+                              |
        ^------------------- gradients reach the context, nothing else is trained <--------------+

In shapes N is the number of images, B of those in a batch, A of augmented views of an image, K of
classes, M of context vectors; D is the width of the text encoder, E that of both features.

README.md has a script that uses this module. Inputs are checked only where a mistake would go
unnoticed or be reported obscurely; ValueError then says what was found and what is expected.
"""
import glob
import json
import math
import os
import random
import re
import runpy
import sys
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import clip
import numpy as np
import torch
import torch.nn.functional as F
from clip.clip import _tokenizer as tokenizer
from PIL import Image, ImageOps, UnidentifiedImageError
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from torchvision import transforms
from tqdm import tqdm

__all__ = ["CoOp", "encode_images", "few_shot", "learning_rate", "linear_probe", "load_clip",
           "load_dataset", "n_epochs", "open_image", "zero_shot_weights"]

SOS = tokenizer.encoder["<|startoftext|>"]
EOT = tokenizer.encoder["<|endoftext|>"]  # the last id of CLIP's vocabulary
CONTEXT = EOT + 1  # in our prompts CONTEXT + i stands for vector i of the context


# ---------------------------------------- CoOp

class CoOp(torch.nn.Module):
    """The prompt learner (section 3.2 of the paper): prompts "[V1] ... [VM] class name ."

    model: a CLIP from load_clip, which chooses the device; `coop.to` would move the context alone.
    classnames: K names. n_ctx: M. class_specific: one context for each class, ctx (K, M, D),
    instead of a unified one, (M, D). class_position: "end", "middle" (the smaller half of an odd M
    stands before the name) or "front". ctx_init: words to start from ("a photo of a"), one vector
    per token; n_ctx is then ignored. Without words, the vectors are drawn from N(0, 0.02^2) with
    `seed`, which also shuffles in `fit`.

    A unified context serves other class names, too, in a CoOp of equal n_ctx and class_position:
    `new.load_state_dict(coop.state_dict())`. For a method of your own override `loss` or `forward`;
    `fit` trains every parameter of the subclass. Its `history_` has loss, accuracy and lr by epoch.
    """

    def __init__(self, model, classnames, n_ctx=16, class_specific=False, class_position="end",
                 ctx_init=None, seed=0):
        super().__init__()
        if class_specific not in (True, False) or class_position not in ("end", "middle", "front"):
            raise ValueError("class_specific is True or False, class_position 'end', 'middle' or "
                             f"'front', not {class_specific!r} and {class_position!r}")
        self.__dict__["clip_model"] = check_clip(model)  # no submodule: not trained, not saved
        self.classnames = check_names(classnames)
        self.class_specific = bool(class_specific)
        self.class_position = class_position
        self.seed = int(seed)
        words = token_ids(ctx_init) if isinstance(ctx_init, str) else []
        # a placeholder for the name ({}, [CLASS], %s, <name>) is refused
        if ctx_init is not None and (not words or set(ctx_init) & set("{}[]%<>")):
            raise ValueError(f"ctx_init is words, with no place for a name, not {ctx_init!r}")
        M = len(words) or n_ctx
        K = len(self.classnames)
        D = model.ln_final.weight.shape[0]
        if K < 2 or not isinstance(M, (int, np.integer)) or M < 1:
            raise ValueError(f"CoOp needs two classes and one vector or more, not {K} and {M!r}")
        self.n_ctx = int(M)

        # the context: words' embeddings or random vectors
        shape = (K, M, D) if class_specific else (M, D)
        if not words:
            generator = torch.Generator().manual_seed(self.seed)
            ctx = 0.02 * torch.randn(shape, generator=generator, dtype=torch.float32)
        else:
            ctx = model.token_embedding.weight[words].expand(shape).clone()
        self.ctx = torch.nn.Parameter(ctx.to(model.text_projection.device))

        # the prompts (section 3.2): ids of context vectors around the tokens of the name. The id
        # CONTEXT + i stands for row i of the context, which encode_rows will put in its place;
        # class-specific contexts are stacked, so that of class k begins at row k * M
        n_before = {"end": M, "middle": M // 2, "front": 0}[class_position]
        prompts = []
        for k, name in enumerate(self.classnames):
            first = CONTEXT + (k * M if class_specific else 0)
            v = list(range(first, first + M))
            tokens = token_ids(f"{name}.")
            # n counts the bare name, as in the published code. tokens[n:] is the period, or nothing
            # where it merges with the name's last token, as in "bat (animal)."
            n = len(token_ids(name))
            prompts.append([SOS, *v[:n_before], *tokens[:n], *v[n_before:], *tokens[n:], EOT])
        self.packed = pack(model, prompts)  # as tensors, for the text encoder
        self.eval()

    def text_features(self, ctx=None):
        """Unit-norm features (K, E) of the prompts, with the learned context or with another one of
        its shape, such as one that a network of yours shifted for an image."""
        ctx = self.ctx if ctx is None else ctx
        if ctx.shape != self.ctx.shape:
            raise ValueError(f"a context of shape {tuple(ctx.shape)}, not {tuple(self.ctx.shape)}")
        return encode_prompts(self.clip_model, self.packed, ctx)

    def forward(self, image_features, text_features=None):
        """Logits (B, K) of image features x (B, E): s cos(w_k, x), where w_k is the text feature of
        class k and s = exp(logit_scale), CLIP's frozen 1 / temperature. Their softmax gives the
        probabilities p(k | x) = exp(s cos(w_k, x)) / sum_j exp(s cos(w_j, x)), section 3.2.

        text_features: (K, E), if at hand. `fit` passes them; a method of your own whose prompts
        depend on the image ignores them.
        """
        text_features = self.text_features() if text_features is None else text_features
        cosines = F.normalize(image_features, dim=-1) @ text_features.T
        return self.clip_model.logit_scale.exp() * cosines

    def loss(self, logits, labels, text_features):
        """The training loss: cross-entropy, the mean of -log p(label | x) over a batch. A method of
        your own may also use the text features (K, E), for instance to regularise them."""
        return F.cross_entropy(logits, labels)

    def fit(self, image_features, labels, epochs=None, lr=0.002, batch_size=32, optimizer=None,
            progress=None):
        """Learns the context by the paper's recipe (section 4.1), from where it is; returns self.

        image_features: (N, E), or (N, A, E) to take a random view of each image in each epoch.
        labels: (N,) integers. epochs: None takes n_epochs(images of the largest class). optimizer:
        your own, in place of SGD with `lr`; its rates follow the same schedule. progress: a bar, or
        None for one in a terminal only. RuntimeError says that the training diverged.
        """
        x = self._features(image_features, dims=(2, 3))
        N = len(x)
        y = self._labels(labels, N)
        epochs = n_epochs(y.bincount().max()) if epochs is None else epochs
        if epochs < 0 or batch_size < 1:
            raise ValueError(f"epochs from 0 and a batch_size from 1, not {epochs}, {batch_size}")
        batch_size = min(int(batch_size), N)
        if optimizer is None:
            optimizer = torch.optim.SGD(self.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
        elif not {*self.parameters()} & {*optimizer.param_groups[0]["params"]}:
            raise ValueError("the optimizer is of other parameters than coop.parameters()")
        generator = torch.Generator().manual_seed(self.seed)  # the same order on every device
        self.history_ = {"loss": [], "accuracy": [], "lr": []}  # of every epoch, on its batches
        self.train()  # matters to subclasses with dropout
        hide = None if progress is None else not progress
        for epoch in tqdm(range(epochs), "learning the context", disable=hide):
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])
                group["lr"] = learning_rate(epoch, epochs, group["initial_lr"])
            order = torch.randperm(N, generator=generator).to(x.device)
            features = x  # (N, E)
            if x.ndim == 3:  # a random one of the A views of each image
                view = torch.randint(x.shape[1], (N,), generator=generator)
                features = x[torch.arange(N), view]
            losses = []
            hits = []
            for batch in order[:N - N % batch_size].split(batch_size):  # an incomplete one goes
                text_features = self.text_features()  # (K, E)
                logits = self(features[batch], text_features)  # (B, K)
                loss = self.loss(logits, y[batch], text_features)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
                hits.append(logits.argmax(1) == y[batch])
            self.history_["loss"].append(torch.stack(losses).mean().item())
            self.history_["accuracy"].append(torch.cat(hits).float().mean().item())
            self.history_["lr"].append(optimizer.param_groups[0]["lr"])
        if not all(p.isfinite().all() for p in self.parameters()):
            raise RuntimeError("training diverged to NaN or infinity: use a smaller lr")
        return self.eval()

    @torch.no_grad()
    def predict_proba(self, image_features):
        """Class probabilities (N, K) of image features (N, E), in eval mode."""
        training = self.training
        self.eval()  # without a subclass's dropout, even if called during training
        probabilities = self(self._features(image_features)).softmax(1)
        self.train(training)
        return probabilities

    def predict(self, image_features):
        """Class indices (N,) of image features (N, E)."""
        return self.predict_proba(image_features).argmax(1)

    def score(self, image_features, labels):
        """Accuracy in [0, 1]."""
        predicted = self.predict(image_features)
        return (predicted == self._labels(labels, len(predicted))).float().mean().item()

    def save(self, path):
        """Writes what was learned, without CLIP."""
        own = ("classnames", "class_specific", "class_position", "seed")
        learned = {key: getattr(self, key) for key in own}
        learned["state"] = self.state_dict()
        learned["clip"] = fingerprint(self.clip_model)
        torch.save(learned, path)

    @classmethod
    def load(cls, path, model, classnames=None, **settings):
        """A new CoOp with a saved context, on the CLIP that it was learned with; a unified context
        also takes other class names. settings: what a subclass takes beside CoOp's arguments."""
        saved = read_tensors(path)
        if "clip" not in saved:
            raise ValueError(f"{path} was not written by CoOp.save")
        if not torch.equal(saved["clip"], fingerprint(check_clip(model))):
            raise ValueError(f"{path} was learned with another CLIP: load that one")
        names = saved["classnames"] if classnames is None else classnames
        if saved["class_specific"] and list(names) != saved["classnames"]:
            raise ValueError(f"{path} is class-specific: only for its own classes, in their order")
        n_ctx = saved["state"]["ctx"].shape[-2]
        own = {key: saved[key] for key in ("class_specific", "class_position", "seed")}
        coop = cls(model, names, n_ctx=n_ctx, **own, **settings)
        coop.load_state_dict(saved["state"])
        return coop.eval()

    def _features(self, image_features, dims=(2,)):
        """Image features in float32 on the right device."""
        E = self.clip_model.text_projection.shape[1]
        try:
            x = torch.as_tensor(image_features, dtype=torch.float32, device=self.ctx.device)
        except (RuntimeError, TypeError, ValueError):
            x = torch.empty(0)  # of images, or of a list of vectors: refused below
        if x.ndim not in dims or x.shape[-1] != E or not x.numel() or not x.isfinite().all():
            found = f"{type(image_features).__name__} {tuple(x.shape)}"
            raise ValueError(f"image features of this CLIP are one tensor or array (N, {E}), for "
                             f"`fit` also (N, A, {E}), not empty and all finite; not {found}")
        return x

    def _labels(self, labels, N):
        """Labels (N,), checked, on the context's device."""
        # NumPy takes lists of names, too, which are then refused by their kind
        y = np.asarray(labels.cpu() if torch.is_tensor(labels) else labels)
        if y.shape != (N,) or y.dtype.kind not in "iu":
            raise ValueError(f"labels are {N} integers, one per image, not {y.shape} {y.dtype}")
        if outside := set(y.tolist()) - set(range(len(self.classnames))):
            raise ValueError(f"label {min(outside)} is outside 0 to {len(self.classnames) - 1}")
        return torch.as_tensor(y.astype(np.int64), device=self.ctx.device)


def learning_rate(epoch, epochs, lr=0.002):
    """The paper's schedule: epoch 0 at 1e-5, to warm up, then a cosine that starts at `lr`."""
    if epoch == 0:
        return min(1e-5, lr)
    # as published, the cosine's period is `epochs`: starting one epoch late, it does not finish
    return 0.5 * lr * (1 + math.cos(math.pi * (epoch - 1) / epochs))


def n_epochs(shots):
    """The paper's epochs: 50 for 1 shot, 100 for 2 to 4, 200 for more. (It takes 50 for ImageNet
    at all shots: pass epochs=50.)"""
    return 50 if shots == 1 else 100 if shots <= 4 else 200


# ---------------------------------------- the text encoder

# CLIP's text encoder with two liberties. A context vector can stand in the place of a token's
# embedding; and the position of each token and the tokens that it sees are given from outside, so
# where it lies in its row does not matter. CLIP's own encoder is causal: a token sees itself and
# what stands before it. With one prompt per row, positions 0, 1, 2 .. and a triangle of visible
# tokens, this one is the same. tests/reference.py is that plain way in 40 lines.

class Part(NamedTuple):
    """Prompts as tensors, in R rows of L tokens."""
    tokens: torch.Tensor  # (R, L) ids
    position: torch.Tensor  # (R, L), of each token in its own prompt
    visible: torch.Tensor  # (R, L, L), whether token i of a row sees token j
    ends: torch.Tensor  # the place of each prompt's EOT in tokens.flatten()


def encode_rows(model, ctx, tokens, position, visible, ends):
    """Features of the prompts of a Part, one per EOT, not normalised. ctx: (M, D), (K, M, D), or
    None if the prompts hold no context."""
    x = model.token_embedding(tokens.clamp(max=EOT))  # (R, L, D); context ids are set below
    if ctx is not None:
        vectors = ctx.flatten(0, -2).to(x.dtype)  # row i is what CONTEXT + i stands for
        i = (tokens - CONTEXT).clamp(min=0)
        x = torch.where(tokens[..., None] < CONTEXT, x, F.embedding(i, vectors))
    x = x + model.positional_embedding[position]
    x = x.transpose(0, 1)  # (L, R, D), CLIP's order
    n_heads = model.transformer.resblocks[0].attn.num_heads
    mask = torch.where(visible, 0.0, -math.inf).to(x.dtype)
    mask = mask.repeat_interleave(n_heads, dim=0)  # (R * n_heads, L, L): one for each head
    for block in model.transformer.resblocks:
        h = block.ln_1(x)
        x = x + block.attn(h, h, h, attn_mask=mask, need_weights=False)[0]
        if block is model.transformer.resblocks[-1]:  # from here on only the EOTs count
            x = x.transpose(0, 1).flatten(0, 1)[ends]  # (prompts, D)
        x = x + block.mlp(block.ln_2(x))
    return model.ln_final(x) @ model.text_projection


def encode_prompts(model, packed, ctx=None):
    """Unit-norm text features (K, E) of a list of Parts. If there are several, the backward pass
    computes each of them once more instead of keeping all in memory."""
    features = []
    for part in packed:
        if len(packed) == 1:
            features.append(encode_rows(model, ctx, *part))
        else:
            features.append(checkpoint(encode_rows, model, ctx, *part, use_reentrant=False,
                                       preserve_rng_state=False))
    return F.normalize(torch.cat(features), dim=-1)


# ---------------------------------------- packing: the same features from fewer tokens

# This part is about speed and memory alone and can be skipped at first reading. The tokens that all
# prompts share at their start, the trunk, have the same outputs in each prompt, as a token sees
# only what stands before it. So they are computed once. Padding after an EOT is dropped. A row
# begins with the trunk, and the rest of each prompt, its branch, hangs behind:
#
#     token     SOS V1 V2 .. VM | cat  .   EOT | sea  horse .   EOT | ...
#     position   0   1  2 ..  M | M+1  M+2 M+3 | M+1  M+2   M+3 M+4 | ...
#
# A token sees the trunk and what stands before it in its own branch: the same tokens at the same
# positions as in its own prompt. So, up to rounding, all outputs and gradients are the same. Many
# prompts fill several rows, each with a copy of the trunk. With class-specific contexts, or the
# name in front, prompts share little more than SOS, and less is gained.

def pack(model, prompts, row_tokens=None, part_tokens=6400):
    """K prompts, lists of token ids -> a list of Parts, the prompts in their order. row_tokens:
    how many branch tokens a row holds, part_tokens: how many tokens a Part holds, if no single
    branch or row is longer."""
    longest = max(prompts, key=len)
    if len(longest) > model.context_length:
        ids = [i for i in longest if i < SOS]
        raise ValueError(f"{tokenizer.decode(ids[:6])!r}... is a prompt of {len(longest)} tokens, "
                         f"but CLIP reads {model.context_length}: make the prompt shorter")
    # the length of the trunk (commonprefix takes lists, too); [:-1]: a branch keeps its EOT
    P = len(os.path.commonprefix([prompt[:-1] for prompt in prompts]))
    # short rows cost less attention, long ones repeat fewer trunks: the rule is a compromise that
    # `python tests/benchmark.py --row-tokens 40 80 ..` chose; --part-tokens weighs memory and time
    row_tokens = row_tokens or 72 + 8 * P
    trunk = [(prompts[0][p], p, -1) for p in range(P)]  # (id, position, owner)
    rows = []
    for k, prompt in enumerate(prompts):
        branch = [(prompt[p], p, k) for p in range(P, len(prompt))]
        if not rows or len(rows[-1]) + len(branch) > P + row_tokens:
            rows.append(list(trunk))  # a new row
        rows[-1] += branch
    rows = [torch.tensor(row, device=model.text_projection.device) for row in rows]
    n = max(1, part_tokens // max(map(len, rows)))  # rows per part
    parts = []
    for i in range(0, len(rows), n):
        # zeros pad short rows at the end; no real token sees them, as it looks only back
        padded = pad_sequence(rows[i:i + n], batch_first=True)
        tokens, position, owner = padded.unbind(2)  # (R, L) each
        visible = owner[:, :, None] == owner[:, None, :]  # (R, L, L): the same prompt
        visible |= owner[:, None, :] == -1  # or the trunk
        ends = (tokens.flatten() == EOT).nonzero()[:, 0]
        parts.append(Part(tokens, position, visible.tril(), ends))
    return parts


# ---------------------------------------- names and checks

def token_ids(text):
    """The ids of a text's tokens, without SOS and EOT even if it spells them; "_" is a space."""
    return [i for i in tokenizer.encode(text.replace("_", " ")) if i < SOS]


def check_names(classnames):
    """Class names as a list; warns of equal ones, which a unified context cannot tell apart."""
    names = [] if isinstance(classnames, (str, dict, set, frozenset)) else list(classnames)
    # bytes of an unknown coding, in a folder's name, are surrogates in Python
    odd = [name for name in names if not isinstance(name, str)
           or re.search("[\ud800-\udfff]", name) or not token_ids(name)]
    if odd or not names:
        raise ValueError(f"class names are a list of texts; found {odd or classnames!r:.99}")
    names = [str(name) for name in names]  # `load` would refuse NumPy's strings
    groups = {}  # token ids -> the names that have them
    for name in names:
        groups.setdefault(tuple(token_ids(name)), []).append(name)
    if same := [group for group in groups.values() if len(group) > 1]:
        warnings.warn(f"classes of the same name cannot be told apart: {same}", stacklevel=3)
    return names


def check_clip(model):
    """The model, if it is a CLIP in float32; else raises ValueError."""
    if not isinstance(model, clip.model.CLIP) or model.text_projection.dtype != torch.float32:
        raise ValueError("a CLIP in float32 is needed: model, preprocess = load_clip()")
    return model


# ---------------------------------------- the rivals

def zero_shot_weights(model, classnames, templates):
    """Zero-shot classifier (K, E), unit-norm, of a template ("a photo of a {}.") or several.

    Each template's features are normalised, summed over templates and normalised again. The score
    of class k is the cosine of an image feature with row k.
    """
    check_clip(model)
    names = check_names(classnames)
    templates = [templates] if isinstance(templates, str) else list(templates)
    if not templates or not all("{}" in template for template in templates):
        raise ValueError(f"templates hold {{}} for the class name, not {str(templates)[:99]}")
    total = 0
    for template in templates:
        prompts = []
        for name in names:
            text = template.replace("{}", name)
            prompts.append([SOS, *token_ids(text), EOT])
        total = total + encode_prompts(model, pack(model, prompts))
    return F.normalize(total, dim=-1)


def linear_probe(train, train_labels, val, val_labels):
    """The paper's baseline: scikit-learn's logistic regression on image features (N, E).

    C is searched on a validation set: a coarse grid from 1e6 to 1e-6, then a bisection in log C
    from a tenth to ten times the best, whose 8 steps keep the half beside the better end. Returns
    scikit-learn's object.
    """
    given = []
    for values in (train, train_labels, val, val_labels):
        given.append(np.asarray(values.cpu() if torch.is_tensor(values) else values))
    x, y, x_val, y_val = given

    @cache  # the search comes back to one end of its range in every step
    def fitted(log_C):
        probe = LogisticRegression(C=10 ** log_C, max_iter=1000).fit(x, y)
        return probe.score(x_val, y_val), probe

    # one thread is several times faster for such small matrices, and always gives the same
    with threadpool_limits(1, user_api="blas"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of slow convergence and of few images per class
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


# ---------------------------------------- CLIP, frozen

DATA = Path(__file__).resolve().with_name("data")
# your own weights (ROOT/clip) and data sets (ROOT/<name>)
ROOT = Path(os.environ.get("MINI_COOP_ROOT") or DATA).expanduser()


def load_clip(name="mini", device=None):
    """Loads a frozen CLIP: (model in eval mode and float32, transform of a PIL image to pixels).

    name: "mini" (ours, which knows icons), the path of a state dict in OpenAI's layout, or a name
    of `clip.available_models()`: OpenAI's, downloaded once to ~/.cache/clip or, where
    MINI_COOP_ROOT is set, to its folder clip. device: None takes CUDA where there is one.
    Raises RuntimeError where OpenAI's file is missing or damaged and cannot be downloaded.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if name in clip.available_models():  # a TorchScript archive, opened if its SHA-256 is right
        folder = Path("~/.cache/clip").expanduser() if ROOT == DATA else ROOT / "clip"
        try:
            model, _ = clip.load(name, "cpu", download_root=str(folder))
        except (OSError, RuntimeError) as error:
            url = clip.clip._MODELS[name]
            raise RuntimeError(f"CLIP {name}: {folder / url.split('/')[-1]} is missing or damaged, "
                               f"no download ({error}): put {url} there") from error
    else:
        path = DATA / "mini_clip.pt" if name == "mini" else Path(name).expanduser()
        if not path.is_file():
            raise ValueError(f"no CLIP called {str(name)!r}: neither 'mini', nor one of "
                             f"{', '.join(clip.available_models())}, nor a file")
        state = read_tensors(path)
        if not {"visual.proj", "visual.attnpool.k_proj.weight"} & set(state):
            raise ValueError(f"{path} is no state dict of OpenAI's CLIP: it begins with "
                             f"{', '.join(map(str, list(state)[:3]))}")
        model = clip.model.build_model(dict(state)).float()
        # again, as build_model rounds to float16
        model.load_state_dict(state, strict=False)
    if not all(x.isfinite().all() for x in model.state_dict().values()):
        raise ValueError(f"CLIP {name}: some weights are NaN or infinite")
    model = model.eval().requires_grad_(False).to(device)
    if device.type in ("cpu", "cuda"):
        model = model.to(memory_format=torch.channels_last)  # convolutions are faster
    return model, clip.clip._transform(model.visual.input_resolution)


def read_tensors(path):
    """What torch.save wrote, if it is tensors and plain values: no code from a file is run."""
    try:
        return dict(torch.load(path, "cpu", weights_only=True))
    except OSError:
        raise  # no such file
    except Exception as error:  # torch's own message advises switching the protection off
        raise ValueError(f"cannot read {path} as a dict of plain tensors: {type(error).__name__}. "
                         "(OpenAI's archives are opened by name, such as 'RN50'.)") from None


def fingerprint(model):
    """The first number of each of a CLIP's tensors, by which a context recognises its CLIP."""
    return torch.stack([x.flatten()[0].float().cpu() for x in model.state_dict().values()])


# ---------------------------------------- images

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = {key for key, value in Image.registered_extensions().items() if value in FORMATS}
SOURCES = (str, Path, zipfile.Path, Image.Image)  # what an image can be given as


def open_image(source):
    """A path, also into an archive (zipfile.Path), or a PIL image -> an RGB image, upright by its
    EXIF tag, transparent parts white. Raises OSError for what is no image."""
    if not isinstance(source, Image.Image):
        with (Path(source) if isinstance(source, str) else source).open("rb") as file:
            try:
                return open_image(Image.open(file, formats=FORMATS))
            except UnidentifiedImageError:  # a page of HTML? a pointer of Git LFS?
                file.seek(0)
                raise OSError(f"no image: it begins with {file.read(24)}") from None
    image = source
    if 0 in image.size:
        raise ValueError(f"no pixels: {image.size[0]} x {image.size[1]}")
    # their range is anybody's guess, and PIL would cut them off at 255
    if image.mode[0] in "IF":
        raise ValueError(f"16-bit or float values (PIL's mode {image.mode}): convert to 8 bits")
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF can raise anything: the photo is taken as it lies
        pass
    if image.has_transparency_data:
        image = image.convert("RGBA")
        opaque = image.getextrema()[3] == (255, 255)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        if not opaque and image.convert("RGB").getextrema() == ((255, 255),) * 3:
            raise ValueError("transparent, on white nothing is left: give it a background")
    return image.convert("RGB")


@torch.no_grad()
def encode_images(model, preprocess, images, views=1, batch_size=64, seed=0, progress=None):
    """CLIP's image features (N, E), not normalised, float32, on the model's device.

    images: a list of paths or PIL images. views=1 uses `preprocess`, the test transform. views=A
    for A > 1 gives (N, A, E), of random crops and flips (the paper's augmentation) that `seed`
    draws in the order of the list; `fit` picks among them. batch_size: views at a time. progress:
    as in `fit`.
    """
    check_clip(model)
    found = f"a {type(images).__name__}"
    images = [] if isinstance(images, SOURCES) else list(images)
    wrong = [type(image).__name__ for image in images if not isinstance(image, SOURCES)]
    if not images or wrong or views < 1:
        found += f" of {wrong[0]}" if wrong else f" with {len(images)} images and {views} views"
        raise ValueError("images are a list of paths or PIL images (of a Split: split.images) with "
                         f"one view or more, not {found}")
    n_px = model.visual.input_resolution
    if views > 1:
        crop = transforms.RandomResizedCrop(n_px, (0.08, 1), interpolation=Image.BICUBIC)
        preprocess = transforms.Compose([crop, transforms.RandomHorizontalFlip(), preprocess])
    unreadable = []

    def pixels_of(source):  # (A, 3, n_px, n_px)
        try:
            image = open_image(source)
            return torch.stack([preprocess(image) for _ in range(views)]).float()
        except Exception as error:  # files can raise anything; all are named at the end
            unreadable.append(f"{str(source)[:200]} ({type(error).__name__}: {error})")
            return torch.zeros(views, 3, n_px, n_px)

    model.eval()  # in training mode a ResNet would mix the images of a batch
    # threads read files side by side. But crops must be drawn in order, and one PIL image may occur
    # twice: then a single thread
    one_by_one = views > 1 or any(isinstance(image, Image.Image) for image in images)
    size = max(1, batch_size // views)
    hide = None if progress is None else not progress
    starts = tqdm(range(0, len(images), size), "encoding images", leave=False, disable=hide)
    features = []
    with ThreadPoolExecutor(1 if one_by_one else None) as pool, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed a card, too
        for start in starts:
            pixels = torch.cat(list(pool.map(pixels_of, images[start:start + size])))
            x = model.encode_image(pixels.to(model.text_projection.device))  # (B * A, E)
            features.append(x.unflatten(0, (-1, views)))  # (B, A, E)
    if unreadable:
        ten = "; ".join(unreadable[:10]) + "; ..." * (len(unreadable) > 10)
        raise ValueError(f"{len(unreadable)} of {len(images)} images cannot be read: {ten}")
    features = torch.cat(features)
    return features if views > 1 else features[:, 0]


# ---------------------------------------- data sets

SPLITS = ("train", "val", "test")
# folders with such names are parts of a data set, not classes
ROLES = {"train", "training", "val", "valid", "validation", "test", "testing",
         "set", "image", "images", "img", "input", "inputs", "mask", "masks",
         "label", "labels", "annotations", "gt", "target", "targets"}


class Split(NamedTuple):
    """Images (paths; inside an archive zipfile.Path) and their labels, two lists."""
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


def load_dataset(name, template=None):
    """Reads a Dataset; images are opened only when they are encoded.

    name: the name of a folder with a dataset.json in data/ (data/README.md has its form), or of any
    data set in $MINI_COOP_ROOT; or the path of a folder that has a dataset.json or one folder per
    class, `<root>/<class>/*.jpg`, with or without train/, val/, test/ above. Without them each
    class is dealt 50 / 20 / 30 % by a fixed seed. template: in place of the data set's own.
    """
    built_in = {file.parent.name: file.parent for file in DATA.glob("*/dataset.json")}
    places = [Path(name).expanduser()]
    if name == places[0].name:  # a name; a Path or "./objects" of yours is a path
        places = [built_in.get(name, ROOT / name), ROOT / name, *places]
    found = list(dict.fromkeys(place.resolve() for place in places if place.is_dir()))
    if not found:
        raise ValueError(f"no data set {str(name)!r}: neither a folder, here or in {ROOT}, nor one "
                         f"of {', '.join(sorted(built_in))}")
    folder = found[0]
    for other in found[1:]:
        warnings.warn(f"{name}: read from {folder}; for {other} give that path", stacklevel=2)
    data = read_json(folder) if (folder / "dataset.json").is_file() else read_folders(folder)
    if absent := set(range(len(data.classnames))) - set(data.test.labels):
        names = [data.classnames[k] for k in sorted(absent)[:5]]
        warnings.warn(f"{name}: no test images of {len(absent)} classes, such as {names}",
                      stacklevel=2)
    return data if template is None else data._replace(template=template)


def read_json(folder):
    """A folder with a dataset.json -> Dataset."""
    file = folder / "dataset.json"
    try:
        spec = json.loads(file.read_text(encoding="utf-8-sig"))  # Windows may put a mark before it
        splits = spec["splits"]
        domains = spec.get("domains", {})
        if set(splits) - set(SPLITS) or set(domains) & set(SPLITS):
            raise ValueError(f"splits are {SPLITS}, and domains have other names")
        if not isinstance(spec["template"], str) or "{}" not in spec["template"]:
            raise ValueError(f"the template has no {{}} for the class name: {spec['template']!r}")
        names = check_names(spec["classnames"])
        root = folder / spec.get("images", ".")
        root = zipfile.Path(root) if root.is_file() else root
        parts = {}
        for part, rows in {**splits, **domains}.items():
            images = [root / path.replace("\\", "/") for path, _ in rows]
            parts[part] = Split(images, [label for _, label in rows])
            labels = set(parts[part].labels)
            if not labels <= set(range(len(names))) or {type(k) for k in labels} - {int}:
                raise ValueError(f"{part!r} has labels that are not 0 to {len(names) - 1}")
            if part in domains and len(labels) < 2:  # among one class every method is right
                raise ValueError(f"the domain {part!r} has images of {len(labels)} classes only")
    except (AttributeError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} is not in our form (data/README.md): {error!r}") from error
    splits = [parts.get(part, Split([], [])) for part in SPLITS]
    domains = {part: parts[part] for part in domains}
    return Dataset(folder.name, names, spec["template"], *splits, domains)


def read_folders(root):
    """<root>/<class>/*.jpg, or the same below train/, val/ and test/ -> Dataset."""
    # */*/*: glob leaves hidden files out and follows links; "**" would follow them in circles
    found = []
    for depth in range(1, 6):
        found += map(Path, glob.glob("/".join("*" * depth), root_dir=root))
    images = sorted(path for path in found if path.suffix.lower() in SUFFIXES)
    images = [path for path in images if not (root / path).is_dir()]
    used = set(images).union(*[path.parents for path in images])
    if others := sorted(str(path) for path in found if path not in used):
        warnings.warn(f"{root}: no {', '.join(FORMATS)}, so not read: {', '.join(others)[:200]}",
                      stacklevel=3)
    in_splits = any(path.parts[0] in SPLITS and len(path.parts) == 3 for path in images)
    depth = 3 if in_splits else 2  # of train/cat/1.jpg, of cat/1.jpg
    odd = []  # images at another depth
    members = {}  # class name -> its images
    for path in images:
        members.setdefault(path.parent.name, []).append(path)
        if len(path.parts) != depth or (in_splits and path.parts[0] not in SPLITS):
            odd.append(path)
    names = sorted(members)
    # only train/, test2/ or images/, masks/ above the images: class folders are missing
    words = [set(re.findall("[a-z]+", name.lower())) for name in names]
    no_classes = all(own and own <= ROLES for own in words) or "test" in names
    if odd or no_classes or len(names) < 2:
        raise ValueError(f"{root}: expected <class>/*.jpg for two classes or more, all of them or "
                         "none below train/, val/ and test/, but found "
                         f"{', '.join(map(str, (odd or names)[:3])) or 'no images'}")
    splits = {part: Split([], []) for part in SPLITS}
    for label, name in enumerate(names):
        own = members[name]
        parts = [path.parts[0] for path in own]
        if not in_splits:  # 50 / 20 / 30 %, rounded as in the published code
            random.Random(0).shuffle(own)
            parts = ["train"] * round(0.5 * len(own)) + ["val"] * round(0.2 * len(own))
            parts += ["test"] * (len(own) - len(parts))
        for part, path in zip(parts, own):
            splits[part].images.append(root / path)
            splits[part].labels.append(label)
    return Dataset(root.name, names, "a photo of a {}.", *splits.values(), {})


def few_shot(data, shots, seed):
    """The published few-shot sample: a Dataset with `shots` training images per class, and
    min(shots, 4) validation images for the linear probe. A class with fewer gives all it has, with
    a warning. On the paper's splits, seeds 1, 2 and 3 reproduce its samples."""
    if not isinstance(shots, (int, np.integer)) or shots < 1:
        raise ValueError(f"shots are a whole number from 1, not {shots!r}")
    rng = random.Random(int(seed))

    def draw(kind, split, n):
        members = {}  # classes in the order of first appearance, on which the sample depends
        for image, label in zip(*split, strict=True):
            members.setdefault(int(label), []).append(image)
        counts = [len(members.get(k, [])) for k in range(len(data.classnames))]
        short = [f"{data.classnames[k]} ({count})" for k, count in enumerate(counts) if count < n]
        if members and short:
            warnings.warn(f"fewer than {n} {kind} images of {', '.join(short)[:200]}", stacklevel=3)
        drawn = Split([], [])
        for label, own in members.items():
            some = rng.sample(own, n) if len(own) >= n else own
            drawn.images.extend(some)
            drawn.labels.extend([label] * len(some))
        return drawn

    train = draw("training", data.train, shots)  # first these: both use the same generator
    return data._replace(train=train, val=draw("validation", data.val, min(shots, 4)))


if __name__ == "__main__":  # the main job of README
    sys.path.append(str(DATA))
    runpy.run_path(str(DATA / "grid.py"), run_name="__main__")
