"""Step 4: the parts of data/README.md that are made from data and results.

    python card.py                      the tables and the figure of ../results, the tasks' picture
    python card.py --runs ../../runs    the same, after taking the results of the card's commands
    python card.py --work work          and the table of icon sets
"""
import argparse
import json
import sys
from pathlib import Path
from statistics import mean

import numpy as np
from matplotlib.figure import Figure

from icons import HERE, read_sets
from mini_coop import encode_images, load_clip, load_dataset, open_image

sys.path.append(str(HERE.parents[1] / "notebooks"))
from lessons import TASKS, grid, kept, papers_average, typical  # noqa: E402

TASKS = TASKS.split()
SHOTS = ["1", "2", "4", "8", "16"]
# in data/README.md: what stands between a mark and the next is replaced
RESULTS = "<!-- results: made by data/build/card.py -->\n"
END = "<!-- end of results -->\n"
SETS = "<!-- sets: made by card.py -->\n"


def collect(runs):
    """runs/[<setting>/]mini_<task>/results.json -> ../results/<task>[_<setting>].json"""
    for file in sorted(runs.rglob("mini_*/results.json")):
        task = file.parent.name.removeprefix("mini_")
        setting = file.parent.parent.name
        suffix = "" if file.parent.parent == runs else f"_{setting}"
        (HERE.parent / f"results/{task}{suffix}.json").write_text(file.read_text())


def sets_table(work):
    """The icon sets as a Markdown table."""
    lines = [row("set", "version", "used for", "drawings", "licence", "name, author, source"),
             "|---" * 6 + "|"]
    for s in read_sets():
        info = json.loads((work / f"node_modules/@iconify-json/{s['set']}/info.json").read_text())
        author = info["author"]
        source = f"[{info['name']}]({author['url']})" if author.get("url") else info["name"]
        drawn = len(np.load(work / f"drawn/{s['set']}.npz")["names"])
        role = "tasks" if s["role"] == "held-out" else "pre-training"
        lines.append(row(s["set"], s["version"], role, str(drawn), info["license"]["spdx"],
                         f"{source}, {author['name']}"))
    return "\n".join(lines)


def tasks_picture(path):
    """A typical training image of eight classes of each task."""
    fig = Figure((9, 1.25 * len(TASKS)), layout="constrained")
    axes = fig.subplots(len(TASKS), 8)
    model, preprocess = load_clip()
    for name, of_task in zip(TASKS, axes):
        data = load_dataset(name)
        same = load_dataset({"favicons": "objects", "pixels": "objects"}.get(name, name))
        features = encode_images(model, preprocess, same.train.images, progress=False)
        some = typical(features, data.train.labels)  # of one drawing in all its sizes
        for label, ax in enumerate(of_task):
            ax.imshow(open_image(data.train.images[some[label]]))
            ax.set(xticks=[], yticks=[])
            ax.set_xlabel(data.classnames[label], fontsize=10)
        of_task[0].set_ylabel(name, fontsize=11)
    fig.savefig(path, dpi=100)


# ---------------------------------------------------------------- tables

def row(*cells):
    return "| " + " | ".join(cells) + " |"


def head(*cells):
    return [row(*cells), "|---" * len(cells) + "|"]


def of_shots(result, method):
    """The cells of a method: mean ± standard deviation for each number of shots."""
    return [grid.spelled(rows) for rows in result["few_shot"][method].values()]


def gaps(result, method, other=None):
    """Cells: a method minus another one, or minus the templates, in points."""
    cells = []
    for n, rows in result["few_shot"][method].items():
        minus = grid.own_template(result)
        if other:
            minus = grid.mean_std(result["few_shot"][other][n])[0]
        cells.append(f"{grid.mean_std(rows)[0] - minus:+.1f}")
    return cells


def average_table(ours, theirs):
    """Averages over the seven tasks beside the paper's over its eleven data sets."""
    lines = head("average, %", "0", *SHOTS)
    for method in grid.METHODS[::-1]:
        lines.append(row(method, "", *of_shots(ours, method)))
        lines.append(row("the paper", "", *of_shots(theirs, method)))
    for name, result in (("zero-shot, the tasks' templates", ours), ("the paper", theirs)):
        lines.append(row(name, f"{grid.own_template(result):.1f}", *[""] * 5))
    lines.append(row("untrained random contexts", grid.spelled(ours["untrained"]), *[""] * 5))
    return lines


def gap_table(results, theirs):
    """Unified CoOp minus templates and minus probe, and class-specific minus unified."""
    lines = head("points", "", *SHOTS)
    ours = grid.average(list(results.values()))
    for text, pair in (("unified − template", ["CoOp unified"]),
                       ("unified − probe", ["CoOp unified", "linear probe"]),
                       ("class-specific − unified", ["CoOp class-specific", "CoOp unified"])):
        for name, result in (("the paper", theirs), ("average", ours), *results.items()):
            lines.append(row(text, name, *gaps(result, *pair)))
            text = ""
    return lines


def task_table(results):
    """A row for each task and method."""
    lines = head("test accuracy, %", "chance", "template", "untrained", "method", *SHOTS)
    for task, result in results.items():
        first = [task, f"{result['chance']:.1f}", f"{grid.own_template(result):.1f}",
                 grid.spelled(result["untrained"])]
        for method in ("CoOp unified", "CoOp class-specific", "linear probe"):
            lines.append(row(*first, method, *of_shots(result, method)))
            first = [""] * 4
    return lines


def template_table(results):
    """Zero-shot accuracy of every hand-written prompt."""
    lines = head("zero-shot, %", "its template", *grid.TEMPLATES)
    for task, result in results.items():
        cells = [f"{result['zero_shot'][template]['test']:.1f}" for template in grid.TEMPLATES]
        lines.append(row(task, f"{grid.own_template(result):.1f}", *cells))
    return lines


def shift_table(task, runs):
    """A task of outlines: test split, the four shifts and their mean; runs: (name, results)."""
    result = kept(task)
    shifts = ["solid", "two-tone", "colour", "dark"]
    lines = head(task, "labels", "source", *shifts, "mean of shifts")

    def cells(rows):
        values = [mean(r[split] for r in rows) for split in ("test", *shifts)]
        return [f"{value:.1f}" for value in (*values, mean(values[1:]))]

    for template in dict.fromkeys([result["template"], "a photo of a {}."]):
        lines.append(row(f"“{template}”", "0", *cells([result["zero_shot"][template]])))
    for name, method, variant in runs:
        by_shots = kept(task, variant)["few_shot"][method]
        for n, labels in (("1", "1"), ("4", "4"), ("16", "all")):  # a class has 6 to 13
            lines.append(row(name, labels, *cells(by_shots[n])))
    return lines


def variant_table():
    """Class position, M and start of the unified context, averaged over the tasks."""
    shots = ("1", "4", "16")
    lines = head("CoOp unified, average of seven, %", *[f"labels: {n}" for n in shots])
    for name, suffix in (("class name at the end, M = 16", ""), ("in the middle", "_middle"),
                         ("in front", "_front"), ("M = 4", "_m4"), ("from words", "_words")):
        average = grid.average([kept(task, suffix) for task in TASKS])
        cells = [grid.spelled(average["few_shot"]["CoOp unified"][n]) for n in shots]
        lines.append(row(name, *cells))
    return lines


def all_tables():
    results = {task: kept(task) for task in TASKS}
    ours = grid.average(list(results.values()))
    theirs = papers_average()
    main = [("linear probe", "linear probe", ""), ("CoOp unified, M = 16", "CoOp unified", "")]
    more = [("CoOp unified, M = 4", "CoOp unified", "_m4"),
            ("CoOp unified, from “a pixel art”", "CoOp unified", "_words")]
    parts = {
        "Few labels beat hand-written prompts": average_table(ours, theirs),
        "The gaps": gap_table(results, theirs), "Every task": task_table(results),
        "Wording matters": template_table(results),
        "A learned prompt travels": shift_table("favicon_outlines", main + more),
        "The counter-example": shift_table("outlines", main), "Variants": variant_table()}
    return "\n".join(f"### {title}\n\n" + "\n".join(lines) + "\n" for title, lines in parts.items())


def replaced(path, start, end, text):
    """Puts a text between two marks of a file."""
    before, start, rest = path.read_text(encoding="utf-8").partition(start)
    after = rest[rest.index(end):] if end else ""
    path.write_text(before + start + text + after, encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="render.py's folder, for the table of sets")
    parser.add_argument("--runs", type=Path, help="results to take first")
    args = parser.parse_args()
    if args.runs:
        collect(args.runs)
    replaced(HERE.parent / "README.md", RESULTS, END, all_tables())
    if args.work:
        replaced(HERE / "README.md", SETS, "", sets_table(args.work) + "\n")
    results = {task: kept(task) for task in TASKS}
    panels = {"average of seven": grid.average(list(results.values())), **results}
    grid.over_shots(panels).savefig(HERE.parent / "results/tasks_over_shots.png", dpi=150)
    tasks_picture(HERE.parent / "results/tasks.png")


if __name__ == "__main__":
    main()
