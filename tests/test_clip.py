"""load_clip: checkpoints of every kind, and what it refuses."""
import copy
import hashlib
import io
import os
import urllib.error
import urllib.request
import warnings

import clip
import pytest
import torch

import mini_coop
from mini_coop import CoOp, load_clip

CLIPS = {
    "small resnet": (32, 64, (1, 1, 1, 1), 32, None, 77, 49408, 64, 1, 1),
    "small vit": (32, 64, 2, 64, 16, 77, 49408, 64, 1, 1),
    "RN50": (1024, 224, (3, 4, 6, 3), 64, None, 77, 49408, 512, 8, 12),
    "ViT-B/16": (512, 224, 12, 768, 16, 77, 49408, 512, 8, 12),
}


class Holder(torch.nn.Module):
    """A CLIP as OpenAI ships its weights: its state dict also holds three numbers."""

    def __init__(self, model, resolution):
        super().__init__()
        self.register_buffer("input_resolution", torch.tensor(resolution))
        self.register_buffer("context_length", torch.tensor(77))
        self.register_buffer("vocab_size", torch.tensor(49408))
        for name, child in model.named_children():
            self.add_module(name, child)
        for name in ("positional_embedding", "text_projection", "logit_scale"):
            setattr(self, name, getattr(model, name))

    def forward(self, x):
        return x


def save_torchscript(model, resolution, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        holder = Holder(model, resolution)
        torch.jit.save(torch.jit.trace(holder, torch.zeros(1), check_trace=False), path)


@pytest.mark.parametrize("kind, archive", [
    ("small resnet", False), ("small vit", True), ("RN50", True), ("ViT-B/16", False)])
def test_load_clip_reads_state_dicts_and_openais_archives(tmp_path, kind, archive, monkeypatch):
    model = clip.model.CLIP(*CLIPS[kind]).eval()  # real shapes, random weights
    clip.model.convert_weights(model)
    name = str(tmp_path / "model.pt")
    if archive:  # in a lab's folder, under a name whose hash is known, as OpenAI's are
        (tmp_path / "clip").mkdir()
        save_torchscript(model, CLIPS[kind][1], tmp_path / "clip/own.pt")
        digest = hashlib.sha256((tmp_path / "clip/own.pt").read_bytes()).hexdigest()
        monkeypatch.setitem(clip.clip._MODELS, "own", f"https://host/models/{digest}/own.pt")
        monkeypatch.setattr(mini_coop, "ROOT", tmp_path)
        name = "own"
    else:  # as jit.load(...).state_dict() gives it, with three numbers beside the weights
        torch.save({**model.state_dict(), "input_resolution": torch.tensor(CLIPS[kind][1]),
                    "context_length": torch.tensor(77), "vocab_size": torch.tensor(49408)}, name)
    loaded, preprocess = load_clip(name, "cpu")
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in loaded.parameters())
    assert not loaded.training and preprocess.transforms[0].size == CLIPS[kind][1]
    model = model.float().to(memory_format=torch.channels_last)  # for the same rounding
    pixels = torch.randn(2, 3, *CLIPS[kind][1:2] * 2)
    text = clip.tokenize(["a cat", "a dog in a tree"])
    with torch.no_grad():
        assert torch.equal(loaded.encode_image(pixels), model.encode_image(pixels))
        assert torch.equal(loaded.encode_text(text), model.encode_text(text))
    # trains on the text tower of that size
    coop = CoOp(loaded, ["cat", "dog"], 2, seed=1)
    coop.fit(torch.randn(2, CLIPS[kind][0]), [0, 1], epochs=1)
    assert coop.history_["loss"][0] > 0 and coop.ctx.isfinite().all()


def test_load_clip_keeps_fp32_weights_to_the_bit(tiny, tmp_path):
    torch.save(tiny[0].state_dict(), tmp_path / "fp32.pt")
    loaded = load_clip(tmp_path / "fp32.pt", "cpu")[0].state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in tiny[0].state_dict().items())


def test_weights_that_are_not_finite_are_damage(tiny, tmp_path):
    state = copy.deepcopy(tiny[0].state_dict())
    state["visual.bn1.running_var"][0] = float("inf")
    torch.save(state, tmp_path / "clip.pt")
    with pytest.raises(ValueError, match="NaN or infinite"):
        load_clip(tmp_path / "clip.pt", "cpu")


def test_a_download_is_checked_by_its_hash(tmp_path, monkeypatch):
    """Of clip.load we rely on this: a wrong file is no model."""
    monkeypatch.setattr(mini_coop, "ROOT", tmp_path)

    class Answer(io.BytesIO):
        def info(self):
            return {"Content-Length": "5"}

    monkeypatch.setattr(urllib.request, "urlopen", lambda url: Answer(b"wrong"))
    place = f"{tmp_path}/clip/RN50.pt is missing or damaged"
    with pytest.raises(RuntimeError, match=rf"{place}.*SHA256.*put https://\S+/RN50.pt there"):
        load_clip("RN50", "cpu")

    def offline(url):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    (tmp_path / "clip/RN50.pt").write_bytes(b"cut off")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match=f"{place}.*no network.*put https://"):
            load_clip("RN50", "cpu")


@pytest.mark.parametrize("content, keys", [
    ({"model_state_dict": {}, "epoch": 3}, "model_state_dict, epoch"),
    ({"module.visual.proj": torch.zeros(3), "module.x": torch.zeros(1)}, "module.visual.proj"),
    ({1: torch.zeros(3)}, "1"),
])
def test_a_checkpoint_of_another_layout_is_named_by_its_keys(tmp_path, content, keys):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=f"other.pt is no state dict of OpenAI's CLIP.*{keys}"):
        load_clip(tmp_path / "other.pt")


def test_no_code_from_a_file_is_run(tmp_path, monkeypatch, malicious):
    monkeypatch.chdir(tmp_path)
    opened = []
    monkeypatch.setattr(torch.jit, "load", lambda *args, **_: opened.append(args))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), "script.pt")
    torch.save({"visual.proj": malicious}, "code.pt")
    torch.save(torch.zeros(3), "tensor.pt")
    with open("text.pt", "w") as file:
        file.write("no checkpoint")
    for name in ("script.pt", "code.pt", "tensor.pt", "text.pt"):
        with pytest.raises(ValueError, match="plain tensors.*opened by name") as error:
            load_clip(name)
        assert "weights_only" not in str(error.value)  # no advice to switch the protection off
    assert opened == [] and not os.path.exists("pwned")


def test_unknown_names_and_a_mini_clip_that_was_cut_off(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="neither 'mini', nor one of RN50"):
        load_clip("RN51")
    content = (mini_coop.DATA / "mini_clip.pt").read_bytes()
    (tmp_path / "mini_clip.pt").write_bytes(content[:9_000_000])
    monkeypatch.setattr(mini_coop, "DATA", tmp_path)
    with pytest.raises(ValueError, match="cannot read .*mini_clip.pt"):
        load_clip("mini", "cpu")


def test_cuda_is_used_where_there_is_one():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    assert next(load_clip()[0].parameters()).is_cuda
