"""The main job, `python mini_coop.py`: zero-shot, linear probe and CoOp over shots and seeds.

A cell of the grid (a method, a number of shots, a seed) that is finished is kept and not run again,
so the same command resumes after an interruption.
"""
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

import check
import mini_coop
from features import cached_features, result_key
from mini_coop import CoOp, few_shot, linear_probe, whole_file, zero_shot_weights
from options import arguments, run_folder, writable_folder
from report import METHODS, TEMPLATES, average_table, figure, save

# ---------------------------------------------------------------- one data set's grid

class Cell(NamedTuple):
    method: str
    shots: int
    seed: int

    def path(self, folder, suffix):
        method = self.method.replace(" ", "_")
        return folder / f"{method}_{self.shots}_shots_seed_{self.seed}{suffix}"


class Grid:
    """One data set: which cells are finished, their features, and running them."""

    def __init__(self, model, preprocess, data, folder, args):
        if not data.train.images or not data.test.images:
            part = "test" if data.train.images else "training"
            raise ValueError(f"{data.name} has no {part} images: the comparison needs both "
                             "(without folders train/ and test/, a class needs 4 images or more)")
        self.model = model
        self.preprocess = preprocess
        self.data = data
        self.folder = folder
        self.args = args
        papers = 50 if data.name == "imagenet" else None  # None: by shots
        self.epochs = papers if args.epochs is None else args.epochs
        self.left_out = set()  # images that cannot be read
        self.tests = {"test": data.test, **data.domains}
        methods = {"yes": METHODS[::2], "no": METHODS[:2], "both": METHODS}[args.class_specific]
        self.methods = [m for m in methods if data.val.images or m != "linear probe"]
        self.picks = {}  # (shots, seed) -> indices of training and of validation images
        self.cells = []
        for n in args.shots:
            for seed in args.seeds:
                self.picks[n, seed] = few_shot(data.train.labels, n, seed, data.val.labels)
                self.cells += [Cell(method, n, seed) for method in self.methods]
        options = args.n_ctx, args.class_position, args.ctx_init, self.epochs, args.views
        self.key = result_key(model, preprocess, data, options)

    def finished(self, cell):
        """A finished cell's accuracies {split: %}, or None."""
        try:
            kept = json.loads(cell.path(self.folder, ".json").read_text())
            if kept["key"] != self.key or kept["context"] != self.context_hash(cell):
                return None
            self.left_out |= set(kept["left_out"])
            return kept["accuracy"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def context_hash(self, cell):
        """SHA-256 of a cell's saved context; the probe saves none."""
        file = cell.path(self.folder, ".pt")
        return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None

    def keep(self, cell, accuracy, coop=None):
        cell.path(self.folder, ".json").unlink(missing_ok=True)  # no old result, new context
        if coop is not None:
            coop.save(cell.path(self.folder, ".pt"))
        with whole_file(cell.path(self.folder, ".json")) as file:
            kept = {"key": self.key, "context": self.context_hash(cell), "accuracy": accuracy,
                    "left_out": sorted(self.left_out)}
            file.write(json.dumps(kept).encode())
        return accuracy

    def encode(self, split, indices, views=1):
        """{index: features} of those images that can be read; kept in <folder>/features."""
        if not len(indices):
            return {}
        images = [split.images[i] for i in indices]
        cache = self.folder / "features"
        features = cached_features(cache, self.model, self.preprocess, images, views)
        found = {i: x for i, x in zip(indices, features) if x.isfinite().all()}
        self.left_out |= {str(split.images[i]) for i in indices if i not in found}
        return found

    def gather(self, split, features, indices):
        """-> features (n, ...) and labels (n,) of those of the images that can be read."""
        indices = [i for i in indices if i in features]
        if not indices:
            raise ValueError(f"{self.data.name}: a split, or a draw of it, has no readable image")
        labels = torch.tensor([split.labels[i] for i in indices])
        return torch.stack([features[i] for i in indices]), labels

    def accuracies(self, scores):
        """{split: %} of scores: features (N, E) -> (N, K). A domain of less than half of the
        classes is a task of those (ImageNet-A and -R)."""
        K = len(self.data.classnames)
        result = {}
        for name, (x, y) in self.test_features.items():
            few = name != "test" and 1 < len(y.unique()) < K / 2
            classes = y.unique() if few else torch.arange(K)
            predicted = classes[scores(x).cpu()[:, classes].argmax(1)]
            result[name] = 100 * (predicted == y).double().mean().item()
        return result

    def prepare(self, todo):
        """Prints how much there is to do, and encodes the images for it."""
        steps = 0
        train = set()
        val = set()
        for cell in self.cells if todo else []:  # all: the same after an interruption
            picks = self.picks[cell[1:]]
            train |= set(picks[0])
            val |= set(picks[1])
            if cell in todo and cell.method != "linear probe":
                steps += self.n_epochs(cell) * max(1, len(picks[0]) // 32)
        n_images = len(train) + len(val) + sum(len(split.images) for split in self.tests.values())
        if other := sum(cell.path(self.folder, ".json").exists() for cell in todo):
            print(f"{other} saved cells are damaged or of another model, data or device: run again")
        for method in {cell.method for cell in todo} - {"linear probe"}:
            self.new_coop(Cell(method, 1, 0))  # names and options that do not fit are said now
        print(f"plan: {len(todo)} of {len(self.cells)} cells are to be run, {steps:,} training "
              f"steps, {n_images:,} images", flush=True)
        self.train = self.encode(self.data.train, sorted(train))
        self.val = self.encode(self.data.val, sorted(val))
        self.views = self.encode(self.data.train, sorted(train), self.args.views)
        self.test_features = {}
        for name, split in self.tests.items():
            everything = range(len(split.images))
            encoded = self.encode(split, everything)
            self.test_features[name] = self.gather(split, encoded, everything)

    def n_epochs(self, cell):
        return mini_coop.n_epochs(cell.shots) if self.epochs is None else self.epochs

    def run(self, cell):
        train, val = self.picks[cell[1:]]
        if cell.method == "linear probe":
            probe = linear_probe(*self.gather(self.data.train, self.train, train),
                                 *self.gather(self.data.val, self.val, val))
            seen = torch.from_numpy(probe.classes_)  # it may be some of the classes only
            columns = F.one_hot(seen, len(self.data.classnames)).double()

            def scores(x):
                return torch.from_numpy(probe.predict_proba(x.cpu().numpy())).double() @ columns
            return self.keep(cell, self.accuracies(scores))
        coop = self.new_coop(cell)
        features = self.gather(self.data.train, self.views, train)
        coop.fit(*features, self.n_epochs(cell), progress=False)
        if coop.interrupted_:
            raise KeyboardInterrupt  # a half-learned context is no result
        return self.keep(cell, self.accuracies(coop.predict_proba), coop)

    def new_coop(self, cell):
        args = self.args
        return CoOp(self.model, self.data.classnames, args.n_ctx, cell.method.endswith("specific"),
                    args.class_position, args.ctx_init, cell.seed)

    def zero_shot(self):
        """{template: {split: %}} of the declared template, the others and their ensemble."""
        templates = list(dict.fromkeys([self.data.template, *TEMPLATES]))
        result = {}
        for name, template in [*zip(templates, templates), ("ensemble of these", templates)]:
            weights = zero_shot_weights(self.model, self.data.classnames, template)
            result[name] = self.accuracies(lambda x: x @ weights.T)
        return result

    def results(self):
        """Runs what is not finished; returns what results.json holds, accuracies in %."""
        done = {cell: self.finished(cell) for cell in self.cells}
        todo = [cell for cell in self.cells if done[cell] is None]
        self.prepare(todo)
        zero_shot = self.zero_shot()
        bar = tqdm(todo, desc=self.data.name, disable=not todo)
        for cell in bar:
            bar.set_postfix_str(f"{cell.method}, {cell.shots} shots, seed {cell.seed}")
            done[cell] = self.run(cell)
        few = {method: {} for method in self.methods}
        for cell in self.cells:
            few[cell.method].setdefault(str(cell.shots), []).append(done[cell])
        return {"template": self.data.template, "zero_shot": zero_shot, "few_shot": few,
                "images_left_out": sorted(self.left_out)}


# ---------------------------------------------------------------- the command

def one(model, preprocess, data, folder, args):
    """Runs one data set's grid; prints its tables, saves results.json and figure.png."""
    start = time.perf_counter()
    where = check.hardware(model.text_projection.device)
    print(f"\n{data.name}: {len(data.classnames)} classes, {len(data.test.images)} test images; "
          f"CLIP {args.model} on {where}", flush=True)
    if not data.val.images:
        print("no validation images: the linear probe, which chooses its C on them, is left out "
              "(for ImageNet the paper takes the C of Caltech101)")
    result = Grid(model, preprocess, data, folder, args).results()
    settings = {**vars(args), "dataset": data.name, "out": str(args.out), "device": where,
                "torch": torch.__version__}
    result = {"settings": settings, "seconds": round(time.perf_counter() - start, 1), **result}
    save(result, data.name, folder)
    return result


def main(argv=None):
    args = arguments(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without ±
    try:
        if args.check:
            sys.exit(0 if check.main(args.model, args.device) else 1)
        datasets = [mini_coop.load_dataset(name) for name in args.dataset]
        if len({data.name for data in datasets}) < len(datasets):
            raise ValueError("two data sets of the same name would be saved in one folder: rename "
                             "one, or run it with another --out")
        folders = [writable_folder(args, *pair) for pair in zip(datasets, args.dataset)]
        model, preprocess = mini_coop.load_clip(args.model, args.device)
        results = {}
        for data, folder in zip(datasets, folders):
            results[data.name] = one(model, preprocess, data, folder, args)
        if len(results) > 1:
            path = Path(f"{run_folder(args.out, args, '+'.join(results)[:150])}.png")
            figure(results, f"CLIP {args.model}", path)
            print(f"\n{average_table(results)}\n\nThe figure of all data sets: {path}")
    except (ValueError, OSError, RuntimeError) as error:
        print(f"mini_coop.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"mini_coop.py: interrupted; what was finished is kept under {args.out}, and the "
              "same command resumes from there", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
