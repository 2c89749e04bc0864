"""Reads results, one JSON line per run, and shows them: averages, tables, the figure over shots.

data/README.md has the form of a line.
"""
import json
import re
import warnings
from pathlib import Path
from statistics import mean, pstdev
from typing import NamedTuple

from matplotlib.figure import Figure

DATA = Path(__file__).resolve().parent
LOOKS = {"linear probe": ("#0072B2", "s--"), "CoOp unified": ("#D55E00", "o-"),
         "CoOp class-specific": ("#009E73", "^-.")}  # of a curve: colour, marker and line
METHODS = tuple(LOOKS)  # those that learn from shots
RECIPE = {"n_ctx": 16, "class_position": "end", "ctx_init": None, "epochs": None, "views": 1}
RESULT = ("accuracy", "file")  # a line's outputs; all its other keys identify the run
STATE = ("weights", "images", "device", "torch")
OWN = "their own templates"  # of several data sets


class Results(NamedTuple):
    """The lines of one data set and one setting; of several data sets, their averages."""
    lines: list
    template: str  # the data set's own
    chance: float  # accuracy of guessing, in %

    def accuracies(self, method, shots=None, split="test"):
        """In %, one per seed. shots: None for what needs none. Of "zero-shot" only that of the data
        set's own template."""
        return [line["accuracy"][split] for line in self.lines
                if line["method"] == method and line.get("shots") == shots
                and line.get("template", self.template) == self.template
                and split in line["accuracy"]]

    def zero_shot(self, split="test"):
        return self.accuracies("zero-shot", split=split)[0]

    def shots(self):
        return sorted({line["shots"] for line in self.lines if line.get("shots")})

    def methods(self):
        there = {line["method"] for line in self.lines}
        return [method for method in METHODS if method in there]


def read_lines(file):
    """The lines of a results.jsonl, as dicts; none if there is no such file."""
    lines = []
    content = Path(file).read_text(encoding="utf-8") if Path(file).is_file() else ""
    for text in filter(None, content.splitlines()):
        try:
            line = json.loads(text)
            line["method"], line["accuracy"]["test"]
            lines.append(line)
        except (KeyError, TypeError, ValueError):  # a job was killed while it wrote
            warnings.warn(f"{file}: a line is cut off or no result, and is skipped: {text[-30:]}")
    return lines


def run_key(line, without=RESULT):
    """What a run is known by, as text."""
    return json.dumps({k: v for k, v in line.items() if k not in without}, sort_keys=True)


def select(lines, **setting):
    """The lines of the paper's recipe, or of another setting; a line that lacks a key is taken, as
    it does not depend on it. Of runs that differ in their state alone the last one counts."""
    recipe = {key: RECIPE[key] for key in RECIPE if key != "n_ctx" or not setting.get("ctx_init")}
    wanted = {**recipe, **setting}
    last = {}
    for line in lines:
        if all(line.get(key, value) == value for key, value in wanted.items()):
            last[run_key(line, RESULT + STATE)] = line
    return sorted(last.values(), key=lambda line: (line.get("shots", 0), line.get("seed") or 0))


def average(results):
    """Several Results -> their average: a line for each method, shots and seed that all have."""
    values = {}
    for each in results:
        for line in each.lines:
            if line.get("template", each.template) == each.template:
                run = (line["method"], line.get("shots"), line.get("seed"))
                values.setdefault(run, []).append(line["accuracy"]["test"])
    lines = []
    for (method, shots, seed), several in values.items():
        if len(several) == len(results):
            lines.append({"method": method, "shots": shots, "seed": seed,
                          "accuracy": {"test": mean(several)}})
    return Results(lines, OWN, mean(each.chance for each in results))


def papers(model="RN50", **setting):
    """The paper's numbers {data set: Results}; of a setting that it has not tried, those of the
    methods that do not depend on it. Where they come from: data/README.md."""
    lines = select(read_lines(DATA / "published.jsonl"), model=model, **setting)
    found = {}
    for own in lines:
        if own["method"] == "zero-shot":
            same = [line for line in lines if line["data"] == own["data"]]
            found[own["data"]] = Results(same, own["template"], 100 / own["classes"])
    return found


def folder_name(model):
    """Of a model's results; a path has separators and colons."""
    return re.sub(r"[^\w.-]+", "-", model).strip("-")


# ---------------------------------------------------------------- tables

def format_mean(values):
    """'61.2 ± 0.8', mean and standard deviation (the population's, as in the published code); of
    one value '61.2', of none ''."""
    spread = f" ± {pstdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{spread}" if values else ""


def format_row(name, cells, first=23, width=11):
    """A line of a table: a column of `first` characters, then columns of `width`."""
    return f"  {name:{first}}" + "".join(f"{cell:>{width}}" for cell in cells)


def rows_beside(name, results, theirs, cells, widths=(23, 11)):
    """A row of a table, and one of the paper's where it has any. cells: (method, shots, split)."""
    rows = []
    for title, each in ((name, results), ("  the paper", theirs)):
        texts = [format_mean(each.accuracies(*cell)) for cell in cells] if each else []
        if any(texts):
            rows.append(format_row(title, texts, *widths))
    return rows


def tables(name, results, theirs=None, note=""):
    """The tables of a data set as text, within 80 columns up to five numbers of shots. theirs: the
    paper's Results; note: what differs there."""
    zero_shot = [line for line in results.lines if line["method"] == "zero-shot"]
    rows = {line.get("template", OWN): line["accuracy"]["test"] for line in zero_shot}
    rows["untrained unified context"] = mean(results.accuracies("untrained"))
    if theirs:
        rows["the paper, its template"] = theirs.zero_shot()
    lines = [f"{name}: zero-shot, accuracy in %"]
    lines += [format_row(row, [f"{value:.1f}"], 42, 7) for row, value in rows.items()]
    lines += ["", f"{name}: few-shot, mean ± standard deviation over seeds"]
    lines += [note] if theirs else []
    shots = results.shots()
    lines.append(format_row("shots", shots))
    for method in results.methods():
        lines += rows_beside(method, results, theirs, [(method, n, "test") for n in shots])
    splits = list(results.lines[0]["accuracy"])
    if len(splits) > 1:  # domains, at the largest number of shots
        n = shots[-1]
        columns = {"template": ("zero-shot", None)}
        columns |= {method.split()[-1]: (method, n) for method in results.methods()}
        lines += ["", format_row(f"domains, {n} shot{'s' * (n != 1)}", columns, 18, 15)]
        for split in splits:
            cells = [(*column, split) for column in columns.values()]
            lines += rows_beside(split, results, theirs, cells, (18, 15))
    return "\n".join(lines)


# ---------------------------------------------------------------- the figure

def over_shots(panels, methods=METHODS):
    """The paper's figure of {title: Results}: a panel for each, at most four in a row."""
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)  # rounded up
    fig = Figure((max(5, 2.4 * columns), 2.4 * rows + 1), layout="constrained")
    legend = {}
    for i, (title, results) in enumerate(panels.items()):
        ax = fig.add_subplot(rows, columns, i + 1)
        draw_panel(ax, results, [method for method in results.methods() if method in methods])
        ax.set_title(title, fontsize=11, parse_math=False)  # a folder's name may hold $
        for handle, label in zip(*ax.get_legend_handles_labels()):
            legend.setdefault(label, handle)
    fig.supxlabel("labelled images per class (shots)", fontsize=10)
    fig.supylabel("test accuracy, %", fontsize=10)
    fig.legend(legend.values(), legend, loc="outside upper center", ncols=3 if columns > 2 else 2)
    return fig


def draw_panel(ax, results, methods):
    """Accuracy over shots of one data set."""
    if untrained := results.accuracies("untrained"):  # the paper has none
        ax.axhline(mean(untrained), color="#CC79A7", label="untrained context")
    ax.axhline(results.zero_shot(), color="black", lw=0.8, ls="--")
    ax.plot(0, results.zero_shot(), "k*", ms=10, label="zero-shot, own template")
    shots = results.shots()
    for i, method in enumerate(methods):
        apart = 0.02 * len(shots) * (i - (len(methods) - 1) / 2)  # so that equal marks can be seen
        over = {1 + shots.index(n) + apart: results.accuracies(method, n) for n in shots}
        over = {x: values for x, values in over.items() if values}
        color, style = LOOKS[method]
        ax.errorbar(list(over), list(map(mean, over.values())), list(map(pstdev, over.values())),
                    fmt=style, color=color, ms=5, capsize=2, label=method)
    # 30 points or more, so that noise does not look like a trend; a mark at 0 or 100 is seen
    low, high = ax.get_ylim()
    low = max(-1, min(low, (low + high) / 2 - 15, 71))
    high = min(101, max(high, low + 30))
    ax.set_ylim(low, high)
    if low < results.chance < high:
        ax.axhline(results.chance, color="gray", lw=0.8, ls=":", label="chance")
    ax.set_xticks(range(len(shots) + 1), [0, *shots])
    ax.grid(alpha=0.3)
