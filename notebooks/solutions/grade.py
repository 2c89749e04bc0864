"""Grades what was handed in: a table of students and exercises.

    python notebooks/solutions/grade.py handed_in    one folder per student, the lessons in it

Every notebook is run, with our own check cells in the place of the student's; so do this where you
may run other people's code. A mark is "right", "wrong" (the check fails), "empty", or "-" where
there is no notebook.
"""
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from cut import HERE, MARK, tagged


def checks_of(notebook):
    """The check cells of the exercises, in order."""
    cells = [cell for cell in notebook.cells if tagged(cell) and cell.cell_type == "code"]
    return [cell for cell in cells if MARK not in cell.source]


def grade(path, solution):
    """Runs the notebook at `path` -> one mark per exercise of the solution."""
    ours = checks_of(solution)
    if not path.exists():
        return ["-"] * len(ours)
    notebook = nbformat.read(path, 4)
    theirs = checks_of(notebook)
    if len(theirs) != len(ours):
        raise ValueError(f"{path} has {len(theirs)} check cells instead of {len(ours)}")
    for cell, check in zip(theirs, ours):
        cell.source = check.source
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=600, allow_errors=True, resources=resources).execute()
    return [mark_of(cell) for cell in theirs]


def mark_of(check):
    """The mark that the outputs of a check cell tell."""
    if any(output.output_type == "error" for output in check.outputs):
        return "wrong"
    printed = "".join(output.get("text", "") for output in check.outputs)
    return "empty" if "is waiting for you" in printed else "right"


def main(handed_in):
    solutions = {path.name: nbformat.read(path, 4) for path in sorted(HERE.glob("0*.ipynb"))}
    columns = []
    for name, solution in solutions.items():
        columns += [f"{int(name[:2])}.{i + 1}" for i in range(len(checks_of(solution)))]
    students = sorted(folder for folder in Path(handed_in).iterdir() if folder.is_dir())
    width = max([len(student.name) for student in students], default=0) + 2
    print(" " * width + "".join(f"{column:>7}" for column in columns))
    for student in students:
        marks = []
        for name, solution in solutions.items():
            marks += grade(student / name, solution)
        print(f"{student.name:{width}}" + "".join(f"{mark:>7}" for mark in marks), flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit(__doc__)
    main(sys.argv[1])
