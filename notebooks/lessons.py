"""What the lessons share: which CLIP and data they use, kept results, exercises and figures."""
import io
import math
import os
import sys
from pathlib import Path
from statistics import mean

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

def settings(clip=None, data=None):
    """-> (the CLIP's name, the data sets' names, whether both are the built-in ones). What is not
    given comes from the environment."""
    given = {"MINI_COOP_MODEL": clip, "MINI_COOP_DATA": data}
    os.environ.update({key: value for key, value in given.items() if value})
    model = os.environ.get("MINI_COOP_MODEL", MODEL)
    tasks = os.environ.get("MINI_COOP_DATA", TASKS)
    built_in = (model, tasks) == (MODEL, TASKS) and "MINI_COOP_RUNS" not in os.environ
    return model, tasks.split(), built_in


def choose(task):
    """The built-in task of a lesson, or the first data set of yours."""
    return task if settings()[2] else settings()[1][0]


def kept(task, **setting):
    """The main job's Results of a data set, or None if it did not run: of the paper's setting, or
    with another n_ctx, class_position, ctx_init ... Of your own runs, in <$MINI_COOP_RUNS, else the
    clone's runs>/<model>_<data set>/results.jsonl, those of the last setting."""
    model, _, built_in = settings()
    data = load_dataset(task)
    runs = Path(os.environ.get("MINI_COOP_RUNS", DATA.parent / "runs")).expanduser()
    own = runs / f"{report.folder_name(model)}_{data.name}/results.jsonl"
    lines = report.read_lines(DATA / "results.jsonl" if built_in else own)
    learned = [line for line in lines if line["method"] == "CoOp unified"]
    if not learned:
        return None
    if not built_in:
        setting = {**{key: learned[-1][key] for key in report.RECIPE}, **setting}
    lines = report.select(lines, data=data.name, model=model, **setting)
    return report.Results(lines, data.template, 100 / len(data.classnames))


def all_kept():
    """{task: Results} of all tasks that the main job ran."""
    results = {Path(task).name: kept(task) for task in settings()[1]}
    return {task: result for task, result in results.items() if result}


def mean_of(results, method, shots, split="test"):
    """A method's accuracy in %, mean over seeds."""
    return mean(results.accuracies(method, shots, split))


def accuracy(scores, labels):
    """% of the rows of scores (N, K) that are largest at their label."""
    return 100 * (scores.argmax(1) == labels).float().mean().item()


def standard_error(accuracy, n):
    """Of an accuracy (%) on n images, in points: sqrt(p (1 - p) / n)."""
    return math.sqrt(accuracy * (100 - accuracy) / n)


def table(rows, columns, width=10, first=30):
    """Prints rows {name: values} under their columns; an empty place for None."""
    print(" " * first + "".join(f"{column:>{width}}" for column in columns))
    for name, values in rows.items():
        cells = ["" if v is None else v if isinstance(v, str) else f"{v:.1f}" for v in values]
        print(f"{name:{first}}" + "".join(f"{cell:>{width}}" for cell in cells))


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
    right.barh([names[k] for k in order], np.asarray(probabilities)[order], color=BLUE)
    right.set(xlim=(0, 1), xlabel="probability", title=title)
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

def over_shots(results, methods=report.METHODS, average=True, paper=False):
    """The paper's figure: panels for the average, for the paper's own and for each task."""
    panels = {}
    if average:
        panels[f"average of these {len(results)}"] = report.average(list(results.values()))
    if paper:
        panels["the paper's average"] = papers_average()
    finish(report.over_shots({**panels, **results}, methods))


def papers_average():
    """The paper's average over its eleven data sets (RN50, M = 16), as Results."""
    return report.average(list(report.papers().values()))


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
    points: {weight: [(distance, base %, new %), ...]}; hand_written: (base %, new %)."""
    fig, axes = plt.subplots(1, 2, figsize=(8.5, 3.2), layout="constrained", sharey=True)
    marks = ("C0o", "C1s", "C2D", "C4^", "C5v", "C9X")
    for i, (ax, title) in enumerate(zip(axes, ("base classes", "new classes"))):
        for mark, (weight, runs) in zip(marks, points.items()):
            values = [run[1 + i] for run in runs]
            ax.plot([run[0] for run in runs], values, mark, ms=7, label=f"weight {weight}")
        ax.axhline(hand_written[i], color="black", ls="--", lw=0.8, label="hand-written")
        ax.set(title=title, xlabel="distance from the hand-written features")
    axes[0].set_ylabel("test accuracy, %")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    finish(fig)
