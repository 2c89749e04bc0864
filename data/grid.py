"""The main job, `python mini_coop.py`: zero-shot, linear probe and CoOp on a grid of shots and seeds; `mini_coop.grid` is this file.

Prints its plan and its tables, and saves a figure, a JSON with every figure and setting, and the learned contexts. A cell of the
grid, a method x shots x seed, that is finished is kept and never run again, so the same command goes on where it was stopped.
"""
import argparse
import json
import statistics
import time
import warnings
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm.auto import tqdm

from mini_coop import DATA, SHARED, CoOp, clip, encode_images, few_shot, linear_probe, load_clip, load_dataset, n_epochs
from mini_coop import weights_file, zero_shot_weights
from mini_coop.datasets import atomic, digest, effect, fingerprint, stamp

# Hand-written templates that are compared beside a data set's own; the last four are the paper's, for other data sets.
TEMPLATES = ["{}", "an icon of a {}.", "a photo of a {}.", "a photo of {}, a type of food.", "{} texture.",
             "a centered satellite photo of {}."]
METHODS = ("linear probe", "CoOp unified", "CoOp class-specific")


def _seconds_a_step(coop):
    """How long a training step of this context takes here: three are timed, after two to warm up; 200 on CUDA, after recording one."""
    features, labels = torch.randn(32, coop.clip_model.text_projection.shape[1]), torch.arange(32) % len(coop.classnames)
    for epochs in (2, 200 if coop.ctx.is_cuda else 3):
        start = time.perf_counter()
        if coop.fit(features, labels, epochs, progress=False).interrupted_:
            raise KeyboardInterrupt
    return (time.perf_counter() - start) / epochs


def experiment(model, preprocess, data, folder, shots, seeds, methods, n_ctx=16, class_position="end", ctx_init=None, epochs=None, views=1):
    """Zero-shot with every template, then every cell, a method x shots x seed, on one data set; contexts are saved in `folder`.

    A finished cell is kept in `folder` too and not run again, unless weights, images or settings changed. Features are cached
    in `folder`/features. Returns {"zero_shot": {template: {split: %}}, "few_shot": {method: {shots: [{split: %} a seed]}}};
    splits: test and the domains.
    """
    if not data.train.images or not data.test.images:
        raise ValueError(f"{data.name} has no {'test' if data.train.images else 'training'} images: the comparison needs both")
    tests, K = {"test": data.test, **data.domains}, len(data.classnames)
    key = digest(fingerprint(model), preprocess, effect(preprocess), list(tests), data.classnames, n_ctx, class_position, ctx_init, epochs, views,
                 [(split.labels, [stamp(image) for image in split.images]) for split in (data.train, data.val, *tests.values())])
    picks = {(n, seed): few_shot(data.train.labels, n, seed, data.val.labels) for n in shots for seed in seeds}

    def finished(cell):
        try:
            kept = json.loads(cell.with_name(cell.name + ".json").read_text())
            whole = "linear_probe" in cell.name or cell.with_name(cell.name + ".pt").is_file()
            return kept["accuracy"] if kept["key"] == key and whole else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    cells = {(n, seed, method): folder / f"{method.replace(' ', '_')}_{n}_shots_seed_{seed}" for n, seed in picks for method in methods}
    done = {which: accuracy for which, cell in cells.items() if (accuracy := finished(cell)) is not None}
    used = [sorted({i for pick in picks.values() for i in pick[part]}) if len(done) < len(cells) else [] for part in (0, 1)]

    def new(method, seed):
        return CoOp(model, data.classnames, n_ctx, method == "CoOp class-specific", class_position, ctx_init, seed)

    def encode(split, indices, views=1):
        """{index: features} of the images that can be read."""
        images = [split.images[i] for i in indices]
        features = encode_images(model, preprocess, images, views, cache=folder / "features") if images else []
        return {i: x for i, x in zip(indices, features) if x.isfinite().all()}

    def gather(split, features, indices):
        indices = [i for i in indices if i in features]
        if not indices:
            raise ValueError(f"{data.name}: a split or a draw of it has no image that can be read")
        return torch.stack([features[i] for i in indices]), torch.tensor([split.labels[i] for i in indices])

    # The plan: what has to be computed, and how long that takes here, from a few steps and images
    n_steps = {method: sum(n_epochs(n, epochs) * max(1, len(picks[n, seed][0]) // 32) for n, seed, m in cells.keys() - done.keys() if m == method)
               for method in methods if method != "linear probe"}
    n_images = len(used[0]) * (1 + views * (views > 1)) + len(used[1]) + sum(len(s.images) for s in tests.values())
    seconds = sum(steps * _seconds_a_step(new(method, 0)) for method, steps in n_steps.items() if steps)
    start = time.perf_counter()
    with warnings.catch_warnings():  # of what cannot be read, once is enough
        warnings.simplefilter("ignore")
        encode_images(model, preprocess, data.test.images[:32], workers=0, progress=False)
    seconds += n_images * (time.perf_counter() - start) / len(data.test.images[:32])
    print(f"plan: {len(cells) - len(done)} of {len(cells)} cells are to be run, {sum(n_steps.values()):,} training steps; {n_images:,} images to encode "
          f"where they are not cached; about {seconds / 60:.1f} minutes", flush=True)

    train, val = encode(data.train, used[0]), encode(data.val, used[1])
    train_views = encode(data.train, used[0], views) if views > 1 else train
    tests = {name: gather(split, encoded := encode(split, range(len(split.images))), encoded) for name, split in tests.items()}

    def accuracies(scores):
        """scores: features -> (N, K). A domain of less than half of the classes is a task of those (ImageNet-A and -R)."""
        result = {}
        for name, (x, y) in tests.items():
            classes = y.unique() if name != "test" and 2 * len(y.unique()) < K else torch.arange(K)
            result[name] = 100 * (classes[scores(x).cpu()[:, classes].argmax(1)] == y).float().mean().item()
        return result

    zero_shot, templates = {}, list(dict.fromkeys([data.template, *TEMPLATES]))
    for name, template in [*zip(templates, templates), ("ensemble of these", templates)]:
        weights = zero_shot_weights(model, data.classnames, template)
        zero_shot[name] = accuracies(lambda x: x @ weights.T)
    bar = tqdm([which for which in cells if which not in done], desc=data.name, disable=len(done) == len(cells))
    for n, seed, method in bar:
        bar.set_postfix_str(f"{method}, {n} shots, seed {seed}")
        (chosen, validation), cell = picks[n, seed], cells[n, seed, method]
        if method == "linear probe":
            probe = linear_probe(*gather(data.train, train, chosen), *gather(data.val, val, validation))
            columns = F.one_hot(torch.from_numpy(probe.classes_), K).double()  # it may have seen some of the classes only
            accuracy = accuracies(lambda x: torch.from_numpy(probe.predict_proba(x.cpu().numpy())).double() @ columns)
        else:
            coop = new(method, seed)
            if coop.fit(*gather(data.train, train_views, chosen), n_epochs(n, epochs), progress=False).interrupted_:
                raise KeyboardInterrupt  # a half-learned context is no result
            Path(f"{cell}.json").unlink(missing_ok=True)  # an older result must not stand beside a newer context
            coop.save(f"{cell}.pt")
            accuracy = accuracies(coop.predict_proba)
        done[n, seed, method] = accuracy
        with atomic(f"{cell}.json") as file:
            file.write(json.dumps({"key": key, "accuracy": accuracy}).encode())
    return {"zero_shot": zero_shot, "few_shot": {m: {str(n): [done[n, seed, m] for seed in seeds] for n in shots} for m in methods}}


def run_folder(out, model, dataset):
    """Where the main job saves what it learns with a model (a name or a checkpoint) on a data set, below its --out."""
    return Path(out) / f"{Path(model).stem if Path(model).is_file() else model.replace('/', '-').replace('@', '-')}_{dataset}"


def mean_std(rows, split="test"):
    """Mean and standard deviation over seeds of one split's accuracies."""
    values = [row[split] for row in rows]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def report(result, published=None):
    """The tables of the main job, as text; `published`: figures of the paper's setting to stand below ours."""
    zero_shot, few, template, published = result["zero_shot"], result["few_shot"], result["template"], published or {}
    shots = list(next(iter(few.values())))
    lines = [f"{'zero-shot, hand-written templates':40}  accuracy %"]
    for name, row in zero_shot.items():
        lines.append(f"  {name + ('  <- declared' if name == template else ''):40}{row['test']:10.1f}")
    if "zero-shot" in published:
        lines.append(f"  {'  published, declared template':40}{published['zero-shot']['0']:10.1f}")
    lines += ["", f"{'few-shot, mean ± std over seeds; shots:':42}" + "".join(f"{n:>12}" for n in shots)]
    for method, row in few.items():
        lines.append(f"  {method:40}" + "".join(f"{'{:.1f} ± {:.1f}'.format(*mean_std(row[n])):>12}" for n in shots))
        if method in published:
            lines.append(f"  {'  published':40}" + "".join(f"{published[method].get(n, ''):>12}" for n in shots))
    if domains := list(zero_shot[template])[1:]:
        most = max(shots, key=int)
        lines += ["", f"{f'domains, {most} shots:':42}" + "".join(f"{name:>12}" for name in domains)]
        rows = {t: {d: (zero_shot[t][d], 0.0) for d in domains} for t in dict.fromkeys([template, "a photo of a {}."])}
        rows |= {method: {d: mean_std(row[most], d) for d in domains} for method, row in few.items()}
        for name, row in rows.items():
            lines.append(f"  {name:40}" + "".join(f"{'{:.1f} ± {:.1f}'.format(*row[d]):>12}" for d in domains))
            if theirs := published.get("domains", {}).get("zero-shot" if name == template else name):
                lines.append(f"  {'  published':40}" + "".join(f"{theirs.get(d, ''):>12}" for d in domains))
    return "\n".join(lines)


def average_report(results):
    """The averages over data sets, as text."""
    few = [r["few_shot"] for r in results.values()]
    lines = [f"{f'average of {len(results)} data sets; shots:':42}" + "".join(f"{n:>8}" for n in (0, *next(iter(few[0].values()))))]
    lines.append(f"  {'zero-shot, declared templates':40}{statistics.mean(r['zero_shot'][r['template']]['test'] for r in results.values()):8.1f}")
    for method in [m for m in METHODS if all(m in row for row in few)]:
        means = [statistics.mean(mean_std(row[method][n])[0] for row in few) for n in few[0][method]]
        lines.append(f"  {method:40}{'':8}" + "".join(f"{mean:8.1f}" for mean in means))
    return "\n".join(lines)


def figure(results, title, path):
    """The paper's figure: test accuracy over shots, zero-shot as a star at 0, a panel a data set and, of several, their average."""
    from matplotlib.figure import Figure
    curves = {name: {m: [mean_std(rows) for rows in row.values()] for m, row in r["few_shot"].items()} for name, r in results.items()}
    stars = {name: r["zero_shot"][r["template"]]["test"] for name, r in results.items()}
    if len(results) > 1:
        shared = [m for m in METHODS if all(m in row for row in curves.values())]
        curves = {"average": {m: [tuple(map(statistics.mean, zip(*points))) for points in zip(*(row[m] for row in curves.values()))]
                              for m in shared}, **curves}
        stars["average"] = statistics.mean(stars.values())
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    fig = Figure((max(5.5, 3.4 * columns), max(4, 2.9 * rows)), layout="constrained")
    fig.suptitle(title)
    for ax, (name, row) in zip(fig.subplots(rows, columns, squeeze=False).flat, curves.items()):
        ax.axhline(stars[name], color="gray", linestyle=":", linewidth=1)
        ax.plot(0, stars[name], "*", color="black", markersize=12, label="zero-shot, declared template")
        for method, points in row.items():
            color, style = dict(zip(METHODS, [("#0072B2", "s--"), ("#D55E00", "o-"), ("#009E73", "^-.")]))[method]
            ax.errorbar(range(1, len(points) + 1), *zip(*points), fmt=style, color=color, capsize=3, label=method)
        shots = list(next(iter(next(iter(results.values()))["few_shot"].values())))
        ax.set(title=name, xlabel="labelled images a class (shots)", ylabel="test accuracy, %", xticks=range(len(shots) + 1), xticklabels=[0, *shots])
        ax.grid(alpha=0.3)
        if name == next(iter(curves)):
            ax.legend(fontsize=8)
    with atomic(path) as file:
        fig.savefig(file, format="png", dpi=100)


def check(name="mini", device=None):
    """Prints what a bug report needs: versions, device, what weights and data sets are found, one step of training."""
    import platform
    import torchvision
    found = [n for n in clip.available_models() if weights_file(n).is_file()]
    datasets = sorted({p.parent.name for place in (SHARED, DATA) for p in place.glob("*/dataset.json")})
    model, preprocess = load_clip(name, device)
    start = time.perf_counter()
    features = encode_images(model, preprocess, [Image.new("RGB", (64, 64), "white")], progress=False)
    spread = zero_shot_weights(model, ["cat", "dog"], "a photo of a {}.").std().item()
    learned = CoOp(model, ["cat", "dog"], 4).fit(features.expand(2, -1), [0, 1], epochs=1, progress=False).ctx
    for what, value in {
            "python": f"{platform.python_version()} on {platform.platform()}", "torch": torch.__version__, "torchvision": torchvision.__version__,
            "CLIP's code": "OpenAI's repository" if clip.tokenize("a").dtype == torch.int32 else "the registry's copy",
            "CUDA": torch.cuda.get_device_name() if torch.cuda.is_available() else "none", "MINI_COOP_ROOT": "not set" if SHARED == DATA else SHARED,
            "OpenAI's weights found": ", ".join(found) or f"none ({weights_file('RN50').parent})", "data sets found": ", ".join(datasets),
            f"one step with {name}": f"{'fine' if learned.isfinite().all() and spread > 0 else 'WRONG: ' + str(features)} on "
                                           f"{features.device}, {time.perf_counter() - start:.2f} s"}.items():
        print(f"{what:28} {value}")


def main(argv=None):
    """Zero-shot, linear probe and CoOp, unified and class-specific, on few labels: tables, and under --out a figure, a JSON with
    every figure and setting, and the learned contexts. The same command goes on where it was stopped."""
    parser = argparse.ArgumentParser("mini_coop.py", description=main.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def positive(text):
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
        return int(text)

    add = parser.add_argument
    add("--model", default="mini", help="mini, a name of clip.available_models(), or a checkpoint")
    add("--dataset", nargs="+", default=["actions"], help="folders of data/, or folders of images")
    add("--shots", nargs="+", type=positive, default=[1, 2, 4, 16], help="labelled images a class")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3], help="each draws the images and the first context")
    add("--n-ctx", type=positive, default=16, help="context vectors (M)")
    add("--class-specific", choices=["yes", "no", "both"], default="both", help="one context a class, one for all, or each in turn")
    add("--class-position", choices=["end", "middle", "front"], default="end", help="where the class name stands")
    add("--ctx-init", metavar="WORDS", help="words to start from; they set --n-ctx")
    add("--epochs", type=positive, help="as in the paper, by shots (50 on imagenet), if not given")
    add("--views", type=positive, default=1, help="random crops a training image; 1: the plain image")
    add("--device", help="CUDA where there is one, if not given")
    add("--out", type=Path, default=Path("runs"), help="folder for what is saved")
    add("--check", action="store_true", help="only print versions, device, weights and data sets found, for a bug report")
    args = parser.parse_args(argv)
    try:
        if args.check:
            return check(args.model, args.device)
        datasets, results = [load_dataset(name) for name in args.dataset], {}
        model, preprocess = load_clip(args.model, args.device)
        if len({data.name for data in datasets}) < len(datasets):
            raise ValueError("two data sets of the same name would be saved in one folder: give one of them another name, or run it with another --out")
        device = model.text_projection.device
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"
        published = json.loads((DATA / "published.json").read_text()).get(args.model, {})
        for data in datasets:
            folder, start = run_folder(args.out, args.model, data.name), time.perf_counter()
            folder.mkdir(parents=True, exist_ok=True)
            print(f"\n{data.name}: {len(data.classnames)} classes, {len(data.test.images)} test images; CLIP {args.model} on {where}", flush=True)
            left_out = {"yes": "CoOp unified", "no": "CoOp class-specific", "both": ""}[args.class_specific]
            methods = [m for m in METHODS if m != left_out and (data.val.images or m != "linear probe")]  # the probe wants a val split
            if not data.val.images:
                print("no validation images: the linear probe, which chooses its C on them, is left out")
            result = experiment(model, preprocess, data, folder, args.shots, args.seeds, methods, args.n_ctx, args.class_position,
                                args.ctx_init, args.epochs or (50 if data.name == "imagenet" else None), args.views)
            settings = {**vars(args), "dataset": data.name, "out": str(args.out), "device": where, "torch": torch.__version__}
            result = {"settings": settings, "seconds": round(time.perf_counter() - start, 1), "template": data.template, **result}
            results[data.name] = result
            with atomic(folder / "results.json") as file:
                file.write(json.dumps(result, indent=1).encode())
            figure({data.name: result}, f"CLIP {args.model}", folder / "figure.png")
            print(f"\n{report(result, published.get(data.name))}\n\n{result['seconds']:.0f} s. Saved in {folder}: results.json, figure.png and the contexts")
        if len(results) > 1:
            path = run_folder(args.out, args.model, "figure.png")
            figure(results, f"CLIP {args.model}", path)
            print(f"\n{average_report(results)}\n\nThe figure of all data sets: {path}")
    except (ValueError, OSError, RuntimeError, zipfile.BadZipFile) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted; what was finished is kept under {args.out}, and the same command goes on from there\n")


if __name__ == "__main__":
    main()
