"""data/prepare.py on small copies of the public data sets: real names, folders and formats, but few
and tiny images."""

import hashlib
import io
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
    """A small data set `name` with its split file, in the published layout (0) or torchvision's
    (1). Its entry in SOURCES gets the new counts and hash."""
    source = prepare.SOURCES[name]
    rows = {}
    for split, n in zip(("train", "val", "test"), per_split):
        rows[split] = [
            [f"class_{i % 3}/{split}_{i:03}.jpg", i % 3, f"name {i % 3}"] for i in range(n)
        ]
        random.Random(split).shuffle(rows[split])
        for path, *_ in rows[split]:
            touch(root / source.images[layout] / path)
    content = json.dumps(rows).encode()
    folder = root / source.images[0].split("/")[0]
    folder.mkdir(exist_ok=True)
    (folder / source.split).write_bytes(content)
    check = prepare.digest(content, source.check)
    change(name, monkeypatch, check=check, classes=3, counts=tuple(per_split))
    return rows


def change(name, monkeypatch, **fields):
    monkeypatch.setitem(prepare.SOURCES, name, prepare.SOURCES[name]._replace(**fields))


def run(capsys, *args):
    """Runs the script; returns whether it worked, and what it printed."""
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
    assert data.classnames == ["name 0", "name 1", "name 2"]
    assert data.template == prepare.SOURCES[name].template
    # The images are in the published order.
    assert len(data.train.images) == 6
    assert all(str(p).endswith(row[0]) for p, row in zip(data.train.images, rows["train"]))
    assert data.train.labels == [row[1] for row in rows["train"]]
    assert len(data.test.images) == 3


@pytest.mark.parametrize("name", [n for n in SPLIT if len(prepare.SOURCES[n].images) > 1])
def test_torchvisions_layout_too(name, tmp_path, monkeypatch, capsys):
    look_alike(name, tmp_path, monkeypatch, layout=1)
    assert run(capsys, name, "--root", tmp_path, "--out", tmp_path)[0]
    # The path is relative, so that a shared folder can be mounted anywhere.
    assert json.loads((tmp_path / name / "dataset.json").read_text())["images"] == ".."
    assert len(load_dataset(tmp_path / name).train.images) == 6


def test_the_few_shot_images_are_the_published_ones(tmp_path, monkeypatch, capsys):
    """The published sampling, applied to the split file itself, gives the same paths."""
    rows = look_alike("dtd", tmp_path, monkeypatch, per_split=(60, 30, 3))
    run(capsys, "dtd", "--root", tmp_path, "--out", tmp_path / "out")
    data = load_dataset(tmp_path / "out/dtd")
    for seed, shots in ((1, 1), (2, 4), (3, 16)):
        rng = random.Random(seed)
        expected = []
        for split, n in (("train", shots), ("val", min(shots, 4))):
            by_class = {}
            for row in rows[split]:
                by_class.setdefault(row[1], []).append(row)
            drawn = []
            for members in by_class.values():
                drawn += [row[0] for row in rng.sample(members, n)]
            expected.append(drawn)
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
    assert data.classnames == ["707-320", "A340-200"]
    assert data.test.labels == [1, 0]
    assert data.test.images[0].name == "1002.jpg"
    (folder / "images_variant_val.txt").unlink()
    worked, out = run(capsys, "fgvc_aircraft", "--root", tmp_path, "--out", tmp_path / "out")
    assert not worked and "images_variant_val.txt is missing. Needed in" in out
    assert f"{folder}/: images/, variants.txt and" in out


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
    sizes = {"imagenetv2": 3, "imagenet_sketch": 3, "imagenet_a": 2, "imagenet_r": 2}
    for name, n in sizes.items():
        small = prepare.SHIFTS[name]._replace(images=n, classes=n)
        monkeypatch.setitem(prepare.SHIFTS, name, small)


def test_imagenet_and_its_shifts(tmp_path, monkeypatch, capsys):
    imagenet(tmp_path, monkeypatch)
    worked, out = run(capsys, "imagenet_a", "--root", tmp_path, "--out", tmp_path / "out")
    assert not worked and "prepare imagenet first" in out
    names = [*prepare.SHIFTS, "imagenet"]
    assert run(capsys, *names, "--root", tmp_path, "--out", tmp_path / "out")[0]
    data = load_dataset(tmp_path / "out/imagenet")
    assert data.classnames == ["tench", "goldfish", "great white shark"]
    assert data.train.labels == [0, 0, 1, 1, 2, 2]
    assert data.val.images == []
    assert set(data.domains) == set(prepare.SHIFTS)
    assert data.domains["imagenetv2"].labels == [0, 1, 2]
    assert data.domains["imagenet_a"].labels == data.domains["imagenet_r"].labels == [1, 2]
    # The domains stay when imagenet is prepared again.
    assert run(capsys, "imagenet", "--root", tmp_path, "--out", tmp_path / "out")[0]
    assert set(load_dataset(tmp_path / "out/imagenet").domains) == set(prepare.SHIFTS)
    touch(tmp_path / "imagenet-sketch/images/n99/x.JPEG")
    worked, out = run(capsys, "imagenet_sketch", "--root", tmp_path, "--out", tmp_path / "out")
    assert not worked and "'n99' that is no class of ImageNet" in out
    (tmp_path / "imagenet/images/val/n01440764/ILSVRC2012_val_n01440764.JPEG").unlink()
    worked, out = run(capsys, "imagenet", "--root", tmp_path, "--out", tmp_path / "other")
    assert not worked and "(6, 0, 2)" in out and "expected" in out
    assert not (tmp_path / "other").exists()


def test_a_domain_of_few_classes_is_a_task_of_those(tmp_path, monkeypatch, capsys, mini):
    imagenet(tmp_path, monkeypatch)
    names = ["imagenet", "imagenet_a", "imagenet_sketch"]
    run(capsys, *names, "--root", tmp_path, "--out", tmp_path / "out")
    data = load_dataset(tmp_path / "out/imagenet")
    # ImageNet-A holds two of five classes, ImageNet-Sketch three.
    data = data._replace(classnames=[*data.classnames, "ray", "hen"])
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
    folder = tmp_path / "eurosat/2750"
    message = f"4 of 12 images that the split names are not under {folder}, first "
    assert not worked and message + ", ".join(gone[:3]) + ":" in out
    assert f"Remove {folder} and run this again" in out
    assert not (tmp_path / "out").exists()


def test_a_split_file_that_is_not_the_published_one(tmp_path, monkeypatch, capsys):
    look_alike("eurosat", tmp_path, monkeypatch)
    path = tmp_path / "eurosat/split_zhou_EuroSAT.json"
    content = path.read_bytes().replace(b"train_000", b"train_001")
    path.write_bytes(content)
    worked, out = run(capsys, "eurosat", "--root", tmp_path, "--out", tmp_path / "out")
    found = hashlib.sha256(content).hexdigest()
    assert not worked
    assert f"is not the published split file: its hash is {found}, expected" in out


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
    names = ["dtd", "sun397", "stanford_cars"]
    worked, out = run(capsys, *names, "--root", tmp_path, "--out", tmp_path / "out")
    assert not worked and out.endswith("not prepared: stanford_cars, sun397, dtd")
    assert "dtd: the download failed (URLError: <urlopen error no network>). Needed in" in out
    assert f"{tmp_path / 'dtd/images'}/: the class folders of dtd-r1.0.1.tar.gz from" in out
    assert f"sun397: no images under {tmp_path}. Needed in" in out
    assert f"{tmp_path / 'sun397/SUN397'}/: the folders of SUN397.tar.gz from" in out
    look_alike("eurosat", tmp_path, monkeypatch)
    path = tmp_path / "eurosat/split_zhou_EuroSAT.json"
    path.unlink()
    worked, out = run(capsys, "eurosat", "--root", tmp_path, "--out", tmp_path / "out")
    assert not worked and f"Put it there by hand: {path} (from https://" in out


def test_stanford_cars_names_the_folders_and_the_file(tmp_path, monkeypatch, capsys):
    args = ["stanford_cars", "--root", tmp_path, "--out", tmp_path / "out"]
    folder = tmp_path / "stanford_cars"

    def assert_it_says_what_is_needed():
        worked, out = run(capsys, *args)
        needed = out.split(f"Needed in {folder}/: ")[1]
        assert not worked and not (tmp_path / "out").exists()
        assert "cars_train/" in needed and "cars_test/" in needed
        assert "split_zhou_StanfordCars.json" in needed

    # No folder at all; then a folder with the split file, but no images.
    assert_it_says_what_is_needed()
    rows = look_alike("stanford_cars", tmp_path, monkeypatch)
    for path, *_ in [*rows["train"], *rows["val"], *rows["test"]]:
        (folder / path).unlink()
    assert_it_says_what_is_needed()


def test_imagenet_sketch_unpacks_under_another_name(tmp_path, monkeypatch, capsys):
    imagenet(tmp_path, monkeypatch)
    args = ["--root", tmp_path, "--out", tmp_path / "out"]
    assert run(capsys, "imagenet", *args)[0]
    before = (tmp_path / "out/imagenet/dataset.json").read_bytes()
    (tmp_path / "imagenet-sketch/images").rename(tmp_path / "imagenet-sketch/sketch")
    worked, out = run(capsys, "imagenet_sketch", *args)
    assert not worked and f"no folder {tmp_path / 'imagenet-sketch/images'}." in out
    assert "move or rename its folder sketch/ to imagenet-sketch/images" in out
    assert (tmp_path / "out/imagenet/dataset.json").read_bytes() == before


@pytest.mark.parametrize("name", ["imagenet", "imagenetv2"])
@pytest.mark.parametrize("fault", ["unsorted", "missing", "no names"])
def test_classnames_must_be_there_and_sorted(name, fault, tmp_path, monkeypatch, capsys):
    imagenet(tmp_path, monkeypatch)
    args = ["--root", tmp_path, "--out", tmp_path / "out"]
    written = tmp_path / "out/imagenet/dataset.json"
    before = None
    if name == "imagenetv2":
        assert run(capsys, "imagenet", *args)[0]
        before = written.read_bytes()
    path = tmp_path / "imagenet/classnames.txt"
    lines = path.read_text().splitlines()
    if fault == "unsorted":
        path.write_text("\n".join(reversed(lines)))
        message = f"the lines of {path} are not sorted by wnid"
    elif fault == "missing":
        path.unlink()
        message = f"{path} is missing"
    else:
        path.write_text("n01440764\n")
        message = f"{path} cannot be read as lines 'wnid name'"
    worked, out = run(capsys, name, *args)
    assert not worked and message in out
    # Where it is had, and what its lines are.
    assert "DATASETS.md, section ImageNet, of https://github.com/KaiyangZhou/CoOp" in out
    assert "sort its lines" in out if fault == "unsorted" else "'wnid name'" in out
    # Nothing was written, or what was there is unchanged.
    assert written.exists() == (name == "imagenetv2")
    assert before is None or written.read_bytes() == before


def test_a_folder_number_that_no_class_has(tmp_path, monkeypatch, capsys):
    imagenet(tmp_path, monkeypatch)
    args = ["--root", tmp_path, "--out", tmp_path / "out"]
    assert run(capsys, "imagenet", *args)[0]
    touch(tmp_path / prepare.SHIFTS["imagenetv2"].folder / "1000/x.jpeg")
    worked, out = run(capsys, "imagenetv2", *args)
    assert not worked and "'1000' that is no class of ImageNet" in out


def test_a_dataset_json_that_is_something_else(tmp_path, monkeypatch, capsys):
    imagenet(tmp_path, monkeypatch)
    args = ["--root", tmp_path, "--out", tmp_path / "out"]
    (tmp_path / "out/imagenet").mkdir(parents=True)
    (tmp_path / "out/imagenet/dataset.json").write_text("[]")
    worked, out = run(capsys, "imagenetv2", *args)
    assert not worked and "prepare imagenet again" in out
    assert run(capsys, "imagenet", *args)[0]  # which replaces it


def test_split_files_are_downloaded_checked_and_kept(tmp_path, monkeypatch, capsys):
    look_alike("eurosat", tmp_path, monkeypatch)
    path = tmp_path / "eurosat/split_zhou_EuroSAT.json"
    content = path.read_bytes()
    path.unlink()
    args = ["eurosat", "--root", tmp_path, "--out", tmp_path / "out"]
    asked = []

    def serve(answer):
        def urlopen(url, timeout):
            asked.append(url)
            return io.BytesIO(answer)

        monkeypatch.setattr("urllib.request.urlopen", urlopen)

    # A truncated download is refused and not kept.
    serve(content[:-9])
    worked, out = run(capsys, *args)
    assert not worked and "is not the published split file" in out and not path.exists()
    serve(content)
    assert run(capsys, *args)[0]
    assert path.read_bytes() == content
    # The kept file is used the next time.
    assert run(capsys, *args)[0]
    assert len(asked) == 2
    repository = "https://raw.githubusercontent.com/linzhiqiu/cross_modal_adaptation/ac9077ee"
    assert asked[0].startswith(repository)
    assert asked[0].endswith("/split_zhou_EuroSAT.json")


def test_a_wrong_root_and_an_unknown_name(tmp_path, capsys):
    assert "is no folder" in run(capsys, "dtd", "--root", tmp_path / "none")[1]
    assert "invalid choice: 'cifar10' (choose from" in run(capsys, "cifar10")[1]


def test_gits_hash_of_a_file():
    assert prepare.digest(b"", "blob x") == "blob e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"


def test_the_table_has_every_data_set_of_the_paper():
    assert len(prepare.SOURCES) == 11 and len(SPLIT) == 9
    n_test = sum(source.counts[2] for source in prepare.SOURCES.values())
    assert n_test == 50000 + 2465 + 3669 + 8041 + 2463 + 30300 + 3333 + 19850 + 1692 + 8100 + 3783
    assert all("{}" in s.template and s.manual for s in prepare.SOURCES.values())
