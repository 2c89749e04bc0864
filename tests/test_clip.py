"""load_clip: checkpoints of every kind, and what it refuses."""
import copy
import hashlib
import io
import os
import pickle
import urllib.error
import urllib.request

import clip
import pytest
import torch

import mini_coop
from mini_coop import CoOp, load_clip


@pytest.mark.parametrize("sizes, archive", [
    ((1024, 224, (3, 4, 6, 3), 64, None, 77, 49408, 512, 8, 12), True),  # RN50
    ((512, 224, 12, 768, 16, 77, 49408, 512, 8, 12), False)])  # ViT-B/16
def test_load_clip_reads_state_dicts_and_openais_archives(tmp_path, sizes, archive, monkeypatch):
    model = clip.model.CLIP(*sizes).eval()  # real shapes, random weights
    clip.model.convert_weights(model)
    name = str(tmp_path / "model.pt")
    if archive:  # in a lab's folder, under a name whose hash is known, as OpenAI's are
        (tmp_path / "clip").mkdir()
        with monkeypatch.context() as patch:  # weights without a graph
            patch.setattr(clip.model.CLIP, "forward", lambda self, x: x)
            traced = torch.jit.trace(model, torch.zeros(1), check_trace=False)
        torch.jit.save(traced, tmp_path / "clip/own.pt")
        digest = hashlib.sha256((tmp_path / "clip/own.pt").read_bytes()).hexdigest()
        monkeypatch.setitem(clip.clip._MODELS, "own", f"https://host/models/{digest}/own.pt")
        monkeypatch.setattr(mini_coop, "ROOT", tmp_path)
        name = "own"
    else:  # as jit.load(...).state_dict() gives it, with three numbers beside the weights
        torch.save({**model.state_dict(), "input_resolution": torch.tensor(sizes[1]),
                    "context_length": torch.tensor(77), "vocab_size": torch.tensor(49408)}, name)
    loaded, preprocess = load_clip(name, "cpu")
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in loaded.parameters())
    assert not loaded.training and preprocess.transforms[0].size == sizes[1]
    model = model.float().to(memory_format=torch.channels_last)  # for the same rounding
    pixels = torch.randn(2, 3, *sizes[1:2] * 2)
    text = clip.tokenize(["a cat", "a dog in a tree"])
    with torch.no_grad():
        assert torch.equal(loaded.encode_image(pixels), model.encode_image(pixels))
        assert torch.equal(loaded.encode_text(text), model.encode_text(text))
    # trains on the text tower of that size
    coop = CoOp(loaded, ["cat", "dog"], 2, seed=1)
    coop.fit(torch.randn(2, sizes[0]), [0, 1], epochs=1)
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


class Malicious:
    """An object whose pickle runs code: it makes the folder `pwned`."""

    def __reduce__(self):
        return (os.mkdir, ("pwned",))


def test_no_code_from_a_file_is_run(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opened = []
    monkeypatch.setattr(torch.jit, "load", lambda *args, **_: opened.append(args))
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), "script.pt")
    torch.save({"visual.proj": Malicious()}, "code.pt")
    torch.save(torch.zeros(3), "tensor.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Malicious()))
    (tmp_path / "text.pt").write_text("no checkpoint")
    for name in ("script.pt", "code.pt", "tensor.pt", "pickle.pt", "text.pt"):
        for load in (load_clip, lambda path: CoOp.load(path, tiny[0])):
            with pytest.raises(ValueError, match="plain tensors.*opened by name") as error:
                load(name)
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
