"""mini-coop: Context Optimization for CLIP, the whole method in one module.

Zhou, Yang, Loy, Liu: *Learning to Prompt for Vision-Language Models*, IJCV 2022 (doi 10.1007/s11263-022-01653-1), "the paper"
below. The words of a prompt ("a photo of a") become learnable vectors; CLIP itself stays frozen. Since the image encoder never
changes, images are encoded once and training sees features only. Left out on purpose: resuming inside a fit, and validation
during training (the paper tests the last step's context). How data sets are read is in data/datasets.py, the linear
probe in data/probe.py; data/grid.py is the main job, `python mini_coop.py`, which compares CoOp with such baselines.

Shapes, in every comment: B images of a batch, N images in all, V views of an image, K classes, M context vectors, L tokens of a
prompt, D text width, E joint embedding. On the text side: P tokens at the start of a prompt that all classes share, at most R
tokens that are a class's own, N of all classes together.
"""
import functools
import gc
import math
import os
import sys
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.checkpoint import checkpoint
from torchvision import transforms
from tqdm.auto import tqdm

with warnings.catch_warnings():  # the registry's copy imports pkg_resources, which warns of its own end
    warnings.simplefilter("ignore")
    import clip
    from clip.clip import _MODELS, _tokenizer, _transform  # the same names in both distributions of CLIP

__path__ = [str(Path(__file__).resolve().with_name("data"))]  # so that mini_coop.datasets is data/datasets.py
from mini_coop.datasets import DATA, SHARED, few_shot, load_dataset, open_image  # noqa: E402, F401
from mini_coop.datasets import Views, atomic, effect, fingerprint, kept  # noqa: E402
from mini_coop.probe import linear_probe  # noqa: E402, F401

SOS, EOT = _tokenizer.encoder["<|startoftext|>"], _tokenizer.encoder["<|endoftext|>"]
GROUP = 50  # classes padded together (CoOp sorts them by length): 10 % faster at 100 classes, 30 % at 1000; on CUDA 5 times as many
TOKENS_AT_ONCE = 5000  # of the classes' own; more are encoded in chunks, again in the backward pass: flat memory, a third more time


# ---------------------------------------------------------------- CLIP, frozen

def load_clip(name="mini", device=None):
    """Loads a frozen CLIP: (model in eval mode and fp32, transform PIL image -> (3, n_px, n_px)).

    name: "mini" (the small one in data/, which knows icons), a name of `clip.available_models()` (OpenAI's, looked for in
    $MINI_COOP_ROOT/clip, else downloaded to ~/.cache/clip) or a checkpoint: a state dict in OpenAI's layout, or a TorchScript
    archive as OpenAI ships. device: None takes CUDA where there is one, else the CPU. ("mps" is accepted but was never tried.)
    Raises ValueError for an unknown name or device and for a file that is no CLIP, RuntimeError if a download fails.
    """
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {str(device)!r} cannot be used here; try 'cpu', or 'cuda' where torch sees a GPU") from error
    if name in _MODELS:
        file = weights_file(name)
        try:
            model, _ = clip.load(name, "cpu", download_root=str(file.parent))  # checks the SHA-256
        except (OSError, RuntimeError) as error:  # URLError is an OSError, a wrong SHA-256 a RuntimeError
            raise RuntimeError(f"could not download CLIP {name!r} ({error}). Put the file there by hand: {file} "
                               f"(from {_MODELS[name]}), or use 'mini', which needs no download") from error
    else:
        path = DATA / "mini_clip.pt" if name == "mini" else Path(name)
        if not path.is_file():
            raise ValueError(f"no CLIP called {str(name)!r}: neither 'mini', nor one of {', '.join(_MODELS)}, nor a file")
        try:
            scripted = zipfile.is_zipfile(path) and any(n.endswith("/constants.pkl") for n in zipfile.ZipFile(path).namelist())
            state = torch.jit.load(path, "cpu").state_dict() if scripted else torch.load(path, "cpu", weights_only=True)
            model = clip.model.build_model(dict(state)).float()
            model.load_state_dict({key: state[key] for key in model.state_dict()})  # build_model rounds to fp16 on its way
        except Exception as error:  # a file that is no checkpoint can raise anything
            reason = f"{type(error).__name__}: {str(error).strip()[:200]}"
            raise ValueError(f"{path} is no CLIP checkpoint in OpenAI's layout, or is damaged ({reason})") from error
    model = model.float().eval().requires_grad_(False).to(device)
    model.visual.to(memory_format=torch.channels_last)  # the same values in another order: a ResNet is a sixth faster
    return model, _transform(model.visual.input_resolution)


def weights_file(name):
    """Where OpenAI's weights of a name lie, or will: the lab's shared folder if they are there, else ~/.cache/clip."""
    shared = SHARED / "clip" / Path(_MODELS[name]).name
    return shared if shared.is_file() else Path("~/.cache/clip").expanduser() / shared.name


def half_precision(device):
    """What the text tower runs in while training, decided here only: bf16; on older CUDA cards fp16, with the loss scaled; else None, fp32."""
    if device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


@torch.no_grad()
def encode_images(model, preprocess, images, views=1, batch_size=64, seed=0, workers=None, progress=True, cache=None):
    """Unit-norm float32 image features on the model's device, (N, E); with views=V > 1 (N, V, E).

    images: paths or PIL images. views=1 uses `preprocess` (the test transform); V > 1 draws V random resized crops and flips an
    image, the paper's augmentation, once: the encoder is frozen, so training picks among them. workers: processes that read
    images; by default none, except on Linux with more than two cores and thousands of images, where they pay. cache: a folder
    that keeps the features; they are taken from there only if weights, transform, views, seed and every file are the same.
    An image that cannot be read is named in a warning and becomes a row of NaN; the others are not lost (nor cached).
    """
    images = [images] if isinstance(images, (str, Path, Image.Image)) else list(images)
    if any(isinstance(image, (list, tuple)) for image in images):
        raise ValueError("images must be paths or PIL images; of a split of load_dataset take .images")
    if not images or views < 1:
        raise ValueError("no images to encode" if not images else f"views must be 1 or more, not {views}")
    if cache is not None:
        key = fingerprint(model.visual), str(preprocess), effect(preprocess), views, seed
        encode = functools.partial(encode_images, model, preprocess, images, views, batch_size, seed, workers, progress)
        return kept(cache, key, images, encode).to(model.text_projection.device)
    device, n_px = model.text_projection.device, model.visual.input_resolution
    if views > 1:
        preprocess = transforms.Compose([
            transforms.RandomResizedCrop(n_px, scale=(0.08, 1), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(), *preprocess.transforms[-2:]])  # the last two: to tensor, CLIP's mean and std
    if workers is None:
        workers = min(8, os.cpu_count()) if sys.platform == "linux" and os.cpu_count() > 2 and len(images) * views > 4000 else 0
    loader = torch.utils.data.DataLoader(
        Views(images, preprocess, views, seed, n_px), max(1, batch_size // views), num_workers=workers, generator=torch.Generator(),
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None, pin_memory=device.type == "cuda")
    features, unreadable = [], []
    for pixels, reasons in tqdm(loader, desc="encoding images", disable=not progress, leave=False):
        with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):  # as OpenAI's weights were trained
            x = model.encode_image(pixels.flatten(0, 1).to(device, non_blocking=True)).float()  # (B * V, E)
        features.append(F.normalize(x, dim=-1).unflatten(0, (-1, views)))
        unreadable += [reason for reason in reasons if reason]
    features = torch.cat(features) if views > 1 else torch.cat(features)[:, 0]
    if unreadable:
        warnings.warn(f"{len(unreadable)} of {len(images)} images cannot be read and are rows of NaN: {'; '.join(unreadable[:3])}. "
                      "keep = features.isfinite().flatten(1).all(1) selects the others", stacklevel=3)
    return features


# ---------------------------------------------------------------- the text side

def encode_prompts(model, shared, rest, positions, ends, groups):
    """CLIP's text encoder on token embeddings, computing what is needed and no more.

    The text transformer is causal: a token sees only those before it. So what all classes share at the start of their prompts
    has the same keys and values for each of them and is computed once, not K times; and nothing after a class's EOT counts.
    shared: (P, D) embeddings of the tokens that all classes share; rest: (N, D) of each class's own, up to its EOT, one class
    after another; positions, ends, groups: their layout, from `_layout`. Returns (K, E) features, not normalised; exact,
    gradients too (tests hold it to the 77-token way).
    """
    P, sizes = len(shared), [len(shared), *(len(where) for where, *_ in groups)]
    x = torch.cat([shared + model.positional_embedding[:P], rest + model.positional_embedding[P + positions]])  # (P + N, D)
    for block in model.transformer.resblocks:
        heads = block.attn.num_heads
        qkv = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias).unflatten(1, (3, heads, -1))
        first, *own = qkv.split(sizes)  # of the shared tokens; of the classes' own, a group at a time
        q, k, v = first.permute(1, 2, 0, 3)  # (heads, P, D / heads) each
        seen = [F.scaled_dot_product_attention(q, k, v, is_causal=True), *(_attend(o, k, v, *group) for o, group in zip(own, groups))]
        seen = torch.cat(seen, 1).transpose(0, 1).flatten(1)  # (P + N, D)
        if block is model.transformer.resblocks[-1]:  # only the EOTs, a class's last tokens, are read: 15 % of the mini-CLIP's step
            x, seen = x[P + ends], seen[P + ends]  # (K, D)
        x = x + block.attn.out_proj(seen)
        x = x + block.mlp(block.ln_2(x))
    return model.ln_final(x) @ model.text_projection


def _attend(qkv, k, v, where, K, R):
    """What K classes' own tokens, qkv (n, 3, heads, D / heads), see of the shared keys and values (heads, P, D / heads) and of
    those before them in their class: (heads, n, D / heads). Only here are short names padded, to the longest of their group."""
    padded = qkv.new_zeros(K * R, *qkv.shape[1:]).index_copy(0, where, qkv)
    own_q, own_k, own_v = padded.permute(1, 2, 0, 3).unflatten(2, (K, R))  # (heads, K, R, D / heads) each
    own_q, future = own_q / own_q.shape[-1] ** 0.5, torch.full((R, R), -math.inf, device=qkv.device).triu(1)
    to_shared = own_q.flatten(1, 2) @ k.mT  # (heads, K * R, P)
    to_own = own_q @ own_k.mT + future  # (heads, K, R, R): what pads a class stands after its EOT, so it is never seen
    weights = torch.cat([to_shared, to_own.flatten(1, 2)], 2).softmax(2)  # (heads, K * R, P + R)
    of_shared, of_own = weights.split([k.shape[1], R], 2)
    seen = of_shared @ v + (of_own.unflatten(1, (K, R)) @ own_v).flatten(1, 2)  # (heads, K * R, D / heads)
    return seen.index_select(1, where)


def _layout(rows, device):
    """K lists of tokens, one after another -> positions (N,), each token's place in its list; ends (K,), which token is a list's
    last; and for each group of k lists where (n,), their tokens' places in a table (k, R) that pads them, flattened; k; R."""
    lengths, positions, groups = torch.tensor([len(row) for row in rows]), [], []
    for group in lengths.split(GROUP if device.type == "cpu" else 5 * GROUP):
        inside = torch.arange(group.max()) < group[:, None]  # (k, R), True where there is a token
        positions.append(inside.nonzero()[:, 1])
        groups.append((inside.flatten().nonzero()[:, 0].to(device), *inside.shape))
    return torch.cat(positions).to(device), (lengths.cumsum(0) - 1).to(device), groups


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


def _tokenize(model, text, M=0):
    """Token ids of a text, EOT last, if they fit into a prompt with M context vectors."""
    tokens = _tokenizer.encode(text) + [EOT]
    if (L := 1 + M + len(tokens)) > model.context_length:
        raise ValueError(f"{text!r}{f' with {M} context vectors' if M else ''} makes a prompt of {L} tokens, but CLIP reads "
                         f"{model.context_length}: shorten it")
    return tokens


def _embed(model, tokens):
    """Token ids, a list -> their embeddings (N, D)."""
    return model.token_embedding(torch.tensor(tokens, device=model.text_projection.device))


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
        rows = [_tokenize(model, template.replace("{}", name)) for name in names]
        rest, layout = _embed(model, sum(rows, [])), _layout(rows, model.text_projection.device)
        weights = weights + F.normalize(encode_prompts(model, _embed(model, [SOS]), rest, *layout), dim=-1)
    return F.normalize(weights, dim=-1)


# ---------------------------------------------------------------- the linear probe

# ---------------------------------------------------------------- CoOp

def learning_rate(epoch, epochs, lr=0.002):
    """The paper's schedule: one epoch at 1e-5, then a cosine over `epochs` that is never finished (epoch 1 runs at `lr`)."""
    return 1e-5 if epoch == 0 else 0.5 * lr * (1 + math.cos(math.pi * (epoch - 1) / epochs))


def n_epochs(shots, epochs=None):
    """The paper's number of epochs, unless given: 50 for 1 shot, 100 for up to 4, else 200 (it takes 50 on ImageNet always)."""
    return epochs if epochs is not None else 50 if shots == 1 else 100 if shots <= 4 else 200


class CoOp(torch.nn.Module):
    """The prompt learner (section 3.2 of the paper): prompts "[V1] ... [VM] class name ." whose vectors V are learned.

    model: a CLIP of load_clip, kept but not registered: `ctx` is the only parameter and all of the state dict.
    classnames: K >= 2 names. n_ctx: M. class_specific: one context a class, ctx (K, M, D), instead of one for all, (M, D).
    class_position: "end", "middle" or "front". ctx_init: words to start from ("a photo of a"), one vector a token, which
    override n_ctx; without them the vectors are drawn from N(0, 0.02^2) by `seed`, which also orders the training.
    Raises ValueError for bad class names, positions, lengths; warns of classes of the same name. The device is load_clip's.

    For a method of your own, override `loss` or `forward`; `text_features(ctx)` takes other contexts, say one shifted by an image's
    feature. `fit` trains every parameter of the subclass.
    """

    def __init__(self, model, classnames, n_ctx=16, class_specific=False, class_position="end", ctx_init=None, seed=0):
        super().__init__()
        classnames = classnames if isinstance(classnames, str) else list(classnames)
        names = _clean(classnames)
        if len(names) < 2:
            raise ValueError(f"there is one class only ({names[0]!r}): nothing to tell apart")
        if class_position not in ("end", "middle", "front"):
            raise ValueError(f"class_position must be 'end', 'middle' or 'front', not {class_position!r}")
        words = None if ctx_init is None else _tokenizer.encode(ctx_init.replace("_", " "))
        M, K, D = n_ctx if words is None else len(words), len(names), model.ln_final.weight.shape[0]
        if type(M) is not int or M < 1:
            raise ValueError(f"n_ctx must be 1 or more, not {M!r}{'' if words is None else ': ctx_init has no words'}")
        object.__setattr__(self, "clip_model", model)  # not registered: frozen, and no part of the state dict
        self.classnames, self.n_ctx, self.class_specific, self.class_position = classnames, M, bool(class_specific), class_position
        self.seed, self.history_ = seed, {"loss": [], "accuracy": [], "lr": []}
        shape, device = (K, M, D) if class_specific else (M, D), model.text_projection.device
        if words:
            ctx = _embed(model, words).expand(shape).clone()
        else:
            ctx = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
        self.ctx = torch.nn.Parameter(ctx)

        # A prompt is a list of places in text_features' `source`: all context vectors, then all names' tokens: name, ".", EOT each.
        tokens = [_tokenize(model, name + ".", M) for name in names]
        n_before = {"end": M, "middle": M // 2, "front": 0}[class_position]  # context vectors before the name
        self.n_shared, prompts, start = 0 if class_specific else n_before, [], ctx.numel() // D
        for k, (name, row) in enumerate(zip(names, tokens)):
            n_name = len(_tokenizer.encode(name))  # as published; "(...)" + "." may merge, then the period goes with the name
            own, ctx = range(start, start + len(row)), range(k * M, k * M + M) if class_specific else range(M)
            prompts.append([*ctx[self.n_shared:n_before], *own[:n_name], *ctx[n_before:], *own[n_name:]])
            start += len(row)
        by_length, chunks = sorted(range(K), key=lambda k: len(prompts[k])), [[]]
        for k in by_length:
            if chunks[-1] and sum(map(len, chunks[-1])) + len(prompts[k]) > TOKENS_AT_ONCE:
                chunks.append([])
            chunks[-1].append(prompts[k])
        self._chunks = [(torch.tensor(sum(chunk, []), device=device), *_layout(chunk, device)) for chunk in chunks]
        self._order = torch.tensor(by_length, device=device).argsort()  # back from the order of lengths to that of the names
        self._sos, self._tokens = _embed(model, [SOS]), _embed(model, sum(tokens, []))  # (1, D), (all names' tokens, D)

    def text_features(self, ctx=None):
        """Unit-norm text features of the prompts as they are now, or with another context of the same shape, (K, E); gradients
        reach it."""
        if ctx is not None and ctx.shape != self.ctx.shape:
            raise ValueError(f"a context of shape {tuple(ctx.shape)} instead of {tuple(self.ctx.shape)}")
        ctx = (self.ctx if ctx is None else ctx).flatten(0, -2)
        half, run = half_precision(ctx.device), encode_prompts
        shared, source = torch.cat([self._sos, ctx[:self.n_shared]]), torch.cat([ctx, self._tokens])  # (P, D)
        if len(self._chunks) > 1:  # many classes: keep no chunk's activations, compute them again in the backward pass
            run = functools.partial(checkpoint, encode_prompts, use_reentrant=False, preserve_rng_state=False)
        with torch.autocast(source.device.type, half, enabled=half is not None):
            features = [run(self.clip_model, shared, source.index_select(0, rows), *layout) for rows, *layout in self._chunks]
        return F.normalize(torch.cat(features)[self._order].float(), dim=-1)

    def _recorded(self):
        """`text_features` as a CUDA graph: recorded once, with its backward pass, then only replayed."""
        ctx = self.ctx.detach().requires_grad_()  # the same memory: a replay sees what the optimiser wrote
        with torch.cuda.device(ctx.device):
            torch.cuda.graph.default_capture_stream = None  # up to torch 2.13 it stays on the device of the first graph
            return functools.partial(torch.cuda.make_graphed_callables(self.text_features, (ctx,)), self.ctx)

    def forward(self, image_features, text_features=None):
        """Logits (B, K) of image features (B, E): exp(logit_scale) * cosine, the scale frozen at CLIP's value. text_features: what
        `text_features()` gave, if it is at hand."""
        text_features = self.text_features() if text_features is None else text_features
        return self.clip_model.logit_scale.exp() * F.normalize(image_features, dim=-1) @ text_features.T

    def loss(self, logits, labels, text_features):
        """What `fit` makes small: the cross-entropy (equation 1) of logits (B, K)."""
        return F.cross_entropy(logits, labels)

    @torch.enable_grad()
    def fit(self, image_features, labels, epochs=None, lr=0.002, batch_size=32, progress=True):
        """Learns the context by the paper's recipe (section 4.1) and returns self; starts from the context as it is, the schedule anew.

        image_features: (N, E), or (N, V, E): then each epoch takes a random view of each image. labels: (N,) integers.
        SGD, momentum 0.9, weight decay 5e-4, the schedule of `learning_rate`; a last short batch is dropped unless it is the
        only one. epochs=None: `n_epochs` of the largest number of images a class.
        `history_` holds loss, accuracy (%) and lr of every epoch. Ctrl-C keeps what is learned so far and sets `interrupted_`.
        """
        features, labels = self._check(image_features, labels, views=True)
        if batch_size < 1 or (epochs is not None and epochs < 0) or not 0 <= lr < math.inf:
            raise ValueError(f"batch_size must be 1 or more, epochs and lr 0 or more, not {batch_size}, {epochs} and {lr}")
        N, device, rows = len(features), features.device, torch.arange(len(features), device=features.device)
        epochs, batch_size = n_epochs(labels.bincount().max().item(), epochs), min(batch_size, N)
        optimizer = torch.optim.SGD(self.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, fused=device.type == "cuda")
        for parameter in self.parameters():  # else unset by a first step that fp16 skips
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        # small gradients survive fp16; scaled by the usual 65536 the first would be too large and its step skipped
        scaler = torch.amp.GradScaler(device.type, init_scale=1024, enabled=half_precision(device) is torch.float16)
        generator = torch.Generator().manual_seed(self.seed)  # on the CPU: the same order on every device
        self.history_, self.interrupted_ = {"loss": [], "accuracy": [], "lr": []}, False
        bar, encode = tqdm(range(epochs), desc="learning the context", disable=not progress), self.text_features
        try:
            if device.type == "cuda" and len(self._chunks) == len(list(self.parameters())) == 1 and not torch.is_anomaly_enabled():
                encode = self._recorded()  # over a thousand small kernels with RN50's text tower
            for epoch in bar:
                optimizer.param_groups[0]["lr"] = learning_rate(epoch, epochs, lr)
                order, x = torch.randperm(N, generator=generator).to(device), features
                if features.ndim == 3:
                    x = features[rows, torch.randint(features.shape[1], (N,), generator=generator).to(device)]  # (N, E)
                loss_sum, right, steps = 0, 0, N // batch_size
                for batch in order[:steps * batch_size].split(batch_size):
                    text_features = encode()  # (K, E)
                    logits = self(x[batch], text_features)  # (B, K)
                    loss = self.loss(logits, labels[batch], text_features)
                    optimizer.zero_grad()
                    scaler.scale(loss).backward()
                    scaler.step(optimizer)
                    scaler.update()
                    loss_sum, right = loss_sum + loss.detach(), right + (logits.argmax(1) == labels[batch]).sum()
                self.history_["loss"].append(float(loss_sum) / steps)
                self.history_["accuracy"].append(100 * float(right) / (steps * batch_size))
                self.history_["lr"].append(optimizer.param_groups[0]["lr"])
                bar.set_postfix(loss=f"{self.history_['loss'][-1]:.3f}", refresh=False)
        except KeyboardInterrupt:
            self.interrupted_ = True
            done = len(self.history_["loss"])
            print(f"interrupted after {done} of {epochs} epochs: the context learned so far is kept", file=sys.stderr)
        finally:
            encode = text_features = logits = loss = None
            optimizer.zero_grad()
            if device.type == "cuda":
                gc.collect()  # a graph is in a reference cycle, and its memory with it
        return self

    def _check(self, features, labels=..., views=False):
        """Features and labels on our device, or one clear error."""
        device, K, E = self.ctx.device, len(self.classnames), self.clip_model.text_projection.shape[1]
        features = torch.as_tensor(features).detach().to(device, torch.float32)
        if features.ndim not in ((2, 3) if views else (2,)) or features.shape[-1] != E or not features.numel():
            raise ValueError(f"image features must be (N, {E}){f' or (N, views, {E})' if views else ''}, "
                             f"not {tuple(features.shape)}: are they from encode_images with the same model?")
        if len(bad := (~features.isfinite().flatten(1).all(1)).nonzero()):
            raise ValueError(f"{len(bad)} of {len(features)} image features are NaN or infinite, first row {int(bad[0])} "
                             "(an image that could not be read?)")
        if labels is ...:
            return features
        try:
            labels = torch.as_tensor(labels, device=device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"labels must be {len(features)} integers, the places of the classes ({error})") from error
        if labels.shape != (len(features),) or labels.is_floating_point() or labels.is_complex():
            raise ValueError(f"labels must be {len(features)} integers, one a feature, not {labels.dtype} {tuple(labels.shape)}")
        labels = labels.long()
        if len(wrong := labels[(labels < 0) | (labels >= K)]):
            raise ValueError(f"label {int(wrong[0])} is outside of the {K} classes (0 to {K - 1})")
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
            result.append([[(_tokenizer.decode([i]).strip(), d) for d, i in zip(*row)] for row in zip(distances.tolist(), ids.tolist())])
        return result if self.class_specific else result[0]

    def save(self, path):
        """Writes the context and what it needs (kilobytes; class-specific, K times as many), whole or not at all."""
        if len(self.state_dict()) > 1:
            raise ValueError("save keeps ctx only, but this variant has more parameters: save its state_dict()")
        state = {"format": "mini-coop 1", "ctx": self.ctx.detach().cpu(), "classnames": [str(n) for n in self.classnames],
                 "class_specific": self.class_specific, "class_position": self.class_position, "seed": self.seed,
                 "text_encoder": fingerprint(self.clip_model, "visual.")}
        with atomic(path) as file:
            torch.save(state, file)

    @classmethod
    def load(cls, path, model, classnames=None):
        """Reads a saved context for the CLIP it was learned with; a unified one may be put before other class names."""
        try:
            state = torch.load(path, "cpu", weights_only=True)
            if not isinstance(state, dict) or state.get("format") != "mini-coop 1":
                raise ValueError("not written by CoOp.save")
            ctx, names, specific, position, seed, text_encoder = (
                state[key] for key in ("ctx", "classnames", "class_specific", "class_position", "seed", "text_encoder"))
            if ctx.ndim != 2 + specific or not ctx.isfinite().all():
                raise ValueError(f"a context of shape {tuple(ctx.shape)}, or one that is not finite")
        except FileNotFoundError:
            raise
        except Exception as error:  # a file that is not ours can raise anything
            reason = f"{type(error).__name__}: {str(error).strip()[:200]}"
            raise ValueError(f"{path} holds no context of ours, or is damaged ({reason})") from error
        if text_encoder != fingerprint(model, "visual."):
            raise ValueError(f"{path} was learned with another text encoder: load the CLIP that it was learned with")
        classnames = names if classnames is None else classnames if isinstance(classnames, str) else list(classnames)
        if specific and [str(name) for name in classnames] != names:
            raise ValueError(f"{path} is class-specific: it serves only the {len(names)} classes that it was learned for")
        coop = cls(model, classnames, ctx.shape[-2], specific, position, seed=seed)
        coop.ctx.data.copy_(ctx)
        return coop


if __name__ == "__main__":
    from mini_coop.grid import main
    main()
