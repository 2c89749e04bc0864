"""Step 4: the parts of data/README.md that are made from data and results.

    python card.py                   the tables and the figure of results/*.json, the tasks' picture
    python card.py --runs ../../runs    the same, after taking the results of the card's commands
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
# what results/<task>*.json and runs/mini_<task>* are called in each setting of the grid
SETTINGS = {"": "", "_middle": "_middle", "_front": "_front", "_m4": "_M4",
            "_words": "_init-an%20icon%20of%20a", "_untrained": "_0-epochs",
            "_untrained_m4": "_M4_0-epochs"}
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


def collect(runs):
    """Copies the results of the card's commands from `runs`, without how long they took."""
    found = {}
    for suffix, setting in SETTINGS.items():
        for task in TASKS if suffix else [*TASKS, "outlines"]:
            result = json.loads((runs / f"mini_{task}{setting}/results.json").read_text())
            del result["seconds"]
            result["settings"]["out"] = "runs"
            found[f"{task}{suffix}.json"] = json.dumps(result, indent=1)
    for name, text in found.items():  # once all are there
        (HERE.parent / "results" / name).write_text(text)


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
    lines = [row("test accuracy, %", "chance", "declared", "M = 16, untrained", "method", *SHOTS),
             "|---" * 10 + "|"]
    untrained = kept("_untrained")
    for task, result in kept().items():
        start = report.spelled(untrained[task]["few_shot"]["CoOp unified"]["1"])
        chance = 100 / len(load_dataset(task).classnames)
        first = [task, f"{chance:.1f}", f"{report.declared(result):.1f}", start]
        for method in ("CoOp unified", "CoOp class-specific", "linear probe"):
            cells = [report.spelled(result["few_shot"][method][n]) for n in SHOTS]
            lines.append(row(*first, method, *cells))
            first = [""] * 4
    return lines


def templates():
    """Zero-shot accuracy of every hand-written prompt."""
    columns = [*report.TEMPLATES, "ensemble of these"]
    lines = [row("zero-shot, %", "declared", *columns), "|---" * (len(columns) + 2) + "|"]
    for task, result in kept().items():
        cells = [f"{result['zero_shot'][template]['test']:.1f}" for template in columns]
        lines.append(row(task, f"{report.declared(result):.1f}", *cells))
    return lines


def gaps(of, method, other):
    """'+1.0 / +2.0 / ...' over shots. of(method, shots) -> accuracy; other: a method or a number"""
    minus = [of(other, n) if isinstance(other, str) else other for n in SHOTS]
    return " / ".join(f"{of(method, n) - x:+.1f}" for n, x in zip(SHOTS, minus))


def average_claims(results):
    """The claims about averages: the paper's, ours, and what we aimed at."""
    star = mean(report.declared(result) for result in results.values())

    def average(method, n):
        return mean(a["test"] for a in report.average_over_tasks(results, method, n))

    def papers(method, n):
        return mean(report.published(PAPER, method)[n].values())

    lines = []
    for text, method, other, theirs, aim in (
            ("unified CoOp minus declared template, 1 / 2 / 4 / 8 / 16 shots", "CoOp unified",
             star, papers("zero-shot", "0"), "+1 / +4 / +7 / - / +14"),
            ("unified CoOp minus linear probe", "CoOp unified", "linear probe", "linear probe",
             "+11 / +8 / +5 / +2 / +0.5"),
            ("class-specific minus unified", "CoOp class-specific", "CoOp unified",
             "CoOp unified", "below 0 up to 8 shots")):
        lines.append(row(text, gaps(papers, method, theirs), gaps(average, method, other), aim))
    return lines


def single_claims(results):
    """The claims about single tasks."""
    most = {}
    own = {}
    for task, result in results.items():
        few = result["few_shot"]
        at_16 = {method: report.mean_std(few[method]["16"])[0] for method in few}
        most[task] = at_16["CoOp unified"] - report.declared(result)
        own[task] = at_16["CoOp class-specific"] - at_16["CoOp unified"]
    best = max(most, key=most.get)
    spread = pstdev(a["test"] for a in results["objects"]["few_shot"]["CoOp unified"]["1"])
    declared = report.declared(results["objects"])
    photo = results["objects"]["zero_shot"]["a photo of a {}."]["test"]
    shares = []
    for task, result in kept("_untrained", ["objects", "things"]).items():
        untrained = report.mean_std(result["few_shot"]["CoOp unified"]["1"])[0]
        shares.append(f"{untrained / report.declared(result):.2f}")
    above = [f"{task} ({gap:+.1f})" for task, gap in own.items() if gap > 0]
    return [
        row("class-specific above unified at 16 shots", "on some tasks",
            ", ".join(above) or "none", "one task or more"),
        row("largest gain at 16 shots", "+46.0 (EuroSAT)", f"{most[best]:+.1f} ({best})", "+30"),
        row("untrained contexts, M = 16, accuracy / the template's, `objects`, `things`", "",
            ", ".join(shares), "0.97"),
        row("`objects`, zero-shot with the declared template", "", f"{declared:.1f}", "84"),
        row('`objects`, "a photo of a {}." below the declared template',
            '5 (Caltech101, "a" left out)', f"{declared - photo:.1f}", "3 to 15"),
        row("`objects`, 1 shot, standard deviation over seeds", "", f"{spread:.1f}", "at most 2")]


def over(better, worse, source):
    """Of two {domain: %}: how much better it is on the source; on the others by domain."""
    gaps = {domain: better[domain] - worse[domain] for domain in better}
    return gaps.pop(source), gaps


def style_claims():
    """The claims about contexts learned on outlines with 16 labels; the paper's on ImageNet."""
    result = kept("", ["outlines"])["outlines"]
    domains = list(result["zero_shot"][result["template"]])[1:]
    few = result["few_shot"]
    columns = json.loads((HERE.parent / "published.json").read_text())["domains"]["columns"]
    ours = {"zero-shot": {d: report.declared(result, d) for d in domains}}
    theirs = {}
    for method in ("CoOp unified", "linear probe"):
        ours[method] = {d: report.mean_std(few[method]["16"], d)[0] for d in domains}
    for method in ("zero-shot", "CoOp unified", "linear probe"):
        theirs[method] = report.published_domains(PAPER, method, columns, "16")
    probe = []
    template = []
    for accuracy, source in ((theirs, "imagenet"), (ours, "outline")):
        _, others = over(accuracy["CoOp unified"], accuracy["linear probe"], source)
        probe.append(f"{mean(others.values()):+.1f}")
        own, others = over(accuracy["CoOp unified"], accuracy["zero-shot"], source)
        best = max(others, key=others.get)
        template.append(f"{own:+.1f}; {others[best]:+.1f} ({best})")
    return [
        row("learned on outlines (the paper: ImageNet), 16 shots, minus linear probe: average of "
            "the four other domains", *probe, "+6"),
        row("the same, minus declared template: on the source; on the best other domain",
            *template, "above; above")]


def claims():
    """The paper's claims, what is measured here, and what we aimed at."""
    results = kept()
    head = [row("claim", "the paper", "here", "aimed at"), "|---|---|---|---|"]
    return head + average_claims(results) + single_claims(results) + style_claims()


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


def all_tables():
    tables = [yardstick(), every_task(), claims(), templates(), styles(), variants()]
    return "\n".join("\n".join(lines) + "\n" for lines in tables)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="render.py's folder, for the table of sets")
    parser.add_argument("--runs", type=Path, help="results to take first")
    args = parser.parse_args()
    if args.runs:
        collect(args.runs)
    card = HERE.parent / "README.md"
    head, mark, rest = card.read_text(encoding="utf-8").partition(RESULTS)
    _, end, tail = rest.partition(END)
    if args.work:
        before, sets, _ = tail.partition(SETS)
        tail = before + sets + table(args.work) + "\n"
    card.write_text(head + mark + all_tables() + end + tail, encoding="utf-8")
    tasks_picture(HERE.parent / "results/tasks.png")
    report.figure(kept(), "CLIP mini", HERE.parent / "results/tasks_over_shots.png")


if __name__ == "__main__":
    main()
