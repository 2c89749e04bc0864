"""The main job end to end on a small setting, and the files that set the project up."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import grid
import mini_coop
from mini_coop import CoOp, load_clip

ROOT = Path(__file__).resolve().parents[1]
SMALL = "--n-ctx 1 --epochs 1 --device cpu".split()


def run(out, *command, dataset="styles"):
    """Runs the main job; returns its results."""
    grid.main(["--dataset", str(dataset), "--out", str(out), *SMALL, *map(str, command)])
    return json.loads((Path(out) / f"mini_{Path(dataset).name}/results.json").read_text())


def photos(root, names=("red", "blue"), n=8):
    """A folder of n small images per class."""
    for k, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (70, 64), (200 - 160 * k, 3 * i, 40 + 160 * k)).save(
                root / name / f"{i}.png")
    return root


@pytest.fixture
def fits(monkeypatch):
    """The shapes of the features, and the numbers of epochs, that CoOp.fit was called with."""
    calls = []
    fit = CoOp.fit

    def recorded(self, x, y, epochs, **options):
        calls.append((*x.shape, epochs))
        return fit(self, x, y, epochs, **options)

    monkeypatch.setattr(CoOp, "fit", recorded)
    return calls


# ---------------------------------------------------------------- a run

def test_main_job(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("runs", "--shots", 2, 1, 2, "--seeds", 2, 1, 1)
    out = capsys.readouterr().out
    assert list(result["few_shot"]) == list(grid.METHODS)
    for method, by_shots in result["few_shot"].items():
        assert method in out and list(by_shots) == ["1", "2"]  # sorted, each once
        for rows in by_shots.values():
            assert [row["seed"] for row in rows] == [1, 2]
            assert all(0 <= row["test"] <= 100 for row in rows)
    assert result["template"] in result["zero_shot"] and len(result["untrained"]) == 3
    for said in ("torch ", "CLIP mini on cpu", "mean ± standard deviation",
                 '  "outline style."\n  "hand-drawn style."'):
        assert said in out, said
    assert max(map(len, out.splitlines())) <= 80
    folder = Path("runs/mini_styles")
    assert Image.open(folder / "figure.png").size[0] > 500
    # the saved context gives the accuracy that the JSON reports
    model, preprocess = load_clip("mini", "cpu")
    data = mini_coop.load_dataset("styles")
    coop = CoOp.load(folder / "CoOp_unified_2_shots_seed_1.pt", model)
    features = mini_coop.encode_images(model, preprocess, data.test.images, progress=False)
    accuracy = result["few_shot"]["CoOp unified"]["2"][0]["test"]
    assert 100 * coop.score(features, data.test.labels) == pytest.approx(accuracy, abs=1e-4)


def test_the_probe_learns_from_features_as_they_come(tmp_path, monkeypatch, mini):
    """Not normalised: the length changes what C means."""
    seen = []
    probe = mini_coop.linear_probe
    monkeypatch.setattr(mini_coop, "linear_probe", lambda *args: seen.append(args) or probe(*args))
    run(tmp_path, "--shots", 1, "--seeds", 1, "--class-specific", "no")
    few = mini_coop.few_shot(mini_coop.load_dataset("styles"), 1, 1)
    for x, split in zip(seen[0][::2], (few.train, few.val)):
        assert torch.allclose(x, mini_coop.encode_images(*mini, split.images), atol=1e-4)


def test_a_probe_that_did_not_see_every_class():
    few = mini_coop.Dataset("", [], "", *[mini_coop.Split(["a", "b"], [0, 2])] * 3, {})
    scores = grid.probe_scores(few, {"a": torch.tensor([1.0, 0]), "b": torch.tensor([0, 1.0])}, 3)
    assert scores(torch.eye(2)).argmax(1).tolist() == [0, 2]


def test_on_imagenet_every_run_has_50_epochs(tmp_path, fits):
    photos(tmp_path / "imagenet/train")
    photos(tmp_path / "imagenet/test")
    grid.main(["--dataset", str(tmp_path / "imagenet"), "--out", str(tmp_path), "--n-ctx", "1",
               "--shots", "2", "--seeds", "1", "--class-specific", "no"])
    assert [epochs for *_, epochs in fits] == [50]


def test_zero_epochs_are_untrained_contexts(tmp_path):
    result = run(tmp_path, "--shots", 1, "--epochs", 0, "--class-position", "front")
    coop = CoOp.load(tmp_path / "mini_styles/CoOp_unified_1_shots_seed_1.pt", load_clip()[0])
    assert coop.class_position == "front"
    trained = [row["test"] for row in result["few_shot"]["CoOp unified"]["1"]]
    assert trained == [row["test"] for row in result["untrained"]]


def test_several_data_sets(tmp_path, capsys):
    command = ["--dataset", "styles", "actions", "--shots", "1", "--seeds", "1", "2", *SMALL]
    grid.main([*command, "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert Image.open(tmp_path / "mini_styles+actions.png").size[0] > 800
    rows = []
    own = []
    for task in ("styles", "actions"):
        result = json.loads((tmp_path / f"mini_{task}/results.json").read_text())
        own.append(grid.own_template(result))
        rows.append([row["test"] for row in result["few_shot"]["CoOp unified"]["1"]])
    averages = np.mean(rows, axis=0)  # of each seed
    text = f"{averages.mean():.1f} ± {averages.std():.1f}"  # the population's
    assert re.search(rf"average of 2: few-shot(.|\n)*CoOp unified +{text}$", out, re.M)
    assert re.search(rf"their own templates +{np.mean(own):.1f}", out)


def test_a_folder_of_your_own(tmp_path, capsys, fits):
    """Views, a template, names that CLIP cannot read, no validation images, one seed."""
    root = tmp_path / "cash_$5_to_$10^"
    for part in ("train", "test"):
        photos(root / part, ("n02085620", "n02085782-pug"))
    with pytest.warns(UserWarning, match="cannot read class names such as 'n02085620'"):
        result = run(tmp_path / "out", "--shots", 4, "--seeds", 1, "--views", 2, "--template",
                     "a picture of {}.", dataset=root)
    out = capsys.readouterr().out
    assert '"a picture of n02085620."' in out and "no linear probe" in out
    assert list(result["few_shot"]) == ["CoOp unified", "CoOp class-specific"]
    assert "±" not in re.search("CoOp unified.*", out)[0]  # one seed has no spread
    assert [shape[:2] for shape in fits] == [(8, 2)] * 2  # 4 shots of two classes, 2 views


def test_domains(tmp_path, capsys, mini):
    """A domain of less than half of the classes is scored among those, as ImageNet-A is; one of
    test images is no shift."""
    root = photos(tmp_path / "photos", ("red", "blue", "green", "gray", "black"))
    rows = {}
    for k, name in enumerate(("red", "blue", "green", "gray", "black")):
        rows[k] = [[f"{name}/{i}.png", k] for i in range(8)]
    every = sum(rows.values(), [])
    spec = {"classnames": ["red", "blue", "green", "gray", "black"], "template": "{}",
            "splits": {"train": every, "val": every, "test": every[::2]},
            "domains": {"same": every[::4], "all": every[1::2], "two": [*rows[3], *rows[4]][1::2]}}
    (root / "dataset.json").write_text(json.dumps(spec))
    result = run(tmp_path / "out", "--shots", 1, "--seeds", 1, dataset=root)
    row = result["zero_shot"]["{}"]
    assert row["mean of shifts"] == (row["all"] + row["two"]) / 2
    assert re.search(f"domains, 1 shot .*(.|\n)*mean of shifts +{row['mean of shifts']:.1f}",
                     capsys.readouterr().out)
    tests = {"two": (torch.zeros(2, 4), torch.tensor([3, 4]), True)}
    scores = torch.tensor([5.0, 4, 3, 2, 1]).expand(2, 5)  # class 0 is not among the answers
    assert grid.accuracies(tests, lambda x: scores)["two"] == 50


# ---------------------------------------------------------------- resuming

def test_finished_runs_are_kept(tmp_path, fits, monkeypatch):
    command = ["--shots", 1, 2, "--seeds", 1, 2]
    first = run(tmp_path, *command)
    assert len(fits) == 8  # 2 shots x 2 seeds x 2 forms
    encoded = []
    encode = mini_coop.encode_images
    monkeypatch.setattr(mini_coop, "encode_images",
                        lambda *args: encoded.append(1) or encode(*args))
    assert run(tmp_path, *command) == first
    assert len(fits) == 8 and not encoded  # nothing is left to do, so nothing is encoded
    more = run(tmp_path, *command, "--seeds", 3, "--class-specific", "no")
    assert [shape[0] for shape in fits[8:]] == [8, 16]
    few = more["few_shot"]["CoOp unified"]["2"]
    assert [row["seed"] for row in few] == [1, 2, 3]
    assert few[:2] == first["few_shot"]["CoOp unified"]["2"]


def test_a_killed_run_resumes(tmp_path, fits):
    command = ["--dataset", "styles", "--shots", "1", "2", "--seeds", "1", "2", *SMALL]
    job = subprocess.Popen([sys.executable, ROOT / "mini_coop.py", *command, "--out", tmp_path],
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    file = tmp_path / "mini_styles/results.json"
    while job.poll() is None and not file.exists():
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.wait()
    before = json.loads(file.read_text())["few_shot"]
    n_before = sum(len(rows) for by_shots in before.values() for rows in by_shots.values())
    assert 0 < n_before < 12
    after = run(tmp_path, "--shots", 1, 2, "--seeds", 1, 2)["few_shot"]
    assert len(fits) == 8 - sum(map(len, [*before.get("CoOp unified", {}).values(),
                                          *before.get("CoOp class-specific", {}).values()]))
    for method, by_shots in before.items():
        for shots, rows in by_shots.items():
            assert after[method][shots][:len(rows)] == rows


def test_ctrl_c_keeps_what_is_finished(tmp_path, monkeypatch):
    fit = CoOp.fit

    def stop(self, *args, **options):
        if self.seed == 2:
            raise KeyboardInterrupt
        return fit(self, *args, **options)

    monkeypatch.setattr(CoOp, "fit", stop)
    with pytest.raises(SystemExit, match="the same command resumes"):
        run(tmp_path, "--shots", 1, "--seeds", 1, 2, "--class-specific", "no")
    few = json.loads((tmp_path / "mini_styles/results.json").read_text())["few_shot"]
    assert len(few["CoOp unified"]["1"]) == 1
    assert not list(tmp_path.rglob("*.part"))


def test_other_settings_images_names_or_weights_are_one_error(tmp_path, monkeypatch, tiny):
    root = photos(tmp_path / "photos")
    out = tmp_path / "out"
    command = ["--shots", 1, "--seeds", 1]
    run(out, *command, dataset=root)

    def refused(what, *more):
        with pytest.raises(SystemExit, match=f"results of other {what}: choose another --out"):
            run(out, *command, *more, dataset=root)

    refused("class_position", "--class-position", "front")
    refused("n_ctx, views", "--n-ctx", 2, "--views", 2)
    refused("template", "--template", "{}")
    with monkeypatch.context() as other:
        other.setattr(mini_coop, "load_clip", lambda *args: tiny)
        refused("weights")
    (root / "blue").rename(root / "azure")
    refused("class names")
    (root / "azure").rename(root / "blue")
    os.utime(root / "blue/0.png", (1, 1))
    refused("images")


@pytest.mark.parametrize("command, message", [
    ("--dataset nowhere", "no data set 'nowhere'"),
    ("--model RN5", "neither 'mini', nor one of RN50"),
    ("--shots 0", "shots begin at 1"),
    ("--epochs 9 --shots 1 --n-ctx 0", "one vector or more"),
    ("--device gpu", "gpu"),
])
def test_errors_are_one_line(command, message, tmp_path):
    with pytest.raises(SystemExit, match=f"^mini_coop.py: error: .*{message}"):
        grid.main([*command.split(), "--out", str(tmp_path / "out")])


def test_a_folder_without_test_images(tmp_path):
    root = photos(tmp_path / "photos/train").parent
    with pytest.warns(UserWarning, match="no test images"):
        with pytest.raises(SystemExit, match="needs training and test images"):
            run(tmp_path / "out", dataset=root)


def test_the_command_line(tmp_path):
    """Warnings come without source lines, and an ASCII terminal is no obstacle."""
    photos(tmp_path / "photos", n=12)
    command = [sys.executable, ROOT / "mini_coop.py", "--dataset", tmp_path / "photos", "--shots",
               "9", "--seeds", "1", "2", *SMALL, "--class-specific", "no", "--out", tmp_path]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    job = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert job.returncode == 0 and "CoOp unified" in job.stdout, job.stderr
    assert "\nwarning: fewer than 9 training images of blue, red\n" in f"\n{job.stderr}"


# ---------------------------------------------------------------- the paper's figures

SETTINGS = {"model": "RN50", "n_ctx": 16, "ctx_init": None, "class_position": "end", "epochs": None}


def result_like(settings, shots=("1", "16"), domains=("imagenet_a",)):
    row = {"test": 50.0, **dict.fromkeys(domains, 20.0)}
    return {"settings": {**SETTINGS, **settings}, "template": "{}", "zero_shot": {"{}": row},
            "untrained": [row], "chance": 1.0,
            "few_shot": dict.fromkeys(grid.METHODS, dict.fromkeys(shots, [row, row]))}


def test_the_papers_figures_stand_beside_the_same_setting_only():
    text = grid.tables(result_like({}), "imagenet")
    assert re.search(r"CoOp unified +50.0 ± 0.0 +50.0 ± 0.0\n +the paper +57.1 +63.0", text)
    assert re.search(r"the paper +58.2\n", text)
    assert re.search(r"imagenet_a +20.0 .*\n +the paper +21.6 +12.7 +22.1", text)  # Table 1
    text = grid.tables(result_like({"ctx_init": "a photo of a"}), "imagenet")
    assert "63.0" not in text and re.search(r"imagenet_a .*\n +the paper +21.6 +12.7 +23.1", text)
    for other in ({"n_ctx": 8}, {"class_position": "front"}, {"epochs": 10}, {"model": "mini"}):
        assert "the paper" not in grid.tables(result_like(other), "imagenet"), other
    one_shot = grid.tables(result_like({}, ("1",)), "imagenet")
    assert "57.1" in one_shot and "23.1" not in one_shot and "12.7" not in one_shot


def test_the_papers_average_is_that_of_its_data_sets():
    for position in ("end", "middle"):
        figures = grid.paper({**SETTINGS, "class_position": position})
        average = figures.pop("average of 11")
        figures.pop("domains", None)
        assert len(figures) == 11
        for method, by_shots in average.items():
            for n, accuracy in by_shots.items():
                values = [of_data_set[method][n] for of_data_set in figures.values()]
                assert accuracy == pytest.approx(np.mean(values), abs=0.006)
    shots = ("1", "2", "4", "8", "16")
    text = grid.tables(grid.average([result_like({}, shots, ())] * 2), "average of 11")
    for row in ("59.6 +62.3 +66.8 +69.9 +73.4", "44.9 +52.0 +60.1 +65.9 +71.4",
                "36.7 +47.6 +57.2 +65.0 +71.1"):
        assert re.search(f"the paper +{row}", text), text


def test_the_figure_takes_methods_and_shots_as_they_are(tmp_path):
    """Of one data set there may be fewer methods, of one method fewer shots."""
    full = result_like({}, ("1", "2", "16"))
    some = {**full, "few_shot": {"CoOp unified": full["few_shot"]["CoOp unified"],
                                 "CoOp class-specific": {"16": [{"test": 50.0}]}}}
    figure = grid.over_shots({"a $x": full, "b": some})
    figure.savefig(tmp_path / "figure.png")  # lays it out: the legend must not be cut off
    assert len(figure.axes) == 2 and figure.legends[0].get_window_extent().x0 > 0
    for ax in figure.axes:
        low, high = ax.get_ylim()
        assert high - low >= 30  # noise must not look like a trend


# ---------------------------------------------------------------- the project's files

def test_environment_and_pyproject_name_the_same_packages():
    project = (ROOT / "pyproject.toml").read_text()
    wanted = {"clip"}
    for key in ("dependencies", "test"):
        wanted |= set(re.findall(r'"([A-Za-z-]+)', re.search(rf"^{key} = \[(.*?)\]", project,
                                                             re.S | re.M)[1]))
    lines = (ROOT / "environment.yml").read_text()
    listed = set(re.findall(r"^ +- ([A-Za-z][A-Za-z-]*)", lines, re.M))
    assert listed - {"conda-forge", "python", "pip", "git"} == wanted
    commits = re.findall(r"openai/CLIP(?:\.git)?@([0-9a-f]{40})", project + lines)
    assert len(commits) == 2 and len(set(commits)) == 1


def test_the_code_in_readme_runs(tmp_path, capsys, monkeypatch):
    """Every Python block of README, one after another, on a folder of own images: to a learned
    prompt and one labelled image."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, re.S)
    assert len(blocks) == 2
    photos(tmp_path / "photos", ("cat", "dog"), n=32)
    Image.new("RGB", (70, 64), (200, 9, 40)).save(tmp_path / "a.jpg")
    monkeypatch.chdir(tmp_path)
    code = "\n".join(blocks)
    assert '"favicons"' in code
    exec(code.replace('"favicons"', '"photos"'), {})
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "accuracy 100.0%" and out[-1].startswith("cat ")
