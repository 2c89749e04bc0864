"""The notebooks beside nbval: house rules, the cut, a copy that is handed out, other data."""
import os
import re
import shutil
import subprocess
import sys

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image

import grid
import mini_coop

NOTEBOOKS = mini_coop.DATA.parent / "notebooks"
LESSONS = sorted(NOTEBOOKS.glob("0*.ipynb"))
WHOLE = sorted((NOTEBOOKS / "solutions").glob("0*.ipynb"))
sys.path[:0] = [str(NOTEBOOKS), str(NOTEBOOKS / "solutions")]
import lessons  # noqa: E402

in_repository = pytest.mark.skipif(not WHOLE, reason="handed out without solutions")


@in_repository
def test_lessons_are_cut_out_of_the_whole_ones(tmp_path, monkeypatch):
    import cut
    assert [p.name for p in LESSONS] == [p.name for p in WHOLE] and len(WHOLE) == 7
    assert cut.main(check=True) == []
    monkeypatch.setattr(cut, "HERE", tmp_path / "solutions")
    (tmp_path / "solutions").mkdir()
    shutil.copy(WHOLE[1], tmp_path / "solutions")
    assert cut.main(check=False) == [WHOLE[1].name]
    path = tmp_path / WHOLE[1].name
    assert "BEGIN SOLUTION" not in path.read_text()
    lesson = nbformat.read(path, 4)
    cut.tagged(lesson, "answer")[0].source += "\nx = 1"  # a student's answer turns nothing red
    nbformat.write(lesson, path)
    assert cut.main(check=True) == []
    for cell in lesson.cells:  # nor do cleared outputs
        cell.outputs = []
    nbformat.write(lesson, path)
    assert cut.main(check=True) == []
    lesson.cells[0].source += " another text"
    nbformat.write(lesson, path)
    assert cut.main(check=True) == [WHOLE[1].name]
    with pytest.raises(SystemExit, match="has other answers"):  # and no answer is lost
        cut.main(check=False)
    assert "x = 1" in path.read_text()


def has_figure(cell):
    return any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))


@in_repository
@pytest.mark.parametrize("path", WHOLE, ids=lambda p: p.stem)
def test_house_rules(path):
    import cut
    whole = nbformat.read(path, 4)
    code = [cell for cell in whole.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))  # in order
    for cell in code:
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr"
            assert not any("widget" in kind for kind in output.get("data", {}))  # raw on the web
    # what nbgrader needs: every answer has its check
    kinds = [cell.metadata.nbgrader.grade_id.split("-")[0] for cell in whole.cells
             if "nbgrader" in cell.metadata]
    assert kinds[:2] == ["answer", "check"] and kinds.count("answer") == kinds.count("check") >= 3
    assert kinds[-1] == "open"

    lesson = cut.cut(whole)
    cells = lesson.cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert text.count("**Predict before you run.**") >= 2 and "**You will learn**" in text
    # the switch in the first cell, the claims in the last, nothing of them between
    assert "lessons.switch(" in code[0].source and code[-1].source.startswith("# Checks of this")
    for cell in code[1:-1]:
        if not cell.metadata.get("tags") == ["check"]:
            assert "environ" not in cell.source and "if lessons.built_in" not in cell.source
    for i, cell in enumerate(cells):
        if has_figure(cell):  # a figure is followed by its description
            assert any("*Figure:" in c.source for c in cells[i + 1:i + 3]), cell.source
    assert path.stat().st_size < 250 * 1024


@in_repository
def test_a_copy_is_handed_out(tmp_path):
    """The two lines of notebooks/README.md clear the copy and leave the clone as it is."""
    text = (NOTEBOOKS / "README.md").read_text()
    lines = "\n".join(re.findall("^    (.*)", text.split("## Handing out")[1], re.MULTILINE)[:2])
    before = [path.read_bytes() for path in LESSONS]
    bin_folder = os.path.dirname(sys.executable)
    subprocess.run(["bash", "-ec", lines.replace("/tmp", str(tmp_path))], check=True,
                   cwd=NOTEBOOKS.parent, env={**os.environ, "PATH": f"{bin_folder}:/usr/bin:/bin"})
    copy = tmp_path / "mini-coop/notebooks"
    assert [path.read_bytes() for path in LESSONS] == before and not (copy / "solutions").exists()
    handed_out = sorted(copy.glob("0*.ipynb"))
    assert [path.name for path in handed_out] == [path.name for path in LESSONS]
    for path in handed_out:
        assert not any(cell.get("outputs") for cell in nbformat.read(path, 4).cells)


@pytest.fixture(scope="module")
def another(tmp_path_factory, tiny):
    """Environment variables that switch the notebooks to a CLIP with random weights, a folder of
    three classes, and a small grid on them with other shots than the kept one."""
    folder = tmp_path_factory.mktemp("another")
    torch.save(tiny[0].state_dict(), folder / "clip.pt")
    rng = np.random.default_rng(0)
    for k, name in enumerate(("red_car", "green tree", "blue")):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(16):
            noise = rng.integers(0, 120, (70, 60, 3), dtype=np.uint8)
            noise[..., k] += 100
            Image.fromarray(noise).save(folder / "photos" / name / f"{i}.jpg")
    grid.main(["--model", str(folder / "clip.pt"), "--dataset", str(folder / "photos"), "--shots",
               "1", "4", "--seeds", "1", "2", "--class-specific", "both", "--epochs", "2", "--out",
               str(folder / "runs")])
    return {"MINI_COOP_MODEL": str(folder / "clip.pt"), "MINI_COOP_DATA": str(folder / "photos"),
            "MINI_COOP_RUNS": str(folder / "runs")}


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_another_clip_and_data_set(path, another, tmp_path, monkeypatch):
    """No cell assumes the built-in tasks, and none leaves anything behind."""
    for name, value in another.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(path, 4)
    for cell in notebook.cells:
        if "answer" in cell.metadata.get("tags", []):  # a student's is for our data
            cell.source = cell.source.split("# your lines here")[0]
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert os.listdir(tmp_path) == []


def test_the_switch_at_the_top_of_a_lesson(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    assert lessons.switch("styles", "objects") == ("mini", "styles", "objects")
    assert lessons.built_in() and lessons.all_tasks() == lessons.TASKS.split()
    own = lessons.switch("styles", "objects", "things", clip="a.pt", data=["my photos", "dtd"])
    assert own == ("a.pt", "my photos", "dtd", "my photos") and not lessons.built_in()
    assert lessons.switch("styles", data="my photos") == ("mini", "my photos")
    assert lessons.all_tasks() == ["my photos"]


def test_an_empty_exercise_is_red_in_strict_mode(monkeypatch, capsys):
    monkeypatch.delenv("MINI_COOP_STRICT", raising=False)
    assert lessons.answered(1, 0, []) and not lessons.answered(2, 1, None)
    assert capsys.readouterr().out == "exercise 2 is waiting for you\n"
    monkeypatch.setenv("MINI_COOP_STRICT", "1")
    with pytest.raises(AssertionError, match="exercise 2 is empty"):
        lessons.answered(2, None)


def test_gaps_are_of_seeds_that_both_methods_have():
    lines = [{"method": "CoOp unified", "shots": 1, "seed": s, "accuracy": {"test": 10.0 * s + 1}}
             for s in (1, 2, 3)]
    lines += [{"method": "linear probe", "shots": 1, "seed": s, "accuracy": {"test": 10.0 * s}}
              for s in (3, 2)]
    results = {"task": lessons.report.Results(lines, "{}", 50)}
    assert lessons.gaps(results, "CoOp unified", "linear probe") == {"task": {1: (1.0, 0.0)}}
