"""What the lessons share: which CLIP and data they use, kept results, exercises and figures."""
import io
import math
import os
import sys
from pathlib import Path
from statistics import mean, pstdev, stdev

import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
import torch
from clip.clip import _tokenizer as tokenizer
from IPython.display import Image, display
from matplotlib.colors import to_rgb

from mini_coop import DATA, load_dataset, open_image

sys.path.append(str(DATA))
import report  # noqa: E402
from grid import TEMPLATES  # noqa: E402, F401

MODEL = "mini"
TASKS = "favicons objects things pixels styles designers actions"
BLUE = "#0072B2"
ORANGE = "#D55E00"
plt.rcParams.update({"font.size": 10, "axes.titlesize": 10, "legend.fontsize": 9,
                     "xtick.labelsize": 9, "ytick.labelsize": 9})


# ---------------------------------------------------------------- CLIP, data, kept results

YOURS = {"clip": MODEL, "data": []}  # what stands in the place of the built-in CLIP and tasks


def switch(*tasks, clip=None, data=None):
    """-> the CLIP's name and a lesson's data sets: `tasks`, or yours in their places (where you
    have fewer, the first one again). clip: a name or path; data: a list of names or paths. What is
    not given comes from MINI_COOP_MODEL and MINI_COOP_DATA."""
    data = [data] if isinstance(data, str) else data
    YOURS["clip"] = clip or os.environ.get("MINI_COOP_MODEL", MODEL)
    YOURS["data"] = data or os.environ.get("MINI_COOP_DATA", "").split()
    own = YOURS["data"]
    names = [own[i] if i < len(own) else own[0] for i in range(len(tasks))] if own else tasks
    return YOURS["clip"], *names


def all_tasks():
    """The seven tasks, or your data sets."""
    return YOURS["data"] or TASKS.split()


def built_in():
    """Whether CLIP, data and kept results are ours, so that the checks of a lesson hold."""
    return YOURS["clip"] == MODEL and not YOURS["data"] and "MINI_COOP_RUNS" not in os.environ


def kept(task, **setting):
    """The main job's Results of a data set, or None if it did not run: of the paper's setting, or
    with another n_ctx, class_position, ctx_init ... Of your own runs, in <$MINI_COOP_RUNS, else the
    clone's runs>/<model>_<data set>/results.jsonl, those of the last setting."""
    data = load_dataset(task)
    runs = Path(os.environ.get("MINI_COOP_RUNS", DATA.parent / "runs")).expanduser()
    own = runs / f"{report.folder_name(YOURS['clip'])}_{data.name}/results.jsonl"
    lines = report.read_lines(DATA / "results.jsonl" if built_in() else own)
    learned = [line for line in lines if line["method"] == "CoOp unified"]
    if not learned:
        print(f"no kept results of {task}: first run the main job (notebooks/README.md)")
        return None
    if not built_in():
        setting = {**{key: learned[-1][key] for key in report.RECIPE}, **setting}
    lines = report.select(lines, data=data.name, model=YOURS["clip"], **setting)
    return report.Results(lines, data.template, 100 / len(data.classnames))


def all_kept():
    """{task: Results} of all tasks that the main job ran."""
    results = {Path(task).name: kept(task) for task in all_tasks()}
    return {task: result for task, result in results.items() if result}


def validation(few):
    """The validation images of a few-shot sample; where there are none, its training images, and
    the output says so."""
    if few.val.images:
        print(f"chosen on {len(few.val.images)} validation images")
        return few.val
    print(f"NO VALIDATION IMAGES: chosen on the {len(few.train.images)} training images")
    return few.train


def accuracy(scores, labels):
    """% of the rows of scores (N, K) that are largest at their label."""
    return 100 * (scores.argmax(1) == labels).float().mean().item()


def standard_error(accuracy, n):
    """Of an accuracy (%) on n images, in points: sqrt(p (1 - p) / n)."""
    return math.sqrt(accuracy * (100 - accuracy) / n)


def by_seed(result, method, shots):
    return {line["seed"]: line["accuracy"]["test"] for line in result.lines
            if (line["method"], line.get("shots")) == (method, shots)}


def gap(ours, theirs):
    """Mean difference of two lists of accuracies, seed by seed, and its standard error."""
    differences = [a - b for a, b in zip(ours, theirs)]
    error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    return mean(differences), error


def gaps(results, method, other, shots=(1, 4, 16)):
    """{task: {shots: gap}} of a method minus another one, or minus "zero-shot" (the template)."""
    rows = {}
    for task, result in results.items():
        rows[task] = {}
        for n in shots:
            ours = by_seed(result, method, n)
            theirs = by_seed(result, other, n)
            if other == "zero-shot":
                theirs = dict.fromkeys(ours, result.zero_shot())
            if both := ours.keys() & theirs.keys():  # the seeds that both were run with
                rows[task][n] = gap([ours[seed] for seed in both], [theirs[seed] for seed in both])
    return rows


def table(rows, columns, width=10, first=30):
    """Prints rows {name: cells} under their columns. A cell is a number, a text, None (empty) or a
    list with an accuracy per seed, shown as mean ± standard deviation."""
    print(" " * first + "".join(f"{column:>{width}}" for column in columns))
    for name, cells in rows.items():
        texts = []
        for cell in cells:
            if isinstance(cell, (list, tuple)):
                cell = report.format_mean(cell)
            texts.append("" if cell is None else cell if isinstance(cell, str) else f"{cell:.1f}")
        print(f"{name:{first}}" + "".join(f"{text:>{width}}" for text in texts))


def variants(shots):
    """Prints kept accuracies of unified contexts with another position, M or start, for the tasks
    where they were run."""
    settings = {"end, M = 16": {}, "middle, M = 16": {"class_position": "middle"},
                "front, M = 16": {"class_position": "front"}, "end, M = 4": {"n_ctx": 4},
                "end, from words": {"ctx_init": "an icon of a"}}
    rows = {name: [] for name in settings}
    tasks = []
    for task in all_tasks():
        if not kept(task) or not kept(task, n_ctx=4).accuracies("CoOp unified", shots):
            continue
        tasks.append(task)
        for name, setting in settings.items():
            if setting.get("ctx_init") and task == "favicons":
                setting = {"ctx_init": "a pixel art"}
            rows[name].append(kept(task, **setting).accuracies("CoOp unified", shots))
    table(rows, tasks, width=14, first=18)


def nearest_words(coop, k):
    """The k tokens whose embeddings are nearest to each vector of a unified context (the paper's
    table 4; Euclidean): M lists of pairs (word, distance)."""
    distances = torch.cdist(coop.ctx.detach(), coop.clip_model.token_embedding.weight)
    nearest = []
    for values, ids in zip(*distances.topk(k, largest=False)):
        words = [tokenizer.decode([i]).strip() for i in ids.tolist()]
        nearest.append(list(zip(words, values.tolist())))
    return nearest


# ---------------------------------------------------------------- exercises

def answered(number, *answers):
    """Whether an exercise is filled in; MINI_COOP_STRICT=1 makes an empty one an error."""
    if all(answer is not None for answer in answers):
        return True
    if os.environ.get("MINI_COOP_STRICT"):
        raise AssertionError(f"exercise {number} is empty")
    print(f"exercise {number} is waiting for you")
    return False


# ---------------------------------------------------------------- figures: images and bars

def finish(fig):
    """Shows a figure as a PNG of 128 colours, which takes a third of the space in the notebook."""
    sharp = io.BytesIO()
    fig.savefig(sharp, dpi=96)
    small = io.BytesIO()
    PIL.Image.open(sharp).convert("RGB").quantize(128).save(small, "PNG", optimize=True)
    plt.close(fig)
    display(Image(small.getvalue()))


def show(images, titles=None, columns=8, rows=None):
    """A grid of images, None leaves a gap. rows: names of the rows, `columns` images each."""
    n_rows = math.ceil(len(images) / columns)
    size = (1.05 * columns, (1.3 if titles else 1.05) * n_rows)
    fig, axes = plt.subplots(n_rows, columns, figsize=size, layout="constrained", squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    for i, (ax, image) in enumerate(zip(axes.flat, images)):
        if image is not None:
            ax.imshow(open_image(image))
        if titles:
            ax.set_title(titles[i], fontsize=9)
    for ax, name in zip(axes[:, 0], rows or []):
        ax.set_ylabel(name, rotation=0, ha="right", va="center")
    finish(fig)


def typical(features, labels):
    """For each class the index of the image (N, E) nearest to the mean of its class."""
    x = torch.nn.functional.normalize(features, dim=-1)
    chosen = []
    for k in range(max(labels) + 1):
        mine = [i for i, label in enumerate(labels) if label == k]
        chosen.append(mine[(x[mine] @ x[mine].mean(0)).argmax()])
    return chosen


def bars(names, panels):
    """Horizontal bars of probabilities; panels: {title: values}."""
    size = (8, 0.6 + 0.36 * len(names))
    fig, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", sharey=True,
                             squeeze=False)
    for ax, (title, values) in zip(axes[0], panels.items()):
        ax.barh(names, values, color=BLUE)
        ax.set(title=title, xlim=(0, 1), xlabel="probability")
    axes[0, 0].invert_yaxis()
    finish(fig)


def guess(image, names, probabilities, title=""):
    """A picture beside its likeliest classes."""
    order = np.argsort(probabilities)[::-1][:5]
    fig, (left, right) = plt.subplots(1, 2, figsize=(8, 2.1), layout="constrained",
                                      width_ratios=(1, 3))
    left.imshow(open_image(image))
    left.axis("off")
    right.barh(range(len(order)), np.asarray(probabilities)[order], color=BLUE)
    right.set_yticks(range(len(order)), [names[k] for k in order], parse_math=False)
    right.set(xlim=(0, 1), xlabel="probability")
    right.set_title(title, parse_math=False)
    right.invert_yaxis()
    finish(fig)


def template_dots(scores, templates, chance):
    """One row per task: a mark for each of seven templates, the last is the task's own."""
    fig, ax = plt.subplots(figsize=(9.5, 0.7 + 0.6 * len(scores)), layout="constrained")
    rows = np.arange(len(scores))
    apart = np.linspace(-0.28, 0.28, 7)  # equal accuracies stay visible
    for i, mark in enumerate(("C0o", "C1s", "C2D", "C4^", "C5v", "C9X", "k*")):
        values = [accuracies[i] for accuracies in scores.values()]
        ax.plot(values, rows + apart[i], mark, mfc="none", ms=8, label=templates[i])
    ax.vlines(chance, rows - 0.35, rows + 0.35, color="gray", label="guessing")
    ax.set(yticks=rows, yticklabels=list(scores), xlim=(0, 100))
    ax.set_xlabel("zero-shot test accuracy, %")
    ax.invert_yaxis()
    fig.legend(loc="outside right upper")
    finish(fig)


# ---------------------------------------------------------------- figures: the method

def draw_prompts(coops, rows=3):
    """The prompts of the first classes, a panel per CoOp; hatched boxes are learned vectors."""
    fig, axes = plt.subplots(math.ceil(len(coops) / 2), 2, figsize=(9, 1.8 * len(coops) / 2),
                             layout="constrained", squeeze=False)
    for ax, coop in zip(axes.flat, coops):
        M = coop.n_ctx
        before = {"end": M, "middle": M // 2, "front": 0}[coop.class_position]
        for y, name in enumerate(coop.classnames[:rows]):
            own = f"\nclass {y + 1}" if coop.class_specific else ""
            v = [f"V{m + 1}{own}" for m in range(M)]
            x = 0
            for text in ["SOS", *v[:before], name, *v[before:], ".", "EOT"]:
                learned = text.startswith("V") and text[1].isdigit()
                width = 1.5 if text == name else 1
                ax.barh(y, width - 0.06, left=x, color="#FFD9B3" if learned else "#D9E6F2",
                        hatch="//" if learned else None, edgecolor="white")
                ax.text(x + width / 2, y, text, ha="center", va="center", fontsize=9)
                x += width
        kind = "class-specific" if coop.class_specific else "unified"
        ax.set(xticks=[], yticks=[], title=f"{kind}, class name: {coop.class_position}")
        ax.spines[:].set_visible(False)
        ax.invert_yaxis()
    finish(fig)


def draw_tree(tokens, position, visible):
    """One packed row: its tokens with their positions, and who sees whom.

    tokens: L texts; position: L numbers; visible: (L, L) bool.
    """
    short = {"<|startoftext|>": "SOS", "<|endoftext|>": "EOT"}
    tokens = [short.get(token, token.replace("</w>", "")) for token in tokens]
    starts = [i for i in range(1, len(position)) if position[i] <= position[i - 1]]
    trunk = position[starts[0]]  # a new branch begins where the trunk ends
    owner = [0] * trunk  # 0: the trunk, 1, 2, ..: the branches
    for i in range(trunk, len(tokens)):
        owner.append(1 + sum(start <= i for start in starts))
    colours = ["#9ECAE1", "#A1D99B", "#FDD870", "#F4B0D0", "#CCCCCC"]
    fig, (top, below) = plt.subplots(2, 1, figsize=(8.5, 6.4), layout="constrained",
                                     height_ratios=(1, 4.2))
    for x, (text, place, k) in enumerate(zip(tokens, position, owner)):
        learned = text.startswith("V") and text[1:].isdigit()
        top.bar(x, 1, 0.94, color="#FFD9B3" if learned else colours[k % 5],
                hatch="//" if learned else None, edgecolor="white")
        top.text(x, 0.5, text, ha="center", va="center", fontsize=9, rotation=60)
        top.text(x, -0.25, place, ha="center", va="center", fontsize=9)
    top.text(-1.1, -0.25, "position", ha="right", va="center", fontsize=9)
    top.set(xlim=(-2.6, len(tokens) - 0.4), ylim=(-0.5, 1.05))
    top.axis("off")
    L = len(tokens)
    mask = np.ones((L, L, 3))  # white: not seen
    for i, j in np.argwhere(np.asarray(visible)):
        mask[i, j] = to_rgb(colours[owner[j] % 5])
    below.imshow(mask)
    names = ["period" if token == "." else token for token in tokens]
    below.set_xticks(range(L), names, rotation=90)
    below.set_yticks(range(L), names)
    below.set(xlabel="... sees this token", ylabel="this token ...")
    finish(fig)


# ---------------------------------------------------------------- figures: results

MARKS = ("o", "s", "^", "D", "v", "X")
COLOURS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # the eye tells them apart


def over_shots(results, methods=report.METHODS, paper=False):
    """The paper's figure: panels for the average, for the paper's own and for each task."""
    if not results:
        return
    panels = {f"average of these {len(results)}": report.average(list(results.values()))}
    if paper:
        panels["the paper's average"] = report.average(list(report.papers().values()))
    finish(report.over_shots({**panels, **results}, methods))


def dots(rows, lines):
    """One row {name: accuracies, one per seed} of dots each; vertical lines {name: accuracy}."""
    fig, ax = plt.subplots(figsize=(8, 0.9 + 0.4 * len(rows)), layout="constrained")
    for y, values in enumerate(rows.values()):
        ax.plot(values, [y] * len(values), "o", color=ORANGE, ms=7, mfc="none")
        ax.plot(sum(values) / len(values), y, "|", color="black", ms=18)
    for (name, value), style in zip(lines.items(), ("--", ":", "-.")):
        ax.axvline(value, color="black", lw=1, ls=style, label=name)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set(ylim=(len(rows) - 0.5, -0.5), xlabel="test accuracy, % (one dot per seed, | their mean)")
    fig.legend(loc="outside right upper")
    finish(fig)


def gap_dots(rows, xlabel):
    """One row per task of differences in points; rows: {task: {shots: (mean, standard error)}}.
    Bars are two standard errors to each side: one that crosses zero leaves it undecided."""
    fig, ax = plt.subplots(figsize=(8, 0.9 + 0.45 * len(rows)), layout="constrained")
    shots = list(dict.fromkeys(n for row in rows.values() for n in row))
    for i, n in enumerate(shots):
        below = 0.25 * (i - (len(shots) - 1) / 2)  # so that the marks of a row stand apart
        y = [k + below for k, row in enumerate(rows.values()) if n in row]
        mine = [row[n] for row in rows.values() if n in row]
        ax.errorbar([m for m, _ in mine], y, xerr=[2 * error for _, error in mine], fmt=MARKS[i],
                    color=COLOURS[i], capsize=2, ms=6, label=f"{n} label{'s' * (n > 1)} per class")
    ax.axvline(0, color="black", lw=0.8)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set(xlabel=xlabel, ylim=(len(rows) - 0.5, -0.5))
    ax.grid(alpha=0.3, axis="x")
    if rows:
        fig.legend(loc="outside right upper")
        finish(fig)


def train_and_test(forms):
    """Accuracy on training and test images over shots, a panel per form.
    forms: {name: {shots: (training accuracies, test accuracies)}}, lists over seeds."""
    fig, axes = plt.subplots(1, len(forms), figsize=(8.5, 2.9), layout="constrained", sharey=True,
                             squeeze=False)
    for ax, (name, over) in zip(axes[0], forms.items()):
        for i, (images, style) in enumerate((("training images", "s--"), ("test images", "o-"))):
            values = [both[i] for both in over.values()]
            ax.errorbar(range(len(over)), list(map(mean, values)), list(map(pstdev, values)),
                        fmt=style, color=COLOURS[i], capsize=3, label=images)
        ax.set_xticks(range(len(over)), list(over))
        ax.set(title=name, xlabel="labels per class", ylim=(0, 101))
    axes[0, 0].set_ylabel("accuracy, %")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper")
    finish(fig)


def source_and_shifts(results, variants, shots, templates):
    """Accuracy on the source across, mean over the domains up: a point per variant {name: (Results,
    method)} and number of shots {n: text}, with standard deviations over seeds; templates as
    crosses."""
    splits = [name for name in (results.lines[0]["accuracy"] if results else {})
              if name not in ("test", "outline")]  # "outline" is the source's own style
    if not splits:
        print("no domains to show")
        return

    def place(results, method, n):  # two lists over seeds
        values = [results.accuracies(method, n, split) for split in splits]
        return results.accuracies(method, n), [mean(v) for v in zip(*values)]

    fig, ax = plt.subplots(figsize=(8.5, 4), layout="constrained")
    for i, (name, (own, method)) in enumerate(variants.items()):
        for n in shots if method in report.METHODS else [None]:
            x, y = place(own, method, n) if own else ([], [])
            if x:
                ax.errorbar(mean(x), mean(y), pstdev(y), pstdev(x), fmt=MARKS[i], capsize=2, ms=7,
                            color=COLOURS[i], label=name if n in (None, *list(shots)[:1]) else None)
                if n:
                    ax.annotate(shots[n], (mean(x), mean(y)), xytext=(5, 4),
                                textcoords="offset points", fontsize=9)
    for template, mark in zip(templates, ("kx", "k+")):
        x, y = place(results._replace(template=template), "zero-shot", None)
        ax.plot(x, y, mark, ms=10, mew=2, label=f"“{template}”")
    ax.set(xlabel="accuracy on the source's test images, %", ylabel="mean over the styles, %")
    ax.grid(alpha=0.3)
    fig.legend(loc="outside right upper")
    finish(fig)


def training(history, K):
    """Loss and learning rate over epochs."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(8.5, 2.7), layout="constrained")
    left.plot(history["loss"], color=ORANGE)
    for loss, name in ((math.log(K), "ln K"), (math.log(K) / 2, "half of it")):
        left.axhline(loss, color="gray", linestyle=":")
        left.text(len(history["loss"]), loss, name, ha="right", va="bottom")
    top = 1.15 * max(math.log(K), *history["loss"])
    left.set(xlabel="epoch", ylabel="training loss", ylim=(0, top))
    right.plot(history["lr"], color=BLUE)
    right.set(xlabel="epoch", ylabel="learning rate")
    finish(fig)


def over_C(coarse, fine, chosen, sizes):
    """The probe's accuracy over C. coarse: {C: (validation, test)}; fine: {C: validation};
    sizes: the number of images of the two splits."""
    fig, ax = plt.subplots(figsize=(8.5, 3), layout="constrained")
    looks = (("s--", BLUE, "validation, coarse"), ("o-", ORANGE, "test, not used by the search"))
    for values, n, (style, color, label) in zip(zip(*coarse.values()), sizes, looks):
        errors = [standard_error(value, n) for value in values]
        ax.errorbar(list(coarse), values, errors, fmt=style, color=color, capsize=3, label=label)
    ax.plot(list(fine), list(fine.values()), "kx", label="validation, fine")
    ax.axvline(chosen, color="gray", linestyle=":", label=f"chosen: C = {chosen:.2g}")
    ax.set(xscale="log", xlabel="C (larger: weaker regularisation)", ylabel="accuracy, %")
    fig.legend(loc="outside right upper")
    finish(fig)


def distance_dots(points, hand_written):
    """Accuracy on base and new classes over the distance from the hand-written text features.
    points: {name: [(distance, base %, new %), ...]}; hand_written: (base %, new %)."""
    fig, axes = plt.subplots(1, 2, figsize=(8.5, 3.2), layout="constrained", sharey=True)
    for i, (ax, title) in enumerate(zip(axes, ("base classes", "new classes"))):
        for mark, colour, (name, runs) in zip(MARKS, COLOURS, points.items()):
            ax.plot([run[0] for run in runs], [run[1 + i] for run in runs], mark, ms=7, mfc="none",
                    color=colour, label=name)
        ax.axhline(hand_written[i], color="black", ls="--", lw=0.8, label="hand-written")
        ax.set(title=title, xlabel="distance from the hand-written features")
    axes[0].set_ylabel("test accuracy, %")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    finish(fig)
