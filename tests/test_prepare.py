"""data/prepare.py on look-alikes of the public data sets: real names, trees and formats, few and
tiny images."""

import hashlib
import json
import random
import urllib.error

import pytest
from PIL import Image

import grid
import mini_coop
import options
import prepare
from mini_coop import few_shot, load_dataset

SPLIT = [name for name, source in prepare.SOURCES.items() if source.split]


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (len(path.name) * 9 % 255, 9, 99)).save(path)


def look_alike(name, root, monkeypatch, layout=0, per_split=(6, 3, 3)):
    """A small data set `name` in the published layout (0) or torchvision's (1), with its split file; the row is told its size."""
    source = prepare.SOURCES[name]
    rows, counts = {}, []
    for split, n in zip(("train", "val", "test"), per_split):
        rows[split] = [
            [f"class_{i % 3}/{split}_{i:03}.jpg", i % 3, f"name {i % 3}"] for i in range(n)
        ]
        random.Random(split).shuffle(rows[split])
        counts.append(n)
        for path, *_ in rows[split]:
            touch(root / source.images[layout] / path)
    content = json.dumps(rows).encode()
    (root / source.images[0].split("/")[0]).mkdir(exist_ok=True)
    (root / source.images[0].split("/")[0] / source.split).write_bytes(content)
    change(
        name,
        monkeypatch,
        check=prepare.digest(content, source.check),
        classes=3,
        counts=tuple(counts),
    )
    return rows


def change(name, monkeypatch, **fields):
    monkeypatch.setitem(prepare.SOURCES, name, prepare.SOURCES[name]._replace(**fields))


def run(capsys, *args):
    """-> (worked, what was printed)"""
    try:
        prepare.main([str(a) for a in args])
        return True, capsys.readouterr().out
    except SystemExit as stop:
        captured = capsys.readouterr()
        return False, f"{captured.out}{captured.err}{stop}"


@pytest.mark.parametrize("name", SPLIT)
def test_the_published_layout_is_used_as_it_is(name, tmp_path, monkeypatch, capsys):
    rows = look_alike(name, tmp_path, monkeypatch)
    worked, out = run(capsys, name, "--root", tmp_path, "--out", tmp_path / "out")
    assert worked and "3 classes, train / val / test 6 / 3 / 3" in out
    data = load_dataset(tmp_path / "out" / name)
    assert (
        data.classnames == ["name 0", "name 1", "name 2"]
        and data.template == prepare.SOURCES[name].template
    )
    assert [str(p).endswith(row[0]) for p, row in zip(data.train.images, rows["train"])] == [
        True
    ] * 6  # in the published order
    assert data.train.labels == [row[1] for row in rows["train"]] and len(data.test.images) == 3


@pytest.mark.parametrize("name", [n for n in SPLIT if len(prepare.SOURCES[n].images) > 1])
def test_torchvisions_layout_too(name, tmp_path, monkeypatch, capsys):
    look_alike(name, tmp_path, monkeypatch, layout=1)
    assert run(capsys, name, "--root", tmp_path, "--out", tmp_path)[0]
    assert (
        json.loads((tmp_path / name / "dataset.json").read_text())["images"] == ".."
    )  # a shared folder can be mounted anywhere
    assert len(load_dataset(tmp_path / name).train.images) == 6


def test_the_few_shot_images_are_the_published_ones(tmp_path, monkeypatch, capsys):
    """The published sampling, written from its description on the split file itself, gives the same paths."""
    rows = look_alike("dtd", tmp_path, monkeypatch, per_split=(60, 30, 3))
    run(capsys, "dtd", "--root", tmp_path, "--out", tmp_path / "out")
    data = load_dataset(tmp_path / "out/dtd")
    for seed, shots in ((1, 1), (2, 4), (3, 16)):
        rng, expected = random.Random(seed), []
        for split, n in (("train", shots), ("val", min(shots, 4))):
            by_class = {}
            for row in rows[split]:
                by_class.setdefault(row[1], []).append(row)
            expected.append(
                [row[0] for members in by_class.values() for row in rng.sample(members, n)]
            )
        chosen = few_shot(data.train.labels, shots, seed, data.val.labels)
        for split, indices, paths in zip((data.train, data.val), chosen, expected):
            assert [str(split.images[i])[-len(path) :] for i, path in zip(indices, paths)] == paths


def test_aircraft(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "fgvc_aircraft"
    folder.mkdir()
    (folder / "variants.txt").write_text("707-320\nA340-200\n")
    for k, split in enumerate(("train", "val", "test")):
        (folder / f"images_variant_{split}.txt").write_text(f"100{k} A340-200\n200{k} 707-320\n")
        for image in (f"100{k}", f"200{k}"):
            touch(folder / f"images/{image}.jpg")
    change("fgvc_aircraft", monkeypatch, classes=2, counts=(2, 2, 2))
    assert run(capsys, "fgvc_aircraft", "--root", tmp_path, "--out", tmp_path / "out")[0]
    data = load_dataset(tmp_path / "out/fgvc_aircraft")
    assert (
        data.classnames == ["707-320", "A340-200"]
        and data.test.labels == [1, 0]
        and data.test.images[0].name == "1002.jpg"
    )
    (folder / "images_variant_val.txt").unlink()
    worked, out = run(capsys, "fgvc_aircraft", "--root", tmp_path, "--out", tmp_path / "out")
    assert not worked and "images_variant_val.txt is missing. Needed: images/" in out


def imagenet(root, monkeypatch):
    wnids = {"n01440764": "tench", "n01443537": "goldfish", "n01484850": "great white shark"}
    (root / "imagenet").mkdir(parents=True)
    (root / "imagenet/classnames.txt").write_text("".join(f"{w} {n}\n" for w, n in wnids.items()))
    for w in wnids:
        for i in range(2):
            touch(root / f"imagenet/images/train/{w}/{w}_{i}.JPEG")
        touch(root / f"imagenet/images/val/{w}/ILSVRC2012_val_{w}.JPEG")
        touch(root / f"imagenet-sketch/images/{w}/sketch_0.JPEG")
    for k in range(3):
        touch(root / f"imagenetv2/imagenetv2-matched-frequency-format-val/{k}/x.jpeg")
    for w in list(wnids)[1:]:  # two of the three classes, as A and R hold 200 of 1000
        touch(root / f"imagenet-adversarial/imagenet-a/{w}/a.jpg")
        touch(root / f"imagenet-rendition/imagenet-r/{w}/r.jpg")
    change("imagenet", monkeypatch, classes=3, counts=(6, 0, 3))
    for name, (n, k) in {
        "imagenetv2": (3, 3),
        "imagenet_sketch": (3, 3),
        "imagenet_a": (2, 2),
        "imagenet_r": (2, 2),
    }.items():
        monkeypatch.setitem(
            prepare.SHIFTS, name, (prepare.SHIFTS[name][0], n, k, prepare.SHIFTS[name][3])
        )


def test_imagenet_and_its_shifts(tmp_path, monkeypatch, capsys):
    imagenet(tmp_path, monkeypatch)
    worked, out = run(capsys, "imagenet_a", "--root", tmp_path, "--out", tmp_path / "out")
    assert not worked and "prepare imagenet first" in out
    assert run(capsys, *prepare.SHIFTS, "imagenet", "--root", tmp_path, "--out", tmp_path / "out")[
        0
    ]
    data = load_dataset(tmp_path / "out/imagenet")
    assert (
        data.classnames == ["tench", "goldfish", "great white shark"]
        and data.train.labels == [0, 0, 1, 1, 2, 2]
        and data.val.images == []
    )
    assert set(data.domains) == set(prepare.SHIFTS) and data.domains["imagenetv2"].labels == [
        0,
        1,
        2,
    ]
    assert data.domains["imagenet_a"].labels == data.domains["imagenet_r"].labels == [1, 2]
    assert run(capsys, "imagenet", "--root", tmp_path, "--out", tmp_path / "out")[
        0
    ]  # prepared again, the domains stay
    assert set(load_dataset(tmp_path / "out/imagenet").domains) == set(prepare.SHIFTS)
    touch(tmp_path / "imagenet-sketch/images/n99/x.JPEG")
    worked, out = run(capsys, "imagenet_sketch", "--root", tmp_path, "--out", tmp_path / "out")
    assert not worked and "'n99' that is no class of ImageNet" in out
    (tmp_path / "imagenet/images/val/n01440764/ILSVRC2012_val_n01440764.JPEG").unlink()
    worked, out = run(capsys, "imagenet", "--root", tmp_path, "--out", tmp_path / "other")
    assert (
        not worked
        and "(6, 0, 2)" in out
        and "expected" in out
        and not (tmp_path / "other").exists()
    )


def test_a_domain_of_few_classes_is_a_task_of_those(tmp_path, monkeypatch, capsys, mini):
    imagenet(tmp_path, monkeypatch)
    run(
        capsys,
        "imagenet",
        "imagenet_a",
        "imagenet_sketch",
        "--root",
        tmp_path,
        "--out",
        tmp_path / "out",
    )
    data = load_dataset(tmp_path / "out/imagenet")
    data = data._replace(
        classnames=[*data.classnames, "ray", "hen"]
    )  # A holds two of five classes, Sketch three
    weights = mini_coop.torch.tensor([0.0, -1, -2, -3, -4])[:, None].expand(5, 256)
    monkeypatch.setattr(grid, "zero_shot_weights", lambda model, names, template: weights)
    monkeypatch.setattr(
        grid,
        "cached_features",
        lambda folder, model, preprocess, images, *views: mini_coop.torch.ones(len(images), 256),
    )
    args = options.arguments("--shots 1 --seeds 1 --n-ctx 1 --epochs 1 --class-specific no".split())
    result = grid.Grid(*mini, data, tmp_path, args).results()["zero_shot"][data.template]
    assert result["imagenet_a"] == 50  # class 0, which scores highest, is not among the answers
    assert result["imagenet_sketch"] == result["test"] == pytest.approx(100 / 3)


# ---------------------------------------------------------------- what goes wrong


def test_missing_images_are_counted_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    rows = look_alike("eurosat", tmp_path, monkeypatch)
    gone = [row[0] for row in rows["train"]][:4]
    for path in gone:
        (tmp_path / "eurosat/2750" / path).unlink()
    worked, out = run(capsys, "eurosat", "--root", tmp_path, "--out", tmp_path / "out")
    assert (
        not worked
        and f"4 of 12 images that the split names are not under {tmp_path / 'eurosat/2750'}, first {', '.join(gone[:3])}:"
        in out
    )
    assert not (tmp_path / "out").exists()


def test_a_split_file_that_is_not_the_published_one(tmp_path, monkeypatch, capsys):
    look_alike("eurosat", tmp_path, monkeypatch)
    path = tmp_path / "eurosat/split_zhou_EuroSAT.json"
    content = path.read_bytes().replace(b"train_000", b"train_001")
    path.write_bytes(content)
    worked, out = run(capsys, "eurosat", "--root", tmp_path, "--out", tmp_path / "out")
    assert (
        not worked
        and f"is not the published split file: its hash is {hashlib.sha256(content).hexdigest()}, expected"
        in out
    )


def test_wrong_counts(tmp_path, monkeypatch, capsys):
    look_alike("food101", tmp_path, monkeypatch)
    change("food101", monkeypatch, counts=(6, 3, 4))
    worked, out = run(capsys, "food101", "--root", tmp_path, "--out", tmp_path / "out")
    assert not worked and "food101: the split gives" in out and "(6, 3, 3)" in out


def test_no_network_tells_what_to_do_by_hand(tmp_path, monkeypatch, capsys):
    import torchvision.datasets

    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torchvision.datasets, "DTD", offline)
    monkeypatch.setattr("urllib.request.urlopen", offline)
    worked, out = run(
        capsys, "dtd", "sun397", "stanford_cars", "--root", tmp_path, "--out", tmp_path / "out"
    )
    assert not worked and out.endswith("not prepared: stanford_cars, sun397, dtd")
    assert (
        "dtd: the download failed (URLError: <urlopen error no network>). By hand: dtd-r1.0.1.tar.gz from"
        in out
    )
    assert (
        f"sun397: no images under {tmp_path}. Needed: SUN397.tar.gz" in out
        and str(tmp_path / "sun397/SUN397") in out
    )
    rows = look_alike("eurosat", tmp_path, monkeypatch)
    (tmp_path / "eurosat/split_zhou_EuroSAT.json").unlink()
    worked, out = run(capsys, "eurosat", "--root", tmp_path, "--out", tmp_path / "out")
    assert (
        rows
        and not worked
        and f"Put it there by hand: {tmp_path / 'eurosat/split_zhou_EuroSAT.json'} (from https://"
        in out
    )


def test_split_files_are_downloaded_checked_and_kept(tmp_path, monkeypatch, capsys):
    look_alike("eurosat", tmp_path, monkeypatch)
    path, asked = tmp_path / "eurosat/split_zhou_EuroSAT.json", []
    content = path.read_bytes()
    path.unlink()
    monkeypatch.setattr(
        "urllib.request.urlopen",
        lambda url, timeout: asked.append(url) or __import__("io").BytesIO(content[:-9]),
    )
    worked, out = run(capsys, "eurosat", "--root", tmp_path, "--out", tmp_path / "out")
    assert not worked and "is not the published split file" in out and not path.exists()
    monkeypatch.setattr(
        "urllib.request.urlopen",
        lambda url, timeout: asked.append(url) or __import__("io").BytesIO(content),
    )
    assert (
        run(capsys, "eurosat", "--root", tmp_path, "--out", tmp_path / "out")[0]
        and path.read_bytes() == content
    )
    assert (
        run(capsys, "eurosat", "--root", tmp_path, "--out", tmp_path / "out")[0] and len(asked) == 2
    )
    assert asked[0].startswith(
        "https://raw.githubusercontent.com/linzhiqiu/cross_modal_adaptation/ac9077ee"
    ) and asked[0].endswith("/split_zhou_EuroSAT.json")


def test_a_wrong_root_and_an_unknown_name(tmp_path, capsys):
    assert "is no folder" in run(capsys, "dtd", "--root", tmp_path / "none")[1]
    assert "invalid choice: 'cifar10' (choose from" in run(capsys, "cifar10")[1]


def test_gits_hash_of_a_file():
    assert prepare.digest(b"", "blob x") == "blob e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"


def test_the_table_has_every_data_set_of_the_paper():
    assert len(prepare.SOURCES) == 11 and len(SPLIT) == 9
    assert (
        sum(s.counts[2] for s in prepare.SOURCES.values())
        == 50000 + 2465 + 3669 + 8041 + 2463 + 30300 + 3333 + 19850 + 1692 + 8100 + 3783
    )
    assert all("{}" in s.template and (s.torchvision or s.manual) for s in prepare.SOURCES.values())
