"""The main job end to end on a small setting, its results, and the files that set the project up.
"""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import grid
import mini_coop
import report
from mini_coop import CoOp, load_clip

ROOT = Path(__file__).resolve().parents[1]
SMALL = "--n-ctx 1 --epochs 1 --device cpu".split()


def run(out, *command, dataset="styles"):
    """Runs the main job; returns the lines of its results."""
    grid.main(["--dataset", str(dataset), "--out", str(out), *SMALL, *map(str, command)])
    return report.read_lines(Path(out) / f"mini_{Path(dataset).name}/results.jsonl")


def trained(lines):
    """{(method, shots, seed): test accuracy} of the lines that have shots."""
    return {(line["method"], line["shots"], line["seed"]): line["accuracy"]["test"]
            for line in lines if "shots" in line}


def photos(root, names=("red", "blue"), n=8):
    """A folder of n small images per class."""
    for k, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (70, 64), (200 - 160 * k, 20 * i, 40 + 160 * k)).save(
                root / name / f"{i}.png")
    return root


@pytest.fixture
def fits():
    """The calls of CoOp.fit: (coop, features, labels, epochs)."""
    with mock.patch.object(CoOp, "fit", autospec=True, side_effect=CoOp.fit) as fit:
        yield fit.call_args_list


# ---------------------------------------------------------------- a run

def test_main_job(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = run("runs", "--shots", 2, 1, 2, "--seeds", 2, 1, 1,
                "--class-specific", "both")
    out = capsys.readouterr().out
    assert set(trained(lines)) == {(method, shots, seed) for method in report.METHODS
                                   for shots in (1, 2) for seed in (1, 2)}
    assert all(0 <= line["accuracy"]["test"] <= 100 for line in lines)
    assert {"model", "weights", "images", "data", "device", "torch"} <= lines[0].keys()
    templates = [line["template"] for line in lines if line["method"] == "zero-shot"]
    assert templates == ["{} style.", *grid.TEMPLATES]
    assert sum(line["method"] == "untrained" for line in lines) == 5
    for said in ("torch ", "CLIP mini on cpu", "mean ± standard deviation",
                 '  "outline style."\n    CLIP\'s pieces of the name: outline\n',
                 '  "hand-drawn style."\n    CLIP\'s pieces of the name: hand | - | drawn\n',
                 *report.METHODS):
        assert said in out, said
    assert max(map(len, out.splitlines())) <= 80
    folder = Path("runs/mini_styles")
    assert Image.open(folder / "figure.png").size[0] > 500
    # every line of a context names its file, which gives the accuracy of the line
    model, preprocess = load_clip("mini", "cpu")
    data = mini_coop.load_dataset("styles")
    features = mini_coop.encode_images(model, preprocess, data.test.images)
    contexts = [line for line in lines if line["method"].startswith("CoOp")]
    assert len({line["file"] for line in contexts}) == len(list(folder.glob("*.pt"))) == 8
    for line in contexts[::3]:
        coop = CoOp.load(folder / line["file"], model)
        assert coop.seed == line["seed"] and coop.class_specific == ("specific" in line["method"])
        accuracy = 100 * coop.score(features, data.test.labels)
        assert accuracy == pytest.approx(line["accuracy"]["test"], abs=1e-4)
    # the probe learns from features as they come: their length changes what C means
    few = mini_coop.few_shot(data, 2, 1)
    x, x_val = (mini_coop.encode_images(model, preprocess, split.images)
                for split in (few.train, few.val))
    probe = mini_coop.linear_probe(x, few.train.labels, x_val, few.val.labels)
    accuracy = 100 * probe.score(features.numpy(), data.test.labels)
    assert accuracy == pytest.approx(trained(lines)["linear probe", 2, 1], abs=1e-4)


def test_a_probe_that_did_not_see_every_class():
    x = torch.eye(2)
    scores = grid.probe_scores(x, [0, 2], x, [0, 2], 3)
    assert scores(x).argmax(1).tolist() == [0, 2]


def test_on_imagenet_every_run_has_50_epochs(tmp_path, fits):
    photos(tmp_path / "imagenet/train")
    photos(tmp_path / "imagenet/test")
    grid.main(["--dataset", str(tmp_path / "imagenet"), "--out", str(tmp_path), "--n-ctx", "1",
               "--shots", "2", "--seeds", "1"])
    assert [call.args[3] for call in fits] == [50]


def test_several_data_sets(tmp_path, capsys):
    """A repeated --dataset adds up; averages are those of each seed."""
    command = ["--dataset", "styles", "--dataset", "actions", "--shots", "1", "--seeds", "1", "2"]
    grid.main([*command, *SMALL, "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert Image.open(tmp_path / "mini_styles+actions.png").size[0] > 800
    rows = []
    own = []
    for task in ("styles", "actions"):
        lines = report.read_lines(tmp_path / f"mini_{task}/results.jsonl")
        own.append(lines[0]["accuracy"]["test"])
        rows.append([trained(lines)["CoOp unified", 1, seed] for seed in (1, 2)])
    averages = np.mean(rows, axis=0)
    text = f"{averages.mean():.1f} ± {averages.std():.1f}"  # the population's
    assert re.search(rf"average of 2: few-shot(.|\n)*CoOp unified +{text}$", out, re.M)
    assert re.search(rf"their own templates +{np.mean(own):.1f}", out)


def test_a_folder_of_your_own(tmp_path, capsys, fits):
    """Views, a template, names of any kind, no validation images, one seed."""
    root = tmp_path / "cash_$5_to_$10^"
    for part in ("train", "test"):
        photos(root / part, ("001.Black_footed_Albatross", "SeaLake", "小猫"))
    with pytest.warns(UserWarning, match="24 training|12 training"):  # train/ and test/ are equal
        lines = run(tmp_path / "out", "--shots", 4, "--seeds", 1, "--views", 2, "--template",
                    "a picture of {}.", dataset=root)
    out = capsys.readouterr().out
    assert '"a picture of 001.Black footed Albatross."' in out and "no linear probe" in out
    assert "pieces of the name: 0 | 0 | 1 | . | black | footed | al" in out
    assert "the built-in CLIP knows icons only: for photographs add --model RN50" in out
    assert {method for method, *_ in trained(lines)} == {"CoOp unified"}
    assert "±" not in re.search("CoOp unified.*", out)[0]  # one seed has no spread
    # 4 shots of three classes, 2 views
    assert [call.args[1].shape[:2] for call in fits] == [(12, 2)]


def test_the_same_picture_in_two_splits_or_classes(tmp_path, recwarn):
    for part in ("train", "val", "test"):
        photos(tmp_path / "set" / part)
    picture = (tmp_path / "set/train/red/0.png").read_bytes()
    (tmp_path / "set/test/blue/9.png").write_bytes(picture)
    run(tmp_path / "out", "--shots", 8, "--seeds", 1, dataset=tmp_path / "set")
    said = [str(w.message) for w in recwarn]
    assert any(text.startswith("16 training images are in the test split") for text in said), said
    assert "2 test images stand in two classes or more" in said
    recwarn.clear()
    run(tmp_path, "--shots", 1, "--seeds", 1)
    assert not [w for w in recwarn if w.category is UserWarning]


def test_domains(tmp_path, capsys):
    """A domain of less than half of the classes is scored among those, as ImageNet-A is."""
    names = ["red", "blue", "green", "gray", "black"]
    root = photos(tmp_path / "photos", names)
    rows = {k: [[f"{name}/{i}.png", k] for i in range(8)] for k, name in enumerate(names)}
    every = sum(rows.values(), [])
    spec = {"classnames": names, "template": "{}",
            "splits": {"train": every, "val": every, "test": every[::2]},
            "domains": {"all": every[1::2], "two": [*rows[3], *rows[4]][1::2]}}
    (root / "dataset.json").write_text(json.dumps(spec))
    with pytest.warns(UserWarning, match="are in the test split, too"):
        lines = run(tmp_path / "out", "--shots", 1, "--seeds", 1, dataset=root)
    row = lines[0]["accuracy"]
    assert list(row) == ["test", "all", "two"]
    assert re.search(f"domains, 1 shot .*(.|\n)*two +{row['two']:.1f}", capsys.readouterr().out)
    tests = {"two": (torch.zeros(2, 4), [3, 4])}
    scores = torch.tensor([5.0, 4, 3, 2, 1]).expand(2, 5)  # class 0 is not among the answers
    assert grid.accuracies(tests, lambda x: scores)["two"] == 50


# ---------------------------------------------------------------- lines: resumed, varied, shared

def test_a_line_is_not_run_again_and_whatever_differs_is_another_line(tmp_path, fits, monkeypatch,
                                                                      capsys):
    command = ["--shots", 1, 2, "--seeds", 1, 2]
    first = run(tmp_path, *command)
    assert len(fits) == 4
    encode = mock.Mock(side_effect=mini_coop.encode_images)
    monkeypatch.setattr(mini_coop, "encode_images", encode)
    capsys.readouterr()
    assert run(tmp_path, *command) == first
    assert len(fits) == 4 and not encode.called  # nothing is left to do, so nothing is encoded
    assert "20 of 20 runs are in" in capsys.readouterr().out
    more = run(tmp_path, *command, "--seeds", 3)
    assert more[:len(first)] == first and [len(call.args[1]) for call in fits[4:]] == [8, 16]
    # a variant needs no other --out, and the first command still finds its own lines
    varied = run(tmp_path, *command, "--epochs", 0, "--class-position", "front", "--ctx-init",
                 "a drawing")
    assert varied[:len(more)] == more and len(fits) == 10
    changed = {"epochs": 0, "class_position": "front", "ctx_init": "a drawing", "n_ctx": 2}
    assert {key: varied[-1][key] for key in changed} == changed
    capsys.readouterr()
    run(tmp_path, *command)
    assert "20 of 20 runs are in" in capsys.readouterr().out and len(fits) == 10


def test_data_that_were_copied_are_the_same_and_other_images_are_not(tmp_path, fits):
    root = photos(tmp_path / "photos", n=16)
    command = ["--shots", 1, "--seeds", 1]
    first = run(tmp_path, *command, dataset=root)
    for file in root.glob("*/*.png"):
        os.utime(file, (1, 1))
    assert run(tmp_path, *command, dataset=root) == first
    file.write_bytes(file.read_bytes() + b"more")
    again = run(tmp_path, *command, dataset=root)
    assert again[:len(first)] == first and len(again) == 2 * len(first) and len(fits) == 2


def test_a_result_does_not_depend_on_the_rest_of_the_command(tmp_path):
    command = ["--views", 2, "--seeds", 1, "--epochs", 3]
    together = trained(run(tmp_path / "a", *command, "--shots", 1, 4))
    run(tmp_path / "b", *command, "--shots", 4)
    assert trained(run(tmp_path / "b", *command, "--shots", 1)) == together


def test_jobs_side_by_side_and_a_killed_one(tmp_path):
    """Three processes in one folder; one is killed, and its line was cut off."""
    command = [sys.executable, ROOT / "mini_coop.py", "--dataset", "styles", "--shots", "1", "2",
               *SMALL, "--out", tmp_path]
    jobs = [subprocess.Popen([*map(str, command), "--seeds", str(seed)],
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for seed in (1, 2, 3)]
    file = tmp_path / "mini_styles/results.jsonl"
    while not trained(report.read_lines(file)):
        time.sleep(0.05)
    jobs[0].send_signal(signal.SIGKILL)
    assert [job.wait() for job in jobs] == [-signal.SIGKILL, 0, 0]
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    with pytest.warns(UserWarning, match="is cut off or no result"):
        lines = run(tmp_path, "--shots", 1, 2, "--seeds", 1, 2, 3)
    assert len(trained(lines)) == 12
    kept = [json.loads(text) for text in whole.splitlines() if text][:-1]
    assert lines[:len(kept)] == kept


# ---------------------------------------------------------------- what is refused

@pytest.mark.parametrize("command, message", [
    ("--dataset nowhere", "no data set 'nowhere'"),
    ("--model RN5", "neither 'mini', nor one of RN50"),
    ("--shots 4 0", "--shots begins at 1, not 0"),
    ("--views 0", "--views begins at 1, not 0"),
    ("--epochs -1", "--epochs begins at 0, not -1"),
    ("--n-ctx 90", "a prompt of 95 tokens, but CLIP reads 77"),
    ("--template icon", "templates hold {} for the class name, not ['icon"),
    ("--ctx-init {}", "no place for a name"),
    ("--dataset styles ./data/styles", "two data sets of one name"),
    ("--device gpu", "gpu"),
])
def test_wrong_options_are_one_line_before_any_image_is_encoded(command, message, tmp_path,
                                                               monkeypatch):
    monkeypatch.setattr(mini_coop, "encode_images", None)
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match=f"^mini_coop.py: error: .*{re.escape(message)}") as stop:
        grid.main([*command.split(), "--out", str(tmp_path / "out")])
    assert len(str(stop.value).splitlines()) == 1


def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(mini_coop, "few_shot", lambda *args: {}["no such key"])
    with pytest.raises(KeyError):
        run(tmp_path)


def test_a_folder_without_test_images(tmp_path):
    root = photos(tmp_path / "photos/train").parent
    with pytest.warns(UserWarning, match="no test images"):
        with pytest.raises(SystemExit, match="needs training and test images"):
            run(tmp_path / "out", dataset=root)


def test_the_command_line(tmp_path):
    """Warnings come without source lines, an ASCII terminal is no obstacle, a checkpoint's path is
    no folder, `~` is the home."""
    photos(tmp_path / "photos", n=12)
    command = [sys.executable, ROOT / "mini_coop.py", "--dataset", tmp_path / "photos", "--shots",
               "9", "--seeds", "1", "2", *SMALL, "--out", "~/out", "--model",
               ROOT / "data/mini_clip.pt"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "HOME": str(tmp_path)}
    job = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert job.returncode == 0 and "CoOp unified" in job.stdout, job.stderr
    few = "\nwarning: fewer than 9 training images of blue (6), red (6)\n"
    assert few in f"\n{job.stderr}"
    (folder,) = (tmp_path / "out").iterdir()
    assert re.fullmatch(r"[\w.-]+-data-mini_clip.pt_photos", folder.name)


# ---------------------------------------------------------------- reading results

def test_select_takes_what_does_not_depend_and_the_last_of_equals():
    line = {"data": "x", "method": "CoOp unified", "n_ctx": 16, "seed": 1, "shots": 1,
            "torch": "2.10", "accuracy": {"test": 1}}
    later = {**line, "torch": "2.14", "accuracy": {"test": 2}}
    probe = {"data": "x", "method": "linear probe", "seed": 1, "shots": 1, "accuracy": {"test": 3}}
    lines = [line, probe, {**line, "n_ctx": 4}, {**line, "data": "y"}, later]
    found = report.select(lines, data="x")
    assert found == [later, probe]


def results_like(n_ctx, ctx_init, shots=(1, 16), epochs=None, position="end"):
    """Results of the main job on ImageNet, all 50 %, and the paper's for this setting."""
    context = {"n_ctx": n_ctx, "class_position": position, "ctx_init": ctx_init, "epochs": epochs}
    accuracy = {"test": 50.0, "imagenet_a": 20.0}
    template = "a photo of a {}."
    lines = [{"method": "zero-shot", "template": template, "accuracy": accuracy},
             {"method": "untrained", **context, "seed": 1, "accuracy": accuracy}]
    for method in report.METHODS:
        for n in shots:
            for seed in (1, 2):
                lines.append({"method": method, "shots": n, "seed": seed, "accuracy": accuracy})
    return report.Results(lines, template, 0.1), report.papers("RN50", **context).get("imagenet")


def test_the_papers_numbers_stand_beside_the_same_setting_only():
    text = report.tables("imagenet", *results_like(16, None), note="  (views)")
    assert re.search(r"CoOp unified +50.0 ± 0.0 +50.0 ± 0.0\n +the paper +57.1 +63.0", text)
    assert re.search(r"the paper, its template +58.2\n", text) and "\n  (views)\n" in text
    assert re.search(r"imagenet_a +20.0 .*\n +the paper +21.6 +12.7 +22.1", text)  # Table 1
    text = report.tables("imagenet", *results_like(4, "a photo of a"))
    assert "63.0" not in text and re.search(r"imagenet_a .*\n +the paper +21.6 +12.7 +23.1", text)
    for other in ({"n_ctx": 8}, {"position": "front"}, {"epochs": 10}):
        setting = {"n_ctx": 16, "ctx_init": None, **other}
        text = report.tables("imagenet", *results_like(**setting))
        assert "55.9" in text and "63.0" not in text, other  # the probe does not depend on it
    assert report.papers("mini") == {}
    one_shot = report.tables("imagenet", *results_like(16, None, (1,)))
    assert "57.1" in one_shot and "63.0" not in one_shot and "12.7" not in one_shot


def test_the_papers_numbers_need_the_papers_data_set(tmp_path, capsys, monkeypatch):
    """A folder that happens to be called dtd is not the paper's."""
    monkeypatch.setattr(report, "papers", lambda model, **setting: {"dtd": report.Results(
        [{"method": "zero-shot", "accuracy": {"test": 42.0}}], "{} texture.", 100 / 47)})
    photos(tmp_path / "dtd", n=12)
    run(tmp_path / "out", "--shots", 1, "--seeds", 1, dataset=tmp_path / "dtd")
    assert "the paper" not in capsys.readouterr().out


def test_the_figure_takes_methods_and_shots_as_they_are(tmp_path):
    """Of one data set there may be fewer methods, of one method fewer shots."""
    full = results_like(16, None, (1, 2, 16))[0]
    some = full._replace(chance=50.0, lines=[
        line for line in full.lines if line["method"] in ("zero-shot", "CoOp unified")
        or (line["method"] == "CoOp class-specific" and line["shots"] == 16)])
    figure = report.over_shots({"a $x": full, "b": some})
    figure.savefig(tmp_path / "figure.png")  # lays it out: the legend must not be cut off
    assert len(figure.axes) == 2 and figure.legends[0].get_window_extent().x0 > 0
    for ax in figure.axes:
        low, high = ax.get_ylim()
        assert 30 <= high - low <= 102  # noise must not look like a trend; no axis beyond 100 %
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "chance" in named and "untrained context" in named
    only = report.over_shots({"b": some._replace(chance=0.1)})
    named = [text.get_text() for text in only.legends[0].get_texts()]
    assert "chance" not in named and "linear probe" not in named  # neither is drawn


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
