"""Step 3: what data/README.md and data/results.md show of data and results.

    python card.py                      tables and figure of ../results.jsonl, the tasks' picture
    python card.py --runs ../../runs    the same, after taking the lines of the card's commands
"""
import argparse
import json
import sys
from pathlib import Path
from statistics import mean

import torch.nn.functional as F
from matplotlib.figure import Figure

from mini_coop import DATA, encode_images, load_clip, load_dataset, open_image

sys.path.append(str(DATA))
import report  # noqa: E402
from grid import TEMPLATES  # noqa: E402

TASKS = "favicons objects things pixels styles designers actions".split()
SHIFTED = ["favicon_outlines", "outlines"]
SHOTS = (1, 2, 4, 8, 16)
PROBE, UNIFIED, SPECIFIC = report.METHODS
# in data/README.md and data/results.md: what stands between these marks is replaced
RESULTS = "<!-- results: made by data/build/card.py -->\n"
END = "<!-- end of results -->\n"


def collect(runs):
    """runs/mini_<task>/results.jsonl of all tasks -> ../results.jsonl, without the contexts' files
    and the untrained contexts of variants, which nothing shows; only if they were made by one torch
    on one kind of device, and none is missing."""
    lines = []
    for task in TASKS + SHIFTED:
        lines += report.read_lines(runs / f"mini_{task}/results.jsonl")
    made = {(line["torch"], line["device"], line["weights"]) for line in lines}
    for task in TASKS + SHIFTED:
        there = {(line["method"], line.get("shots")) for line in lines if line["data"] == task}
        missing = {(method, n) for method in report.METHODS for n in SHOTS} - there
        if missing or len(made) > 1:
            sys.exit(f"{task} lacks {missing}, or there are several of {made}")
    lines = [line for line in lines if line["method"] != "untrained"
             or all(line.get(key, value) == value for key, value in report.RECIPE.items())]
    text = "".join(json.dumps({k: v for k, v in line.items() if k != "file"}) + "\n"
                   for line in lines)
    (DATA / "results.jsonl").write_text(text)


def kept(task, **setting):
    """The Results of a task, in the paper's setting or another one."""
    data = load_dataset(task)
    lines = report.select(report.read_lines(DATA / "results.jsonl"), data=task, **setting)
    return report.Results(lines, data.template, 100 / len(data.classnames))


def typical(features, labels, k):
    """The index of the image (N, E) nearest to the mean of class k."""
    mine = [i for i, label in enumerate(labels) if label == k]
    x = F.normalize(features[mine], dim=-1)
    return mine[(x @ x.mean(0)).argmax()]


def tasks_picture(path):
    """A typical training image of eight classes of each task."""
    fig = Figure((9, 1.25 * len(TASKS)), layout="constrained")
    axes = fig.subplots(len(TASKS), 8)
    model, preprocess = load_clip()
    for name, of_task in zip(TASKS, axes):
        data = load_dataset(name)
        same = load_dataset({"favicons": "objects", "pixels": "objects"}.get(name, name))
        features = encode_images(model, preprocess, same.train.images)
        for label, ax in enumerate(of_task):  # of one drawing in all its sizes
            image = data.train.images[typical(features, data.train.labels, label)]
            ax.imshow(open_image(image))
            ax.set(xticks=[], yticks=[])
            ax.set_xlabel(data.classnames[label], fontsize=10)
        of_task[0].set_ylabel(name, fontsize=11)
    fig.savefig(path, dpi=100)


# ---------------------------------------------------------------- tables

def row(*cells):
    return "| " + " | ".join(cells) + " |"


def head(*cells):
    return [row(*cells), "|---" * len(cells) + "|"]


def of_shots(results, method):
    """The cells of a method: mean ± standard deviation for each number of shots."""
    return [report.format_mean(results.accuracies(method, n)) for n in SHOTS]


def gaps(results, method, other=None):
    """Cells: a method minus another one, or minus the templates, in points."""
    cells = []
    for n in SHOTS:
        minus = mean(results.accuracies(other, n)) if other else results.zero_shot()
        cells.append(f"{mean(results.accuracies(method, n)) - minus:+.1f}")
    return cells


def average_table(ours, theirs):
    """Averages over the seven tasks beside the paper's over its eleven data sets."""
    lines = head("average, %", "0", *map(str, SHOTS))
    for method in report.METHODS[::-1]:
        lines.append(row(method, "", *of_shots(ours, method)))
        lines.append(row("the paper", "", *of_shots(theirs, method)))
    for name, results in (("zero-shot, the tasks' templates", ours), ("the paper", theirs)):
        lines.append(row(name, f"{results.zero_shot():.1f}", *[""] * 5))
    untrained = report.format_mean(ours.accuracies("untrained"))
    lines.append(row("untrained random contexts", untrained, *[""] * 5))
    return lines


def gap_table(rows):
    """Unified CoOp minus templates and minus probe, and class-specific minus unified; rows:
    {name: Results}."""
    lines = head("points", "", *map(str, SHOTS))
    for text, pair in (("unified − template", [UNIFIED]), ("unified − probe", [UNIFIED, PROBE]),
                       ("class-specific − unified", [SPECIFIC, UNIFIED])):
        for name, results in rows.items():
            lines.append(row(text, name, *gaps(results, *pair)))
            text = ""
    return lines


def task_table(results):
    """A row for each task and method."""
    lines = head("test accuracy, %", "chance", "template", "untrained", "method", *map(str, SHOTS))
    for task, of_task in results.items():
        first = [task, f"{of_task.chance:.1f}", f"{of_task.zero_shot():.1f}",
                 report.format_mean(of_task.accuracies("untrained"))]
        for method in (UNIFIED, SPECIFIC, PROBE):
            lines.append(row(*first, method, *of_shots(of_task, method)))
            first = [""] * 4
    return lines


def template_table(results):
    """Zero-shot accuracy of every hand-written prompt."""
    lines = head("zero-shot, %", "its template", *TEMPLATES)
    for task, of_task in results.items():
        cells = [f"{of_task._replace(template=template).zero_shot():.1f}" for template in TEMPLATES]
        lines.append(row(task, f"{of_task.zero_shot():.1f}", *cells))
    return lines


def shift_table(task, runs, short=False):
    """A task of outlines: test split, the four shifts (unless short) and their mean; runs: {name:
    (method, setting)}."""
    shifts = ["solid", "two-tone", "colour", "dark"]
    lines = head(task, "labels", "source", *([] if short else shifts), "mean of shifts")

    def cells(results, method, shots=None):
        values = [mean(results.accuracies(method, shots, split)) for split in ("test", *shifts)]
        shown = values[:1] if short else values
        return [f"{value:.1f}" for value in (*shown, mean(values[1:]))]

    results = kept(task)
    for template in dict.fromkeys([results.template, "a photo of a {}."]):
        lines.append(row(f"“{template}”", "0",
                         *cells(results._replace(template=template), "zero-shot")))
    lines.append(row("untrained contexts, M = 16", "0", *cells(results, "untrained")))
    for name, (method, setting) in runs.items():
        results = kept(task, **setting)
        for n, labels in ((1, "1"), (4, "4"), (16, "all")):  # a class has 6 to 13
            lines.append(row(name, labels, *cells(results, method, n)))
    return lines


def variant_table():
    """Class position, M and start of the unified context, on four tasks."""
    shots = (1, 4, 16)
    lines = head("CoOp unified, %", "setting", *[f"labels: {n}" for n in shots])
    for task in ("favicons", "objects", "styles", "actions"):
        words = "a pixel art" if task == "favicons" else "an icon of a"
        first = task
        for name, setting in (("class name at the end, M = 16", {}),
                              ("in the middle", {"class_position": "middle"}),
                              ("in front", {"class_position": "front"}), ("M = 4", {"n_ctx": 4}),
                              (f"from “{words}”", {"ctx_init": words})):
            results = kept(task, **setting)
            cells = [report.format_mean(results.accuracies(UNIFIED, n)) for n in shots]
            lines.append(row(first, name, *cells))
            first = ""
    return lines


def titled(parts):
    return "\n".join(f"### {title}\n\n" + "\n".join(lines) + "\n" for title, lines in parts.items())


def all_tables():
    """-> the tables of data/README.md, one per claim, and those of data/results.md."""
    results = {task: kept(task) for task in TASKS}
    ours = report.average(list(results.values()))
    theirs = report.average(list(report.papers().values()))
    main = {"linear probe": (PROBE, {}), "CoOp unified, M = 16": (UNIFIED, {})}
    words = {"CoOp unified, from “a pixel art”": (UNIFIED, {"ctx_init": "a pixel art"})}
    fewer = {"CoOp unified, M = 4": (UNIFIED, {"n_ctx": 4})}
    of_card = {
        "Few labels beat hand-written prompts": average_table(ours, theirs),
        "The gaps": gap_table({"the paper": theirs, "here": ours}),
        "Wording matters": template_table(results),
        "A learned prompt travels": shift_table("favicon_outlines", main | words, short=True)}
    full = {
        "Every task": task_table(results), "The gaps": gap_table(results),
        "A learned prompt travels": shift_table("favicon_outlines", main | words | fewer),
        "The counter-example of a shift": shift_table("outlines", main),
        "Variants": variant_table()}
    return titled(of_card), titled(full)


def replace(path, tables):
    """Puts the tables between the marks of a page."""
    before, start, rest = path.read_text(encoding="utf-8").partition(RESULTS)
    path.write_text(before + start + tables + rest[rest.index(END):], encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="results to take first")
    args = parser.parse_args()
    if args.runs:
        collect(args.runs)
    of_card, full = all_tables()
    replace(DATA / "README.md", of_card)
    replace(DATA / "results.md", full)
    results = {task: kept(task) for task in TASKS}
    panels = {"average of seven": report.average(list(results.values())), **results}
    report.over_shots(panels).savefig(DATA / "figures/tasks_over_shots.png", dpi=150)
    tasks_picture(DATA / "figures/tasks.png")


if __name__ == "__main__":
    main()
