"""The main job, `python mini_coop.py`: zero-shot CLIP, linear probe and CoOp over shots and seeds.

For each data set, <out>/<model>_<data set>/ gets figure.png, the learned contexts and
results.jsonl: a line per run, written as soon as it is finished (data/README.md has its form). A
run whose line is there is not repeated, so the same command resumes, and several may share --out.
"""
import argparse
import hashlib
import json
import sys
import textwrap
import warnings
import zipfile
from functools import lru_cache, partial
from itertools import compress
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import mini_coop
import report

TEMPLATES = ("{}", "an icon of a {}.", "a photo of a {}.", "a photo of {}, a type of food.",
             "{} texture.", "a centered satellite photo of {}.")  # beside a data set's own
UNTRAINED = (1, 2, 3, 4, 5)  # seeds of the contexts that are scored as they start


def arguments(argv):
    """The command line as a namespace."""
    parser = argparse.ArgumentParser("mini_coop.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", default="mini", help="mini, a name of clip.available_models(), or a checkpoint")
    add("--dataset", nargs="+", action="extend", help="names, or folders (default: favicons)")
    add("--template", help="in place of the data set's own, such as 'a photo of a {}.'")
    add("--shots", nargs="+", type=int, default=[1, 4], help="images per class (default: 1 4)")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3], help="(default: 1 2 3)")
    add("--n-ctx", type=int, default=16, help="context vectors (default: 16)")
    add("--class-specific", choices=["yes", "no", "both"], default="no", help="(default: no)")
    add("--class-position", choices=["end", "middle", "front"], default="end")
    add("--ctx-init", metavar="WORDS", help="words to start from; they set --n-ctx")
    add("--epochs", type=int, help="in place of the paper's; 0: contexts as they start")
    add("--views", type=int, default=1, help="random crops per image; 1: as it is")
    add("--device", help="cpu or cuda; without it, CUDA where there is one")
    add("--out", type=Path, default=Path("runs"), help="folder for results (default: runs)")
    args = parser.parse_args(argv)
    args.dataset = args.dataset or ["favicons"]
    args.out = args.out.expanduser()
    for name, least in (("shots", 1), ("n_ctx", 1), ("epochs", 0), ("views", 1), ("seeds", 0)):
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value < least:
                raise ValueError(f"--{name.replace('_', '-')} begins at {least}, not {value}")
    return args


def short_hash(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def images_hash(data):
    """Of the names, sizes and labels of all images, and of the names of classes and domains."""
    found = [data.classnames, *data.domains]
    for split in (data.train, data.val, data.test, *data.domains.values()):
        found.append(split.labels)
        for image in split.images:
            if isinstance(image, zipfile.Path):
                info = image.root.NameToInfo.get(image.at)
                size = info.file_size if info else None  # missing: encode_images will say so
            else:
                size = image.stat().st_size
            found.append((image.name, size))
    return short_hash(found)


def wanted_runs(model, data, args):
    """The runs that the command asks for: lines that lack their result."""
    weights = short_hash(mini_coop.fingerprint(model).tolist())
    every = {"model": args.model, "weights": weights, "images": images_hash(data),
             "data": data.name, "device": model.text_projection.device.type,
             "torch": torch.__version__}
    context = {key: getattr(args, key) for key in ("n_ctx", "class_position", "ctx_init")}
    recipe = {**context, "epochs": args.epochs, "views": args.views}  # epochs null: the paper's
    runs = []
    for template in dict.fromkeys([data.template, *TEMPLATES]):
        runs.append({**every, "method": "zero-shot", "template": template})
    for seed in UNTRAINED[:1] if args.ctx_init else UNTRAINED:  # words are the same for all
        runs.append({**every, "method": "untrained", **context, "seed": seed})
    probe, unified, specific = report.METHODS
    forms = {"yes": [specific], "no": [unified], "both": [unified, specific]}[args.class_specific]
    for shots in sorted(set(args.shots)):
        for seed in sorted(set(args.seeds)):
            if data.val.images:  # the probe chooses its C on them
                runs.append({**every, "method": probe, "shots": shots, "seed": seed})
            for form in forms:
                runs.append({**every, "method": form, **recipe, "shots": shots, "seed": seed})
    return runs


def probe_scores(x, y, x_val, y_val, n_classes):
    """A linear probe's scores, features (N, E) -> (N, K); zero for a class that it did not see."""
    probe = mini_coop.linear_probe(x, y, x_val, y_val)
    columns = torch.eye(n_classes, dtype=torch.float64)[probe.classes_]
    return lambda x: torch.from_numpy(probe.predict_proba(x.cpu().numpy())).double() @ columns


def accuracies(tests, scores):
    """{split: %} of scores: features (N, E) -> (N, K); tests: {split: (features, labels)}. (The
    lengths of features do not change which score is the largest.) A domain with less than half of
    the classes (ImageNet-A and -R) is scored among those alone."""
    found = {}
    for name, (x, y) in tests.items():
        s = scores(x).cpu()
        y = torch.tensor(y)
        classes = y.unique()
        if name == "test" or len(classes) >= s.shape[1] / 2:
            classes = torch.arange(s.shape[1])
        predicted = classes[s[:, classes].argmax(1)]
        found[name] = 100 * (predicted == y).double().mean().item()
    return found


def same_picture(x, others):
    """For each feature of x (N, E), whether one of the others is the same up to rounding."""
    others = F.normalize(others, dim=-1).T
    parts = [(F.normalize(part, dim=-1) @ others > 1 - 1e-6).any(1) for part in x.split(1000)]
    return torch.cat(parts).cpu()


def train(run, model, data, sample, folder, args):
    """Does one run: -> its scores, features (N, E) -> (N, K), and the file of its context."""
    method = run["method"]
    if method == "zero-shot":
        weights = mini_coop.zero_shot_weights(model, data.classnames, run["template"])
        return partial(F.linear, weight=weights), None
    if method == "linear probe":
        x, y, x_val, y_val, _ = sample
        return probe_scores(x, y, x_val, y_val, len(data.classnames)), None
    specific = method == "CoOp class-specific"
    start = {key: run[key] for key in ("n_ctx", "class_position", "ctx_init", "seed")}
    coop = mini_coop.CoOp(model, data.classnames, class_specific=specific, **start)
    if method == "untrained":
        return coop.predict_proba, None
    _, y, _, _, views = sample
    epochs = 50 if args.epochs is None and data.name == "imagenet" else args.epochs  # the paper's
    coop.fit(views, y, epochs, progress=False)
    name = f"{method} {run['shots']} shots seed {run['seed']} {short_hash(run)}.pt"
    coop.save(folder / name.replace(" ", "_"))
    return coop.predict_proba, name.replace(" ", "_")


def run_dataset(model, preprocess, data, folder, args):
    """Runs what has no line yet; returns the lines that the command asks for."""
    file = folder / "results.jsonl"
    runs = wanted_runs(model, data, args)
    done = set(map(report.run_key, report.read_lines(file)))
    todo = [run for run in runs if report.run_key(run) not in done]
    if len(todo) < len(runs):
        print(f"{len(runs) - len(todo)} of {len(runs)} runs are in {file}")
    if todo:
        run_all(todo, model, partial(mini_coop.encode_images, model, preprocess), data, file, args)
    by_run = {report.run_key(line): line for line in report.read_lines(file)}
    return [by_run[report.run_key(run)] for run in runs]


def run_all(todo, model, encode, data, file, args):
    """Appends a line for each run; warns of pictures that are where they should not be."""
    tests = {}  # split -> features, labels
    for name, split in {"test": data.test, **data.domains}.items():
        tests[name] = encode(split.images), split.labels
    x_test, y_test = tests["test"]
    twice = set()  # training images whose picture is in the test split, too

    @lru_cache(maxsize=1)  # the methods of a sample follow one another
    def encode_sample(shots, seed):
        few = mini_coop.few_shot(data, shots, seed)
        x = encode(few.train.images)
        twice.update(compress(few.train.images, same_picture(x, x_test)))
        x_val = encode(few.val.images) if few.val.images else None
        views = encode(few.train.images, args.views, seed=seed) if args.views > 1 else x
        return x, few.train.labels, x_val, few.val.labels, views

    for run in tqdm(todo, data.name, ncols=79, disable=None):
        sample = encode_sample(run["shots"], run["seed"]) if "shots" in run else None
        scores, context = train(run, model, data, sample, file.parent, args)
        line = {**run, "accuracy": accuracies(tests, scores)}
        # one write, as jobs may share the file; the break first, as its last line may be cut off
        with open(file, "a", encoding="utf-8") as out:
            out.write("\n" + json.dumps({**line, "file": context} if context else line))
    if twice:
        warnings.warn(f"{len(twice)} training images are in the test split, too: accuracies are "
                      "too high")
    y = torch.tensor(y_test)
    if several := sum(same_picture(x_test[y == k], x_test[y != k]).sum() for k in y.unique()):
        warnings.warn(f"{several} test images stand in two classes or more")


def introduce(model, data, args):
    """Prints the prompts of a data set, and how CLIP reads the names; refuses wrong options, and
    sets args.n_ctx where words do."""
    if not data.train.images or not data.test.images:
        raise ValueError(f"{data.name} needs training and test images")
    print(f"\n{data.name}: {len(data.classnames)} classes, prompts such as")
    for name in (data.classnames[0], data.classnames[-1]):
        pieces = [mini_coop.tokenizer.decode([i]).strip() for i in mini_coop.token_ids(name)]
        print(f'  "{data.template.replace("{}", name.replace("_", " "))}"')
        print("    CLIP's pieces of the name: " + textwrap.shorten(" | ".join(pieces), 50))
    if args.model == "mini" and not isinstance(data.test.images[0], zipfile.Path):  # not our data
        print("the built-in CLIP knows icons only: for photographs add --model RN50")
    if not data.val.images:
        print("no validation images: no linear probe, which chooses its C on them")
    # wrong options are refused here, before any image is encoded; TEMPLATES[3] is the longest
    coop = mini_coop.CoOp(model, data.classnames, args.n_ctx, class_position=args.class_position,
                          ctx_init=args.ctx_init)
    args.n_ctx = coop.n_ctx
    mini_coop.zero_shot_weights(model, data.classnames, [data.template, TEMPLATES[3]])


def note(args):
    """What the paper does otherwise, in one line."""
    here = f"one of {args.views} crops" if args.views > 1 else "the image as it is"
    return f"  (the paper: a new random crop in every epoch; here {here})"


def show_dataset(data, lines, folder, args):
    """Prints a data set's tables beside the paper's numbers, saves its figure; gives its Results
    and the paper's."""
    results = report.Results(lines, data.template, 100 / len(data.classnames))
    setting = {key: getattr(args, key) for key in report.RECIPE if key != "views"}
    theirs = report.papers(args.model, **setting).get(data.name)
    if theirs and (theirs.template, theirs.chance) != (results.template, results.chance):
        theirs = None  # not the paper's data set
    report.over_shots({data.name: results}).savefig(folder / "figure.png", dpi=120)
    print("\n" + report.tables(data.name, results, theirs, note(args)))
    print(f"\nSaved in {folder}: results.jsonl, figure.png, contexts")
    return results, theirs


def run_job(args):
    """Runs every data set; prints the tables and saves the figures."""
    datasets = [mini_coop.load_dataset(name, args.template) for name in args.dataset]
    names = [data.name for data in datasets]
    if len(set(names)) < len(names):
        raise ValueError(f"two data sets of one name, whose results would mix: {', '.join(names)}")
    model, preprocess = mini_coop.load_clip(args.model, args.device)
    device = model.text_projection.device
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else device
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, CLIP {args.model} on {on}, "
          f"CPU threads: {torch.get_num_threads()}")
    for data in datasets:
        introduce(model, data, args)
    label = report.folder_name(args.model)
    panels = {}
    papers = []
    for data in datasets:
        folder = args.out / f"{label}_{data.name}"
        folder.mkdir(parents=True, exist_ok=True)
        lines = run_dataset(model, preprocess, data, folder, args)
        panels[data.name], theirs = show_dataset(data, lines, folder, args)
        papers.append(theirs)
    if len(panels) > 1:
        title = f"average of {len(panels)}"
        panels = {title: report.average(list(panels.values())), **panels}
        file = args.out / f"{label}_{'+'.join(names)[:99]}.png"
        report.over_shots(panels).savefig(file, dpi=120)
        theirs = report.average(papers) if all(papers) else None
        print("\n" + report.tables(title, panels[title], theirs, note(args)))
        print(f"\nThe figure of all: {file}")


def main(argv=None):
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    sys.stdout.reconfigure(errors="replace")  # a terminal without ±
    try:
        run_job(arguments(argv))
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"mini_coop.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command resumes")


if __name__ == "__main__":
    main()
