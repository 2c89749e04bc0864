"""Cuts the exercises of every lesson out of its solutions, so that the two cannot drift.

python notebooks/solutions/cut.py            writes them into the lessons; then run those lessons again
python notebooks/solutions/cut.py --check    only compares, and fails where a lesson differs
"""

import sys
from pathlib import Path

import nbformat

MARK = "# your lines below"
HERE = Path(__file__).resolve().parent


def tagged(cell):
    return "exercise" in cell.metadata.get("tags", [])


def cut(solutions):
    """The exercise cells of a solutions notebook, without what stands below the mark."""
    cells = []
    for cell in filter(tagged, solutions.cells):
        above, mark, _ = cell.source.partition(MARK)
        new = (
            nbformat.v4.new_markdown_cell
            if cell.cell_type == "markdown"
            else nbformat.v4.new_code_cell
        )
        cells.append(
            new(above + mark, id=f"exercise-{len(cells)}", metadata={"tags": ["exercise"]})
        )
    return cells


def main(check):
    drifted = []
    for path in sorted(HERE.glob("*.ipynb")):
        lesson_path = HERE.parent / path.name
        lesson, new = nbformat.read(lesson_path, 4), cut(nbformat.read(path, 4))
        old = [i for i, cell in enumerate(lesson.cells) if tagged(cell)]
        if [lesson.cells[i].source for i in old] != [cell.source for cell in new]:
            drifted.append(path.name)
            lesson.cells[old[0] : old[-1] + 1] = new
            if not check:
                nbformat.write(lesson, lesson_path)
    if drifted:
        print(
            ("differ from their solutions: " if check else "cut anew, run them again: ")
            + ", ".join(drifted)
        )
    return drifted


if __name__ == "__main__":
    check = "--check" in sys.argv[1:]
    sys.exit(bool(main(check)) and check)
