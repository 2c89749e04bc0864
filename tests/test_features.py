"""The grid's cache of image features."""
import copy
import os

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

import features
import mini_coop
from features import cached_features, result_key


def picture(path, colour=(200, 30, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (80, 70), colour).save(path)


def test_kept_features_are_used_only_if_nothing_changed(tiny, tmp_path, monkeypatch):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", (0, 0, 200))
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    calls = []
    encode = features.encode_images
    monkeypatch.setattr(features, "encode_images", lambda *args: calls.append(1) or encode(*args))

    def get(files=files, model=tiny[0], views=1):
        return cached_features(tmp_path / "cache", model, tiny[1], files, views)

    first = get()
    assert torch.equal(get(), first) and len(calls) == 1
    get(files[::-1])
    assert len(calls) == 2
    assert get(views=2).shape == get(views=2).shape == (2, 2, 32) and len(calls) == 3
    other = copy.deepcopy(tiny[0])
    other.visual.conv1.weight.data[0] += 1
    assert not torch.allclose(get(model=other), first) and len(calls) == 4
    picture(tmp_path / "a.png", (9, 200, 9))  # the file changed
    os.utime(tmp_path / "a.png", (1, 1))
    changed = get()
    assert not torch.allclose(changed, first) and len(calls) == 5
    for kept in (tmp_path / "cache").iterdir():
        kept.write_bytes(kept.read_bytes()[:300])  # cut off in writing
    assert torch.equal(get(), changed) and len(calls) == 6
    for kept in (tmp_path / "cache").iterdir():
        state = kept.read_bytes()
        at = state.find(changed.numpy().tobytes()[:16])
        if at > 0:  # a flipped bit
            kept.write_bytes(state[:at] + bytes([state[at] ^ 1]) + state[at + 1:])
    assert torch.equal(get(), changed) and len(calls) == 7


def test_transforms_and_places_are_told_apart(tiny, tmp_path, monkeypatch):
    for folder, colour in (("a", (200, 30, 30)), ("b", (0, 0, 200))):
        picture(tmp_path / folder / "i.bmp", colour)
        os.utime(tmp_path / folder / "i.bmp", (1, 1))  # the same name, size and time

    def get(change):
        transform = transforms.Compose([*tiny[1].transforms, transforms.Lambda(change)])
        return cached_features(tmp_path / "cache", tiny[0], transform, ["i.bmp"])

    monkeypatch.chdir(tmp_path / "a")
    plain = get(lambda x: x)
    negative = get(lambda x: -x)  # prints like the other
    monkeypatch.chdir(tmp_path / "b")
    elsewhere = get(lambda x: x)
    assert not torch.allclose(plain, negative) and not torch.allclose(plain, elsewhere)
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_results_of_another_device_are_told_apart(tiny):
    class Elsewhere:
        text_projection = torch.empty(0, device="meta")
        state_dict = tiny[0].state_dict

    data = mini_coop.load_dataset("styles")
    here = result_key(*tiny, data, ())
    assert here == result_key(*tiny, data, ()) != result_key(Elsewhere, tiny[1], data, ())


def test_features_with_an_unreadable_image_are_not_kept(tiny, tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    with pytest.warns(UserWarning, match="1 of 2 images cannot be read"):
        found = cached_features(tmp_path / "cache", *tiny, files)
    assert found.isfinite().all(1).tolist() == [True, False] and not (tmp_path / "cache").exists()


def test_a_full_disk_loses_no_features(tiny, tmp_path, monkeypatch):
    def full(*args):
        raise OSError("No space left on device")

    picture(tmp_path / "a.png")
    monkeypatch.setattr(features.torch, "save", full)
    with pytest.warns(UserWarning, match="could not be kept.*No space left"):
        found = cached_features(tmp_path / "cache", *tiny, [tmp_path / "a.png"])
    assert found.shape == (1, 32) and not list((tmp_path / "cache").iterdir())


def test_paths_inside_an_archive_and_missing_files(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "images.ZIP", "w") as archive:
        archive.writestr("a.png", np.zeros(4).tobytes())
    assert features.stamp(tmp_path / "images.ZIP/a.png")[1] is not None
    assert features.stamp(tmp_path / "nowhere.png")[1] is None
