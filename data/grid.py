"""The main job, `python mini_coop.py`: zero-shot CLIP, linear probe and CoOp over shots and seeds.

For each data set, <out>/<model>_<data set>/ gets results.json, figure.png and the learned contexts.
results.json is written after every run, so the same command resumes. Its rows are {split: accuracy
in %}, one for each template, for three untrained contexts, and for each method, shots and seed.
"""
import argparse
import hashlib
import json
import re
import sys
import warnings
import zipfile
from functools import partial
from pathlib import Path
from statistics import mean, pstdev

import torch
from matplotlib.figure import Figure
from tqdm.auto import tqdm

import mini_coop

LOOKS = {"linear probe": ("#0072B2", "s--"), "CoOp unified": ("#D55E00", "o-"),
         "CoOp class-specific": ("#009E73", "^-.")}  # of a curve: colour, marker and line
METHODS = tuple(LOOKS)
TEMPLATES = ("{}", "an icon of a {}.", "a photo of a {}.", "a photo of {}, a type of food.",
             "{} texture.", "a centered satellite photo of {}.")  # beside a data set's own


def arguments(argv):
    """The command line as a namespace."""
    parser = argparse.ArgumentParser("mini_coop.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", default="mini", help="mini, a name of clip.available_models(), or a checkpoint")
    add("--dataset", nargs="+", default=["favicons"], help="names under data/, or folders")
    add("--template", help="in place of the data set's own, such as 'a photo of a {}.'")
    add("--shots", nargs="+", type=int, default=[1, 4], help="images per class (default: 1 4)")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3], help="(default: 1 2 3)")
    add("--n-ctx", type=int, default=16, help="context vectors (default: 16)")
    add("--class-specific", choices=["yes", "no", "both"], default="both", help="(default: both)")
    add("--class-position", choices=["end", "middle", "front"], default="end")
    add("--ctx-init", metavar="WORDS", help="words to start from; they set --n-ctx")
    add("--epochs", type=int, help="in place of the paper's; 0: contexts as they start")
    add("--views", type=int, default=1, help="random crops per image; 1: as it is")
    add("--device", help="cpu or cuda; without it, CUDA where there is one")
    add("--out", type=Path, default=Path("runs"), help="folder for results (default: runs)")
    return parser.parse_args(argv)


def identity(model, data, args):
    """What results depend on; all results in one results.json share it."""
    images = []
    for split in (data.train, data.val, data.test, *data.domains.values()):
        images.append(split.labels)
        for image in split.images:
            if isinstance(image, zipfile.Path):
                images.append((image.name, image.root.getinfo(image.at).CRC))
            else:
                images.append((image.name, image.stat().st_size, image.stat().st_mtime_ns))
    weights = mini_coop.fingerprint(model).tolist()
    keys = ("model", "n_ctx", "class_position", "ctx_init", "epochs", "views")
    return {**{key: getattr(args, key) for key in keys}, "template": data.template,
            "device": model.text_projection.device.type, "class names": data.classnames,
            "images": hashlib.sha256(repr(images).encode()).hexdigest(),
            "weights": hashlib.sha256(repr(weights).encode()).hexdigest()}


def read_results(file, same):
    """results.json, and its finished runs {(method, shots, seed): row}; both may be empty."""
    if not file.is_file():
        return {}, {}
    result = json.loads(file.read_text())
    differ = [key for key, value in same.items() if result["settings"].get(key) != value]
    if differ:
        raise ValueError(f"{file} holds results of other {', '.join(differ)}: choose another --out")
    done = {}
    for method, by_shots in result["few_shot"].items():
        for shots, rows in by_shots.items():
            done |= {(method, int(shots), row["seed"]): row for row in rows}
    return result, done


def nested(done):
    """{(method, shots, seed): row} -> {method: {shots: rows}}, in this order."""
    few = {}
    for run in sorted(done, key=lambda run: (METHODS.index(run[0]), *run[1:])):
        few.setdefault(run[0], {}).setdefault(str(run[1]), []).append(done[run])
    return few


def encode(model, preprocess, images, views=1):
    """Image features {name: (E,) or (A, E)}; every image is encoded once."""
    images = {str(image): image for image in images}
    return dict(zip(images, mini_coop.encode_images(model, preprocess, images.values(), views)))


def gather(split, features):
    """Features (N, ...) and labels (N,) of a split's images."""
    x = torch.stack([features[str(image)] for image in split.images])
    return x, torch.tensor(split.labels)


def probe_scores(few, features, K):
    """A linear probe's scores, features (N, E) -> (N, K); zero for a class that it did not see."""
    probe = mini_coop.linear_probe(*gather(few.train, features), *gather(few.val, features))
    columns = torch.eye(K, dtype=torch.float64)[probe.classes_]
    return lambda x: torch.from_numpy(probe.predict_proba(x.cpu().numpy())).double() @ columns


def encode_tests(model, preprocess, data):
    """{split: (features, labels, is_shift)} of the test split and the domains. A domain made of
    test images, as our task `outlines` has one, is no domain shift."""
    test_images = set(map(str, data.test.images))
    tests = {}
    for name, split in {"test": data.test, **data.domains}.items():
        x = mini_coop.encode_images(model, preprocess, split.images)
        is_shift = test_images.isdisjoint(map(str, split.images))
        tests[name] = x, torch.tensor(split.labels), is_shift
    return tests


def accuracies(tests, scores):
    """{split: %} of scores: features (N, E) -> (N, K). A domain with less than half of the classes
    (ImageNet-A and -R) is scored among those alone."""
    row = {}
    shifts = []
    for name, (x, y, is_shift) in tests.items():
        s = scores(x).cpu()
        classes = y.unique()
        if name == "test" or len(classes) >= s.shape[1] / 2:
            classes = torch.arange(s.shape[1])
        predicted = classes[s[:, classes].argmax(1)]
        row[name] = 100 * (predicted == y).double().mean().item()
        shifts += [row[name]] if is_shift else []
    return {**row, "mean of shifts": mean(shifts)} if shifts else row


def before_training(model, data, tests, untrained):
    """What results.json holds beside the few-shot runs."""
    zero_shot = {}
    for template in dict.fromkeys([data.template, *TEMPLATES]):
        weights = mini_coop.zero_shot_weights(model, data.classnames, template)
        zero_shot[template] = accuracies(tests, lambda x: x @ weights.T)
    untrained = [accuracies(tests, coop.predict_proba) for coop in untrained]
    return {"chance": 100 / len(data.classnames), "template": data.template,
            "zero_shot": zero_shot, "untrained": untrained}


def run_grid(model, preprocess, data, folder, args):
    """Runs what is not finished, writes results.json after each run, returns the results."""
    file = folder / "results.json"
    same = identity(model, data, args)
    result, done = read_results(file, same)
    methods = {"yes": METHODS[::2], "no": METHODS[:2], "both": METHODS}[args.class_specific]
    methods = [method for method in methods if data.val.images or method != "linear probe"]
    samples = {}  # (shots, seed) -> Dataset
    wanted = []
    for shots in sorted(set(args.shots)):
        for seed in sorted(set(args.seeds)):
            samples[shots, seed] = mini_coop.few_shot(data, shots, seed)
            wanted += [(method, shots, seed) for method in methods]
    new_coop = partial(mini_coop.CoOp, model, data.classnames, args.n_ctx,
                       class_position=args.class_position, ctx_init=args.ctx_init)
    if todo := [run for run in wanted if run not in done]:
        # the images of all samples, whatever is finished: the same command draws the same views
        train = sum([sample.train.images for sample in samples.values()], [])
        val = sum([sample.val.images for sample in samples.values()], [])
        features = encode(model, preprocess, train + val)
        views = features if args.views == 1 else encode(model, preprocess, train, args.views)
        tests = encode_tests(model, preprocess, data)
        settings = {**vars(args), **same, "dataset": data.name, "out": str(args.out),
                    "threads": torch.get_num_threads(), "torch": torch.__version__}
        untrained = [new_coop(seed=seed) for seed in (1, 2, 3)]
        result = {"settings": settings, **before_training(model, data, tests, untrained)}
    for method, shots, seed in tqdm(todo, data.name, ncols=79, disable=not todo):
        few = samples[shots, seed]
        if method == "linear probe":
            scores = probe_scores(few, features, len(data.classnames))
        else:
            coop = new_coop(seed=seed, class_specific=method == "CoOp class-specific")
            epochs = 50 if args.epochs is None and data.name == "imagenet" else args.epochs
            coop.fit(*gather(few.train, views), epochs, progress=False)
            coop.save(folder / f"{method.replace(' ', '_')}_{shots}_shots_seed_{seed}.pt")
            scores = coop.predict_proba
        done[method, shots, seed] = {"seed": seed, **accuracies(tests, scores)}
        text = json.dumps({**result, "few_shot": nested(done)}, indent=1)
        file.with_suffix(".part").write_text(text)
        file.with_suffix(".part").replace(file)
    return {**result, "few_shot": nested({run: done[run] for run in wanted})}


def mean_std(rows, split="test"):
    """Mean and standard deviation over seeds (the population's, as in the published code)."""
    values = [row[split] for row in rows]
    return mean(values), pstdev(values)


def spelled(rows, split="test"):
    """'61.2 ± 0.8', or of one seed '61.2'."""
    average, spread = mean_std(rows, split)
    return f"{average:.1f} ± {spread:.1f}" if len(rows) > 1 else f"{average:.1f}"


def own_template(result, split="test"):
    """Zero-shot accuracy of the data set's own template."""
    return result["zero_shot"][result["template"]][split]


def average(results):
    """The average over data sets, as one result; each row averages one seed."""
    def mean_rows(lists):
        return [{"test": mean_std(rows)[0]} for rows in zip(*lists)]
    few = {}
    for method in METHODS:
        tables = [result["few_shot"].get(method) for result in results]
        if all(tables):
            few[method] = {n: mean_rows([table[n] for table in tables]) for n in tables[0]}
    own = mean(map(own_template, results))
    return {**results[0], "chance": mean(result["chance"] for result in results),
            "template": "their own templates", "zero_shot": {"their own templates": {"test": own}},
            "untrained": mean_rows([result["untrained"] for result in results]), "few_shot": few}


def paper(settings):
    """The paper's numbers at this setting: by data set, "average of 11" and "domains" (Table 1)."""
    start = settings["ctx_init"] or settings["n_ctx"]
    setting = f"{settings['model']}, {start}, {settings['class_position']}"
    file = Path(__file__).with_name("published.json")
    return json.loads(file.read_text()).get(setting, {}) if settings["epochs"] is None else {}


def line(name, values, first=23, width=11):  # columns of `first`, `width`, `width` ... characters
    cells = [value if isinstance(value, str) else f"{value:.1f}" for value in values]
    return f"  {name:{first}}" + "".join(f"{cell:>{width}}" for cell in cells)


def tables(result, name):
    """The tables of a data set as text, within 80 columns up to five numbers of shots."""
    few = result["few_shot"]
    theirs = paper(result["settings"]).get(name, {})
    lines = [f"{name}: zero-shot, accuracy in %"]
    for template, row in result["zero_shot"].items():
        lines.append(line(template, [row["test"]], 42, 7))
    if theirs:
        lines.append(line("  the paper", theirs["zero-shot"].values(), 42, 7))
    lines.append(line("untrained unified context", [mean_std(result["untrained"])[0]], 42, 7))
    shots = list(few[list(few)[0]])
    lines += ["", f"{name}: few-shot, mean ± standard deviation over seeds", line("shots", shots)]
    for method, by_shots in few.items():
        lines.append(line(method, map(spelled, by_shots.values())))
        if theirs:
            lines.append(line("  the paper", [theirs.get(method, {}).get(n, "") for n in shots]))
    return "\n".join(lines + domain_table(result, shots[-1]))


def domain_table(result, n):
    """The lines of the table of domains; none if there are no domains."""
    splits = list(result["zero_shot"][result["template"]])
    few = {method: by_shots[n] for method, by_shots in result["few_shot"].items()}
    theirs = paper(result["settings"]).get("domains", {}) if n == "16" else {}
    heads = ["template", *[method.split()[-1] for method in few]]
    lines = ["", line(f"domains, {n} shot{'s' * (n != '1')}", heads, 18, 15)]
    for split in splits:
        values = [spelled(rows, split) for rows in few.values()]
        lines.append(line(split, [own_template(result, split), *values], 18, 15))
        if split in theirs:
            values = [theirs[split].get(method, "") for method in ("zero-shot", *few)]
            lines.append(line("  the paper", values, 18, 15))
    return lines if len(splits) > 1 else []


def over_shots(results, methods=METHODS):
    """The paper's figure of {title: result}: a panel for each, at most four in a row."""
    columns = min(4, len(results))
    rows = -(-len(results) // columns)  # rounded up
    fig = Figure((max(5, 2.4 * columns), 2.4 * rows + 1), layout="constrained")
    for i, (title, result) in enumerate(results.items()):
        ax = fig.add_subplot(rows, columns, i + 1)
        if "untrained" in result:  # the paper has none (notebooks show its average)
            ax.axhline(mean_std(result["untrained"])[0], color="#CC79A7", label="untrained context")
        ax.axhline(own_template(result), color="black", lw=0.8, ls="--")
        ax.plot(0, own_template(result), "k*", ms=10, label="zero-shot, own template")
        few = result["few_shot"]
        shots = sorted(set().union(*few.values()), key=int)
        for method in [method for method in methods if method in few]:
            at = [1 + shots.index(n) + 0.08 * METHODS.index(method) for n in few[method]]
            means, spreads = zip(*map(mean_std, few[method].values()))
            color, style = LOOKS[method]
            ax.errorbar(at, means, spreads, fmt=style, color=color, ms=5, capsize=2, label=method)
        low, high = ax.get_ylim()
        ax.axhline(result["chance"], color="gray", lw=0.8, ls=":", label="chance (if in range)")
        more = max(0, 30 - (high - low)) / 2  # 30 points or more: noise must not look like a trend
        ax.set_ylim(low - more, high + more)
        ax.set_xticks(range(len(shots) + 1), [0, *shots])
        ax.set_title(title, fontsize=11, parse_math=False)  # a folder's name may hold $
        ax.grid(alpha=0.3)
    fig.supxlabel("labelled images per class (shots)", fontsize=10)
    fig.supylabel("test accuracy, %", fontsize=10)
    legend = max((ax.get_legend_handles_labels() for ax in fig.axes), key=lambda both: len(both[1]))
    fig.legend(*legend, loc="outside upper center", ncols=3 if columns > 2 else 2)
    return fig


def one(model, preprocess, data, args):
    """Runs one data set; prints its prompts and tables, saves its figure."""
    if not data.train.images or not data.test.images:
        raise ValueError(f"{data.name} needs training and test images")
    names = [name.replace("_", " ") for name in data.classnames]
    print(f"\n{data.name}: {len(names)} classes, prompts such as")
    for name in (names[0], names[-1]):
        print(f'  "{data.template.replace("{}", name)}"')
    codes = [n for n in names if not re.search(r"[^\W\d_]{2}", n) or re.search(r"\d{5}", n)]
    if 2 * len(codes) > len(names):
        warnings.warn(f"CLIP cannot read class names such as {codes[0]!r}: rename the folders")
    if not data.val.images:
        print("no validation images: no linear probe, which chooses its C on them")
    folder = args.out / f"{args.model.replace('/', '-')}_{data.name}"
    folder.mkdir(parents=True, exist_ok=True)
    result = run_grid(model, preprocess, data, folder, args)
    over_shots({data.name: result}).savefig(folder / "figure.png", dpi=120)
    print(f"\n{tables(result, data.name)}\n\nSaved in {folder}: results.json, figure.png, contexts")
    return result


def main(argv=None):
    args = arguments(argv)
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    sys.stdout.reconfigure(errors="replace")  # a terminal without ±
    try:
        datasets = [mini_coop.load_dataset(name, args.template) for name in args.dataset]
        model, preprocess = mini_coop.load_clip(args.model, args.device)
        on = torch.cuda.get_device_name() if model.logit_scale.is_cuda else "cpu"
        print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, CLIP {args.model} "
              f"on {on}, CPU threads: {torch.get_num_threads()}")
        results = {data.name: one(model, preprocess, data, args) for data in datasets}
        if len(results) > 1:
            name = f"average of {len(results)}"
            panels = {name: average(list(results.values())), **results}
            file = args.out / f"{args.model.replace('/', '-')}_{'+'.join(results)[:99]}.png"
            over_shots(panels).savefig(file, dpi=120)
            print(f"\n{tables(panels[name], name)}\n\nThe figure of all: {file}")
    except (AssertionError, KeyError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"mini_coop.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command resumes")


if __name__ == "__main__":
    main()
