"""Cuts the exercises of every lesson out of its solutions, so that the two cannot drift."""
import argparse
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
        if [lesson.cells[i].source for i in old] == [cell.source for cell in new]:
            continue
        drifted.append(path.name)
        if check:
            continue
        if any(lesson.cells[i].source.partition(MARK)[2].strip() for i in old):
            sys.exit(f"{lesson_path} has answers below the mark: move it away, or empty them")
        lesson.cells[old[0] : old[-1] + 1] = new
        nbformat.write(lesson, lesson_path)
    return drifted


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare; fail where they differ")
    args = parser.parse_args()
    if drifted := main(args.check):
        what = "differ from their solutions" if args.check else "cut anew, run them again"
        print(f"{what}: {', '.join(drifted)}")
        sys.exit(args.check)
