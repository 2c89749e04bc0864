"""Tables and figures of the main job's results, and the paper's own figures beside them.

A result is what grid.py writes to results.json: {"template", "zero_shot": {template: {split: %}},
"few_shot": {method: {shots: [{split: %} per seed]}}, "settings", ...}. Standard deviations are the
population's (they divide by the number of seeds), as in the published code.
"""
import json
from pathlib import Path
from statistics import mean, pstdev

from mini_coop import whole_file

# Hand-written templates, compared beside a data set's own; four are the paper's, of other data sets
TEMPLATES = ["{}", "an icon of a {}.", "a photo of a {}.", "a photo of {}, a type of food.",
             "{} texture.", "a centered satellite photo of {}."]
METHODS = ("linear probe", "CoOp unified", "CoOp class-specific")
STYLES = {"linear probe": ("#0072B2", "s--"), "CoOp unified": ("#D55E00", "o-"),
          "CoOp class-specific": ("#009E73", "^-.")}  # of a curve: colour, marker and line
ON_IMAGENET = "users of the published code report 60.6 to 60.9 here (its issue 88)"


def mean_std(rows, split="test"):
    """Mean and standard deviation over seeds of one split's accuracies."""
    values = [row[split] for row in rows]
    return mean(values), pstdev(values)


def spelled(rows, split="test"):
    """'61.2 ± 0.8', or of one seed '61.2'."""
    average, spread = mean_std(rows, split)
    return f"{average:.1f} ± {spread:.1f}" if len(rows) > 1 else f"{average:.1f}"


def average_over_tasks(results, method, shots):
    """A method's accuracy averaged over data sets, per seed: rows for mean_std and spelled."""
    per_task = [r["few_shot"][method][shots] for r in results.values()]
    averages = []
    for seeds in zip(*per_task):
        averages.append({"test": mean(row["test"] for row in seeds)})
    return averages


def shared_methods(results):
    """The methods that every data set has."""
    shared = set.intersection(*[set(r["few_shot"]) for r in results.values()])
    return [method for method in METHODS if method in shared]


def declared(result, split="test"):
    """Zero-shot accuracy of the data set's own template."""
    return result["zero_shot"][result["template"]][split]


# ---------------------------------------------------------------- the paper's figures

def published(settings, method):
    """The paper's figures {shots: {data set: %}} of a method, {} unless the setting is the same."""
    tables = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
    same = (settings["n_ctx"] == 16 or method == "linear probe") and not settings["ctx_init"]
    if not same or settings["epochs"] is not None or settings["model"] not in tables:
        return {}
    key = method if method == "linear probe" else f"{method}, {settings['class_position']}"
    return tables[settings["model"]].get(key if method != "zero-shot" else method, {})


def published_domains(settings, method, domains, shots):
    """The paper's Table 1, {domain: %}, where the setting is one of it, else {}: 16 shots, and of
    CoOp the unified form, M = 16 from random vectors or M = 4 from "a photo of a"."""
    tables = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
    table = tables["domains"].get(settings["model"], {})
    if method == "CoOp unified":
        if settings["class_position"] != "end" or settings["epochs"] is not None:
            return {}
        start = settings["ctx_init"] or settings["n_ctx"]
        M = {16: 16, "a photo of a": 4}.get(start)
        method = f"CoOp M={M}"
    if method not in table or shots != "16":
        return {}
    row = dict(zip(tables["domains"]["columns"], table[method]))
    return {domain: row[domain] for domain in domains if domain in row}


# ---------------------------------------------------------------- tables

def line(name, values, width=12):
    return f"  {name:40}" + "".join(f"{value:>{width}}" for value in values)


def table(result, name):
    """The tables of one data set, as text."""
    settings = result["settings"]
    few = result["few_shot"]
    shots = list(next(iter(few.values())))
    lines = ["zero-shot, hand-written templates, accuracy in %"]
    for template, row in result["zero_shot"].items():
        mark = "  <- declared" if template == result["template"] else ""
        lines.append(line(template + mark, [f"{row['test']:.1f}"]))
    theirs = published(settings, "zero-shot").get("0", {})
    if name in theirs:
        lines.append(line("  the paper, declared template", [theirs[name]]))
    lines += ["", "few-shot, mean ± standard deviation over seeds (the population's)"]
    lines.append(line("shots", shots))
    for method, row in few.items():
        lines.append(line(method, [spelled(row[n]) for n in shots]))
        theirs = published(settings, method)
        if any(name in theirs.get(n, {}) for n in shots):
            note = f"; {ON_IMAGENET}" if name == "imagenet" and method == "CoOp unified" else ""
            values = [theirs.get(n, {}).get(name, "") for n in shots]
            lines.append(line("  the paper", values) + note)
    domains = list(result["zero_shot"][result["template"]])[1:]
    if domains:
        lines += ["", f"domains, {shots[-1]} shots", line("", domains, wide(domains))]
        lines += domain_lines(result, domains, shots[-1])
    return "\n".join(lines)


def wide(names):
    """The width of columns that are headed by names."""
    return max(12, 2 + max(map(len, names)))


def domain_lines(result, domains, shots):
    """A line for the declared template, "a photo of a {}." and each method."""
    lines = []
    for template in dict.fromkeys([result["template"], "a photo of a {}."]):
        row = result["zero_shot"][template]
        lines.append(line(template, [f"{row[d]:.1f}" for d in domains], wide(domains)))
    for method, row in result["few_shot"].items():
        lines.append(line(method, [spelled(row[shots], d) for d in domains], wide(domains)))
        if theirs := published_domains(result["settings"], method, domains, shots):
            lines.append(line("  the paper", [theirs.get(d, "") for d in domains], wide(domains)))
    return lines


def average_table(results):
    """The averages over data sets, as text; the paper's average over its eleven beside them."""
    first = next(iter(results.values()))
    shots = list(next(iter(first["few_shot"].values())))
    zero_shot = mean(declared(r) for r in results.values())
    lines = [f"average of {len(results)} data sets", line("shots", ["0", *shots]),
             line("zero-shot, declared templates", [f"{zero_shot:.1f}"])]
    for method in shared_methods(results):
        rows = [spelled(average_over_tasks(results, method, n)) for n in shots]
        lines.append(line(method, ["", *rows]))
        theirs = published(first["settings"], method)
        if theirs:
            values = [f"{mean(theirs[n].values()):.1f}" if n in theirs else "" for n in shots]
            lines.append(line("  the paper, its eleven", ["", *values]))
    return "\n".join(lines)


# ---------------------------------------------------------------- figures

def panel(ax, title, shots, curves, star, paper=()):
    """One panel of the paper's figure. curves: {method: [(mean, std) per number of shots]}."""
    ax.axhline(star, color="gray", linestyle=":", linewidth=1)
    ax.plot(0, star, "*", color="black", markersize=12, label="zero-shot, declared template")
    places = range(1, len(shots) + 1)
    for j, (method, points) in enumerate(curves.items()):
        color, style = STYLES[method]
        means = [average for average, _ in points]
        spreads = [spread for _, spread in points]
        apart = [place + 0.08 * (j - 1) for place in places]  # error bars side by side
        ax.errorbar(apart, means, spreads, fmt=style, color=color, capsize=3, label=method)
    for method, means in paper:
        ax.plot(places, means, ":", color=STYLES[method][0], label=f"{method}, the paper's average")
    printable = title.encode(errors="replace").decode()  # a folder's name need not be UTF-8
    ax.set_title(printable, fontsize=11, parse_math=False)  # and may hold $
    ax.set_xticks(range(len(shots) + 1), [0, *shots])
    ax.set_xlabel("labelled images per class (shots)")
    ax.set_ylabel("test accuracy, %")
    ax.grid(alpha=0.3)


def figure(results, title, path):
    """The paper's figure: accuracy over shots, a panel per data set and one of their average."""
    from matplotlib.figure import Figure  # here, as it takes a second to import
    first = next(iter(results.values()))
    shots = list(next(iter(first["few_shot"].values())))
    n_panels = len(results) + (len(results) > 1)
    columns = min(3, n_panels)
    rows = -(-n_panels // columns)
    fig = Figure((max(6, 3.6 * columns), 3.2 * rows + 0.9), layout="constrained")
    fig.suptitle(title, parse_math=False)
    axes = list(fig.subplots(rows, columns, squeeze=False).flat)
    if len(results) > 1:
        curves = {}
        paper = []
        for method in shared_methods(results):
            averages = [average_over_tasks(results, method, n) for n in shots]
            curves[method] = [mean_std(row) for row in averages]
            theirs = published(first["settings"], method)
            if all(n in theirs for n in shots):
                paper.append((method, [mean(theirs[n].values()) for n in shots]))
        star = mean(declared(r) for r in results.values())
        panel(axes[0], "average", shots, curves, star, paper)
    for ax, (name, result) in zip(axes[n_panels - len(results):], results.items()):
        curves = {}
        for method, row in result["few_shot"].items():
            curves[method] = [mean_std(row[n]) for n in shots]
        panel(ax, name, shots, curves, declared(result))
    for ax in axes[n_panels:]:
        ax.axis("off")
    legend = {}  # a method may be in some panels only
    for ax in axes:
        handles, labels = ax.get_legend_handles_labels()
        legend |= dict(zip(labels, handles))
    fig.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=2, fontsize=9)
    with whole_file(path) as file:
        fig.savefig(file, format="png", dpi=100)


def save(result, name, folder):
    """Writes a data set's results.json and figure.png, and prints its tables."""
    if (folder / "results.json").exists():
        print("results.json and figure.png are replaced; finished cells of other shots are kept")
    with whole_file(folder / "results.json") as file:
        file.write(json.dumps(result, indent=1).encode())
    print(f"\n{table(result, name)}\n\n{result['seconds']:.0f} s. Saved in {folder}: "
          "results.json, figure.png and the contexts")
    figure({name: result}, f"CLIP {result['settings']['model']}", folder / "figure.png")
