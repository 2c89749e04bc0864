"""Data sets, few-shot samples, images and their features."""
import copy
import json
import random
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mini_coop
from mini_coop import Dataset, Split, encode_images, few_shot, load_dataset, open_image


def picture(path, colour=(200, 30, 30), size=(80, 70)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def tree(root, *folders, n=4, suffix="png"):
    """n small images in each folder."""
    for folder in folders:
        for i in range(n):
            picture(root / folder / f"{i}.{suffix}", size=(4, 4))
    return root


def random_image(seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (90, 70, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# ---------------------------------------------------------------- few-shot samples

def data_of(train, val):
    """A data set whose images are their places."""
    splits = [Split(list(range(len(labels))), labels) for labels in (train, val, [])]
    return Dataset("numbers", [f"class {k}" for k in range(8)], "{}", *splits, {})


def test_few_shot_by_hand():
    """Classes in the order of first appearance, rng.sample for each, then validation."""
    data = data_of([7, 3, 7, 3, 7, 5, 5, 3, 5], [3, 7, 5, 3, 7, 5])
    rng = random.Random(1)
    train = rng.sample([0, 2, 4], 2) + rng.sample([1, 3, 7], 2) + rng.sample([5, 6, 8], 2)
    val = rng.sample([0, 3], 2) + rng.sample([1, 4], 2) + rng.sample([2, 5], 2)
    few = few_shot(data, shots=2, seed=1)
    assert few.train == (train, [7, 7, 3, 3, 5, 5]) and few.val == (val, [3, 3, 7, 7, 5, 5])
    assert train == [0, 4, 3, 1, 6, 8]  # random.Random's sequence, fixed since Python 3.2
    assert few.test is data.test and few.classnames is data.classnames


def test_few_shot_takes_four_validation_images_at_most_and_what_there_is():
    few = few_shot(data_of([0] * 30 + [1] * 30, [0] * 9 + [1] * 9), shots=16, seed=2)
    assert len(set(few.train.images)) == 32 and few.val.labels == [0] * 4 + [1] * 4
    few = r"fewer than 3 training images of class 1 \(2\), class 2 \(0\)"
    with pytest.warns(UserWarning, match=few):
        few = few_shot(data_of([0, 0, 0, 1, 1], []), shots=3, seed=1)
    assert sorted(few.train.images) == [0, 1, 2, 3, 4]
    few = r"^fewer than 4 validation images of class 0 \(0\), class 2 \(0\), class 3 \(2\), class 4"
    with pytest.warns(UserWarning, match=few):  # only the classes that lack some are named
        few_shot(data_of(list(range(8)) * 4, [1, 1, 1, 1, 3, 3]), shots=4, seed=1)
    for shots in (0, 2.0):
        with pytest.raises(ValueError, match="whole number from 1"):
            few_shot(data_of([0, 1], []), shots=shots, seed=1)


# ---------------------------------------------------------------- folders

def test_a_folder_of_class_folders_is_dealt_as_published(tmp_path):
    for n in range(1, 12):
        tree(tmp_path, f"class_{n:02}", n=n, suffix="JPG")
    with pytest.warns(UserWarning, match="no test images"):
        data = load_dataset(tmp_path)
    assert data.classnames[0] == "class_01" and data.template == "a photo of a {}."
    for label in range(11):
        n = label + 1
        counts = [split.labels.count(label) for split in (data.train, data.val, data.test)]
        assert counts == [round(0.5 * n), round(0.2 * n), n - round(0.5 * n) - round(0.2 * n)]
    assert len({*data.train.images, *data.val.images, *data.test.images}) == 66


def test_forms_of_folders_that_are_read(tmp_path, monkeypatch):
    splits = tree(tmp_path / "splits", "train/cat", "train/dog", "test/cat", "test/dog", "val/cat")
    data = load_dataset(str(splits), "a drawing of {}.")
    assert data.template == "a drawing of {}."
    assert data.classnames == ["cat", "dog"] and data.train.labels == [0] * 4 + [1] * 4
    assert data.val.labels == [0] * 4 and data.train.images[0] == splits / "train/cat/0.png"
    vehicles = tree(tmp_path / "vehicles", "train", "cars", "ships")
    assert load_dataset(vehicles).classnames == ["cars", "ships", "train"]
    odd = tree(tmp_path / "odd", "Löwe", "猫", "a [b]", ".hidden", "__MACOSX/.x")
    for suffix in ("jfif", "ppm", "pgm", "webp", "tif"):
        tree(odd, "猫", n=1, suffix=suffix)
    (odd / "link").symlink_to(vehicles / "cars")
    assert load_dataset(odd).classnames == ["Löwe", "a [b]", "link", "猫"]
    monkeypatch.chdir(tree(tmp_path, "actions/cat", "actions/dog"))
    assert load_dataset("./actions").classnames == ["cat", "dog"]  # a path is no name
    with pytest.warns(UserWarning, match="read from .*data/actions; for .*/actions give that path"):
        assert len(load_dataset("actions").classnames) == 11


@pytest.mark.parametrize("folders, found", [
    (["train", "test1"], "test1, train"),  # Kaggle's cats and dogs: labels in file names
    (["Art/cat", "Art/dog", "Clipart/cat"], "Art/cat/0.png"),  # domains above the classes
    (["train/cat", "train/dog", "valid/cat", "test/cat"], "valid/cat/0.png"),
    (["train/cat", "train/dog", "test"], "test/0.png"),  # test images without labels
    (["image", "gt"], "gt, image"),  # a segmentation set
    (["train", "train_labels", "val", "val_labels"], "train, train_labels, val"),  # CamVid
    (["cat", "dog", "test"], "cat, dog, test"),  # a flat test set beside the classes
    (["train/n01/images", "train/n02/images"], "train/n01/images/0.png"),  # Tiny ImageNet
    (["cat", "dog", "."], "0.png"),
    (["cat"], "found cat"),
    ([], "found no images"),
])
def test_other_forms_of_folders_are_one_error(tmp_path, folders, found):
    tree(tmp_path, *folders)
    with pytest.raises(ValueError, match=rf"expected <class>/\*.jpg.*{found}"):
        load_dataset(tmp_path)


def test_links_that_lead_back(tmp_path):
    """Through one folder or two: no endless walk, and an error as for any other form."""
    tree(tmp_path, "cat", "dog", "fox")
    (tmp_path / "cat/again").symlink_to(tmp_path)
    (tmp_path / "cat/dogs").symlink_to(tmp_path / "dog")
    (tmp_path / "dog/cats").symlink_to(tmp_path / "cat")
    with pytest.raises(ValueError, match="but found cat/"):
        load_dataset(tmp_path)


def test_what_is_missing_in_a_folder_is_said(tmp_path):
    tree(tmp_path, "train/cat", "train/dog", "val/cat", "val/dog")
    with pytest.warns(UserWarning, match=r"no test images of 2 classes.*'cat', 'dog'"):
        load_dataset(tmp_path)
    tree(tmp_path, "test/cat", "test/dog", "test/fox")
    with pytest.warns(UserWarning, match=r"training images of .*fox \(0\)"):
        few_shot(load_dataset(tmp_path), 1, 1)
    tree(tmp_path, "train/fox")
    (tmp_path / "train/dog/photo.heic").write_bytes(b"another format")
    (tmp_path / "train/owl").mkdir()
    with pytest.warns(UserWarning, match="so not read: train/dog/photo.heic, train/owl$"):
        load_dataset(tmp_path)
    (tmp_path / "train/dog/photo.heic").unlink()
    (tmp_path / "train/owl").rmdir()
    (tmp_path / "train/cat/gone.png").symlink_to("/nowhere/gone.png")
    assert tmp_path / "train/cat/gone.png" in load_dataset(tmp_path).train.images  # an error later


# ---------------------------------------------------------------- dataset.json

SPEC = {"classnames": ["x", "y"], "template": "{}", "images": "img",
        "splits": {"train": [["a.png", 0]], "test": [["b.png", 1]]},
        "domains": {"night": [["a.png", 0], ["b.png", 1]]}}


@pytest.mark.filterwarnings("ignore:.*no test images")
@pytest.mark.parametrize("images", ["img", "img.ZIP"])
def test_dataset_json_with_files_and_with_an_archive(tmp_path, images):
    picture(tmp_path / "img/a.png")
    picture(tmp_path / "img/b.png", (0, 0, 200))
    with zipfile.ZipFile(tmp_path / "img.ZIP", "w") as archive:
        archive.write(tmp_path / "img/a.png", "a.png")
        archive.write(tmp_path / "img/b.png", "b.png")
    (tmp_path / "dataset.json").write_text(json.dumps({**SPEC, "images": images}))
    data = load_dataset(tmp_path)
    assert open_image(data.test.images[0]).getpixel((0, 0)) == (0, 0, 200)
    assert data.val.images == [] and data.domains["night"].labels == [0, 1]


@pytest.mark.parametrize("change", [
    {"classnames": None}, {"classnames": "xy"}, {"classnames": ["x"]}, {"splits": None},
    {"splits": {"validation": []}}, {"domains": {"test": []}}, {"domains": {"val": []}},
    {"splits": {"train": [["a.png", "0"]]}}, {"splits": {"train": [["a.png", -1]]}},
    {"splits": {"train": ["a.png"]}}, {"images": "dataset.json"}, {"template": None},
    {"template": "an icon"}, {"template": ["a {}."]}, {"splits": {"train": [["a.png", 0.0]]}},
    {"domains": {"night": []}}, {"domains": {"night": [["a.png", 1]]}},
])
def test_a_dataset_json_of_another_form(tmp_path, change):
    (tmp_path / "dataset.json").write_text(json.dumps(SPEC | change))
    with pytest.raises(ValueError, match="dataset.json is not in our form"):
        load_dataset(tmp_path)
    (tmp_path / "dataset.json").write_text(json.dumps(SPEC)[:40])
    with pytest.raises(ValueError, match="dataset.json is not in our form"):
        load_dataset(tmp_path)


@pytest.mark.filterwarnings("ignore:.*no test images")
def test_a_dataset_json_from_windows(tmp_path):
    picture(tmp_path / "img/more/a.png")
    spec = {**SPEC, "splits": {"train": [["more\\a.png", 0]]}}
    (tmp_path / "dataset.json").write_text(json.dumps(spec), encoding="utf-8-sig")
    assert open_image(load_dataset(tmp_path).train.images[0]).size == (80, 70)


def test_unknown_data_sets_and_a_labs_own(tmp_path, monkeypatch):
    monkeypatch.setattr(mini_coop, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="no data set 'object': neither a folder.*objects"):
        load_dataset("object")
    tree(tmp_path, "insects/img")
    spec = {**SPEC, "splits": {part: [["0.png", 0], ["1.png", 1]] for part in ("train", "test")}}
    (tmp_path / "insects/dataset.json").write_text(json.dumps({**spec, "domains": {}}))
    assert load_dataset("insects").test.images[0] == tmp_path / "insects/img/0.png"
    assert len(load_dataset("styles").classnames) == 8  # our own are still found
    tree(tmp_path, "pets/cat", "pets/dog", "styles/a", "styles/b")
    assert load_dataset("pets").classnames == ["cat", "dog"]  # class folders by name
    with pytest.warns(UserWarning, match=f"styles: read from .*; for {tmp_path}/styles give that"):
        assert len(load_dataset("styles").classnames) == 8


# ---------------------------------------------------------------- images

def test_all_kinds_of_images(tmp_path):
    """What a person sees is what is encoded: EXIF, transparency, palette, gray, CMYK."""
    red = Image.new("RGB", (40, 20), (250, 10, 10))
    red.paste((10, 10, 250), (0, 0, 10, 20))  # blue at the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: the left becomes the top
    red.save(tmp_path / "exif.jpg", exif=exif, quality=100)
    turned = open_image(tmp_path / "exif.jpg")
    assert turned.size == (20, 40)
    assert turned.getpixel((10, 3))[2] > 200 > turned.getpixel((10, 30))[2]
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 9, 99, 200])
    palette.save(tmp_path / "palette.png")
    palette.putpixel((5, 5), 0)
    palette.save(tmp_path / "transparent.png", transparency=1)
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    clear.putpixel((5, 5), (0, 0, 0, 255))
    clear.save(tmp_path / "alpha.png")
    Image.new("L", (8, 8), 77).save(tmp_path / "gray.png")
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.tif")
    for name, colour in (("palette.png", (9, 99, 200)), ("transparent.png", (255, 255, 255)),
                         ("alpha.png", (255, 255, 255)), ("gray.png", (77, 77, 77)),
                         ("cmyk.tif", (255, 0, 0))):
        assert open_image(tmp_path / name).getpixel((1, 1)) == colour, name


@pytest.mark.parametrize("values", [np.uint16(128 * 256), np.float32(0.5), np.int32(4000)])
def test_brightness_is_not_guessed(tmp_path, values):
    Image.fromarray(np.full((8, 8), values)).save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match="convert to 8 bits"):
        open_image(tmp_path / "deep.tif")


@pytest.mark.parametrize("alpha", [0, 90, 255])
def test_white_on_transparent_ground_is_refused(tmp_path, alpha):
    image = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    image.paste((255, 255, 255, alpha), (2, 2, 6, 6))
    image.save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="on white nothing is left: give it a background"):
        open_image(tmp_path / "a.png")
    assert open_image(Image.new("RGB", (8, 8), "white")).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("exif", [b"", b"not a tiff header at all", b"II*\0\x08\0\0\0\x01\0",
                                  # an x-resolution of -1 / 0 beside an orientation
                                  b"II*\0\x08\0\0\0\x02\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\x1a"
                                  b"\x01\n\0\x01\0\0\0&\0\0\0\0\0\0\0\xff\xff\xff\xff\0\0\0\0"])
def test_a_photo_with_broken_exif_is_taken_as_it_lies(tmp_path, exif):
    Image.new("RGB", (60, 40), "red").save(tmp_path / "a.jpg", exif=b"Exif\0\0" + exif)
    assert open_image(tmp_path / "a.jpg").size == (60, 40)


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\noid ...",
                                     b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"])
def test_what_is_no_image_shows_its_first_bytes(tmp_path, content):
    """PostScript, which PIL would run, is none of the formats either."""
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(OSError, match=f"no image: it begins with b'{content[:9].decode()}"):
        open_image(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="no pixels: 0 x 9"):
        open_image(Image.new("RGB", (0, 9)))


# ---------------------------------------------------------------- image features

def test_encode_images(tiny, tmp_path):
    images = [random_image(i) for i in range(5)]
    images[0].save(tmp_path / "0.png")
    features = encode_images(*tiny, images, batch_size=2)
    own = tiny[0].encode_image(torch.stack([tiny[1](image) for image in images]))
    assert torch.allclose(features, own, atol=1e-5) and features.dtype == torch.float32
    file = tmp_path / "0.png"
    for image in (file, str(file), Image.open(file)):  # which is not read twice at once
        x = encode_images(*tiny, [image] * 9)
        assert torch.allclose(x, features[:1].expand(9, -1), atol=1e-5)
    training = copy.deepcopy(tiny[0]).train()  # batch norm would mix the images
    features = encode_images(training, tiny[1], images)
    assert torch.allclose(features, own, atol=1e-5)


def test_views_are_crops_drawn_by_the_seed(tiny):
    images = [random_image(i) for i in range(3)]
    state = torch.get_rng_state()
    views = encode_images(*tiny, images, views=4)
    assert views.shape == (3, 4, 32) and torch.equal(torch.get_rng_state(), state)
    assert (views[0, 0] - views[0, 1]).abs().max() > 1e-4
    again = encode_images(*tiny, images, views=4, batch_size=5)
    assert torch.allclose(views, again, atol=1e-5)
    other = encode_images(*tiny, images, views=4, seed=1)
    assert (views - other).abs().max() > 1e-4


def test_all_images_that_cannot_be_read_are_named(tiny, tmp_path):
    picture(tmp_path / "good.png")
    content = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[:60])
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "float.tif")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.write(tmp_path / "good.png", "good.png")
        archive.writestr("cut too.png", content[:60])
    files = [tmp_path / name for name in ("good.png", "cut.png", "gone.png", "float.tif")]
    files += [zipfile.Path(tmp_path / "images.zip", name) for name in ("good.png", "cut too.png")]
    with pytest.raises(ValueError, match="4 of 6 images cannot be read") as error:
        encode_images(*tiny, files)
    for name in ("cut.png", "gone.png", "float.tif.*8 bits", "images.zip/cut too.png"):
        assert re.search(name, str(error.value)), name
    assert "good.png" not in str(error.value)
    many = [tmp_path / f"{i}.png" for i in range(5000)]
    with pytest.raises(ValueError, match="5000 of 5000 images cannot be read: .*; ...$") as error:
        encode_images(*tiny, many)
    assert len(str(error.value)) < 3000 and "\n" not in str(error.value)


@pytest.mark.parametrize("images, found", [
    ("a.png", "a str with"), (Path("a.png"), "a PosixPath with"),
    (Image.new("RGB", (9, 9)), "a Image with"),
    (np.zeros((9, 9, 3), np.uint8), "ndarray of ndarray"), (torch.zeros(3, 3, 9, 9), "of Tensor"),
    ([(Image.new("RGB", (9, 9)), 1)], "list of tuple"), (Split(["a.png"], [0]), "Split of list"),
    ([b"GIF"], "bytes"), ([], "0 images and 1 views")])
def test_other_kinds_of_images_are_one_sentence(tiny, images, found):
    with pytest.raises(ValueError, match=f"images are a list of paths or PIL .*{found}") as error:
        encode_images(*tiny, images)
    assert len(str(error.value)) < 200
