"""The main job end to end on a small setting, and the files that set the project up."""
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import mini_coop
from mini_coop import CoOp, load_clip

ROOT = Path(__file__).resolve().parents[1]


def test_main_job(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mini_coop.main("--dataset styles --shots 1 2 --seeds 1 2 --n-ctx 2 --epochs 3 --device cpu".split())
    out = capsys.readouterr().out
    folder = tmp_path / "runs/mini_styles"
    result = json.loads((folder / "results.json").read_text())
    assert set(result["few_shot"]) == {"linear probe", "CoOp unified", "CoOp class-specific"}
    for method, row in result["few_shot"].items():
        assert method in out and [len(row[n]) for n in ("1", "2")] == [2, 2]
        assert all(0 <= seed["test"] <= 100 for n in row for seed in row[n])
    assert result["settings"]["epochs"] == 3 and result["template"] in result["zero_shot"] and "<- declared" in out
    assert Image.open(folder / "figure.png").size[0] > 500
    contexts = sorted(p.name for p in folder.glob("*.pt"))
    assert len(contexts) == 8 and "CoOp_unified_2_shots_seed_1.pt" in contexts
    # the saved context gives the accuracy that the JSON reports
    model, preprocess = load_clip("mini", "cpu")
    data = mini_coop.load_dataset("styles")
    coop = CoOp.load(folder / "CoOp_unified_2_shots_seed_1.pt", model)
    features = mini_coop.encode_images(model, preprocess, data.test.images, progress=False)
    assert 100 * coop.score(features, data.test.labels) == pytest.approx(result["few_shot"]["CoOp unified"]["2"][0]["test"], abs=1e-4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs"]


def test_own_folder_with_an_unreadable_image_and_views(tmp_path, capsys):
    for name, colour in (("red", (220, 30, 30)), ("blue", (30, 30, 220))):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (70, 64), tuple(min(255, c + 3 * i) for c in colour)).save(tmp_path / "photos" / name / f"{i}.png")
    load_one = mini_coop.load_dataset(tmp_path / "photos").train.images[0]
    load_one.write_bytes(b"no image")
    with pytest.warns(UserWarning, match="cannot be read"):
        mini_coop.main(["--dataset", str(tmp_path / "photos"), "--out", str(tmp_path / "out"), *"--shots 4 --seeds 1 --views 2 --n-ctx 1 "
                        "--epochs 2 --class-specific no --device cpu".split()])
    out = capsys.readouterr().out
    assert "photos: 2 classes" in out and "class-specific" not in out and (tmp_path / "out/mini_photos/results.json").exists()


def test_ctrl_c_writes_no_half_result(tmp_path, capsys, monkeypatch):
    def interrupt(epoch, epochs, lr):
        raise KeyboardInterrupt
    monkeypatch.setattr(mini_coop, "learning_rate", interrupt)
    with pytest.raises(SystemExit) as stop:
        mini_coop.main(["--dataset", "styles", "--shots", "1", "--seeds", "1", "--class-specific", "no", "--device", "cpu", "--out", str(tmp_path)])
    assert stop.value.code == 130 and "interrupted" in capsys.readouterr().err
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_folder_without_test_images(tmp_path, capsys):
    for name in ("red", "blue"):
        (tmp_path / "photos/train" / name).mkdir(parents=True)
        Image.new("RGB", (64, 64), name).save(tmp_path / "photos/train" / name / "a.png")
    with pytest.raises(SystemExit):
        mini_coop.main(["--dataset", str(tmp_path / "photos"), "--device", "cpu", "--out", str(tmp_path / "out")])
    assert "photos has no test images" in capsys.readouterr().err


@pytest.mark.parametrize("options, message", [
    ("--dataset nowhere", "no data set 'nowhere': neither a folder nor one of actions, designers, objects"),
    ("--model RN5", "neither 'mini', nor one of RN50"),
    ("--shots 0", "'0' is not a whole number of 1 or more"),
    ("--class-position start", "choose from"),
    ("--device gpu", "device 'gpu' cannot be used here"),
])
def test_wrong_options_say_what_is_allowed(options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        mini_coop.main(options.split())
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_import_does_nothing():
    """No downloads, no data read, no threads changed at import; the module runs with -W error for our own code."""
    code = "import mini_coop, sys; assert 'sklearn' not in sys.modules and 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_environment_and_pyproject_name_the_same_packages():
    project = (ROOT / "pyproject.toml").read_text()
    wanted = set(re.findall(r'"([A-Za-z-]+)', re.search(r"^dependencies = \[(.*?)\]", project, re.S | re.M)[1]))
    wanted |= set(re.findall(r'"(clip|nbval|jupyter)\b', project))
    listed = set(re.findall(r"^ +- ([A-Za-z][A-Za-z-]*)", (ROOT / "environment.yml").read_text(), re.M)) - {"conda-forge", "python", "pip", "git"}
    assert listed == wanted == {"torch", "clip", "jupyter", "matplotlib", "scikit-learn", "nbval"}
    commits = {re.search(r"openai/CLIP(?:\.git)?@([0-9a-f]{40})", text)[1] for text in (project, (ROOT / "environment.yml").read_text())}
    assert len(commits) == 1


def test_cuda_is_used_where_there_is_one():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    assert next(load_clip()[0].parameters()).is_cuda
