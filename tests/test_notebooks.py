"""The notebooks' house rules, their exercises, and a run of each with another CLIP on another data set. (nbval runs them as they are.)"""

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
sys.path.insert(0, str(NOTEBOOKS / "solutions"))
import cut  # noqa: E402


def test_exercises_are_cut_out_of_their_solutions():
    assert [p.name for p in LESSONS] == [p.name for p in SOLUTIONS] and len(LESSONS) == 5
    assert cut.main(check=True) == []
    for path in SOLUTIONS:
        assert (
            sum(cell.source.startswith("### Exercise") for cell in nbformat.read(path, 4).cells)
            == 3
        )


@pytest.mark.parametrize("path", LESSONS + SOLUTIONS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_house_rules(path):
    assert path.stat().st_size < 200 * 1024
    cells = nbformat.read(path, 4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(
        range(1, len(code) + 1)
    )  # one clean run, top to bottom
    assert not any(
        output.output_type == "error" or output.get("name") == "stderr"
        for cell in code
        for output in cell.outputs
    )
    assert max(len(cell.source.splitlines()) for cell in code) <= 25
    for cell in code:
        assert (
            "NBVAL_CHECK_OUTPUT" not in cell.source
            or "# NBVAL_CHECK_OUTPUT" in cell.source.splitlines()
        )
    if path in LESSONS:
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        assert (
            text.count("**Predict before you run.**") >= 2
            and "## In this notebook we have" in text
            and "**You will learn**" in text
        )
        figures = [
            i
            for i, cell in enumerate(cells)
            if any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))
        ]
        for i in figures:  # every figure is followed by its description (behind the live control, where there is one)
            assert any("*Figure:" in cell.source for cell in cells[i + 1 : i + 3]), cells[i].source


@pytest.fixture(scope="module")
def another(tmp_path_factory, tiny):
    """Environment variables that switch the notebooks to a CLIP with random weights and a folder of three classes."""
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
    """No cell assumes the embedded tasks: everything runs, the claims that hold for them alone are skipped."""
    for name, value in another.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(path, 4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert os.listdir(tmp_path) == []  # and it leaves nothing behind
