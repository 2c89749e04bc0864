"""load_clip: checkpoints of every kind, and what it refuses."""

import hashlib
import io
import os
import pickle
import urllib.error
import urllib.request
import warnings
from pathlib import Path

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


@pytest.mark.parametrize("kind", CLIPS)
@pytest.mark.parametrize("archive", [False, True])
def test_load_clip_reads_state_dicts_and_torchscript(tmp_path, kind, archive, monkeypatch):
    model = clip.model.CLIP(*CLIPS[kind]).eval()  # real shapes, random weights
    clip.model.convert_weights(model)
    path = tmp_path / "model.pt"
    if archive:
        save_torchscript(model, CLIPS[kind][1], path)
        # opened only if its hash is known, as OpenAI's are
        with pytest.raises(ValueError, match="TorchScript that is not OpenAI's could run code"):
            load_clip(path, "cpu")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        monkeypatch.setitem(mini_coop._MODELS, "own", f"https://host/models/{digest}/own.pt")
    else:
        torch.save(model.state_dict(), path)
    loaded, preprocess = load_clip(str(path), "cpu")
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in loaded.parameters())
    assert not loaded.training
    model = model.float()
    model.visual.to(memory_format=torch.channels_last)  # as load_clip does, for the same rounding
    pixels = torch.randn(2, 3, *CLIPS[kind][1:2] * 2)
    text = clip.tokenize(["a cat", "a dog in a tree"])
    with torch.no_grad():
        assert torch.equal(loaded.encode_image(pixels), model.encode_image(pixels))
        assert torch.equal(loaded.encode_text(text), model.encode_text(text))
    assert preprocess.transforms[0].size == CLIPS[kind][1]
    # trains on the text tower of that size
    coop = CoOp(loaded, ["cat", "dog"], 2, seed=1)
    coop.fit(torch.randn(2, CLIPS[kind][0]), [0, 1], epochs=1, progress=False)
    assert coop.history_["loss"][0] > 0 and coop.ctx.isfinite().all()
    path.unlink()


def test_load_clip_keeps_fp32_weights_to_the_bit(tiny, tmp_path):
    torch.save(tiny[0].state_dict(), tmp_path / "fp32.pt")
    loaded = load_clip(tmp_path / "fp32.pt", "cpu")[0].state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in tiny[0].state_dict().items())


def test_load_clip_says_what_is_wrong(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="neither 'mini', nor one of RN50"):
        load_clip("RN51")
    whole = (mini_coop.DATA / "mini_clip.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:100_000])
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    for file in ("cut.pt", "other.pt"):
        with pytest.raises(ValueError, match=f"{file} is no CLIP checkpoint"):
            load_clip(tmp_path / file)
    for device in ("cuda:99", "gpu", "meta0"):
        with pytest.raises(ValueError, match=f"device '{device}' cannot be used here"):
            load_clip("mini", device)

    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(mini_coop, "_download", offline)
    message = r"no network.*clip.ViT-L-14-336px.pt.*'mini', which needs no download"
    with pytest.raises(RuntimeError, match=message):
        load_clip("ViT-L/14@336px")


def test_weights_of_a_wrong_hash_are_refused(tmp_path, monkeypatch):
    (tmp_path / "clip").mkdir()
    file = tmp_path / "clip/RN50.pt"
    file.write_bytes(b"half a download")
    monkeypatch.setenv("MINI_COOP_ROOT", str(tmp_path))

    class Answer(io.BytesIO):
        def info(self):
            return {"Content-Length": "5"}

    monkeypatch.setattr(urllib.request, "urlopen", lambda url: Answer(b"wrong"))
    # a file that is there is not overwritten: the shared folder of a lab is not ours to mend
    with pytest.raises(ValueError, match="RN50.pt is no CLIP .* SHA-256 is wrong. Delete it"):
        load_clip("RN50", "cpu")
    assert file.read_bytes() == b"half a download"
    file.unlink()
    monkeypatch.setattr(mini_coop, "weights_file", lambda name: file)
    with pytest.raises(RuntimeError, match="SHA256.*RN50.pt .from https://.*'mini'"):
        load_clip("RN50", "cpu")
    assert os.listdir(tmp_path / "clip") == []


def test_a_download_that_is_cut_off_leaves_no_file(tmp_path, monkeypatch):
    (tmp_path / "clip").mkdir()
    monkeypatch.setattr(mini_coop, "weights_file", lambda name: tmp_path / "clip/RN50.pt")
    seen = []

    class Answer(io.BytesIO):
        def info(self):
            return {"Content-Length": "9"}

        def read(self, *args):
            seen.append((tmp_path / "clip/RN50.pt").exists())
            return super().read(*args)

    monkeypatch.setattr(urllib.request, "urlopen", lambda url: Answer(b"half"))
    with pytest.raises(RuntimeError, match="could not download"):
        load_clip("RN50", "cpu")
    assert seen and not any(seen) and os.listdir(tmp_path / "clip") == []


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


def test_an_archive_with_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opened = []
    monkeypatch.setattr(torch.jit, "load", lambda *args, **_: opened.append(args))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), "script.pt")
    with pytest.raises(ValueError, match=r"could run code.*torch.jit.load\('script.pt'\)"):
        load_clip("script.pt")
    assert opened == []


def test_errors_do_not_advise_to_switch_the_protection_off(tmp_path):
    torch.save({"weights": Malicious()}, tmp_path / "evil.pt")
    for load in (load_clip, lambda path: CoOp.load(path, load_clip("mini", "cpu")[0])):
        with pytest.raises(ValueError) as error:
            load(tmp_path / "evil.pt")
        assert "weights_only" not in str(error.value)


def test_a_damaged_mini_clip_is_noticed(tmp_path, monkeypatch):
    content = bytearray((mini_coop.DATA / "mini_clip.pt").read_bytes())
    content[9_000_000:9_050_000] = bytes(50_000)
    (tmp_path / "mini_clip.pt").write_bytes(content)
    monkeypatch.setattr(mini_coop, "DATA", tmp_path)
    with pytest.raises(ValueError, match="damaged.*git checkout data"):
        load_clip("mini", "cpu")


@pytest.mark.parametrize("name", ["nowhere", "a file"])
def test_a_root_that_is_no_folder_is_said_at_once(monkeypatch, tmp_path, name):
    (tmp_path / "a file").touch()
    monkeypatch.setenv("MINI_COOP_ROOT", str(tmp_path / name))
    for load in (load_clip, lambda: mini_coop.load_dataset("styles")):
        message = f"MINI_COOP_ROOT is set to .*{name}, which is no folder"
        with pytest.raises(ValueError, match=message):
            load()


def test_a_name_may_be_a_path(mini):
    model, _ = load_clip(Path("mini"), "cpu")
    assert torch.equal(model.text_projection, mini[0].text_projection.cpu())


def test_an_installation_without_data_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(mini_coop, "DATA", tmp_path / "data")
    for load in (load_clip, lambda: mini_coop.load_dataset("styles")):
        with pytest.raises(ValueError, match="pip install -e"):
            load()


def test_loading_leaves_the_callers_random_state_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    load_clip("mini", "cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_statistics_that_are_not_finite_are_damage(tiny, tmp_path):
    state = {key: value.clone() for key, value in tiny[0].state_dict().items()}
    state["visual.bn1.running_var"][0] = float("inf")
    torch.save(state, tmp_path / "clip.pt")
    with pytest.raises(ValueError, match="NaN or infinite"):
        load_clip(tmp_path / "clip.pt", "cpu")
