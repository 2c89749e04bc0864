"""The notebooks: house rules, exercises, a run of each with another CLIP on another data set.

nbval runs them as they are.
"""

import os
import sys

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image

import mini_coop

NOTEBOOKS = mini_coop.DATA.parent / "notebooks"
LESSONS = sorted(NOTEBOOKS.glob("0*.ipynb"))
SOLUTIONS = sorted((NOTEBOOKS / "solutions").glob("0*.ipynb"))
sys.path[:0] = [str(NOTEBOOKS), str(NOTEBOOKS / "solutions")]
import cut  # noqa: E402
import grade  # noqa: E402
import lessons  # noqa: E402


def test_exercises_are_cut_out_of_their_solutions():
    assert [p.name for p in LESSONS] == [p.name for p in SOLUTIONS] and len(LESSONS) == 5
    assert cut.main(check=True) == []
    for path in SOLUTIONS:
        cells = nbformat.read(path, 4).cells
        exercises = sum(cell.source.startswith("### Exercise") for cell in cells)
        assert exercises == len(grade.checks_of(nbformat.read(path, 4))) >= 3
        assert any(cell.source.startswith("### Open questions") for cell in cells)


def has_figure(cell):
    return any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))


@pytest.mark.parametrize("path", LESSONS + SOLUTIONS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_house_rules(path):
    assert path.stat().st_size < 250 * 1024  # the house contract
    cells = nbformat.read(path, 4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    # one clean run, top to bottom
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr"
        lines = cell.source.splitlines()
        assert len(lines) <= 25
        # nbval wants its mark alone on a line
        assert "NBVAL_CHECK_OUTPUT" not in cell.source or "# NBVAL_CHECK_OUTPUT" in lines
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
    """Environment variables that switch the notebooks to another CLIP and another data set.

    The CLIP has random weights, the data set is a folder of three classes.
    """
    folder = tmp_path_factory.mktemp("another")
    torch.save(tiny[0].state_dict(), folder / "clip.pt")
    rng = np.random.default_rng(0)
    for k, name in enumerate(("red_car", "green tree", "blue")):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(16):
            noise = rng.integers(0, 120, (70, 60, 3), dtype=np.uint8)
            noise[..., k] += 100
            Image.fromarray(noise).save(folder / "photos" / name / f"{i}.jpg")
    return {"MINI_COOP_MODEL": str(folder / "clip.pt"), "MINI_COOP_DATA": str(folder / "photos")}


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_another_clip_and_data_set(path, another, tmp_path, monkeypatch):
    """No cell assumes the embedded tasks: everything runs.

    Claims that hold for the embedded tasks alone are skipped.
    """
    for name, value in another.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(path, 4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert os.listdir(tmp_path) == []  # and it leaves nothing behind


def notebook_of(*sources):
    """A small lesson: each source a code cell; those with a mark or a check are an exercise."""
    cells = []
    for source in sources:
        tags = ["exercise"] if cut.MARK in source or "answered" in source else []
        cells.append(nbformat.v4.new_code_cell(source, metadata={"tags": tags}))
    return nbformat.v4.new_notebook(cells=cells)


def test_what_is_handed_in_is_graded(tmp_path):
    start = f"import sys; sys.path.append({str(NOTEBOOKS)!r}); import lessons"
    checks = []
    for n in (1, 2, 3):
        checks.append(f"if lessons.answered({n}, x{n}):\n    assert x{n} == {n}")
    answers = ["x1 = None", "x2 = None", "x3 = None"]
    solution = notebook_of(start, *checks)
    answers = [f"{answer}\n{cut.MARK}\n" for answer in answers]
    answers[0] += "x1 = 1"
    answers[1] += "x2 = 3"
    # a check that the student has softened is replaced by ours
    softened = "if lessons.answered(2, x2):\n    pass"
    cells = [answers[0], checks[0], answers[1], softened, answers[2], checks[2]]
    path = tmp_path / "lesson.ipynb"
    nbformat.write(notebook_of(start, *cells), path)
    assert grade.grade(path, solution) == ["right", "wrong", "empty"]
    assert grade.grade(tmp_path / "nothing.ipynb", solution) == ["-"] * 3
    nbformat.write(notebook_of(start), path)
    with pytest.raises(ValueError, match="0 check cells instead of 3"):
        grade.grade(path, solution)


def test_an_empty_exercise_is_red_in_strict_mode(monkeypatch, capsys):
    monkeypatch.delenv("MINI_COOP_STRICT", raising=False)
    assert lessons.answered(1, 0, []) and not lessons.answered(2, 1, None)
    assert capsys.readouterr().out == "exercise 2 is waiting for you\n"
    monkeypatch.setenv("MINI_COOP_STRICT", "1")
    with pytest.raises(AssertionError, match="exercise 2 is empty"):
        lessons.answered(2, None)


def test_slides_are_the_figures_of_the_lessons(tmp_path, monkeypatch):
    monkeypatch.setenv("MINI_COOP_DPI", "90")
    plot = "import matplotlib.pyplot as plt\nplt.plot([1, 2]); plt.show()"
    nbformat.write(notebook_of("print(1)", plot, plot), tmp_path / "one.ipynb")
    lessons.slides(tmp_path / "slides", [tmp_path / "one.ipynb"])
    names = ["one_1.png", "one_2.png"]
    assert sorted(os.listdir(tmp_path / "slides")) == names
    assert Image.open(tmp_path / "slides/one_1.png").size[0] > 100
