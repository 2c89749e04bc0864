"""data/prepare.py on small copies of the public data sets: real folders, few and empty images."""
import hashlib
import io
import json
import random
import urllib.error

import pytest
from torchvision import datasets

import prepare
from mini_coop import load_dataset


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def change(name, monkeypatch, **fields):
    table = prepare.SOURCES if name in prepare.SOURCES else prepare.SHIFTS
    monkeypatch.setitem(table, name, table[name]._replace(**fields))


def split_path(name, root):
    source = prepare.SOURCES[name]
    return root / source.folders[0].split("/")[0] / f"split_zhou_{source.split[0]}.json"


def look_alike(name, root, monkeypatch, layout=0):
    """A small data set with its split file, in the published layout (0) or torchvision's (1)."""
    source = prepare.SOURCES[name]
    rows = {}
    for split, n in (("train", 60), ("val", 30), ("test", 3)):
        rows[split] = [[f"class_{i % 3}/{split}_{i}.jpg", i % 3, f"name {i % 3}"] for i in range(n)]
        random.Random(split).shuffle(rows[split])
        for path, _, _ in rows[split]:
            touch(root / source.folders[layout] / path)
    content = json.dumps(rows).encode()
    split_path(name, root).parent.mkdir(exist_ok=True)
    split_path(name, root).write_bytes(content)
    git_hash = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    change(name, monkeypatch, split=(source.split[0], git_hash))
    return rows


def imagenet(root, monkeypatch):
    """Three classes; the shifts hold two of them, as ImageNet-A and -R hold 200 of the 1000."""
    for wnid in ("n01440764", "n01443537", "n01484850"):
        touch(root / f"imagenet/images/train/{wnid}/{wnid}_0.JPEG")
        touch(root / f"imagenet/images/train/{wnid}/{wnid}_1.JPEG")
        touch(root / f"imagenet/images/val/{wnid}/ILSVRC2012_val_{wnid}.JPEG")
    names = "n01440764 tench\nn01443537 goldfish\nn01484850 great white shark\n"
    (root / "imagenet/classnames.txt").write_text(names)
    change("imagenet", monkeypatch, counts={"train": 6, "val": 0, "test": 3, "classes": 3})
    for label, wnid in ((1, "n01443537"), (2, "n01484850")):
        touch(root / f"imagenetv2/imagenetv2-matched-frequency-format-val/{label}/x.jpeg")
        touch(root / f"imagenet-sketch/images/{wnid}/x.JPEG")
        touch(root / f"imagenet-adversarial/imagenet-a/{wnid}/x.jpg")
        touch(root / f"imagenet-rendition/imagenet-r/{wnid}/x.jpg")
    for name in prepare.SHIFTS:
        change(name, monkeypatch, counts={"images": 2, "classes": 2})


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the script on tmp_path; returns whether it worked, and what it printed."""

    def run(*names, out="out"):
        try:
            prepare.main([*names, "--root", str(tmp_path), "--out", str(tmp_path / out)])
            return True, capsys.readouterr().out
        except SystemExit as stop:
            captured = capsys.readouterr()
            return False, f"{captured.out}{captured.err}{stop}"

    return run


@pytest.mark.parametrize("name", ["eurosat", "stanford_cars"])
def test_the_published_layout_is_used_as_it_is(name, tmp_path, monkeypatch, run):
    rows = look_alike(name, tmp_path, monkeypatch)
    assert run(name)[0]
    data = load_dataset(tmp_path / "out" / name)
    assert data.classnames == ["name 0", "name 1", "name 2"]
    assert data.template == prepare.SOURCES[name].template
    # The images are in the published order.
    folder = tmp_path / prepare.SOURCES[name].folders[0]
    for split, part in (("train", data.train), ("val", data.val), ("test", data.test)):
        assert part.images == [folder / path for path, _, _ in rows[split]]
        assert part.labels == [label for _, label, _ in rows[split]]


@pytest.mark.parametrize("name", ["caltech101", "dtd"])
def test_torchvision_downloads_to_its_own_layout(name, tmp_path, monkeypatch, run):
    look_alike(name, tmp_path, monkeypatch, layout=1)
    folder = tmp_path / prepare.SOURCES[name].folders[1]
    away = folder.rename(tmp_path / "away")
    download = prepare.SOURCES[name].torchvision
    monkeypatch.setattr(datasets, download, lambda root, download: away.rename(folder))
    # The second time the images are there.
    for _ in range(2):
        assert run(name, out=".")[0]
        assert len(load_dataset(tmp_path / name).train.images) == 60
    # The path is relative, so that a shared folder can be mounted anywhere.
    assert json.loads((tmp_path / name / "dataset.json").read_text())["images"] == ".."


def test_aircraft(tmp_path, monkeypatch, run):
    folder = tmp_path / "fgvc_aircraft"
    folder.mkdir()
    (folder / "variants.txt").write_text("707-320\nA340-200\n")
    for k, split in enumerate(("train", "val", "test")):
        (folder / f"images_variant_{split}.txt").write_text(f"100{k} A340-200\n200{k} 707-320\n")
        for image in (f"100{k}", f"200{k}"):
            touch(folder / f"images/{image}.jpg")
    change("fgvc_aircraft", monkeypatch, counts={"train": 2, "val": 2, "test": 2, "classes": 2})
    assert run("fgvc_aircraft")[0]
    data = load_dataset(tmp_path / "out/fgvc_aircraft")
    assert data.classnames == ["707-320", "A340-200"]
    assert data.test.labels == [1, 0]
    assert data.test.images[0] == folder / "images/1002.jpg"


def test_imagenet_and_its_shifts(tmp_path, monkeypatch, run):
    imagenet(tmp_path, monkeypatch)
    assert "prepare imagenet first" in run("imagenet_a")[1]
    # imagenet is prepared first, whatever the order of the names.
    assert run(*prepare.SHIFTS, "imagenet")[0]
    data = load_dataset(tmp_path / "out/imagenet")
    assert data.classnames == ["tench", "goldfish", "great white shark"]
    assert data.train.labels == [0, 0, 1, 1, 2, 2]
    assert data.val.labels == [] and data.test.labels == [0, 1, 2]
    assert list(data.domains) == ["imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r"]
    assert all(domain.labels == [1, 2] for domain in data.domains.values())
    # The domains stay when imagenet is prepared again.
    assert run("imagenet")[0]
    assert load_dataset(tmp_path / "out/imagenet") == data


def test_missing_images_are_counted_and_nothing_is_written(tmp_path, monkeypatch, run):
    rows = look_alike("eurosat", tmp_path, monkeypatch)
    gone = [f"eurosat/2750/{path}" for path, _, _ in rows["train"][:4]]
    for path in gone:
        (tmp_path / path).unlink()
    worked, out = run("eurosat")
    assert not worked and "4 of 93 images are missing" in out and ", ".join(gone[:3]) in out
    assert not (tmp_path / "out").exists()


def test_without_a_split_file_the_images_are_counted(tmp_path, monkeypatch, run):
    imagenet(tmp_path, monkeypatch)
    (tmp_path / "imagenet-rendition/imagenet-r/n01443537/x.jpg").unlink()
    assert "found {'images': 1, 'classes': 1}" in run("imagenet", "imagenet_r")[1]
    assert load_dataset(tmp_path / "out/imagenet").domains == {}
    (tmp_path / "imagenet/images/train/n01443537/n01443537_0.JPEG").unlink()
    assert "found {'train': 5," in run("imagenet", out="other")[1]
    assert not (tmp_path / "other").exists()


def test_no_network_tells_what_to_do_by_hand(tmp_path, monkeypatch, run):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(datasets, "DTD", offline)
    monkeypatch.setattr("urllib.request.urlopen", offline)
    look_alike("food101", tmp_path, monkeypatch)
    look_alike("eurosat", tmp_path, monkeypatch)
    split_path("eurosat", tmp_path).unlink()
    worked, out = run("dtd", "sun397", "stanford_cars", "eurosat", "food101")
    # The others fail, but food101 is there.
    assert not worked and out.endswith("not prepared: stanford_cars, sun397, dtd, eurosat")
    assert (tmp_path / "out/food101/dataset.json").exists()
    assert "error: dtd: <urlopen error no network>" in out
    assert f"The images belong in {tmp_path}/dtd/images/: get dtd-r1.0.1.tar.gz from" in out
    assert f"The images belong in {tmp_path}/sun397/SUN397/: get SUN397.tar.gz from" in out
    assert f"belong in {tmp_path}/stanford_cars/: get both cars_train/ and cars_test/" in out
    path = split_path("eurosat", tmp_path)
    assert f"Save {prepare.SPLITS}split_zhou_EuroSAT.json as {path}" in out


def test_split_files_are_downloaded_checked_and_kept(tmp_path, monkeypatch, run):
    look_alike("eurosat", tmp_path, monkeypatch)
    path = split_path("eurosat", tmp_path)
    content = path.read_bytes()
    # A file that is not the published one is refused.
    path.write_bytes(content.replace(b"train_1", b"train_2"))
    assert f"the split file ({path}) is not the published one" in run("eurosat")[1]
    path.unlink()
    answers = iter([io.BytesIO(content[:-9]), io.BytesIO(content)])
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: next(answers))
    # A truncated download is refused and not kept.
    assert "is not the published one" in run("eurosat")[1] and not path.exists()
    assert run("eurosat")[0] and path.read_bytes() == content
    # The kept file is used the next time: there is no third answer.
    assert run("eurosat")[0]


@pytest.mark.parametrize("text", ["n01443537 goldfish\nn01440764 tench\n", "n01440764\n", None])
def test_classnames_must_be_there_and_sorted(text, tmp_path, monkeypatch, run):
    imagenet(tmp_path, monkeypatch)
    path = tmp_path / "imagenet/classnames.txt"
    path.unlink()
    if text:
        path.write_text(text)
    worked, out = run("imagenet")
    assert not worked and f"{path} must have lines 'wnid name', sorted by wnid" in out
    assert "DATASETS.md" in out and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, folder", [("imagenetv2", "1000"), ("imagenet_sketch", "n99")])
def test_a_folder_that_is_no_class(name, folder, tmp_path, monkeypatch, run):
    imagenet(tmp_path, monkeypatch)
    touch(tmp_path / prepare.SHIFTS[name].folders[0] / folder / "x.jpeg")
    assert f"{folder} is no class of ImageNet" in run("imagenet", name)[1]
    assert load_dataset(tmp_path / "out/imagenet").domains == {}
