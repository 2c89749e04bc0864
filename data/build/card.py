"""Step 4: the parts of data/README.md that are made from data and results.

    python card.py                   the tables and the figure of results/*.json, the tasks' picture
    python card.py --work work       and the table of icon sets
"""

import argparse
import json
import random
import sys
from pathlib import Path
from statistics import mean, pstdev

import numpy as np
from matplotlib.figure import Figure

from icons import HERE, read_sets
from mini_coop import load_dataset, open_image

sys.path.append(str(HERE.parent))
import report  # noqa: E402

TASKS = ["objects", "things", "pixels", "styles", "designers", "actions"]
SHOTS = ["1", "2", "4", "8", "16"]
# in data/README.md: what stands between a mark and the next is replaced
RESULTS = "<!-- results: made by data/build/card.py -->\n"
END = "<!-- end of results -->\n"
SETS = "<!-- sets: made by data/build/card.py -->\n"
PAPER = {"model": "RN50", "n_ctx": 16, "ctx_init": None, "epochs": None, "class_position": "end"}


def table(work):
    """The icon sets as a Markdown table."""
    lines = ["| set | version | used for | drawings | licence | name, author, source |",
             "|---|---|---|---|---|---|"]
    for row in read_sets():
        info = json.loads((work / f"node_modules/@iconify-json/{row['set']}/info.json").read_text())
        author = info["author"]
        licence = info["license"]["spdx"]
        source = f"[{info['name']}]({author['url']})" if author.get("url") else info["name"]
        drawn = len(np.load(work / f"drawn/{row['set']}.npz")["names"])
        role = "tasks" if row["role"] == "held-out" else "pre-training"
        lines.append(f"| {row['set']} | {row['version']} | {role} | {drawn} | {licence} "
                     f"| {source}, {author['name']} |")
    return "\n".join(lines)


def tasks_picture(path):
    """The tasks, ten training images each with their class names."""
    fig = Figure((9, 6.2), layout="constrained")
    axes = fig.subplots(len(TASKS), 10)
    for name, row in zip(TASKS, axes):
        data = load_dataset(name)
        rng = random.Random(1)
        # ten classes; of a task with fewer, some twice
        classes = range(len(data.classnames))
        labels = rng.sample(classes, min(10, len(classes)))
        labels += rng.sample(classes, 10 - len(labels))
        for ax, label in zip(row, labels):
            pairs = zip(data.train.images, data.train.labels)
            image = rng.choice([image for image, k in pairs if k == label])
            ax.imshow(open_image(image).convert("RGB"))
            ax.set(xticks=[], yticks=[])
            ax.set_xlabel(data.classnames[label], fontsize=7)
        row[0].set_ylabel(name)
    fig.savefig(path, dpi=80)


def kept(variant="", tasks=TASKS):
    """{task: results.json} of one setting of the kept grid."""
    folder = HERE.parent / "results"
    return {t: json.loads((folder / f"{t}{variant}.json").read_text()) for t in tasks}


def row(*cells):
    return "| " + " | ".join(cells) + " |"


def yardstick():
    """Averages over the six tasks beside the paper's over its eleven data sets."""
    lines = [row("average, %", "0", *SHOTS), "|---" * 7 + "|"]
    results = kept()
    zero_shot = mean(report.declared(result) for result in results.values())
    lines.append(row("zero-shot, declared templates", f"{zero_shot:.1f}", *[""] * 5))
    theirs = mean(report.published(PAPER, "zero-shot")["0"].values())
    lines.append(row("the paper", f"{theirs:.1f}", *[""] * 5))
    for variant, M in (("_untrained_m4", 4), ("_untrained", 16)):
        averages = report.average_over_tasks(kept(variant), "CoOp unified", "1")
        text = report.spelled(averages)
        lines.append(row(f"untrained random contexts, M = {M}, five seeds", text, *[""] * 5))
    for method in report.METHODS[::-1]:
        cells = []
        for n in SHOTS:
            cells.append(report.spelled(report.average_over_tasks(results, method, n)))
        lines.append(row(method, "", *cells))
        theirs = report.published(PAPER, method)
        lines.append(row("the paper", "", *[f"{mean(theirs[n].values()):.1f}" for n in SHOTS]))
    return lines


def every_task():
    """A row per task and method."""
    lines = [row("test accuracy, %", "declared", "M = 16, untrained", "method", *SHOTS),
             "|---" * 9 + "|"]
    untrained = kept("_untrained")
    for task, result in kept().items():
        start = report.spelled(untrained[task]["few_shot"]["CoOp unified"]["1"])
        first = [task, f"{report.declared(result):.1f}", start]
        for method in ("CoOp unified", "CoOp class-specific", "linear probe"):
            cells = [report.spelled(result["few_shot"][method][n]) for n in SHOTS]
            lines.append(row(*first, method, *cells))
            first = ["", "", ""]
    return lines


def claims():
    """The paper's claims, and what is measured here."""
    results = kept()
    star = mean(report.declared(result) for result in results.values())

    def average(method, n):
        return mean(a["test"] for a in report.average_over_tasks(results, method, n))

    def papers(method, n):
        return mean(report.published(PAPER, method)[n].values())

    def gaps(of, method, other):
        """'+1.0 / +2.0 / ...' over shots; other: a method, or a number."""
        minus = [of(other, n) if isinstance(other, str) else other for n in SHOTS]
        return " / ".join(f"{of(method, n) - x:+.1f}" for n, x in zip(SHOTS, minus))

    most = {}
    own = {}
    for task, result in results.items():
        few = result["few_shot"]
        at_16 = {method: report.mean_std(few[method]["16"])[0] for method in few}
        most[task] = at_16["CoOp unified"] - report.declared(result)
        own[task] = at_16["CoOp class-specific"] - at_16["CoOp unified"]
    best = max(most, key=most.get)
    spread = pstdev(a["test"] for a in results["objects"]["few_shot"]["CoOp unified"]["1"])
    photo = results["objects"]["zero_shot"]["a photo of a {}."]["test"]
    above = [f"{task} ({gap:+.1f})" for task, gap in own.items() if gap > 0]
    lines = [row("claim", "paper", "here"), "|---|---|---|"]
    for text, method, other, theirs in (
            ("unified CoOp minus declared template, 1 / 2 / 4 / 8 / 16 shots", "CoOp unified",
             star, papers("zero-shot", "0")),
            ("unified CoOp minus linear probe", "CoOp unified", "linear probe", "linear probe"),
            ("class-specific minus unified", "CoOp class-specific", "CoOp unified",
             "CoOp unified")):
        lines.append(row(text, gaps(papers, method, theirs), gaps(average, method, other)))
    lines += [
        row("class-specific above unified at 16 shots", "some", ", ".join(above) or "none"),
        row("largest gain at 16 shots", "+46.0 (EuroSAT)", f"{most[best]:+.1f} ({best})"),
        row("`objects`: a photo of a {}. below the declared template", "5 (Caltech101, a word)",
            f"{report.declared(results['objects']) - photo:.1f}"),
        row("`objects`, 1 shot: standard deviation over seeds", "", f"{spread:.1f}")]
    return lines


def styles():
    """`outlines`: trained on one style, tested on others."""
    result = kept("", ["outlines"])["outlines"]
    domains = list(result["zero_shot"][result["template"]])[1:]
    lines = [row("trained on outlines", *domains), "|---" * (len(domains) + 1) + "|"]
    for template in (result["template"], "a photo of a {}."):
        values = [f"{result['zero_shot'][template][d]:.1f}" for d in domains]
        lines.append(row(f"zero-shot, {template}", *values))
    for method, few in result["few_shot"].items():
        lines.append(row(method, *[report.spelled(few["16"], d) for d in domains]))
    return lines


def variants():
    """Class position, M and start of the unified context, averaged over the tasks."""
    shots = ("1", "4", "16")
    lines = [row("CoOp unified, average of six, %", *shots), "|---" * 4 + "|"]
    for name, suffix in (("class name at the end, M = 16", ""), ("in the middle", "_middle"),
                         ("in front", "_front"), ("M = 4", "_m4"),
                         ("M = 4, from “an icon of a”", "_words")):
        results = kept(suffix)
        averages = [report.average_over_tasks(results, "CoOp unified", n) for n in shots]
        lines.append(row(name, *map(report.spelled, averages)))
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="render.py's folder, for the table of sets")
    args = parser.parse_args()
    card = HERE.parent / "README.md"
    head, mark, rest = card.read_text(encoding="utf-8").partition(RESULTS)
    _, end, tail = rest.partition(END)
    tables = [yardstick(), every_task(), claims(), styles(), variants()]
    text = "\n".join("\n".join(lines) + "\n" for lines in tables)
    if args.work:
        before, sets, _ = tail.partition(SETS)
        tail = before + sets + table(args.work) + "\n"
    card.write_text(head + mark + text + end + tail, encoding="utf-8")
    tasks_picture(HERE.parent / "results/tasks.png")
    report.figure(kept(), "CLIP mini", HERE.parent / "results/tasks_over_shots.png")


if __name__ == "__main__":
    main()
