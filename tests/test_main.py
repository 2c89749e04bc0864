"""The main job end to end on a small setting, and the files that set the project up."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import mini_coop
from mini_coop import CoOp, grid, load_clip

ROOT = Path(__file__).resolve().parents[1]


def test_main_job(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grid.main("--dataset styles --shots 1 2 --seeds 1 2 --n-ctx 2 --epochs 3 --device cpu".split())
    out = capsys.readouterr().out
    folder = tmp_path / "runs/mini_styles"
    result = json.loads((folder / "results.json").read_text())
    assert set(result["few_shot"]) == {"linear probe", "CoOp unified", "CoOp class-specific"}
    for method, row in result["few_shot"].items():
        assert method in out and [len(row[n]) for n in ("1", "2")] == [2, 2]
        assert all(0 <= seed["test"] <= 100 for n in row for seed in row[n])
    assert (
        result["settings"]["epochs"] == 3
        and result["template"] in result["zero_shot"]
        and "<- declared" in out
    )
    assert Image.open(folder / "figure.png").size[0] > 500
    contexts = sorted(p.name for p in folder.glob("*.pt"))
    assert len(contexts) == 8 and "CoOp_unified_2_shots_seed_1.pt" in contexts
    # the saved context gives the accuracy that the JSON reports
    model, preprocess = load_clip("mini", "cpu")
    data = mini_coop.load_dataset("styles")
    coop = CoOp.load(folder / "CoOp_unified_2_shots_seed_1.pt", model)
    features = mini_coop.encode_images(model, preprocess, data.test.images, progress=False)
    assert 100 * coop.score(features, data.test.labels) == pytest.approx(
        result["few_shot"]["CoOp unified"]["2"][0]["test"], abs=1e-4
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs"]


def test_own_folder_with_an_unreadable_image_and_views(tmp_path, capsys):
    for name, colour in (("red", (220, 30, 30)), ("blue", (30, 30, 220))):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (70, 64), tuple(min(255, c + 3 * i) for c in colour)).save(
                tmp_path / "photos" / name / f"{i}.png"
            )
    load_one = mini_coop.load_dataset(tmp_path / "photos").train.images[0]
    load_one.write_bytes(b"no image")
    with pytest.warns(UserWarning, match="cannot be read"):
        grid.main(
            [
                "--dataset",
                str(tmp_path / "photos"),
                "--out",
                str(tmp_path / "out"),
                *"--shots 4 --seeds 1 --views 2 --n-ctx 1 "
                "--epochs 2 --class-specific no --device cpu".split(),
            ]
        )
    out = capsys.readouterr().out
    assert (
        "photos: 2 classes" in out
        and "class-specific" not in out
        and (tmp_path / "out/mini_photos/results.json").exists()
    )


def test_ctrl_c_writes_no_half_result(tmp_path, capsys, monkeypatch):
    def interrupt(epoch, epochs, lr):
        raise KeyboardInterrupt

    monkeypatch.setattr(mini_coop, "learning_rate", interrupt)
    with pytest.raises(SystemExit) as stop:
        grid.main(
            [
                "--dataset",
                "styles",
                "--shots",
                "1",
                "--seeds",
                "1",
                "--class-specific",
                "no",
                "--device",
                "cpu",
                "--out",
                str(tmp_path),
            ]
        )
    assert stop.value.code == 130 and "interrupted" in capsys.readouterr().err
    assert (
        not list(tmp_path.rglob("CoOp*"))
        and not list(tmp_path.rglob("results.json"))
        and not list(tmp_path.rglob("*.part"))
    )


def test_a_finished_cell_is_not_run_again_and_a_damaged_or_outdated_one_is(
    tmp_path, capsys, monkeypatch
):
    calls, fit = [], CoOp.fit
    monkeypatch.setattr(
        CoOp,
        "fit",
        lambda self, x, *rest, **kw: (
            (calls.append(len(x)) if len(x) != 32 else None) or fit(self, x, *rest, **kw)
        ),
    )
    options = [
        "--dataset",
        "styles",
        "--shots",
        "1",
        "2",
        "--seeds",
        "1",
        "2",
        "--n-ctx",
        "1",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    ]
    grid.main([*options, "--epochs", "1"])
    assert (
        len(calls) == 8 and "plan: 12 of 12 cells" in capsys.readouterr().out
    )  # 2 shots x 2 seeds x 2 contexts; and 4 probes
    first = json.loads((tmp_path / "mini_styles/results.json").read_text())
    grid.main([*options, "--epochs", "1"])
    assert len(calls) == 8 and "plan: 0 of 12 cells" in capsys.readouterr().out
    again = json.loads((tmp_path / "mini_styles/results.json").read_text())
    assert again["few_shot"] == first["few_shot"] and again["zero_shot"] == first["zero_shot"]
    cell = tmp_path / "mini_styles/CoOp_unified_2_shots_seed_1.json"
    cell.write_text(cell.read_text()[:30])  # half written
    grid.main([*options, "--epochs", "1"])
    assert calls[8:] == [16] and json.loads(cell.read_text())["accuracy"]
    grid.main([*options, "--epochs", "2"])  # another setting: nothing of it is finished
    assert len(calls) == 9 + 8


def test_several_data_sets_and_the_published_figures(tmp_path, capsys):
    grid.main(
        [
            "--dataset",
            "styles",
            "actions",
            *"--shots 1 --seeds 1 --n-ctx 1 --epochs 1 --device cpu".split(),
            "--out",
            str(tmp_path),
        ]
    )
    out = capsys.readouterr().out
    assert (
        "average of 2 data sets" in out and Image.open(tmp_path / "mini_figure.png").size[0] > 900
    )
    results = {
        t: json.loads((tmp_path / f"mini_{t}/results.json").read_text())
        for t in ("styles", "actions")
    }
    mean = sum(r["few_shot"]["CoOp unified"]["1"][0]["test"] for r in results.values()) / 2
    assert re.search(rf"CoOp unified +{mean:.1f}$", out, re.M)
    published = json.loads((mini_coop.DATA / "published.json").read_text())["RN50"]["imagenet"]
    for method in grid.METHODS:
        results["styles"]["few_shot"][method] = {"1": [{"test": 50.0, "imagenet_a": 20.0}]}
    results["styles"]["zero_shot"] = {
        t: {**row, "imagenet_a": 10.0} for t, row in results["styles"]["zero_shot"].items()
    }
    text = grid.report(results["styles"], published)
    assert re.search(r"CoOp unified +50.0 ± 0.0\n +published +57.15", text) and re.search(
        r"published, declared template +58.2", text
    )
    assert re.search(r"CoOp unified +20.0 ± 0.0\n +published +23.06", text) and re.search(
        r"published +21.83", text
    )


def test_check_prints_what_a_bug_report_needs(capsys):
    grid.main(["--check", "--device", "cpu"])
    out = capsys.readouterr().out
    for what in (
        "python ",
        "torch ",
        "CUDA",
        "OpenAI's weights found",
        "data sets found",
        "objects",
        "one step with mini           fine on cpu",
    ):
        assert what in out, what


def test_a_shared_folder_is_searched_for_weights_and_data(tmp_path):
    (tmp_path / "lab/clip").mkdir(parents=True)
    (tmp_path / "lab/clip/RN50.pt").write_bytes(b"not whole")
    (tmp_path / "lab/tiny").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "lab/tiny/a.png")
    (tmp_path / "lab/tiny/dataset.json").write_text(
        json.dumps({"classnames": ["x", "y"], "template": "{}", "splits": {"test": [["a.png", 0]]}})
    )
    code = "from mini_coop import *; print(weights_file('RN50')); print(weights_file('RN101')); print(load_dataset('tiny').test.images)"
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "MINI_COOP_ROOT": str(tmp_path / "lab")},
    ).stdout.splitlines()
    assert (
        out[0] == str(tmp_path / "lab/clip/RN50.pt")
        and out[1].endswith(os.path.join(".cache", "clip", "RN101.pt"))
        and "a.png" in out[2]
    )


def test_a_folder_without_test_images(tmp_path, capsys):
    for name in ("red", "blue"):
        (tmp_path / "photos/train" / name).mkdir(parents=True)
        Image.new("RGB", (64, 64), name).save(tmp_path / "photos/train" / name / "a.png")
    with pytest.raises(SystemExit):
        grid.main(
            [
                "--dataset",
                str(tmp_path / "photos"),
                "--device",
                "cpu",
                "--out",
                str(tmp_path / "out"),
            ]
        )
    assert "photos has no test images" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        ("--dataset nowhere", "no data set 'nowhere': neither a folder nor one of actions, "),
        ("--dataset styles styles", "two data sets of the same name"),
        ("--model RN5", "neither 'mini', nor one of RN50"),
        ("--shots 0", "'0' is not a whole number of 1 or more"),
        ("--class-position start", "choose from"),
        ("--device gpu", "device 'gpu' cannot be used here"),
    ],
)
def test_wrong_options_say_what_is_allowed(options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        grid.main(options.split())
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_import_does_nothing():
    """No downloads, no data read, no threads changed at import; the module runs with -W error for our own code."""
    code = "import mini_coop, sys; assert 'sklearn' not in sys.modules and 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_environment_and_pyproject_name_the_same_packages():
    project = (ROOT / "pyproject.toml").read_text()
    wanted = set(
        re.findall(
            r'"([A-Za-z-]+)', re.search(r"^dependencies = \[(.*?)\]", project, re.S | re.M)[1]
        )
    )
    wanted |= set(re.findall(r'"(clip|nbval|jupyter)\b', project))
    listed = set(
        re.findall(r"^ +- ([A-Za-z][A-Za-z-]*)", (ROOT / "environment.yml").read_text(), re.M)
    ) - {"conda-forge", "python", "pip", "git"}
    assert listed == wanted == {"torch", "clip", "jupyter", "matplotlib", "scikit-learn", "nbval"}
    commits = {
        re.search(r"openai/CLIP(?:\.git)?@([0-9a-f]{40})", text)[1]
        for text in (project, (ROOT / "environment.yml").read_text())
    }
    assert len(commits) == 1


def test_the_code_in_readme_runs(tmp_path, capsys, monkeypatch):
    """Every Python block of README, one after another, on a folder of own images: to a learned prompt and one labelled image."""
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S
    )
    assert (
        len(blocks) == 3 and len(blocks[1].splitlines()) == 2 and len(blocks[2].splitlines()) == 5
    )
    for name, colour in (("cat", (220, 30, 30)), ("dog", (30, 30, 220))):
        (tmp_path / "path/to/photos" / name).mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (70, 64), tuple(min(255, c + 2 * i) for c in colour)).save(
                tmp_path / "path/to/photos" / name / f"{i}.jpg"
            )
    Image.new("RGB", (70, 64), (225, 35, 35)).save(tmp_path / "a.jpg")
    monkeypatch.chdir(tmp_path)
    own = "\n".join(
        [blocks[0].split("\n\n")[0], blocks[1], blocks[0][blocks[0].index("chosen =") :], blocks[2]]
    )
    with pytest.warns(UserWarning, match="fewer than 16 training images"):
        exec(own.replace("ViT-B/16", "mini"), {})
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "accuracy 100.0%" and out[-1].startswith("cat ")


def test_cuda_is_used_where_there_is_one():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    assert next(load_clip()[0].parameters()).is_cuda
