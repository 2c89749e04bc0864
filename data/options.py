"""The command line of the main job, and the folder in which each setting saves its results."""
import argparse
import tempfile
from pathlib import Path
from urllib.parse import quote

YARDSTICK = (
    "To measure how well prompts can be learned on a CLIP, run --dataset objects things pixels "
    "styles designers actions --shots 1 2 4 8 16, and once more with --epochs 0 --shots 1 --seeds "
    "1 2 3 4 5 --class-specific no for contexts that are random and untrained (with --n-ctx 4, "
    "too). The averages stand in data/README.md beside the paper's.")


def arguments(argv):
    """The command line as a namespace."""
    parser = argparse.ArgumentParser(
        "mini_coop.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Zero-shot, linear probe and CoOp on few labels: prints tables; saves a "
        "figure, a JSON with every figure and setting, and the contexts. Resumes.",
        epilog=YARDSTICK)

    def whole(text, least=1):
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
        return int(text)

    add = parser.add_argument
    add("--model", default="mini", help="mini, a name of clip.available_models(), or a checkpoint")
    add("--dataset", nargs="+", default=["actions"], help="names under data/, or paths of folders")
    add("--shots", nargs="+", type=whole, default=[1, 4, 8], help="labelled images per class")
    add("--seeds", nargs="+", type=lambda text: whole(text, 0), default=[1, 2, 3],
        help="each draws the training images and the first context")
    add("--n-ctx", type=whole, default=16, help="context vectors (M)")
    add("--class-specific", choices=["yes", "no", "both"], default="both",
        help="a context for each class, one for all, or both in turn")
    add("--class-position", choices=["end", "middle", "front"], default="end",
        help="where the class name stands")
    add("--ctx-init", metavar="WORDS",
        help="words to start from; --n-ctx is then their number of tokens")
    add("--epochs", type=lambda text: whole(text, 0),
        help="if not given, the paper's: 50 for 1 shot, 100 for 2 and 4, 200 for more, 50 on "
        "imagenet; 0: contexts as they start")
    add("--views", type=whole, default=1,
        help="random crops kept of a training image; 1: the image as it is")
    add("--device", help="if not given, CUDA where there is one")
    add("--out", type=Path, default=Path("runs"), help="folder for what is saved")
    add("--check", action="store_true",
        help="only print what a bug report needs, after two steps of training")
    args = parser.parse_args(argv)
    if args.ctx_init:
        args.n_ctx = None  # the words set it
    args.shots = sorted(set(args.shots))
    args.seeds = sorted(set(args.seeds))
    return args


def run_folder(out, args, name):
    """Where a run saves: <out>/<model>_<data set>, and every setting that is not the default."""
    model = Path(args.model)
    model = model.stem if model.is_file() else args.model.replace("/", "-").replace("@", "-")
    parts = [model, name]
    parts += [f"M{args.n_ctx}"] if args.n_ctx not in (16, None) else []
    parts += [args.class_position] if args.class_position != "end" else []
    parts += [f"init-{quote(args.ctx_init, safe='')}"] if args.ctx_init else []
    parts += [f"{args.epochs}-epochs"] if args.epochs is not None else []
    parts += [f"{args.views}-views"] if args.views > 1 else []
    return Path(out).expanduser() / "_".join(parts)


def writable_folder(args, data, dataset):
    """The folder for a data set's results, outside of its images, which they would join."""
    folder = run_folder(args.out, args, data.name)
    images = Path(dataset).expanduser()
    if images.is_dir() and images.resolve() in folder.resolve().parents:
        raise ValueError(f"the figure in {folder} would be an image of {dataset} in the next run: "
                         "choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):  # that it cannot be written is said now
        pass
    return folder
