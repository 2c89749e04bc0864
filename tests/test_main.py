"""The main job end to end on a small setting, and the files that set the project up."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import features
import grid
import mini_coop
import options
import report
from mini_coop import CoOp, load_clip

ROOT = Path(__file__).resolve().parents[1]
SMALL = "--n-ctx 1 --epochs 1 --device cpu".split()


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def photos(root, n=8):
    """Two classes of n small images each."""
    for name, colour in (("red", (220, 30, 30)), ("blue", (30, 30, 220))):
        (root / name).mkdir(parents=True)
        for i in range(n):
            shade = tuple(min(255, c + 3 * i) for c in colour)
            Image.new("RGB", (70, 64), shade).save(root / name / f"{i}.png")
    return root


def test_main_job(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = "--dataset styles --shots 2 1 2 --seeds 2 1 1 --n-ctx 2 --epochs 3 --device cpu"
    grid.main(command.split())
    out = capsys.readouterr().out
    folder = tmp_path / "runs/mini_styles_M2_3-epochs"
    result = results_of(folder)
    assert list(result["few_shot"]) == list(report.METHODS)
    for method, row in result["few_shot"].items():
        assert method in out and list(row) == ["1", "2"]  # sorted, each once
        assert [len(row[n]) for n in ("1", "2")] == [2, 2]
        assert all(0 <= seed["test"] <= 100 for seed in row["1"] + row["2"])
    assert result["settings"]["epochs"] == 3 and result["template"] in result["zero_shot"]
    assert "<- declared" in out and result["images_left_out"] == []
    assert Image.open(folder / "figure.png").size[0] > 500
    contexts = sorted(p.name for p in folder.glob("*.pt"))
    assert len(contexts) == 8 and "CoOp_unified_2_shots_seed_1.pt" in contexts
    # the saved context gives the accuracy that the JSON reports
    model, preprocess = load_clip("mini", "cpu")
    data = mini_coop.load_dataset("styles")
    coop = CoOp.load(folder / "CoOp_unified_2_shots_seed_1.pt", model)
    features = mini_coop.encode_images(model, preprocess, data.test.images, progress=False)
    accuracy = result["few_shot"]["CoOp unified"]["2"][0]["test"]
    assert 100 * coop.score(features, data.test.labels) == pytest.approx(accuracy, abs=1e-4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs"]


def test_the_grids_probe_learns_from_features_as_they_come(tmp_path, monkeypatch):
    """Not normalised: the length changes what C means."""
    seen = []
    probe = grid.linear_probe
    monkeypatch.setattr(grid, "linear_probe", lambda *args: seen.append(args) or probe(*args))
    command = "--dataset styles --shots 1 --seeds 1 --class-specific no --out".split()
    grid.main([*command, str(tmp_path), *SMALL])
    train, _, val, _ = seen[0]
    model, preprocess = load_clip("mini", "cpu")
    data = mini_coop.load_dataset("styles")
    for x, split in ((train, data.train), (val, data.val)):
        raw = mini_coop.encode_images(model, preprocess, split.images, progress=False)
        distance = torch.cdist(x, raw).min(1).values
        assert (distance < 1e-3 * x.norm(dim=1)).all() and (x.norm(dim=1) - 1).abs().min() > 0.1


def test_own_folder_with_an_unreadable_image_and_views(tmp_path, capsys):
    root = photos(tmp_path / "photos")
    bad = mini_coop.load_dataset(root).train.images[0]
    bad.write_bytes(b"no image")
    command = "--shots 4 --seeds 1 --views 2 --n-ctx 1 --epochs 2 --class-specific no --device cpu"
    with pytest.warns(UserWarning, match="cannot be read"):
        grid.main(["--dataset", str(root), "--out", str(tmp_path / "out"), *command.split()])
    out = capsys.readouterr().out
    assert "photos: 2 classes" in out and "class-specific" not in out
    result = results_of(tmp_path / "out/mini_photos_M1_2-epochs_2-views")
    assert result["images_left_out"] == [str(bad)]
    assert "±" not in re.search("CoOp unified.*", out)[0]  # one seed has no spread


def test_a_folder_name_with_dollars_has_its_figure(tmp_path):
    root = photos(tmp_path / "cash_$5_to_$10^")
    grid.main(["--dataset", str(root), "--shots", "1", "--seeds", "1", *SMALL,
               "--out", str(tmp_path / "out")])
    assert list((tmp_path / "out").rglob("figure.png"))


def test_one_class_is_nothing_to_tell_apart(tmp_path, capsys):
    photos(tmp_path / "photos")
    shutil.rmtree(tmp_path / "photos/red")
    with pytest.raises(SystemExit):
        grid.main(["--dataset", str(tmp_path / "photos"), "--out", str(tmp_path / "out"), *SMALL])
    assert "one class only" in capsys.readouterr().err


def test_own_output_never_becomes_data(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(photos(tmp_path / "photos"))
    with pytest.raises(SystemExit) as stop:
        grid.main(["--dataset", ".", "--shots", "1", *SMALL])
    assert stop.value.code == 2 and "choose another --out" in capsys.readouterr().err
    assert sorted(p.name for p in Path().iterdir()) == ["blue", "red"]


def test_a_folder_that_cannot_be_written_is_found_first(tmp_path, capsys, monkeypatch):
    (tmp_path / "out").write_text("a file, not a folder")
    loaded = []
    monkeypatch.setattr(mini_coop, "load_clip", lambda *args: loaded.append(args))
    with pytest.raises(SystemExit) as stop:
        grid.main(["--dataset", "styles", "--out", str(tmp_path / "out"), *SMALL])
    assert stop.value.code == 2 and "out" in capsys.readouterr().err and loaded == []


def test_ctrl_c_writes_no_half_result(tmp_path, capsys, monkeypatch):
    def interrupt(epoch, epochs, lr):
        raise KeyboardInterrupt

    monkeypatch.setattr(mini_coop, "learning_rate", interrupt)
    command = ["--dataset", "styles", "--shots", "1", "--class-specific", "no", "--device", "cpu"]
    with pytest.raises(SystemExit) as stop:
        grid.main([*command, "--out", str(tmp_path)])
    assert stop.value.code == 130 and "interrupted" in capsys.readouterr().err
    for pattern in ("CoOp*", "results.json", "*.part"):
        assert not list(tmp_path.rglob(pattern))


def test_a_training_that_diverges_is_no_finished_cell(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mini_coop, "learning_rate", lambda *args: 1e30)
    command = ["--dataset", "styles", "--shots", "1", "--class-specific", "no", "--device", "cpu"]
    with pytest.raises(SystemExit) as stop:
        grid.main([*command, "--epochs", "9", "--out", str(tmp_path)])
    assert stop.value.code == 2 and "training diverges" in capsys.readouterr().err
    assert not list(tmp_path.rglob("CoOp*"))


def test_a_finished_cell_is_kept_and_a_damaged_one_is_run(tmp_path, capsys, monkeypatch):
    calls = []
    fit = CoOp.fit
    monkeypatch.setattr(CoOp, "fit", lambda self, x, *rest, **options: calls.append(len(x))
                        or fit(self, x, *rest, **options))
    command = ["--dataset", "styles", "--shots", "1", "2", "--seeds", "1", "2", *SMALL,
               "--out", str(tmp_path)]
    grid.main(command)
    # 2 shots x 2 seeds x 2 contexts; and 4 probes
    assert len(calls) == 8 and "plan: 12 of 12 cells" in capsys.readouterr().out
    folder = tmp_path / "mini_styles_M1_1-epochs"
    first = results_of(folder)
    grid.main(command)
    out = capsys.readouterr().out
    assert len(calls) == 8 and "plan: 0 of 12 cells" in out and "are replaced" in out
    again = results_of(folder)
    assert again["few_shot"] == first["few_shot"] and again["zero_shot"] == first["zero_shot"]
    cell = folder / "CoOp_unified_2_shots_seed_1.json"
    cell.write_text(cell.read_text()[:30])  # half written
    grid.main(command)
    assert calls[8:] == [16] and json.loads(cell.read_text())["accuracy"]
    (folder / "CoOp_unified_2_shots_seed_1.pt").write_bytes(b"garbage")
    grid.main(command)
    out = capsys.readouterr().out
    assert calls[9:] == [16] and "cells are damaged or of another model, data or device" in out
    grid.main([*command, "--class-position", "front"])  # another setting has a folder of its own
    assert len(calls) == 10 + 8 and results_of(folder)["few_shot"] == first["few_shot"]
    monkeypatch.setattr(features, "sha256_of", lambda *args: "other weights")
    grid.main(command)
    assert len(calls) == 18 + 8


def test_every_setting_has_its_folder():
    names = set()
    for more in ([], ["--n-ctx", "4"], ["--class-position", "middle"], ["--ctx-init", "a photo"],
                 ["--epochs", "5"], ["--views", "8"], ["--model", "ViT-B/32"]):
        names.add(options.run_folder("out", options.arguments(more), "styles"))
    assert len(names) == 7 and Path("out/mini_styles") in names
    for words in ("a b", "a-b", "M4", "front", "a/../../../escaped"):
        folder = options.run_folder("out", options.arguments(["--ctx-init", words]), "styles")
        assert folder not in names and folder.parent == Path("out")
        names.add(folder)
    home = options.run_folder("~/out", options.arguments([]), "styles")
    assert str(home).startswith(os.path.expanduser("~"))


def test_several_data_sets(tmp_path, capsys):
    command = ["--dataset", "styles", "actions", "--shots", "1", "--seeds", "1", "2", *SMALL]
    grid.main([*command, "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert "average of 2 data sets" in out
    assert Image.open(tmp_path / "mini_styles+actions_M1_1-epochs.png").size[0] > 900
    results = {t: results_of(tmp_path / f"mini_{t}_M1_1-epochs") for t in ("styles", "actions")}
    rows = [r["few_shot"]["CoOp unified"]["1"] for r in results.values()]
    averages = [(a["test"] + b["test"]) / 2 for a, b in zip(*rows)]
    # the spread of the average is that of the average over seeds, the population's
    spread = abs(averages[0] - averages[1]) / 2
    assert re.search(rf"CoOp unified +{sum(averages) / 2:.1f} ± {spread:.1f}$", out, re.M)


SETTINGS = {"model": "RN50", "n_ctx": 16, "ctx_init": None, "class_position": "end", "epochs": None}


def result_like(settings, shots=("1", "16"), domains=("imagenet_a",)):
    row = {"test": 50.0, **dict.fromkeys(domains, 20.0)}
    templates = ["a photo of a {}.", "{}"]
    return {"settings": settings, "template": templates[0],
            "zero_shot": {t: row for t in templates},
            "few_shot": dict.fromkeys(report.METHODS, dict.fromkeys(shots, [row, row]))}


def test_the_papers_figures_stand_beside_the_same_setting_only():
    text = report.table(result_like(SETTINGS), "imagenet")
    assert re.search(r"CoOp unified +50.0 ± 0.0 +50.0 ± 0.0\n +the paper +57.15 +62.95", text)
    assert "60.6 to 60.9" in text and "issue 88" in text  # what users of the published code get
    assert re.search(r"the paper, declared template +58.18", text)
    assert re.search(r"CoOp unified +20.0 ± 0.0\n +the paper +22.12", text)  # M = 16 in Table 1
    four = {**SETTINGS, "n_ctx": 4, "ctx_init": "a photo of a"}
    text = report.table(result_like(four), "imagenet")
    assert "62.95" not in text and re.search(r"CoOp unified +20.0 ± 0.0\n +the paper +23.06", text)
    for other in ({"n_ctx": 8}, {"class_position": "front"}, {"epochs": 10}, {"model": "mini"},
                  {"ctx_init": "a photo of a"}):
        text = report.table(result_like({**SETTINGS, **other}), "imagenet")
        assert "62.95" not in text and "22.12" not in text, other
    assert "91.83" in report.table(result_like(SETTINGS), "caltech101")
    one_shot = report.table(result_like(SETTINGS, ("1",)), "imagenet")
    assert "57.15" in one_shot and "22.12" not in one_shot  # Table 1 is of 16 shots


def test_the_papers_average_stands_beside_ours(tmp_path):
    result = result_like(SETTINGS, ("1", "2", "4", "8", "16"), ())
    results = {"dtd": result, "eurosat": result}
    text = report.average_table(results)
    for row in ("59.6 +62.3 +66.8 +69.9 +73.4", "44.9 +52.0 +60.1 +65.9 +71.4",
                "36.7 +47.6 +57.2 +65.0 +71.1"):
        assert re.search(f"the paper, its eleven +{row}", text), text
    report.figure(results, "CLIP RN50", tmp_path / "figure.png")
    assert Image.open(tmp_path / "figure.png").size[0] > 900


def test_tables_print_on_an_ascii_terminal(tmp_path):
    command = [sys.executable, str(ROOT / "mini_coop.py"), "--dataset", "styles", "--shots", "1",
               "--seeds", "1", "2", *SMALL, "--class-specific", "no", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert run.returncode == 0 and "CoOp unified" in run.stdout, run.stderr


def test_check_prints_what_a_bug_report_needs(capsys, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        grid.main(["--check", "--device", "cpu"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    for what in ("python ", "torch ", "CUDA", "OpenAI's weights found", "data sets found",
                 "objects", "two steps with mini          fine on cpu"):
        assert what in out, what
    monkeypatch.setattr(CoOp, "fit", lambda self, *args, **options: self)  # learns nothing
    with pytest.raises(SystemExit) as stop:
        grid.main(["--check", "--device", "cpu"])
    assert stop.value.code == 1 and "WRONG" in capsys.readouterr().out


def test_a_shared_folder_is_searched_for_weights_and_data(tmp_path, monkeypatch):
    (tmp_path / "lab/clip").mkdir(parents=True)
    (tmp_path / "lab/clip/RN50.pt").write_bytes(b"not whole")
    (tmp_path / "lab/tiny").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "lab/tiny/a.png")
    spec = {"classnames": ["x", "y"], "template": "{}", "splits": {"test": [["a.png", 0]]}}
    (tmp_path / "lab/tiny/dataset.json").write_text(json.dumps(spec))
    monkeypatch.setenv("MINI_COOP_ROOT", str(tmp_path / "lab"))
    assert mini_coop.weights_file("RN50") == tmp_path / "lab/clip/RN50.pt"
    assert mini_coop.weights_file("RN101").parts[-3:] == (".cache", "clip", "RN101.pt")
    assert mini_coop.load_dataset("tiny").test.images == [tmp_path / "lab/tiny/a.png"]
    assert len(mini_coop.load_dataset("styles").classnames) == 8  # our own are still found


def test_a_folder_without_test_images(tmp_path, capsys):
    for name in ("red", "blue"):
        (tmp_path / "photos/train" / name).mkdir(parents=True)
        Image.new("RGB", (64, 64), name).save(tmp_path / "photos/train" / name / "a.png")
    with pytest.raises(SystemExit):
        grid.main(["--dataset", str(tmp_path / "photos"), *SMALL, "--out", str(tmp_path / "out")])
    assert "photos has no test images" in capsys.readouterr().err


@pytest.mark.parametrize("command, message", [
    ("--dataset nowhere", "no data set 'nowhere': neither a folder nor one of actions, "),
    ("--dataset styles styles", "two data sets of the same name"),
    ("--model RN5", "neither 'mini', nor one of RN50"),
    ("--shots 0", "'0' is not a whole number of 1 or more"),
    ("--seeds -1", "'-1' is not a whole number of 0 or more"),
    ("--class-position start", "choose from"),
    ("--device gpu", "device 'gpu' cannot be used here"),
])
def test_wrong_options_say_what_is_allowed(command, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        grid.main([*command.split(), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.json"))


def test_import_does_nothing_and_names_what_is_public():
    """No downloads, no data read, no threads changed at import."""
    code = "import mini_coop, sys; assert not {'sklearn', 'matplotlib', 'grid'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert all(getattr(mini_coop, name).__doc__ for name in mini_coop.__all__)
    text = (ROOT / "mini_coop.py").read_text(encoding="utf-8")
    assert "__path__" not in text and "from mini_coop" not in text


def test_the_modules_body_runs_once_as_the_command(tmp_path):
    code = ("import runpy, sys; sys.argv = ['mini_coop.py', '--check', '--device', 'cpu']\n"
            "try: runpy.run_path('mini_coop.py', run_name='__main__')\n"
            "except SystemExit: pass\n"
            "import grid; assert grid.CoOp.__module__ == '__main__'")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_environment_and_pyproject_name_the_same_packages():
    project = (ROOT / "pyproject.toml").read_text()
    wanted = set(re.findall(r'"([A-Za-z-]+)', re.search(r"^dependencies = \[(.*?)\]", project,
                                                        re.S | re.M)[1]))
    wanted |= set(re.findall(r'"(clip)\b', project))
    wanted |= set(re.findall(r'"([A-Za-z-]+)', re.search(r"^test = \[(.*?)\]", project,
                                                         re.S | re.M)[1]))
    lines = (ROOT / "environment.yml").read_text()
    listed = set(re.findall(r"^ +- ([A-Za-z][A-Za-z-]*)", lines, re.M))
    listed -= {"conda-forge", "python", "pip", "git"}
    assert listed == wanted == {"torch", "clip", "jupyter", "matplotlib", "scikit-learn", "nbval",
                                "pytest-xdist", "ruff"}
    commits = re.findall(r"openai/CLIP(?:\.git)?@([0-9a-f]{40})", project + lines)
    assert len(commits) == 2 and len(set(commits)) == 1


def test_the_code_in_readme_runs(tmp_path, capsys, monkeypatch):
    """Every Python block of README, one after another, on a folder of own images: to a learned
    prompt and one labelled image."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, re.S)
    assert len(blocks) == 2
    assert len(blocks[0].splitlines()) == 10 and len(blocks[1].splitlines()) == 3
    for name, colour in (("cat", (220, 30, 30)), ("dog", (30, 30, 220))):
        (tmp_path / "path/to/photos" / name).mkdir(parents=True)
        for i in range(12):
            shade = tuple(min(255, c + 2 * i) for c in colour)
            Image.new("RGB", (70, 64), shade).save(tmp_path / "path/to/photos" / name / f"{i}.jpg")
    Image.new("RGB", (70, 64), (225, 35, 35)).save(tmp_path / "a.jpg")
    monkeypatch.chdir(tmp_path)
    code = "\n".join(blocks).replace('"actions"', '"path/to/photos"')
    with pytest.warns(UserWarning, match="fewer than 16 training images"):
        exec(code, {})
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "accuracy 100.0%" and out[-1].startswith("cat ")


def test_cuda_is_used_where_there_is_one():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    assert next(load_clip()[0].parameters()).is_cuda


def test_zero_epochs_are_untrained_contexts(tmp_path, mini):
    command = "--dataset styles --shots 1 --seeds 2 --n-ctx 4 --epochs 0 --class-specific no"
    grid.main([*command.split(), "--out", str(tmp_path)])
    few = results_of(tmp_path / "mini_styles_M4_0-epochs")["few_shot"]
    data = mini_coop.load_dataset("styles")
    x = mini_coop.encode_images(*mini, data.test.images, progress=False)
    untrained = mini_coop.CoOp(mini[0], data.classnames, 4, seed=2).score(x, data.test.labels)
    assert few["CoOp unified"]["1"][0]["test"] == pytest.approx(100 * untrained, abs=0.5)


def folder_of(path, names, images=6):
    for k, name in enumerate(names):
        for i in range(images):
            (path / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), (80 * k, 20 * i, 99)).save(path / name / f"{i}.png")


def test_images_left_out_are_still_told_of_after_a_resume(tmp_path, capsys):
    folder_of(tmp_path / "photos", ("cat", "dog"), images=12)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name / "3.png").write_bytes(b"broken")
    command = ["--dataset", str(tmp_path / "photos"), "--shots", "4", "--seeds", "1", *SMALL,
               "--out", str(tmp_path / "out")]
    with pytest.warns(UserWarning, match="cannot be read"):
        grid.main(command)
    first = results_of(tmp_path / "out/mini_photos_M1_1-epochs")["images_left_out"]
    assert first and "plan: 3 of 3" in capsys.readouterr().out
    grid.main(command)
    assert "plan: 0 of 3" in capsys.readouterr().out
    assert results_of(tmp_path / "out/mini_photos_M1_1-epochs")["images_left_out"] == first


def test_domains_of_other_names_are_run_again(tmp_path, capsys):
    folder_of(tmp_path / "photos", ("cat", "dog"))
    rows = [[f"cat/{i}.png", 0] for i in range(6)] + [[f"dog/{i}.png", 1] for i in range(6)]
    data = {"classnames": ["cat", "dog"], "template": "a {}.",
            "splits": {"train": rows, "val": rows, "test": rows}}
    file = tmp_path / "photos/dataset.json"
    command = ["--dataset", str(tmp_path / "photos"), "--shots", "1", "--seeds", "1", *SMALL,
               "--out", str(tmp_path / "out")]
    for domains in ({"a": rows, "b": rows[:8]}, {"b": rows, "a": rows[:8]}, {"a": rows, "c": rows}):
        file.write_text(json.dumps({**data, "domains": domains}))
        grid.main(command)
        assert "plan: 3 of 3 cells" in capsys.readouterr().out


def test_the_tilde_is_no_way_around_the_check_of_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder_of(tmp_path / "photos", ("cat", "dog"))
    with pytest.raises(SystemExit):
        grid.main(["--dataset", "~/photos", "--out", "~/photos/runs", *SMALL])
    assert "choose another --out" in capsys.readouterr().err


def test_words_set_the_number_of_vectors(tmp_path):
    args = options.arguments(["--ctx-init", "a photo of a", "--n-ctx", "7"])
    other = options.arguments(["--ctx-init", "a photo of a"])
    assert args.n_ctx is None and vars(args) == vars(other)


def test_a_figure_of_odd_names_and_of_some_methods(tmp_path):
    both = result_like(SETTINGS, ("1", "16"), ())
    some = {**both, "few_shot": {"CoOp unified": both["few_shot"]["CoOp unified"]}}
    report.figure({"latin\udce9 $x": some, "b": both}, "CLIP", tmp_path / "figure.png")
    assert Image.open(tmp_path / "figure.png").size[0] > 600
