"""The prompt learner against independent oracles.

The 77-token way, zero-shot CLIP, closed forms.
"""

import copy
import math
import os
import threading

import clip
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import mini_coop
from conftest import solvable
from mini_coop import CoOp, encode_images, learning_rate, load_clip, zero_shot_weights
from reference import reference_features

NAMES = ["cat", "a_very_long_name of an outdoor apartment building with a swimming pool",
         "Bird (animal)", "T-shirt", "ox", "x-.."]


# one row; several rows; several parts, which are computed again in the backward pass
@pytest.mark.parametrize("part, row", [(9999, 500), (9999, 16), (60, 8)])
@pytest.mark.parametrize("ctx_init", [None, "a photo of a"])
@pytest.mark.parametrize("n_ctx", [4, 5])
@pytest.mark.parametrize("class_position", ["end", "middle", "front"])
@pytest.mark.parametrize("class_specific", [False, True])
def test_equal_to_the_77_token_way(
    tiny, class_specific, class_position, n_ctx, ctx_init, part, row, monkeypatch
):
    """Features and gradients, in every configuration, to 1e-4 of the largest."""
    pack = mini_coop.pack
    monkeypatch.setattr(mini_coop, "pack", lambda prompts, on: pack(prompts, on, row, part))
    again = []

    def counted(*args, **options):
        again.append(1)
        return checkpoint(*args, **options)

    monkeypatch.setattr(mini_coop, "checkpoint", counted)
    init = ctx_init if n_ctx == 4 or not ctx_init else ctx_init + " big"  # even and odd M for words
    coop = CoOp(tiny[0], NAMES, n_ctx, class_specific, class_position, init, seed=3)
    shape = (len(NAMES), n_ctx, 128) if class_specific else (n_ctx, 128)
    assert coop.n_ctx == n_ctx and coop.ctx.shape == shape
    parts, _ = coop.packed
    assert (len(parts) > 1) == (part == 60)
    assert (len(parts[0][0]) > 1) == (row < 500)
    target = torch.randn(len(NAMES), 32, generator=torch.Generator().manual_seed(0))
    ours = coop.text_features()
    theirs = reference_features(coop)
    assert torch.allclose(ours, theirs, atol=1e-4 * theirs.abs().max().item(), rtol=0)
    (ours_gradient,) = torch.autograd.grad((ours * target).sum(), coop.ctx)
    (gradient,) = torch.autograd.grad((theirs * target).sum(), coop.ctx)
    assert gradient.abs().max() > 0 and bool(again) == (part == 60)
    assert torch.allclose(ours_gradient, gradient, atol=1e-4 * gradient.abs().max().item(), rtol=0)


def test_the_trunk_is_shared_and_the_eot_is_last(tiny):
    """SOS and what of the context stands before all names is written once per row."""
    for position, class_specific, P in [
        ("end", False, 7),
        ("middle", False, 4),
        ("front", False, 1),
        ("end", True, 1),
    ]:
        coop = CoOp(tiny[0], NAMES, 6, class_specific, position)
        ((tokens, positions, visible, eot),), order = coop.packed
        assert (positions == 0).sum() == len(tokens) + (tokens == 0).sum()  # one SOS in each row
        assert visible[0, 0, :, :P].tril().sum() == visible[0, 0, :, :P].sum()
        assert visible[0, 0, P:, :P].all() and (tokens.flatten()[eot] == mini_coop.EOT).all()
        lengths = [
            1 + 6 + len(mini_coop._tokenizer.encode(n.replace("_", " ") + ".")) for n in NAMES
        ]
        ends = positions.flatten()[eot][order]  # EOT is the last of each prompt
        assert ends.tolist() == lengths


def test_prompts_that_share_more_and_prompts_that_are_the_same(tiny):
    """The trunk is whatever all prompts begin with, here also words of the names."""
    names = ["red cat", "red dog", "red"]
    weights = zero_shot_weights(tiny[0], names, "a {}")
    tokens = clip.tokenize([f"a {name}" for name in names])
    own = F.normalize(tiny[0].encode_text(tokens), dim=-1)
    assert torch.allclose(weights, own, atol=1e-5)
    assert torch.allclose(
        zero_shot_weights(tiny[0], ["cat"], "a {}"),
        F.normalize(tiny[0].encode_text(clip.tokenize(["a cat"])), dim=-1),
        atol=1e-5,
    )
    with pytest.warns(UserWarning, match="cannot be told apart"):
        same = zero_shot_weights(tiny[0], ["cat", "cat"], "a {}")
    assert torch.allclose(same[0], same[1])


@pytest.mark.parametrize("class_specific", [False, True])
def test_words_and_no_steps_are_zero_shot(mini, class_specific):
    names = ["umbrella", "trash_can", "light bulb", "T-shirt"]
    coop = CoOp(mini[0], names, class_specific=class_specific, ctx_init="a photo of a")
    weights = zero_shot_weights(mini[0], names, "a photo of a {}.")
    assert torch.allclose(coop.text_features(), weights, atol=1e-5)
    own = F.normalize(
        mini[0].encode_text(clip.tokenize([f"a photo of a {n.replace('_', ' ')}." for n in names])),
        dim=-1,
    )
    assert torch.allclose(weights, own, atol=1e-5)  # and CLIP's own encoder says the same


def test_an_ensemble_is_the_normalised_mean(mini):
    both = [zero_shot_weights(mini[0], ["cat", "dog"], t) for t in ("{}", "a photo of a {}.")]
    assert torch.allclose(
        zero_shot_weights(mini[0], ["cat", "dog"], ["{}", "a photo of a {}."]),
        F.normalize(sum(both), dim=-1),
        atol=1e-6,
    )


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
    assert probabilities.shape == (32, 4)
    assert torch.allclose(probabilities.sum(1), torch.ones(32), atol=1e-5)
    assert torch.equal(coop.predict(features), labels)


def test_schedule_of_every_epoch(tiny):
    features, labels = solvable(n=1)
    coop = CoOp(tiny[0], ["cat", "dog", "ox", "bird"], n_ctx=2).fit(
        features, labels, progress=False
    )
    T = 50  # 1 shot
    assert coop.history_["lr"] == [1e-5] + [
        0.001 * (1 + math.cos(math.pi * (e - 1) / T)) for e in range(1, T)
    ]
    assert learning_rate(1, 200) == 0.002


@pytest.mark.parametrize("n, epochs", [(1, 50), (2, 100), (4, 100), (8, 200), (16, 200)])
def test_epochs_by_shots(tiny, n, epochs, monkeypatch):
    def stop(epoch, T, lr):
        raise KeyboardInterrupt

    seen = []
    monkeypatch.setattr(mini_coop, "learning_rate", stop)
    monkeypatch.setattr(mini_coop, "tqdm", lambda steps, **_: seen.append(len(steps)) or steps)
    CoOp(tiny[0], ["cat", "dog"], 1).fit(*solvable(K=2, n=n), progress=False)
    assert seen == [epochs]


def test_the_recipe_by_hand(tiny):
    """Two epochs rebuilt with plain torch.

    Batches of 4 of 10, the short last one dropped; SGD with momentum and weight decay.
    """
    features = torch.randn(10, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(10) % 3
    coop = CoOp(tiny[0], ["cat", "dog", "ox"], 3, seed=5)
    # Vectors and a learning rate so large that the weight decay shows: leaving it out moves ctx by
    # 9e-3.
    coop.ctx.data *= 50
    ctx = coop.ctx.detach().clone()
    velocity = 0
    coop.fit(features, labels, epochs=2, lr=1.0, batch_size=4, progress=False)
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


def test_views_are_drawn_per_epoch(tiny):
    """Of two views one is poison, the first or the last: training sees both."""
    features, labels = solvable()
    one = CoOp(tiny[0], ["cat", "dog", "ox", "bird"], 2).fit(
        features, labels, epochs=3, progress=False
    )
    same = CoOp(tiny[0], ["cat", "dog", "ox", "bird"], 2)
    same.fit(features[:, None].expand(-1, 2, -1), labels, epochs=1, progress=False)
    assert len(same.history_["loss"]) == 1
    for poisoned in (0, 1):
        views = [features, features]
        views[poisoned] = -features
        other = CoOp(tiny[0], ["cat", "dog", "ox", "bird"], 2)
        other.fit(torch.stack(views, 1), labels, epochs=3, progress=False)
        assert torch.isfinite(other.ctx).all() and not torch.allclose(one.ctx, other.ctx)


def test_same_seed_same_context(tiny):
    features, labels = solvable()
    contexts = []
    for seed in (1, 1, 2):
        coop = CoOp(tiny[0], ["cat", "dog", "ox", "bird"], 4, seed=seed)
        contexts.append(coop.fit(features, labels, epochs=3, progress=False).ctx)
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
        coop = CoOp(mini[0], ["cat", "dog"], class_specific=class_specific, ctx_init="a photo of a")
        words = coop.nearest_words(2)
        words = words[1] if class_specific else words
        assert [pairs[0][0] for pairs in words] == ["a", "photo", "of", "a"]
        assert all(pairs[0][1] < 1e-3 < pairs[1][1] for pairs in words)


# ---------------------------------------------------------------- save and load


@pytest.mark.parametrize("class_specific", [False, True])
def test_save_and_load(tiny, tmp_path, class_specific):
    features, labels = solvable()
    coop = CoOp(tiny[0], ["cat", "dog", "ox", "bird"], 4, class_specific, "middle")
    coop.fit(features, labels, epochs=2, progress=False)
    coop.save(tmp_path / "ctx.pt")
    again = CoOp.load(tmp_path / "ctx.pt", tiny[0])
    assert torch.equal(coop.predict_proba(features), again.predict_proba(features))
    assert again.classnames == coop.classnames
    assert again.class_position == "middle"
    assert again.class_specific == class_specific
    assert os.listdir(tmp_path) == ["ctx.pt"] and (tmp_path / "ctx.pt").stat().st_size < 40_000
    if class_specific:
        with pytest.raises(ValueError, match="class-specific: it serves only the 4 classes"):
            CoOp.load(tmp_path / "ctx.pt", tiny[0], ["fox", "hen"])
    else:
        other = CoOp.load(tmp_path / "ctx.pt", tiny[0], ["fox", "hen"])
        assert torch.equal(other.ctx, coop.ctx) and other.predict(features).max() <= 1


def test_a_class_specific_context_wants_its_classes_in_this_order(tiny, tmp_path):
    CoOp(tiny[0], ["cat", "dog"], 2, class_specific=True).save(tmp_path / "ctx.pt")
    assert CoOp.load(tmp_path / "ctx.pt", tiny[0], ["cat", "dog"]).class_specific
    with pytest.raises(ValueError, match="learned for, in this order"):
        CoOp.load(tmp_path / "ctx.pt", tiny[0], ["dog", "cat"])


def test_two_threads_save_without_disturbing_each_other(tiny, tmp_path):
    coops = [CoOp(tiny[0], ["cat", "dog"], 2, seed=seed) for seed in range(8)]
    threads = [threading.Thread(target=coop.save, args=(tmp_path / "ctx.pt",)) for coop in coops]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = CoOp.load(tmp_path / "ctx.pt", tiny[0])  # whole, whichever came last
    assert any(torch.equal(found.ctx, coop.ctx) for coop in coops)
    assert os.listdir(tmp_path) == ["ctx.pt"]


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
    with pytest.raises(ValueError, match="ctx.pt was not written by CoOp.save"):
        CoOp.load(path, tiny[0])
    torch.save({"format": "mini-coop 1", "ctx": torch.zeros(4, 128)}, path)
    with pytest.raises(ValueError, match="ctx.pt was not written by CoOp.save, or is damaged"):
        CoOp.load(path, tiny[0])
    with pytest.raises(FileNotFoundError):
        CoOp.load(tmp_path / "none.pt", tiny[0])


def test_a_failed_save_leaves_the_old_file(tiny, tmp_path, monkeypatch):
    coop = CoOp(tiny[0], ["cat", "dog"], 4)
    path = tmp_path / "ctx.pt"
    coop.save(path)
    whole = path.read_bytes()

    def disk_full(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(mini_coop.torch, "save", disk_full)
    with pytest.raises(OSError, match="disk full"):
        coop.save(path)
    assert path.read_bytes() == whole and os.listdir(tmp_path) == ["ctx.pt"]


def test_a_path_that_cannot_be_written(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        CoOp(tiny[0], ["cat", "dog"], 4).save(tmp_path / "none" / "ctx.pt")


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "names, options, message",
    [
        ([], {}, "list of class names is empty"),
        ("cat", {}, "must be a list"),
        (["cat"], {}, "one class only"),
        (["cat", " _ "], {}, "class 1 has an empty name"),
        (["cat", "dog"], {"n_ctx": 0}, "n_ctx must be a whole number of 1 or more, not 0"),
        (["cat", "dog"], {"n_ctx": 2.5}, "n_ctx must be a whole number of 1 or more, not 2.5"),
        (["cat", "dog"], {"n_ctx": True}, "n_ctx must be a whole number of 1 or more, not True"),
        (["cat", "dog"], {"class_position": "start"}, "'end', 'middle' or 'front', not 'start'"),
        (
            ["cat", "very " * 70 + "long"],
            {},
            "very long' makes a prompt of 90 tokens, but CLIP reads 77",
        ),
        (["cat", "dog"], {"ctx_init": "very " * 80}, "makes a prompt of 82 tokens"),
        (["cat", "dog"], {"ctx_init": " "}, "ctx_init has no words"),
    ],
)
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


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x, y: (x[:, :16], y), r"must be \(N, 32\).*not \(8, 16\)"),
        (lambda x, y: (x[0], y), r"must be \(N, 32\)"),
        (lambda x, y: (x[:0], y[:0]), r"must be \(N, 32\)"),
        (
            lambda x, y: (with_(x, 3, math.nan), y),
            "1 of 8 image features are NaN or infinite, first row 3",
        ),
        (lambda x, y: (with_(x, 5, math.inf), y), "NaN or infinite, first row 5"),
        (lambda x, y: (x, with_(y, 2, 4)), "label 4 is outside of the 4 classes"),
        (lambda x, y: (x, with_(y, 2, -1)), "label -1 is outside"),
        (lambda x, y: (x, y[:5]), "must be 8 integers"),
        (lambda x, y: (x, y.float()), "must be 8 integers"),
        (lambda x, y: (x, None), "must be 8 integers"),
        (lambda x, y: (x, ["cat"] * 8), "must be 8 integers, the places of the classes.*not <U3"),
    ],
)
def test_bad_features_and_labels(tiny, change, message):
    features, labels = solvable(n=2)
    coop = CoOp(tiny[0], ["cat", "dog", "ox", "bird"], 2)
    start = coop.ctx.detach().clone()
    for call in (coop.fit, coop.score):
        with pytest.raises(ValueError, match=message):
            call(*change(features, labels))
    assert torch.equal(coop.ctx, start)


def test_zero_epochs_train_nothing_and_a_negative_number_is_refused(tiny):
    features, labels = solvable(n=2)
    coop = CoOp(tiny[0], iter(["cat", "dog", "ox", "bird"]), 2)
    start = coop.ctx.detach().clone()
    assert torch.equal(coop.fit(features, labels, epochs=0, progress=False).ctx, start)
    assert coop.classnames[3] == "bird"
    for name, value, least in (("epochs", -1, 0), ("batch_size", 0, 1)):
        with pytest.raises(ValueError, match=f"{name} must be a whole number of {least} or more"):
            coop.fit(features, labels, **{name: value})
    for lr in (-1.0, math.nan, math.inf, "0.1", True):
        with pytest.raises(ValueError, match="lr must be a number of 0 or more"):
            coop.fit(features, labels, lr=lr)
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

    coop = Variant(tiny[0], ["cat", "dog", "ox", "bird"], 2)
    coop.fit(*solvable(n=2), epochs=3, progress=False)
    assert (coop.shift < -0.1).all() and coop.seen == [(4, 32)] * 3
    with pytest.raises(ValueError, match="save keeps ctx only"):
        coop.save(tmp_path / "variant.pt")
    assert not list(tmp_path.iterdir())


def test_fit_needs_no_gradients_switched_on(tiny):
    coop = CoOp(tiny[0], ["cat", "dog", "ox", "bird"], 2)
    with torch.no_grad():
        coop.fit(*solvable(n=2), epochs=3, progress=False)
    assert coop.ctx.grad is None
    other = CoOp(tiny[0], coop.classnames, 2).fit(*solvable(n=2), epochs=3, progress=False)
    assert torch.equal(coop.ctx, other.ctx)


def test_numpy_is_welcome(tiny):
    features, labels = solvable(n=2)
    coop = CoOp(tiny[0], ["cat", "dog", "ox", "bird"], 2)
    coop.fit(features.numpy(), labels.numpy().astype(np.int32), epochs=1, progress=False)
    assert coop.score(features.numpy(), labels.tolist()) == coop.score(features, labels)


# ---------------------------------------------------------------- names, numbers, modes

@pytest.mark.parametrize("names, options, message", [
    ({"cat", "dog"}, {}, "must be a list of texts, not a set"),
    ([b"cat", "dog"], {}, "class 0 must be a text, not b'cat'"),
    (["cat", None], {}, "class 1 must be a text, not None"),
    ([["cat"], ["dog"]], {}, "class 0 must be a text"),
    (["cat", "<|endoftext|>"], {}, "own marks of start and end"),
    (["cat", "dog"], {"class_specific": "no"}, "class_specific is a bool, not 'no'"),
    (["cat", "dog"], {"ctx_init": "a photo of a {}."}, "not a template: pass 'a photo of a'"),
    (["cat", "dog"], {"ctx_init": 4}, "ctx_init must be a text, not 4"),
    (["cat", "dog"], {"n_ctx": "4"}, "n_ctx must be a whole number of 1 or more, not '4'"),
    (["cat", "dog"], {"seed": None}, "seed must be a whole number of 0 or more, not None"),
    (["cat", "dog"], {"seed": -1}, "seed must be a whole number of 0 or more, not -1"),
    (["cat", "dog"], {"seed": 2**64}, "seed must be a whole number"),
    (["cat", "dog"], {"seed": 1.0}, "seed must be a whole number of 0 or more, not 1.0"),
])
def test_names_and_numbers_that_are_refused(tiny, names, options, message):
    with pytest.raises(ValueError, match=message):
        CoOp(tiny[0], names, **options)


def test_duplicates_are_what_clip_sees(tiny):
    with pytest.warns(UserWarning, match="cannot be told apart.*Cat = cat  = CAT"):
        CoOp(tiny[0], ["Cat", "dog", "cat ", "CAT"], 2)


def test_numpy_integers_and_series_work(tiny):
    class Series:  # like pandas': an index that starts anywhere
        def __init__(self, values):
            self.values = values

        def __array__(self, dtype=None, copy=None):
            return np.asarray(self.values, dtype)

        def __getitem__(self, i):
            raise KeyError(i)

        def __len__(self):
            return len(self.values)

    features, labels = solvable(n=2)
    coop = CoOp(tiny[0], ["cat", "dog", "ox", "bird"], np.int64(2), seed=np.int32(1))
    series = Series(labels.tolist())
    coop.fit(features, series, epochs=np.int64(1), batch_size=np.int8(4), progress=False)
    assert coop.score(features, series) == coop.score(features, labels)
    chosen = mini_coop.few_shot(series, np.int64(1), np.int64(1))
    assert chosen == mini_coop.few_shot(labels, 1, 1)


@pytest.mark.parametrize("change", [lambda m: m.half(), lambda m: m.double(),
                                    lambda m: m.requires_grad_(True), lambda m: m.train()])
def test_a_clip_that_is_not_as_load_clip_gives_it(tiny, change):
    with pytest.raises(ValueError, match=r"model.float\(\).eval\(\).requires_grad_\(False\)"):
        CoOp(change(copy.deepcopy(tiny[0])), ["cat", "dog"])


def test_the_context_is_not_parted_from_clip(tiny):
    coop = CoOp(tiny[0], ["cat", "dog"], 2)
    for change in (coop.half, coop.double, lambda: coop.to("meta")):
        with pytest.raises(ValueError, match=r"load_clip\(name, device\)"):
            change()
    assert coop.to("cpu") is coop and coop.float() is coop


def test_inference_mode_and_other_default_types(tiny):
    features, labels = solvable(n=2)
    names = ["cat", "dog", "ox", "bird"]
    expected = CoOp(tiny[0], names, 2).fit(features, labels, epochs=3, progress=False).ctx
    with torch.inference_mode():
        coop = CoOp(tiny[0], names, 2).fit(features * 1, labels * 1, epochs=3, progress=False)
        assert coop.predict(features).shape == labels.shape
    assert torch.equal(coop.ctx, expected)
    with torch.autocast("cpu", torch.bfloat16):
        coop = CoOp(tiny[0], names, 2).fit(features, labels, epochs=3, progress=False)
    assert torch.allclose(coop.ctx, expected, atol=1e-6) and coop.ctx.dtype == torch.float32
    try:
        torch.set_default_dtype(torch.float64)
        coop = CoOp(tiny[0], names, 2).fit(features, labels, epochs=3, progress=False)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(coop.ctx, expected)


def test_what_load_clip_gives_is_a_pair(tiny):
    with pytest.raises(ValueError, match=r"model, preprocess = load_clip\(\)"):
        CoOp(tiny, ["cat", "dog"])


def test_a_context_saved_before_there_was_a_hash_is_read(tiny, tmp_path):
    coop = CoOp(tiny[0], ["cat", "dog"], 2)
    coop.save(tmp_path / "ctx.pt")
    state = torch.load(tmp_path / "ctx.pt", weights_only=True)
    del state["sha256"]
    torch.save(state, tmp_path / "old.pt")
    assert torch.equal(CoOp.load(tmp_path / "old.pt", tiny[0]).ctx, coop.ctx)


def test_a_context_whose_settings_were_changed_is_noticed(tiny, tmp_path):
    CoOp(tiny[0], ["cat", "dog"], 2).save(tmp_path / "ctx.pt")
    state = torch.load(tmp_path / "ctx.pt", weights_only=True)
    torch.save({**state, "classnames": ["dog", "cat"]}, tmp_path / "ctx.pt")
    with pytest.raises(ValueError, match="not written by CoOp.save, or is damaged"):
        CoOp.load(tmp_path / "ctx.pt", tiny[0])


def test_a_context_that_is_not_finite_predicts_nothing(tiny):
    coop = CoOp(tiny[0], ["cat", "dog"], 2)
    coop.ctx.data[0] = math.nan
    with pytest.raises(ValueError, match="NaN or infinity: train it anew"):
        coop.predict(torch.randn(2, 32))


def test_a_training_that_diverges_is_an_error(tiny, tmp_path):
    coop = CoOp(tiny[0], ["cat", "dog", "ox", "bird"], 2)
    with pytest.raises(RuntimeError, match="the loss is nan in epoch .*: training diverges"):
        coop.fit(*solvable(n=2), lr=1e30, epochs=9, progress=False)
    with pytest.raises(ValueError, match="NaN or infinity: not saved"):
        coop.save(tmp_path / "ctx.pt")
    assert not list(tmp_path.iterdir())


def test_a_context_with_other_numbers_is_noticed(tiny, tmp_path, monkeypatch):
    CoOp(tiny[0], ["cat", "dog"], 2).save(tmp_path / "ctx.pt")
    state = torch.load(tmp_path / "ctx.pt", weights_only=True)
    torch.save({**state, "ctx": state["ctx"] + 1}, tmp_path / "ctx.pt")
    with pytest.raises(ValueError, match="not written by CoOp.save, or is damaged"):
        CoOp.load(tmp_path / "ctx.pt", tiny[0])
    torch.save(state, tmp_path / "ctx.pt")
    assert torch.equal(CoOp.load(tmp_path / "ctx.pt", tiny[0]).ctx, state["ctx"])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert CoOp.load("~/ctx.pt", tiny[0]).n_ctx == 2


# ---------------------------------------------------------------- CUDA


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("class_specific", [False, True])
def test_cuda_and_cpu_agree(class_specific):
    results = []
    for device in ("cpu", "cuda"):
        model, preprocess = load_clip("mini", device)
        data = mini_coop.load_dataset("styles")
        chosen = mini_coop.few_shot(data.train.labels, 4, 1)
        images = [data.train.images[i] for i in chosen]
        features = encode_images(model, preprocess, images, progress=False)
        labels = torch.tensor(data.train.labels)[chosen]
        coop = CoOp(model, data.classnames, 8, class_specific)
        coop.fit(features, labels, epochs=20, progress=False)
        assert coop.ctx.dtype == torch.float32 and coop.ctx.device.type == device
        probabilities = coop.predict_proba(features).cpu()
        results.append((features.cpu(), probabilities, coop.history_["loss"][-1]))
    (cpu_features, cpu_p, cpu_loss), (cuda_features, cuda_p, cuda_loss) = results
    assert torch.allclose(cpu_features, cuda_features, atol=2e-3)
    # the text side runs in bf16 on CUDA
    assert abs(cpu_loss - cuda_loss) < 0.05
    assert (cpu_p.argmax(1) == cuda_p.argmax(1)).float().mean() > 0.9


def test_features_as_a_list_of_tensors(tiny):
    coop = CoOp(tiny[0], ["a", "b"], 2)
    x = torch.randn(3, coop.clip_model.text_projection.shape[1])
    assert torch.equal(coop.predict_proba(list(x)), coop.predict_proba(x))


def test_the_users_autocast_changes_nothing(tiny):
    coop = CoOp(tiny[0], ["a", "b"], 2)
    x = torch.randn(3, coop.clip_model.text_projection.shape[1])
    expected = coop.predict_proba(x)
    with torch.autocast("cpu", torch.bfloat16):
        probabilities = coop.predict_proba(x)
    assert probabilities.dtype == torch.float32
    assert torch.allclose(probabilities, expected, atol=1e-6)


def test_no_epoch_is_faster_than_lr(tiny):
    coop = CoOp(tiny[0], ["a", "b"], 2)
    before = coop.ctx.detach().clone()
    x = torch.randn(2, coop.clip_model.text_projection.shape[1])
    coop.fit(x, [0, 1], epochs=2, lr=0.0, progress=False)
    assert torch.equal(coop.ctx, before)


def test_save_writes_through_a_link(tiny, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.pt").symlink_to(tmp_path / "real/context.pt")
    CoOp(tiny[0], ["a", "b"], 2).save(tmp_path / "link.pt")
    assert (tmp_path / "link.pt").is_symlink() and (tmp_path / "real/context.pt").is_file()


@pytest.mark.parametrize("features", [["a.jpg"], [object()]])
def test_features_that_are_no_numbers(tiny, features):
    with pytest.raises(ValueError, match="image features are numbers"):
        CoOp(tiny[0], ["a", "b"], 2).predict(features)
