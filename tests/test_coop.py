"""The prompt learner against independent oracles: the 77-token way, zero-shot CLIP, closed forms."""
import contextlib
import copy
import math
import os
import pickle
import warnings

import clip
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import mini_coop
from mini_coop import CoOp, encode_images, learning_rate, linear_probe, load_clip, zero_shot_weights

NAMES = ["cat", "a_very_long_name of an outdoor apartment building with a swimming pool", "Bird (animal)", "T-shirt", "ox"]


def naive_logits(coop, image_features):
    """The published way, written from the paper: 77 tokens a class, every class on its own, CLIP's own transformer."""
    model, M = coop.clip_model, coop.n_ctx
    names = [name.replace("_", " ") for name in coop.classnames]
    tokens = clip.tokenize([" ".join(["X"] * M) + f" {name}." for name in names]).long()
    embedding = model.token_embedding(tokens)
    ctx = coop.ctx if coop.ctx.ndim == 3 else coop.ctx.expand(len(names), -1, -1)
    prompts = []
    for k, name in enumerate(names):
        n = len(clip.simple_tokenizer.SimpleTokenizer().encode(name))
        sos, rest = embedding[k, :1], embedding[k, 1 + M:]
        half = {"end": M, "middle": M // 2, "front": 0}[coop.class_position]
        if coop.class_position == "end":
            n = 0
        prompts.append(torch.cat([sos, ctx[k, :half], rest[:n], ctx[k, half:], rest[n:]]))
    x = torch.stack(prompts) + model.positional_embedding
    x = model.ln_final(model.transformer(x.permute(1, 0, 2)).permute(1, 0, 2))
    text = x[torch.arange(len(names)), tokens.argmax(1)] @ model.text_projection
    return model.logit_scale.exp() * F.normalize(image_features, dim=-1) @ F.normalize(text, dim=-1).T


@pytest.mark.parametrize("group, at_once", [(50, 5000), (2, 5000), (2, 30)])  # padded together; in groups; in chunks, computed again
@pytest.mark.parametrize("ctx_init", [None, "a photo of a"])
@pytest.mark.parametrize("n_ctx", [4, 5])
@pytest.mark.parametrize("class_position", ["end", "middle", "front"])
@pytest.mark.parametrize("class_specific", [False, True])
def test_equal_to_the_77_token_way(tiny, class_specific, class_position, n_ctx, ctx_init, group, at_once, monkeypatch):
    monkeypatch.setattr(mini_coop, "GROUP", group)
    monkeypatch.setattr(mini_coop, "TOKENS_AT_ONCE", at_once)
    again = []
    monkeypatch.setattr(mini_coop, "checkpoint", lambda *args, **options: again.append(1) or checkpoint(*args, **options))
    init = ctx_init if n_ctx == 4 or not ctx_init else ctx_init + " big"  # even and odd M for words too
    coop = CoOp(tiny[0], NAMES, n_ctx, class_specific, class_position, init, seed=3)
    assert coop.n_ctx == n_ctx and coop.ctx.shape == ((5, n_ctx, 128) if class_specific else (n_ctx, 128))
    assert (len(coop._chunks) > 1) == (at_once == 30) and (len(coop._chunks[0][3]) > 1) == (group == 2)
    images, labels = torch.randn(7, 32), torch.tensor([0, 1, 2, 3, 4, 1, 2])
    results = []
    for logits in (coop(images), naive_logits(coop, images)):
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels), coop.ctx)
        results.append((logits.detach(), gradient))
    (ours, ours_gradient), (naive, naive_gradient) = results
    assert bool(again) == (at_once == 30)
    assert torch.allclose(ours, naive, atol=1e-4 * naive.abs().max(), rtol=0)
    assert naive_gradient.abs().max() > 0
    assert torch.allclose(ours_gradient, naive_gradient, atol=1e-4 * naive_gradient.abs().max(), rtol=0)


def test_the_shared_start_is_really_shared(tiny):
    assert [CoOp(tiny[0], NAMES, 6, False, p).n_shared for p in ("end", "middle", "front")] == [6, 3, 0]
    assert CoOp(tiny[0], NAMES, 6, True).n_shared == 0


@pytest.mark.parametrize("class_specific", [False, True])
def test_words_and_no_steps_are_zero_shot(mini, class_specific):
    names = ["umbrella", "trash_can", "light bulb", "T-shirt"]
    coop = CoOp(mini[0], names, class_specific=class_specific, ctx_init="a photo of a")
    weights = zero_shot_weights(mini[0], names, "a photo of a {}.")
    assert torch.allclose(coop.text_features(), weights, atol=1e-5)
    own = F.normalize(mini[0].encode_text(clip.tokenize([f"a photo of a {n.replace('_', ' ')}." for n in names])), dim=-1)
    assert torch.allclose(weights, own, atol=1e-5)  # and CLIP's own encoder says the same


def test_an_ensemble_is_the_normalised_mean(mini):
    both = [zero_shot_weights(mini[0], ["cat", "dog"], t) for t in ("{}", "a photo of a {}.")]
    assert torch.allclose(zero_shot_weights(mini[0], ["cat", "dog"], ["{}", "a photo of a {}."]), F.normalize(sum(both), dim=-1), atol=1e-6)


def solvable(E=32, K=4, n=8, seed=0):
    """Features around K directions, with labels: a task that any classifier can solve."""
    generator = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(K, E, generator=generator), dim=-1)
    labels = torch.arange(K).repeat_interleave(n)
    return F.normalize(centres[labels] + 0.05 * torch.randn(K * n, E, generator=generator), dim=-1), labels


def test_a_solvable_task_is_solved_and_clip_is_untouched(tiny):
    before = copy.deepcopy(tiny[0].state_dict())
    features, labels = solvable()
    coop = CoOp(tiny[0], ["cat", "dog", "ox", "bird"], class_specific=True)
    assert coop.fit(features, labels, lr=0.05, progress=False) is coop
    assert coop.score(features, labels) == 1.0
    loss = coop.history_["loss"]
    assert loss[-1] < 0.3 * loss[0] and len(loss) == 200  # 8 shots: 200 epochs
    assert all(torch.equal(before[k], v) for k, v in tiny[0].state_dict().items())
    assert [n for n, _ in coop.named_parameters()] == ["ctx"] and list(coop.state_dict()) == ["ctx"]
    probabilities = coop.predict_proba(features)
    assert probabilities.shape == (32, 4) and torch.allclose(probabilities.sum(1), torch.ones(32), atol=1e-5)
    assert torch.equal(coop.predict(features), labels)


def test_schedule_of_every_epoch(tiny):
    features, labels = solvable(n=1)
    coop = CoOp(tiny[0], ["cat", "dog", "ox", "bird"], n_ctx=2).fit(features, labels, progress=False)
    T = 50  # 1 shot
    assert coop.history_["lr"] == [1e-5] + [0.001 * (1 + math.cos(math.pi * (e - 1) / T)) for e in range(1, T)]
    assert learning_rate(1, 200) == 0.002


@pytest.mark.parametrize("n, epochs", [(1, 50), (2, 100), (4, 100), (8, 200), (16, 200)])
def test_epochs_by_shots(tiny, n, epochs, monkeypatch):
    monkeypatch.setattr(mini_coop, "learning_rate", lambda epoch, T, lr: (_ for _ in ()).throw(KeyboardInterrupt(T)))
    seen = []
    monkeypatch.setattr(mini_coop, "tqdm", lambda it, **kw: seen.append(len(it)) or mini_coop_bar(it))
    CoOp(tiny[0], ["cat", "dog"], 1).fit(*solvable(K=2, n=n), progress=False)
    assert seen == [epochs]


class mini_coop_bar(list):
    def set_postfix(self, **_):
        pass


def test_the_recipe_by_hand(tiny):
    """Two epochs rebuilt with plain torch: batches of 4 of 10, the short last one dropped, SGD with momentum and weight decay."""
    features, labels = torch.randn(10, 32, generator=torch.Generator().manual_seed(0)), torch.arange(10) % 3
    coop = CoOp(tiny[0], ["cat", "dog", "ox"], 3, seed=5)
    coop.ctx.data *= 50  # vectors and a learning rate so large that the weight decay shows: leaving it out moves ctx by 9e-3
    ctx, velocity = coop.ctx.detach().clone(), 0
    coop.fit(features, labels, epochs=2, lr=1.0, batch_size=4, progress=False)
    other, generator = CoOp(tiny[0], ["cat", "dog", "ox"], 3), torch.Generator().manual_seed(5)
    for lr in (1e-5, 1.0):
        order = torch.randperm(10, generator=generator)
        for batch in (order[:4], order[4:8]):
            other.ctx.data = ctx
            gradient, = torch.autograd.grad(F.cross_entropy(other(features[batch]), labels[batch]), other.ctx)
            velocity = 0.9 * velocity + gradient + 5e-4 * ctx
            ctx = ctx - lr * velocity
    assert torch.allclose(coop.ctx, ctx, atol=1e-4, rtol=0)  # rounding: 3e-7


def test_fp16_with_its_loss_scaled_learns_the_same(tiny, monkeypatch):
    """What a card without bf16 runs, on the CPU: the same steps, none of them skipped."""
    features, labels = solvable()
    scales, step = [], torch.amp.GradScaler.step
    monkeypatch.setattr(torch.amp.GradScaler, "step", lambda self, optimizer: scales.append(self.get_scale()) or step(self, optimizer))
    contexts, losses = [], []
    for half in (None, torch.float16):
        monkeypatch.setattr(mini_coop, "half_precision", lambda device, half=half: half)
        coop = CoOp(tiny[0], ["cat", "dog", "ox", "bird"], 4).fit(features, labels, epochs=30, lr=0.02, progress=False)
        contexts.append(coop.ctx - CoOp(tiny[0], ["cat", "dog", "ox", "bird"], 4).ctx)
        losses.append(coop.history_["loss"])
    assert scales[0] == 1 and scales[-1] == 1024 and coop.ctx.dtype == torch.float32
    assert F.cosine_similarity(*(c.flatten() for c in contexts), dim=0) > 0.99 and abs(losses[0][-1] - losses[1][-1]) < 0.02 * losses[0][-1]


@pytest.mark.skipif(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 4), reason="no fused optimiser on the CPU before torch 2.4")
def test_a_first_step_skipped_for_fp16_is_no_harm(tiny, monkeypatch):
    """With the scale far too large; the fused optimiser, which CUDA uses, would keep momentum that nobody has set."""
    features, labels = solvable()
    monkeypatch.setattr(mini_coop, "half_precision", lambda device: torch.float16)
    monkeypatch.setattr(torch.optim, "SGD", lambda *args, fused, sgd=torch.optim.SGD, **options: sgd(*args, fused=True, **options))
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, init_scale, enabled: scaler(device, 2.0 ** 40, enabled=enabled))
    junk = [torch.full((4, tiny[0].ln_final.weight.shape[0]), 1e30) for _ in range(50)]  # for memory that is not zero by chance
    del junk
    coop = CoOp(tiny[0], ["cat", "dog", "ox", "bird"], 4).fit(features, labels, epochs=30, lr=0.02, progress=False)
    assert coop.ctx.isfinite().all() and coop.history_["loss"][-1] < coop.history_["loss"][0] - 0.1


class Tape(TorchDispatchMode):
    """A CUDA graph acted out on the CPU: recording computes nothing that lasts, a replay runs the same operations on the same
    memory, and what would have to wait for the GPU is an error."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        waits = ("local_scalar", "nonzero", "masked", "unique", "lift_fresh", "equal", "bincount", "repeat_interleave")
        assert "masked_fill" in str(operation) or not any(word in str(operation) for word in waits), operation
        assert all(t.dtype != torch.bool for t in tree_leaves(args[1:2])) if "index.Tensor" in str(operation) else True, operation
        result = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, result))
        return result

    def new(self, args, kwargs, result):
        """The results of an operation that are no views of its arguments."""
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        return [t if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known else None for t in tree_leaves(result)]

    def __exit__(self, *error):
        super().__exit__(*error)
        for _, args, kwargs, result in self.operations:
            for tensor in self.new(args, kwargs, result):
                if tensor is not None and tensor.is_floating_point():
                    tensor.data.fill_(math.nan)

    @torch.no_grad()
    def replay(self):
        for operation, args, kwargs, result in self.operations:
            for tensor, value in zip(self.new(args, kwargs, result), tree_leaves(operation(*args, **kwargs))):
                if tensor is not None:
                    tensor.data.copy_(value)


@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("half", [None, torch.bfloat16, torch.float16])
def test_a_recorded_step_is_the_step(tiny, monkeypatch, half, position, class_specific):
    """torch's own make_graphed_callables on acted-out graphs: nothing in a step waits, and replays learn the same to the bit."""
    monkeypatch.setattr(mini_coop, "half_precision", lambda device: half)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda.graphs, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", lambda tape, **_: tape)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda.graphs, "graph_pool_handle", lambda: None)
    features, labels = solvable()
    contexts = []
    for recorded in (False, True):
        coop = CoOp(tiny[0], ["cat", "a dog", "ox", "bird (animal)"], 4, class_specific, position)
        optimizer = torch.optim.SGD([coop.ctx], lr=0.1, momentum=0.9)
        with sdpa_kernel(SDPBackend.MATH):  # what CUDA takes where a fused kernel does not fit, and the most operations
            text_features = coop._recorded() if recorded else coop.text_features
            for _ in range(5):
                optimizer.zero_grad()
                F.cross_entropy(coop(features, text_features()), labels).backward()
                optimizer.step()
        contexts.append(coop.ctx.detach())
    assert torch.equal(*contexts) and not torch.equal(contexts[0], CoOp(tiny[0], coop.classnames, 4, class_specific, position).ctx)


def test_views_are_drawn_per_epoch(tiny):
    """Of two views one is poison for a class: training sees both, and (N, 1, E) is the same as (N, E)."""
    features, labels = solvable()
    one = CoOp(tiny[0], ["cat", "dog", "ox", "bird"], 2).fit(features, labels, epochs=3, progress=False)
    same = CoOp(tiny[0], ["cat", "dog", "ox", "bird"], 2)
    same.fit(features[:, None].expand(-1, 2, -1), labels, epochs=1, progress=False)
    other = CoOp(tiny[0], ["cat", "dog", "ox", "bird"], 2)
    other.fit(torch.stack([features, -features], 1), labels, epochs=3, progress=False)
    assert torch.isfinite(other.ctx).all() and not torch.allclose(one.ctx, other.ctx)
    assert len(same.history_["loss"]) == 1


def test_same_seed_same_context(tiny):
    features, labels = solvable()
    contexts = [CoOp(tiny[0], ["cat", "dog", "ox", "bird"], 4, seed=s).fit(features, labels, epochs=3, progress=False).ctx for s in (1, 1, 2)]
    assert torch.equal(contexts[0], contexts[1]) and not torch.equal(contexts[0], contexts[2])


def test_ctrl_c_keeps_what_is_learned(tiny, monkeypatch, capsys):
    def interrupt(epoch, epochs, lr):
        if epoch == 3:
            raise KeyboardInterrupt
        return 0.002
    monkeypatch.setattr(mini_coop, "learning_rate", interrupt)
    coop = CoOp(tiny[0], ["cat", "dog", "ox", "bird"], 2)
    start = coop.ctx.detach().clone()
    coop.fit(*solvable(), epochs=9, progress=False)
    assert len(coop.history_["loss"]) == 3 and not torch.equal(coop.ctx, start)
    assert "interrupted after 3 of 9 epochs" in capsys.readouterr().err and coop.interrupted_


def test_nearest_words_find_the_words_of_the_init(mini):
    for class_specific in (False, True):
        words = CoOp(mini[0], ["cat", "dog"], class_specific=class_specific, ctx_init="a photo of a").nearest_words(2)
        words = words[1] if class_specific else words
        assert [pairs[0][0] for pairs in words] == ["a", "photo", "of", "a"]
        assert all(pairs[0][1] < 1e-3 < pairs[1][1] for pairs in words)


def test_linear_probe_solves_and_searches():
    features, labels = solvable(n=12)
    classifier = linear_probe(features, labels, features[::3], labels[::3])
    assert classifier.score(features.numpy(), labels.numpy()) == 1.0 and 1e-8 < classifier.C < 1e8


def test_linear_probe_follows_the_validation_set(monkeypatch):
    """With an accuracy that peaks at C = 10 ** 0.6 the search must end near it."""
    import sklearn.linear_model

    class Fake:
        def __init__(self, C, max_iter):
            assert max_iter == 1000
            self.C = C

        def fit(self, x, y):
            return self

        def score(self, x, y):
            return -abs(math.log10(self.C) - 0.6)
    monkeypatch.setattr(sklearn.linear_model, "LogisticRegression", Fake)
    assert abs(math.log10(linear_probe(*[torch.zeros(2)] * 4).C) - 0.6) < 0.02


# ---------------------------------------------------------------- save and load

@pytest.mark.parametrize("class_specific", [False, True])
def test_save_and_load(tiny, tmp_path, class_specific):
    features, labels = solvable()
    coop = CoOp(tiny[0], ["cat", "dog", "ox", "bird"], 4, class_specific, "middle").fit(features, labels, epochs=2, progress=False)
    coop.save(tmp_path / "ctx.pt")
    again = CoOp.load(tmp_path / "ctx.pt", tiny[0])
    assert torch.equal(coop.predict_proba(features), again.predict_proba(features))
    assert (again.classnames, again.class_position, again.class_specific) == (coop.classnames, "middle", class_specific)
    assert os.listdir(tmp_path) == ["ctx.pt"] and (tmp_path / "ctx.pt").stat().st_size < 40_000
    if class_specific:
        with pytest.raises(ValueError, match="class-specific: it serves only the 4 classes"):
            CoOp.load(tmp_path / "ctx.pt", tiny[0], ["fox", "hen"])
    else:
        other = CoOp.load(tmp_path / "ctx.pt", tiny[0], ["fox", "hen"])
        assert torch.equal(other.ctx, coop.ctx) and other.predict(features).max() <= 1


def test_load_refuses_what_it_cannot_serve(tiny, mini, tmp_path):
    path = tmp_path / "ctx.pt"
    CoOp(tiny[0], ["cat", "dog"], 4).save(path)
    with pytest.raises(ValueError, match="another text encoder"):
        CoOp.load(path, mini[0])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="ctx.pt.*damaged"):
        CoOp.load(path, tiny[0])
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="ctx.pt.*damaged"):
        CoOp.load(path, tiny[0])
    for content in (b"\x80\x02.", b"\x80\x02M"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="ctx.pt.*damaged"):
            CoOp.load(path, tiny[0])
    other = copy.deepcopy(tiny[0])  # the same projection, another transformer
    other.transformer.resblocks[0].ln_1.bias.data += 1
    CoOp(other, ["cat", "dog"], 4).save(path)
    with pytest.raises(ValueError, match="another text encoder"):
        CoOp.load(path, tiny[0])
    state = torch.load(path, weights_only=True)
    for ctx in (None, torch.zeros(4), torch.full((4, 128), math.nan)):
        torch.save({**state, "ctx": ctx}, path)
        with pytest.raises(ValueError, match="ctx.pt.*damaged"):
            CoOp.load(path, other)
    torch.save({"epoch": 3}, path)
    with pytest.raises(ValueError, match="not written by CoOp.save"):
        CoOp.load(path, tiny[0])
    torch.save({"format": "mini-coop 1", "ctx": torch.zeros(4, 128)}, path)
    with pytest.raises(ValueError, match="ctx.pt.*KeyError"):
        CoOp.load(path, tiny[0])
    with pytest.raises(FileNotFoundError):
        CoOp.load(tmp_path / "none.pt", tiny[0])


class Malicious:
    def __reduce__(self):
        return (os.mkdir, ("pwned",))


def test_a_pickle_with_code_is_refused_and_not_run(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ctx.pt").write_bytes(pickle.dumps(Malicious()))
    torch.save({"format": "mini-coop 1", "ctx": Malicious()}, tmp_path / "zip.pt")
    for file in ("ctx.pt", "zip.pt"):
        with pytest.raises(ValueError, match="damaged"):
            CoOp.load(tmp_path / file, tiny[0])
        with pytest.raises(ValueError, match="no CLIP"):
            load_clip(tmp_path / file)
    assert not (tmp_path / "pwned").exists()


def test_a_failed_save_leaves_the_old_file(tiny, tmp_path, monkeypatch):
    coop, path = CoOp(tiny[0], ["cat", "dog"], 4), tmp_path / "ctx.pt"
    coop.save(path)
    whole = path.read_bytes()
    monkeypatch.setattr(mini_coop.torch, "save", lambda state, file: file.write(b"half") and (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        coop.save(path)
    assert path.read_bytes() == whole and os.listdir(tmp_path) == ["ctx.pt"]


def test_a_path_that_cannot_be_written(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        CoOp(tiny[0], ["cat", "dog"], 4).save(tmp_path / "none" / "ctx.pt")


# ---------------------------------------------------------------- checkpoints of CLIP

CLIPS = {"small resnet": (32, 64, (1, 1, 1, 1), 32, None, 77, 49408, 64, 1, 1), "small vit": (32, 64, 2, 64, 16, 77, 49408, 64, 1, 1),
         "RN50": (1024, 224, (3, 4, 6, 3), 64, None, 77, 49408, 512, 8, 12), "ViT-B/16": (512, 224, 12, 768, 16, 77, 49408, 512, 8, 12)}


@pytest.mark.parametrize("kind", CLIPS)
@pytest.mark.parametrize("archive", [False, True])
def test_load_clip_reads_state_dicts_and_torchscript(tmp_path, kind, archive):
    model = clip.model.CLIP(*CLIPS[kind]).eval()  # real shapes, random weights
    clip.model.convert_weights(model)
    path = tmp_path / "model.pt"
    if archive:  # as OpenAI ships its weights: a scripted module, whose state dict also holds three numbers
        class Holder(torch.nn.Module):
            def __init__(self):
                super().__init__()
                for name, value in (("input_resolution", CLIPS[kind][1]), ("context_length", 77), ("vocab_size", 49408)):
                    self.register_buffer(name, torch.tensor(value))

            def forward(self, x):
                return x
        holder = Holder()
        for name, child in model.named_children():
            holder.add_module(name, child)
        for name in ("positional_embedding", "text_projection", "logit_scale"):
            setattr(holder, name, getattr(model, name))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.save(torch.jit.trace(holder, torch.zeros(1), check_trace=False), path)
    else:
        torch.save(model.state_dict(), path)
    loaded, preprocess = load_clip(str(path), "cpu")
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in loaded.parameters()) and not loaded.training
    model = model.float()
    model.visual.to(memory_format=torch.channels_last)  # as load_clip does, for the same rounding
    pixels, text = torch.randn(2, 3, *CLIPS[kind][1:2] * 2), clip.tokenize(["a cat", "a dog in a tree"])
    with torch.no_grad():
        assert torch.equal(loaded.encode_image(pixels), model.encode_image(pixels)) and torch.equal(loaded.encode_text(text), model.encode_text(text))
    assert preprocess.transforms[0].size == CLIPS[kind][1]
    coop = CoOp(loaded, ["cat", "dog"], 2, seed=1)
    coop.fit(torch.randn(2, CLIPS[kind][0]), [0, 1], epochs=1, progress=False)  # trains on the text tower of that size
    assert coop.history_["loss"][0] > 0 and coop.ctx.isfinite().all()
    path.unlink()


def test_load_clip_keeps_fp32_weights_to_the_bit(tiny, tmp_path):
    torch.save(tiny[0].state_dict(), tmp_path / "fp32.pt")
    loaded = load_clip(tmp_path / "fp32.pt", "cpu")[0]
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in tiny[0].state_dict().items())


def test_load_clip_says_what_is_wrong(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="neither 'mini', nor one of RN50"):
        load_clip("RN51")
    (tmp_path / "cut.pt").write_bytes(mini_coop.DATA.joinpath("mini_clip.pt").read_bytes()[:100_000])
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    for file in ("cut.pt", "other.pt"):
        with pytest.raises(ValueError, match=f"{file} is no CLIP checkpoint"):
            load_clip(tmp_path / file)
    for device in ("cuda:99", "gpu", "meta0"):
        with pytest.raises(ValueError, match=f"device '{device}' cannot be used here"):
            load_clip("mini", device)

    def offline(*args, **kwargs):
        import urllib.error
        raise urllib.error.URLError("no network")
    monkeypatch.setattr(clip, "load", offline)
    with pytest.raises(RuntimeError, match=r"no network.*clip.ViT-L-14-336px.pt.*'mini', which needs no download"):
        load_clip("ViT-L/14@336px")


def test_weights_of_a_wrong_hash_are_refused(tmp_path, monkeypatch):
    import io
    import urllib.request
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip/RN50.pt").write_bytes(b"half a download")
    monkeypatch.setattr(mini_coop, "SHARED", tmp_path)

    class Answer(io.BytesIO):
        def info(self):
            return {"Content-Length": "5"}
    monkeypatch.setattr(urllib.request, "urlopen", lambda url: Answer(b"wrong"))
    with pytest.warns(UserWarning, match="SHA256"), pytest.raises(RuntimeError, match="SHA256.*RN50.pt .from https://.*'mini'"):
        load_clip("RN50", "cpu")


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("names, options, message", [
    ([], {}, "list of class names is empty"),
    ("cat", {}, "must be a list"),
    (["cat"], {}, "one class only"),
    (["cat", " _ "], {}, "class 1 has an empty name"),
    (["cat", "dog"], {"n_ctx": 0}, "n_ctx must be 1 or more, not 0"),
    (["cat", "dog"], {"n_ctx": 2.5}, "n_ctx must be 1 or more, not 2.5"),
    (["cat", "dog"], {"n_ctx": True}, "n_ctx must be 1 or more, not True"),
    (["cat", "dog"], {"class_position": "start"}, "'end', 'middle' or 'front', not 'start'"),
    (["cat", "very " * 70 + "long"], {}, "very long.' with 16 context vectors makes a prompt of 90 tokens, but CLIP reads 77"),
    (["cat", "dog"], {"ctx_init": "very " * 80}, "makes a prompt of 84 tokens"),
    (["cat", "dog"], {"ctx_init": " "}, "not 0: ctx_init has no words"),
])
def test_bad_classes_and_options(tiny, names, options, message):
    with pytest.raises(ValueError, match=message):
        CoOp(tiny[0], names, **options)


def test_classes_of_the_same_name_are_named(tiny):
    with pytest.warns(UserWarning, match="cannot be told apart.*sunglasses"):
        CoOp(tiny[0], ["sunglasses", "cat", "sunglasses"])


def test_a_split_is_no_list_of_images(tiny):
    with pytest.raises(ValueError, match="of a split of load_dataset take .images"):
        encode_images(*tiny, mini_coop.load_dataset("styles").test)


def test_names_of_a_loaded_context_are_a_list(tiny, tmp_path):
    CoOp(tiny[0], ["cat", "dog"], 2).save(tmp_path / "ctx.pt")
    with pytest.raises(ValueError, match="must be a list"):
        CoOp.load(tmp_path / "ctx.pt", tiny[0], "catdog")


def test_bad_templates(tiny):
    with pytest.raises(ValueError, match="has no {}"):
        zero_shot_weights(tiny[0], ["cat", "dog"], "a photo of a cat")
    with pytest.raises(ValueError, match="no template"):
        zero_shot_weights(tiny[0], ["cat", "dog"], [])
    with pytest.raises(ValueError, match="must be a list"):
        zero_shot_weights(tiny[0], "cat", "{}")
    with pytest.raises(ValueError, match="prompt of 83 tokens"):
        zero_shot_weights(tiny[0], ["cat", "dog"], "very " * 80 + "{}")


def with_(features, row, value):
    features = features.clone()
    features[row] = value
    return features


@pytest.mark.parametrize("change, message", [
    (lambda x, y: (x[:, :16], y), r"must be \(N, 32\).*not \(8, 16\)"),
    (lambda x, y: (x[0], y), r"must be \(N, 32\)"),
    (lambda x, y: (x[:0], y[:0]), r"must be \(N, 32\)"),
    (lambda x, y: (with_(x, 3, math.nan), y), "1 of 8 image features are NaN or infinite, first row 3"),
    (lambda x, y: (with_(x, 5, math.inf), y), "NaN or infinite, first row 5"),
    (lambda x, y: (x, with_(y, 2, 4)), "label 4 is outside of the 4 classes"),
    (lambda x, y: (x, with_(y, 2, -1)), "label -1 is outside"),
    (lambda x, y: (x, y[:5]), "must be 8 integers"),
    (lambda x, y: (x, y.float()), "must be 8 integers"),
    (lambda x, y: (x, None), "must be 8 integers"),
    (lambda x, y: (x, ["cat"] * 8), "must be 8 integers, the places of the classes"),
])
def test_bad_features_and_labels(tiny, change, message):
    coop, (features, labels) = CoOp(tiny[0], ["cat", "dog", "ox", "bird"], 2), solvable(n=2)
    start = coop.ctx.detach().clone()
    for call in (coop.fit, coop.score):
        with pytest.raises(ValueError, match=message):
            call(*change(features, labels))
    assert torch.equal(coop.ctx, start)


def test_zero_epochs_train_nothing_and_a_negative_number_is_refused(tiny):
    coop, (features, labels) = CoOp(tiny[0], iter(["cat", "dog", "ox", "bird"]), 2), solvable(n=2)
    start = coop.ctx.detach().clone()
    assert torch.equal(coop.fit(features, labels, epochs=0, progress=False).ctx, start) and coop.classnames[3] == "bird"
    for options in ({"epochs": -1}, {"batch_size": 0}, {"lr": -1.0}, {"lr": math.nan}, {"lr": math.inf}):
        with pytest.raises(ValueError, match="batch_size must be 1 or more, epochs and lr 0 or more"):
            coop.fit(features, labels, **options)
    with pytest.raises(ValueError, match=r"image features must be .*not \(8, 0, 32\)"):
        coop.fit(features[:, None][:, :0], labels)


def test_text_features_of_another_context(tiny):
    coop, other = (CoOp(tiny[0], ["cat", "dog"], 3, seed=seed) for seed in (0, 1))
    assert torch.equal(coop.text_features(other.ctx), other.text_features())
    features = solvable(n=2)[0]
    assert torch.equal(coop(features, other.text_features()), other(features))
    for wrong in (other.ctx[:2], other.ctx.expand(2, 3, -1)):
        with pytest.raises(ValueError, match="a context of shape .* instead of"):
            coop.text_features(wrong)


def test_a_method_of_ones_own(tiny, tmp_path):
    """A term of its own in the loss, and a parameter of its own in the logits: fit trains both."""
    class Variant(CoOp):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.shift = torch.nn.Parameter(torch.zeros(len(self.classnames)))
            self.seen = []

        def forward(self, image_features, text_features=None):
            return super().forward(image_features, text_features) + self.shift

        def loss(self, logits, labels, text_features):
            self.seen.append(text_features.shape)
            return super().loss(logits, labels, text_features) + 100 * self.shift.sum()

    coop = Variant(tiny[0], ["cat", "dog", "ox", "bird"], 2).fit(*solvable(n=2), epochs=3, progress=False)
    assert (coop.shift < -0.1).all() and coop.seen == [(4, 32)] * 3
    with pytest.raises(ValueError, match="save keeps ctx only"):
        coop.save(tmp_path / "variant.pt")
    assert not list(tmp_path.iterdir())


def test_fit_needs_no_gradients_switched_on(tiny):
    with torch.no_grad():
        coop = CoOp(tiny[0], ["cat", "dog", "ox", "bird"], 2).fit(*solvable(n=2), epochs=3, progress=False)
    assert coop.ctx.grad is None and torch.equal(coop.ctx, CoOp(tiny[0], coop.classnames, 2).fit(*solvable(n=2), epochs=3, progress=False).ctx)


def test_numpy_is_welcome(tiny):
    coop, (features, labels) = CoOp(tiny[0], ["cat", "dog", "ox", "bird"], 2), solvable(n=2)
    coop.fit(features.numpy(), labels.numpy().astype(np.int32), epochs=1, progress=False)
    assert coop.score(features.numpy(), labels.tolist()) == coop.score(features, labels)


# ---------------------------------------------------------------- CUDA

@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("class_specific", [False, True])
def test_cuda_and_cpu_agree(class_specific):
    results = []
    for device in ("cpu", "cuda"):
        model, preprocess = load_clip("mini", device)
        data = mini_coop.load_dataset("styles")
        chosen = mini_coop.few_shot(data.train.labels, 4, 1)
        features = encode_images(model, preprocess, [data.train.images[i] for i in chosen], progress=False)
        labels = torch.tensor(data.train.labels)[chosen]
        coop = CoOp(model, data.classnames, 8, class_specific).fit(features, labels, epochs=20, progress=False)
        assert coop.ctx.dtype == torch.float32 and coop.ctx.device.type == device
        results.append((features.cpu(), coop.predict_proba(features).cpu(), coop.history_["loss"][-1]))
    (cpu_features, cpu_p, cpu_loss), (cuda_features, cuda_p, cuda_loss) = results
    assert torch.allclose(cpu_features, cuda_features, atol=2e-3)
    assert abs(cpu_loss - cuda_loss) < 0.05 and (cpu_p.argmax(1) == cuda_p.argmax(1)).float().mean() > 0.9  # bf16 text side


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("class_specific", [False, True])
def test_a_recorded_step_is_the_step_on_cuda(monkeypatch, class_specific):
    model, moved = load_clip("mini", "cuda")[0], []
    features = torch.randn(40, model.text_projection.shape[1], generator=torch.Generator().manual_seed(0))
    for recorded in (True, True, False):
        if not recorded:
            monkeypatch.setattr(CoOp, "_recorded", lambda self: self.text_features)
        coop = CoOp(model, ["red cat", "red dog", "a blue cat", "blue dog"], 8, class_specific)
        start = coop.ctx.detach().clone()
        moved.append((coop.fit(features, torch.arange(40) % 4, epochs=20, lr=0.02, progress=False).ctx - start).flatten())
    assert all(F.cosine_similarity(m, moved[2], dim=0) > 0.99 for m in moved)
