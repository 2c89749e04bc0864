"""The notebooks beside nbval: house rules, exercises, a run with another CLIP and data set."""

import os
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
SOLUTIONS = sorted((NOTEBOOKS / "solutions").glob("0*.ipynb"))
sys.path[:0] = [str(NOTEBOOKS), str(NOTEBOOKS / "solutions")]
import lessons  # noqa: E402


@pytest.mark.skipif(not SOLUTIONS, reason="handed out without solutions")
def test_exercises_are_cut_out_of_their_solutions(tmp_path, monkeypatch):
    import cut
    assert [p.name for p in LESSONS] == [p.name for p in SOLUTIONS] and len(LESSONS) == 6
    assert cut.main(check=True) == []
    for path in SOLUTIONS:
        cells = nbformat.read(path, 4).cells
        assert sum(cell.source.startswith("### Exercise") for cell in cells) >= 3
        assert any(cell.source.startswith("### Open questions") for cell in cells)
    # filled-in answers are not overwritten
    monkeypatch.setattr(cut, "HERE", tmp_path / "solutions")
    (tmp_path / "solutions").mkdir()
    for folder, answer in (("solutions", "x = 1"), (".", "x = 2")):
        cell = nbformat.v4.new_code_cell(f"x = None\n{cut.MARK}\n{answer}",
                                         metadata={"tags": ["exercise"]})
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / folder / "1.ipynb")
    with pytest.raises(SystemExit, match="has answers below the mark"):
        cut.main(check=False)
    assert "x = 2" in (tmp_path / "1.ipynb").read_text()


def has_figure(cell):
    return any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))


@pytest.mark.parametrize("path", LESSONS + SOLUTIONS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_house_rules(path):
    assert path.stat().st_size < 250 * 1024  # the house contract
    cells = nbformat.read(path, 4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))  # in order
    for cell in code:
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr"
            assert not any("widget" in kind for kind in output.get("data", {}))  # raw on the web
        assert len(cell.source.splitlines()) <= 25
    if path in LESSONS:
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        assert text.count("**Predict before you run.**") >= 2
        assert "## In this notebook we have" in text
        assert "**You will learn**" in text
        # every figure is followed by its description, behind the live control where there is one
        for i, cell in enumerate(cells):
            if has_figure(cell):
                assert any("*Figure:" in c.source for c in cells[i + 1 : i + 3]), cell.source


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
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert os.listdir(tmp_path) == []


def test_settings_at_the_top_of_a_notebook(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    assert lessons.settings() == ("mini", lessons.TASKS.split(), True)
    assert lessons.settings("a.pt", "a/photos dtd") == ("a.pt", ["a/photos", "dtd"], False)
    assert lessons.choose("objects") == "a/photos"


def test_an_empty_exercise_is_red_in_strict_mode(monkeypatch, capsys):
    monkeypatch.delenv("MINI_COOP_STRICT", raising=False)
    assert lessons.answered(1, 0, []) and not lessons.answered(2, 1, None)
    assert capsys.readouterr().out == "exercise 2 is waiting for you\n"
    monkeypatch.setenv("MINI_COOP_STRICT", "1")
    with pytest.raises(AssertionError, match="exercise 2 is empty"):
        lessons.answered(2, None)
