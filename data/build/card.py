"""Step 4: the parts of data/README.md made from the data: the table of sets, the tasks' picture.

    python card.py [--work work]
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from icons import HERE, read_sets
from mini_coop import load_dataset, open_image

TASKS = ["objects", "pixels", "styles", "designers", "actions", "things"]
MARK = "<!-- sets: made by data/build/card.py -->\n"


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
    """Five tasks, ten training images each with their class names."""
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


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE / "work")
    args = parser.parse_args()
    # what stands below the mark is replaced
    card = HERE.parent / "README.md"
    head, mark, _ = card.read_text(encoding="utf-8").partition(MARK)
    card.write_text(head + mark + table(args.work) + "\n", encoding="utf-8")
    (HERE.parent / "results").mkdir(exist_ok=True)
    tasks_picture(HERE.parent / "results/tasks.png")


if __name__ == "__main__":
    main()
