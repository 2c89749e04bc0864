"""The prompt learner and its rivals against independent oracles: the 77-token way, zero-shot CLIP,
the recipe written by hand, closed forms."""
import copy
import io
import math

import clip
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

import mini_coop
from mini_coop import CoOp, encode_images, learning_rate, load_clip, zero_shot_weights
from reference import reference_features

NAMES = ["cat", "a_very_long_name of an outdoor apartment building with a swimming pool",
         "Bird (animal)", "T-shirt", "ox", "x-.."]
FOUR = ["cat", "dog", "ox", "bird"]


def solvable(E=32, K=4, n=8, seed=0):
    """Features (K n, E) around K directions, with labels: a task that any classifier can solve."""
    generator = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(K, E, generator=generator), dim=-1)
    labels = torch.arange(K).repeat_interleave(n)
    noise = torch.randn(K * n, E, generator=generator)
    return F.normalize(centres[labels] + 0.05 * noise, dim=-1), labels


# ---------------------------------------------------------------- the text side

@pytest.mark.parametrize("class_specific, class_position, ctx_init, row_tokens, part_tokens", [
    (False, "end", None, 500, 9999),  # one row
    (False, "end", "a photo of a", 16, 9999),  # several rows
    (False, "end", None, 8, 20),  # several Parts, which are computed again in the backward pass
    (False, "middle", None, 16, 9999),
    (False, "middle", "a big photo of a", 8, 20),  # an odd number of vectors
    (False, "front", None, 500, 9999),
    (True, "end", None, 500, 9999),
    (True, "middle", "a big photo of a", 500, 9999),
    (True, "front", None, 8, 20),
])
def test_equal_to_the_77_token_way(tiny, class_specific, class_position, ctx_init, row_tokens,
                                   part_tokens, monkeypatch):
    """Features and gradients to 1e-5 and 1e-4 of the largest."""
    pack = mini_coop.pack
    monkeypatch.setattr(mini_coop, "pack",
                        lambda model, prompts: pack(model, prompts, row_tokens, part_tokens))
    coop = CoOp(tiny[0], NAMES, 5, class_specific, class_position, ctx_init, seed=3)
    n_rows = sum(len(part.tokens) for part in coop.packed)
    assert (n_rows > 1) == (row_tokens < 500) and (len(coop.packed) > 1) == (part_tokens == 20)
    target = torch.randn(len(NAMES), 32, generator=torch.Generator().manual_seed(0))
    ours = coop.text_features()
    theirs = reference_features(coop)
    assert torch.allclose(ours, theirs, atol=1e-5)
    (our_gradient,) = torch.autograd.grad((ours * target).sum(), coop.ctx)
    (gradient,) = torch.autograd.grad((theirs * target).sum(), coop.ctx)
    assert torch.allclose(our_gradient, gradient, atol=1e-4 * gradient.abs().max().item(), rtol=0)


def plain_rows(prompts):
    """Lists of token ids -> a Part with one prompt per row, which sees a triangle."""
    tokens = pad_sequence([torch.tensor(ids) for ids in prompts], batch_first=True)  # (K, L)
    K, L = tokens.shape
    visible = torch.ones(K, L, L).tril().bool()
    ends = (tokens.flatten() == mini_coop.EOT).nonzero()[:, 0]
    return mini_coop.Part(tokens, torch.arange(L).expand(K, L), visible, ends)


def test_one_prompt_per_row_is_clips_own_encoder(tiny):
    texts = [name.replace("_", " ") for name in NAMES]
    part = plain_rows([[mini_coop.SOS, *mini_coop.token_ids(t), mini_coop.EOT] for t in texts])
    features = mini_coop.encode_rows(tiny[0], None, *part)
    assert torch.allclose(features, tiny[0].encode_text(clip.tokenize(texts)), atol=1e-5)
    # and with context vectors in the place of words
    coop = CoOp(tiny[0], NAMES, 3)
    v = [mini_coop.CONTEXT + i for i in range(3)]
    dotted = [mini_coop.token_ids(name + ".") for name in NAMES]
    part = plain_rows([[mini_coop.SOS, *v, *name, mini_coop.EOT] for name in dotted])
    features = mini_coop.encode_prompts(tiny[0], [part], coop.ctx)
    assert torch.allclose(features, reference_features(coop), atol=1e-5)


@pytest.mark.parametrize("class_position, class_specific, P", [
    ("end", False, 7), ("middle", False, 4), ("front", False, 1), ("end", True, 1)])
def test_the_trunk_is_written_once_in_each_row(tiny, class_position, class_specific, P):
    (part,) = CoOp(tiny[0], NAMES, 6, class_specific, class_position).packed
    n_tokens = P * len(part.tokens)
    for name in NAMES:
        n_tokens += 1 + 6 + len(mini_coop.token_ids(name + ".")) + 1 - P  # SOS, context, name, EOT
    padding = (part.position == 0) & (part.tokens != mini_coop.SOS)
    assert part.tokens.numel() - padding.sum() == n_tokens
    assert part.visible[:, P:, :P].all() and not part.visible.triu(1).any()


def test_another_default_dtype_or_precision_of_the_context(tiny):
    x = solvable()[0]
    expected = CoOp(tiny[0], FOUR, 4).predict_proba(x)
    torch.set_default_dtype(torch.float64)
    try:
        p = CoOp(tiny[0], FOUR, 4).fit(*solvable(), epochs=1).predict_proba(x)
        images = encode_images(*tiny, [Image.new("RGB", (70, 70))])
    finally:
        torch.set_default_dtype(torch.float32)
    assert p.dtype == images.dtype == torch.float32
    for coop in (CoOp(tiny[0], FOUR, 4).half(), CoOp(tiny[0], FOUR, 4).double()):
        assert torch.allclose(coop.predict_proba(x), expected, atol=0.01)


def test_the_reference_runs_in_half_precision(tiny):
    """As the published code on a card, whose token embedding stays in float32."""
    half = copy.deepcopy(tiny[0])
    clip.model.convert_weights(half)
    coop = CoOp(tiny[0], NAMES, 4)
    features = reference_features(coop, model=half)
    assert half.token_embedding.weight.dtype == torch.float32 != half.text_projection.dtype
    assert torch.allclose(features, reference_features(coop), atol=0.02)


@pytest.mark.parametrize("class_specific", [False, True])
def test_words_and_no_steps_are_zero_shot(mini, class_specific):
    names = ["umbrella", "trash_can", "light bulb", "T-shirt"]
    coop = CoOp(mini[0], names, class_specific=class_specific, ctx_init="a photo of a")
    weights = zero_shot_weights(mini[0], names, "a photo of a {}.")
    assert torch.allclose(coop.text_features(), weights, atol=1e-5)
    texts = [f"a photo of a {name.replace('_', ' ')}." for name in names]
    own = mini[0].encode_text(clip.tokenize(texts).to(weights.device))
    assert torch.allclose(weights, F.normalize(own, dim=-1), atol=1e-5)


def test_an_ensemble_of_prompts_that_share_words_of_the_names(tiny):
    """The trunk is whatever all prompts begin with; one prompt may begin another."""
    names = ["red cat", "red dog", "red"]
    total = 0
    for template in ("{}", "a {}"):
        own = tiny[0].encode_text(clip.tokenize([template.replace("{}", name) for name in names]))
        total = total + F.normalize(own, dim=-1)
    weights = zero_shot_weights(tiny[0], names, ["{}", "a {}"])
    assert torch.allclose(weights, F.normalize(total, dim=-1), atol=1e-5)


# ---------------------------------------------------------------- training

def test_a_solvable_task_is_solved_and_clip_is_untouched(tiny):
    before = copy.deepcopy(tiny[0].state_dict())
    features, labels = solvable()
    coop = CoOp(tiny[0], FOUR, class_specific=True)
    assert coop.fit(features, labels, lr=0.05) is coop
    assert coop.score(features, labels) == 1.0
    loss = coop.history_["loss"]
    assert loss[-1] < 0.3 * loss[0] and len(loss) == 200  # 8 shots: 200 epochs
    assert coop.history_["accuracy"][-1] == 1.0
    assert all(torch.equal(before[key], x) for key, x in tiny[0].state_dict().items())
    assert list(coop.state_dict()) == [name for name, _ in coop.named_parameters()] == ["ctx"]
    probabilities = coop.predict_proba(features)
    assert torch.allclose(probabilities.sum(1), torch.ones(32), atol=1e-5)
    assert torch.equal(coop.predict(features), labels)


@pytest.mark.parametrize("n, T", [(1, 50), (2, 100), (4, 100), (8, 200), (16, 200)])
def test_epochs_and_schedule(tiny, n, T):
    coop = CoOp(tiny[0], ["cat", "dog"], 1).fit(*solvable(K=2, n=n))
    rates = [0.001 * (1 + math.cos(math.pi * (epoch - 1) / T)) for epoch in range(1, T)]
    assert coop.history_["lr"] == [1e-5, *rates] and rates[0] == 0.002
    assert learning_rate(0, T, lr=0.0) == 0  # no epoch is faster than lr


def test_the_recipe_by_hand(tiny):
    """Two epochs with plain tensors: batches of 4 of 10, the short last one dropped, SGD with
    momentum and weight decay."""
    features = torch.randn(10, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(10) % 3
    coop = CoOp(tiny[0], ["cat", "dog", "ox"], 3, seed=5)
    coop.ctx.data *= 50  # so large that the weight decay shows: without it ctx is off by 9e-3
    ctx = coop.ctx.detach().clone()
    velocity = 0
    coop.fit(features, labels, epochs=2, lr=1.0, batch_size=4)
    other = CoOp(tiny[0], ["cat", "dog", "ox"], 3)
    generator = torch.Generator().manual_seed(5)
    for lr in (1e-5, 1.0):
        order = torch.randperm(10, generator=generator)
        for batch in (order[:4], order[4:8]):
            other.ctx.data = ctx
            loss = F.cross_entropy(other(features[batch]), labels[batch])
            (gradient,) = torch.autograd.grad(loss, other.ctx)
            velocity = 0.9 * velocity + gradient + 5e-4 * ctx
            ctx = ctx - lr * velocity
    assert torch.allclose(coop.ctx, ctx, atol=1e-4, rtol=0)  # rounding: 3e-7


def test_each_epoch_takes_a_random_view(tiny):
    """Of two views one is poison, the first or the last: training sees both."""
    features, labels = solvable()
    one = CoOp(tiny[0], FOUR, 2).fit(features, labels, epochs=3)
    for views in ([features, -features], [-features, features]):
        other = CoOp(tiny[0], FOUR, 2)
        other.fit(torch.stack(views, 1), labels, epochs=3)
        assert torch.isfinite(other.ctx).all() and not torch.allclose(one.ctx, other.ctx)


def test_numpy_and_lists_are_welcome(tiny):
    features, labels = solvable(n=2)
    coop = CoOp(tiny[0], np.array(FOUR), np.int64(2), seed=np.int32(1))
    coop.fit(features.numpy(), labels.numpy().astype(np.uint8), epochs=1)
    assert coop.score(features.numpy(), labels.tolist()) == coop.score(features, labels)


def test_a_method_of_your_own(tiny, tmp_path):
    """A term of its own in the loss, a parameter in the logits, an argument: fit trains both,
    `load` passes the argument on."""

    class Variant(CoOp):
        def __init__(self, *args, weight, **options):
            super().__init__(*args, **options)
            self.weight = weight
            self.shift = torch.nn.Parameter(torch.zeros(len(self.classnames)))
            self.seen = []

        def forward(self, image_features, text_features=None):
            return super().forward(image_features, text_features) + self.shift

        def loss(self, logits, labels, text_features):
            self.seen.append(text_features.shape)
            return super().loss(logits, labels, text_features) + self.weight * self.shift.sum()

    coop = Variant(tiny[0], FOUR, 2, weight=100).fit(*solvable(n=2), epochs=3)
    assert (coop.shift < -0.1).all() and coop.seen == [(4, 32)] * 3
    coop.save(tmp_path / "variant.pt")
    with pytest.raises(TypeError, match="multiple values"):  # what the file says holds
        Variant.load(tmp_path / "variant.pt", tiny[0], weight=5, seed=9)
    again = Variant.load(tmp_path / "variant.pt", tiny[0], weight=5)
    assert torch.equal(again.shift, coop.shift) and again.weight == 5


def test_layers_that_a_subclass_added_are_in_eval_mode_but_in_fit(tiny):
    modes = []

    class Dropped(CoOp):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.dropout = torch.nn.Dropout(0.5)

        def forward(self, image_features, text_features=None):
            modes.append((self.training, self.dropout.training))
            return super().forward(self.dropout(image_features), text_features)

    coop = Dropped(tiny[0], FOUR, 2)
    x, y = solvable(n=2)
    assert not coop.training and torch.equal(coop.predict_proba(x), coop.predict_proba(x))
    optimizer = torch.optim.SGD(coop.parameters(), lr=0.01)
    optimizer.register_step_post_hook(lambda *_: coop.score(x, y))  # a score amid training
    coop.fit(x, y, epochs=2, optimizer=optimizer)
    assert modes == [(False, False)] * 2 + [(True, True), (False, False)] * 2
    assert not coop.training and not coop.dropout.training


def test_an_optimizer_of_your_own(tiny):
    """Its rates follow the schedule from its own lr, and again in a second fit."""
    x, y = solvable(n=2)
    plain = CoOp(tiny[0], FOUR, 2).fit(x, y, epochs=4, lr=0.01)
    coop = CoOp(tiny[0], FOUR, 2)
    sgd = torch.optim.SGD(coop.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    assert torch.equal(coop.fit(x, y, epochs=4, optimizer=sgd).ctx, plain.ctx)
    coop.fit(x, y, epochs=4, optimizer=sgd)
    assert coop.history_["lr"] == plain.history_["lr"] and plain.history_["lr"][1] == 0.01
    with pytest.raises(ValueError, match="of other parameters"):
        CoOp(tiny[0], FOUR, 2).fit(x, y, optimizer=sgd)
    adam = torch.optim.Adam(coop.parameters(), lr=0.01)
    assert not torch.equal(coop.fit(x, y, epochs=4, optimizer=adam).ctx, plain.ctx)


@pytest.mark.parametrize("progress, terminal, shown", [
    (None, True, True), (None, False, False), (True, False, True), (False, True, False)])
def test_progress_bars_are_shown_in_a_terminal(tiny, progress, terminal, shown, monkeypatch):
    class Screen(io.StringIO):
        def isatty(self):
            return terminal

    monkeypatch.setattr("sys.stderr", screen := Screen())
    CoOp(tiny[0], FOUR, 2).fit(*solvable(n=1), epochs=1, progress=progress)
    encode_images(*tiny, [Image.new("RGB", (70, 70))], progress=progress)
    assert ("context" in screen.getvalue()) == ("images" in screen.getvalue()) == shown


def test_text_features_of_another_context(tiny):
    coop, other = (CoOp(tiny[0], ["cat", "dog"], 3, seed=seed) for seed in (0, 1))
    assert not torch.equal(coop.ctx, other.ctx)
    assert torch.equal(coop.text_features(other.ctx), other.text_features())
    with pytest.raises(ValueError, match="shape"):
        coop.text_features(other.ctx.expand(2, 3, -1))


# ---------------------------------------------------------------- the linear probe

def test_the_linear_probe_follows_the_validation_set(monkeypatch):
    """With an accuracy that peaks at C = 10 ** 0.6 the search must end near it."""

    class Fake:
        def __init__(self, C, max_iter):
            assert max_iter == 1000
            self.C = C

        def fit(self, x, y):
            return self

        def score(self, x, y):
            return -abs(math.log10(self.C) - 0.6)

    monkeypatch.setattr(mini_coop, "LogisticRegression", Fake)
    assert abs(math.log10(mini_coop.linear_probe(*[torch.zeros(2)] * 4).C) - 0.6) < 0.02


# ---------------------------------------------------------------- save and load

@pytest.mark.parametrize("class_specific", [False, True])
def test_save_and_load(tiny, tmp_path, class_specific):
    features, labels = solvable()
    coop = CoOp(tiny[0], FOUR, 4, class_specific, "middle", seed=7)
    coop.fit(features, labels, epochs=2).save(tmp_path / "ctx.pt")
    again = CoOp.load(tmp_path / "ctx.pt", tiny[0])
    assert torch.equal(coop.predict_proba(features), again.predict_proba(features))
    assert (again.classnames, again.seed) == (FOUR, 7)
    assert (tmp_path / "ctx.pt").stat().st_size < 40_000
    if class_specific:
        for names in (["fox", "hen"], FOUR[::-1]):
            with pytest.raises(ValueError, match="class-specific"):
                CoOp.load(tmp_path / "ctx.pt", tiny[0], names)
    else:
        other = CoOp.load(tmp_path / "ctx.pt", tiny[0], ["fox", "hen"])
        new = CoOp(tiny[0], ["fox", "hen"], 4, class_position="middle")
        new.load_state_dict(coop.state_dict())
        assert torch.equal(new.text_features(), other.text_features())
        assert torch.equal(other.ctx, coop.ctx) and other.predict(features).max() <= 1
        with pytest.raises(ValueError, match="list of texts"):
            CoOp.load(tmp_path / "ctx.pt", tiny[0], "foxhen")


def test_load_refuses_what_it_cannot_serve(tiny, mini, tmp_path):
    CoOp(tiny[0], FOUR, 4).save(tmp_path / "ctx.pt")
    other = copy.deepcopy(tiny[0])  # the same projection, another transformer
    other.transformer.resblocks[0].ln_1.bias.data += 1
    for model in (mini[0], other):
        with pytest.raises(ValueError, match="another CLIP"):
            CoOp.load(tmp_path / "ctx.pt", model)
    with pytest.raises(FileNotFoundError):
        CoOp.load(tmp_path / "gone.pt", tiny[0])
    torch.save({"epoch": 3}, tmp_path / "program.pt")
    with pytest.raises(ValueError, match="not written by CoOp.save"):
        CoOp.load(tmp_path / "program.pt", tiny[0])


# ---------------------------------------------------------------- what would pass silently

@pytest.mark.parametrize("names, options, message", [
    ("light bulb", {}, "found 'light bulb'"),
    ({"cat", "dog"}, {}, "list of texts"),
    (["cat", None], {}, "list of texts"),
    (["cat"], {}, "two classes"),
    (["cat", "caf\udce9"], {}, "list of texts; found .*caf"),  # bytes of another coding
    (["cat", "dog"], {"n_ctx": 0}, "one vector or more"),
    (["cat", "dog"], {"n_ctx": "a photo of a"}, "one vector or more, not 2 and 'a photo of a'"),
    (["cat", "dog"], {"ctx_init": ["a", "photo"]}, "no place for a name"),
    (["cat", "dog"], {"ctx_init": ""}, "ctx_init is words"),
    (["cat", "dog", ""], {}, "found .''"),
    (["cat", "dog"], {"ctx_init": "a photo of a [CLASS]."}, "no place for a name"),
    (["cat", "dog"], {"class_specific": "no"}, "not 'no'"),
    (["cat", "dog"], {"class_position": "start"}, "not .* 'start'"),
    (["cat", "very " * 70 + "long"], {}, "very very .*90 tokens, but CLIP reads 77"),
])
def test_wrong_names_and_options(tiny, names, options, message):
    with pytest.raises(ValueError, match=message):
        CoOp(tiny[0], names, **options)


def test_no_template_at_all(tiny):
    with pytest.raises(ValueError, match=r"templates hold {} .* not \[\]"):
        zero_shot_weights(tiny[0], FOUR, [])


def test_names_that_clip_cannot_tell_apart(tiny):
    for call in (CoOp, lambda model, names: zero_shot_weights(model, names, "{}")):
        with pytest.warns(UserWarning, match="told apart.*'Crane', 'crane '") as caught:
            call(tiny[0], ["Crane", "dog", "crane "])
        assert caught[0].filename == __file__


NAN = torch.full((8, 32), math.nan)


@pytest.mark.parametrize("change, message", [
    (lambda x, y: (x[:, :16], y), r"\(N, 32\).*not Tensor \(8, 16\)"),
    (lambda x, y: (x[0], y), r"\(N, 32\)"),
    (lambda x, y: (NAN, y), "all finite"),
    (lambda x, y: (x[:0], y[:0]), "not empty"),
    (lambda x, y: (["a.png"] * 8, y), "one tensor or array .*not list"),
    (lambda x, y: (list(x), y), "one tensor or array .*not list"),
    (lambda x, y: (x, torch.where(y == 2, 4, y)), "label 4 is outside 0 to 3"),
    (lambda x, y: (x, y - 1), "label -1 is outside"),
    (lambda x, y: (x, y[:5]), "8 integers"),
    (lambda x, y: (x, y.float()), "8 integers"),
    (lambda x, y: (x, y > 1), "8 integers"),
    (lambda x, y: (x, ["cat"] * 8), "8 integers"),
])
def test_wrong_features_and_labels(tiny, change, message):
    coop = CoOp(tiny[0], FOUR, 2)
    for call in (coop.fit, coop.score):
        with pytest.raises(ValueError, match=message):
            call(*change(*solvable(n=2)))


def test_a_clip_that_is_not_as_load_clip_gives_it(tiny):
    for wrong in (copy.deepcopy(tiny[0]).half(), tiny):
        for call in (CoOp, lambda model, names: zero_shot_weights(model, names, "{}"),
                     lambda model, names: encode_images(model, tiny[1], ["a.png"])):
            with pytest.raises(ValueError, match=r"a CLIP in float32 is needed.*load_clip\(\)"):
                call(wrong, FOUR)


def test_a_wrong_number_of_epochs_or_images_per_batch(tiny):
    for options in ({"epochs": -1}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="epochs from 0 and a batch_size from 1"):
            CoOp(tiny[0], FOUR, 2).fit(*solvable(n=2), **options)


def test_a_training_that_diverges(tiny):
    with pytest.raises(RuntimeError, match="diverged"):
        CoOp(tiny[0], FOUR, 2).fit(*solvable(n=2), lr=1e30, epochs=9)


# ---------------------------------------------------------------- CUDA

@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("class_specific", [False, True])
def test_cuda_and_cpu_agree(class_specific):
    results = []
    few = mini_coop.few_shot(mini_coop.load_dataset("styles"), 4, 1)
    for device in ("cpu", None):  # None: CUDA, where there is one
        model, preprocess = load_clip("mini", device)
        x = encode_images(model, preprocess, few.train.images)
        coop = CoOp(model, few.classnames, 8, class_specific)
        coop.fit(x, few.train.labels, epochs=20)
        assert coop.ctx.dtype == torch.float32 and coop.ctx.device.type == (device or "cuda")
        results.append((x.cpu(), coop.predict(x).cpu(), coop.history_["loss"][-1]))
    (cpu_x, cpu_predicted, cpu_loss), (x, predicted, loss) = results
    assert torch.allclose(F.normalize(cpu_x), F.normalize(x), atol=1e-4)  # float32 on both
    assert abs(cpu_loss - loss) < 0.01
    assert (cpu_predicted == predicted).float().mean() > 0.95
