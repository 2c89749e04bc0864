"""Cuts the exercises of every lesson out of its solutions, so that the two cannot drift.

    python notebooks/solutions/cut.py            writes them into the lessons; run those again
    python notebooks/solutions/cut.py --check    only compares, and fails where a lesson differs
"""

import sys
from pathlib import Path

import nbformat

MARK = "# your lines below"
HERE = Path(__file__).resolve().parent


def tagged(cell):
    """Whether the cell belongs to an exercise."""
    return "exercise" in cell.metadata.get("tags", [])


def cut(solutions):
    """The exercise cells of a solutions notebook, without what stands below the mark."""
    cells = []
    for cell in filter(tagged, solutions.cells):
        above, mark, _ = cell.source.partition(MARK)
        new_cell = nbformat.v4.new_code_cell
        if cell.cell_type == "markdown":
            new_cell = nbformat.v4.new_markdown_cell
        name = f"exercise-{len(cells)}"
        cells.append(new_cell(above + mark, id=name, metadata={"tags": ["exercise"]}))
    return cells


def main(check):
    """Names of the lessons that differ from their solutions; they are rewritten unless `check`."""
    drifted = []
    for path in sorted(HERE.glob("*.ipynb")):
        lesson_path = HERE.parent / path.name
        lesson = nbformat.read(lesson_path, 4)
        new = cut(nbformat.read(path, 4))
        old = [i for i, cell in enumerate(lesson.cells) if tagged(cell)]
        if [lesson.cells[i].source for i in old] != [cell.source for cell in new]:
            drifted.append(path.name)
            lesson.cells[old[0] : old[-1] + 1] = new
            if not check:
                nbformat.write(lesson, lesson_path)
    if drifted:
        what = "differ from their solutions" if check else "cut anew, run them again"
        print(f"{what}: {', '.join(drifted)}")
    return drifted


if __name__ == "__main__":
    check = "--check" in sys.argv[1:]
    sys.exit(bool(main(check)) and check)
