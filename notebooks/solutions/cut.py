"""`python cut.py` writes the lessons: the whole ones beside this file, without their answers. It
stops at a lesson that somebody has filled in."""
import copy
import re
import sys
from pathlib import Path

import nbformat

HERE = Path(__file__).resolve().parent
ANSWER = re.compile(r"^### BEGIN SOLUTION\n.*?^### END SOLUTION", re.DOTALL | re.MULTILINE)
STUB = {"code": "# your lines here", "markdown": "*Your answer here.*"}


def tagged(lesson, tag):
    return [cell for cell in lesson.cells if tag in cell.metadata.get("tags", [])]


def cut(whole):
    """A whole lesson -> the lesson: no answers, no outputs of their cells."""
    lesson = copy.deepcopy(whole)
    whole_only = tagged(lesson, "whole")
    lesson.cells = [cell for cell in lesson.cells if cell not in whole_only]
    count = 0
    for cell in lesson.cells:
        exercise = cell.metadata.get("nbgrader")  # an answer, or the check of one
        cell.metadata = {}  # no tag of nbval either: outputs may be cleared in a copy
        if exercise:
            cell.metadata["tags"] = ["answer" if exercise["solution"] else "check"]
            cell.source = ANSWER.sub(STUB[cell.cell_type], cell.source)
        if cell.cell_type == "code":
            count += 1
            cell.execution_count = None if exercise else count
            cell.outputs = [] if exercise else cell.outputs
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = count
    return lesson


def same(lesson, new):
    """Whether a lesson is `new`, but for answers that somebody filled in, and for outputs where
    somebody cleared or ran it."""
    for cell, right in zip(lesson.cells, new.cells):
        is_answer = "answer" in right.metadata.get("tags", [])
        if cell.cell_type != right.cell_type or (cell.source != right.source and not is_answer):
            return False
    outputs = [cell.get("outputs") for cell in lesson.cells]
    own_run = any(cell.get("execution_count") for cell in tagged(lesson, "check"))
    return len(lesson.cells) == len(new.cells) and (
        own_run or not any(outputs) or outputs == [cell.get("outputs") for cell in new.cells])


def main(check):
    """Names of the lessons that differ from their cut; they are written unless `check`."""
    differ = []
    for path in sorted(HERE.glob("0*.ipynb")):
        new = cut(nbformat.read(path, 4))
        target = HERE.parent / path.name
        if target.exists():
            old = nbformat.read(target, 4)
            if same(old, new):
                continue
            stubs = {cell.source for cell in tagged(new, "answer")}
            if not check and {cell.source for cell in tagged(old, "answer")} - stubs:
                sys.exit(f"{target} has other answers: move it away first")
        differ.append(path.name)
        if not check:
            nbformat.write(new, target)
    return differ


if __name__ == "__main__":
    print("written:", ", ".join(main(check=False)) or "none, all are as they should be")
