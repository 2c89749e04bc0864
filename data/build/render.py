"""Step 1: the icon sets of sets.tsv, from the npm registry, drawn at 64 x 64 pixels into one .npz a set.

    python render.py [--work work] [--only SET ...]

Needs Node.js with npm. Sets that are already drawn are skipped, so an interrupted run goes on where it stopped.
"""

import argparse
import json
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from icons import HERE, read_sets, select

MARGIN = 0.03  # of the icon's size, on every side


def fetch(work, sets):
    """npm packages of the sets at their pinned versions, and the renderer; no install scripts are run."""
    missing = [s for s in sets if not (work / f"node_modules/@iconify-json/{s['set']}").is_dir()]
    if missing or not (work / "node_modules/@resvg/resvg-js").is_dir():
        work.mkdir(parents=True, exist_ok=True)
        packages = [f"@iconify-json/{s['set']}@{s['version']}" for s in missing] + [
            "@resvg/resvg-js@2.6.2"
        ]
        subprocess.run(
            [
                "npm",
                "install",
                "--no-audit",
                "--no-fund",
                "--ignore-scripts",
                "--no-save",
                "--prefix",
                ".",
                *packages,
            ],
            cwd=work,
            check=True,
            stdout=subprocess.DEVNULL,
        )


def load_set(work, prefix):
    """icons.json -> (icons {name: svg body and box}, brand names, {icon: [other names]})."""
    folder = work / f"node_modules/@iconify-json/{prefix}"
    data, meta = (
        json.loads((folder / "icons.json").read_text()),
        json.loads((folder / "metadata.json").read_text()),
    )
    icons = {
        k: {
            "left": 0,
            "top": 0,
            "width": data.get("width", 16),
            "height": data.get("height", 16),
            **v,
        }
        for k, v in data["icons"].items()
        if not v.get("hidden")
    }
    brands = {
        icon
        for title, names in meta.get("categories", {}).items()
        if any(w in title.lower() for w in ("brand", "logo", "social"))
        for icon in names
    }
    others = {}
    for alias, value in data.get("aliases", {}).items():
        if not {"hFlip", "vFlip", "rotate", "hidden"} & value.keys():
            others.setdefault(value["parent"], []).append(alias)
    return icons, brands, others


def svg(icon, color="#000"):
    """One icon's SVG document in a square box with our margin; `color` is what currentColor means."""
    side = max(icon["width"], icon["height"]) * (1 + 2 * MARGIN)
    left = icon["left"] - (side - icon["width"]) / 2
    top = icon["top"] - (side - icon["height"]) / 2
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="64" height="64" '
        f'viewBox="{left} {top} {side} {side}" color="{color}">{icon["body"]}</svg>'
    )


def draw(work, documents, background="#fff"):
    """SVG documents -> (N, 64, 64, 3) uint8; a document that cannot be drawn comes back all zero."""
    pictures, at = np.zeros((len(documents), 64, 64, 3), np.uint8), 0
    while at < len(documents):
        with tempfile.TemporaryFile("w+") as lines:
            for document in documents[at:]:
                lines.write(json.dumps({"svg": document, "background": background}) + "\n")
            lines.seek(0)
            out = subprocess.run(
                ["node", str(HERE / "render.mjs")], cwd=work, stdin=lines, capture_output=True
            ).stdout
        drawn = np.frombuffer(out, np.uint8)[: len(out) // 16384 * 16384].reshape(-1, 64, 64, 4)
        pictures[at : at + len(drawn)] = drawn[..., :3] * (drawn.max((1, 2, 3), keepdims=True) > 0)
        at += len(drawn) + 1  # the one that aborted the renderer stays zero
    return pictures


def render_set(work, prefix):
    """Draws one set -> work/drawn/<set>.npz with pictures (gray where the set is black and white), icons, names, styles, others."""
    target = work / f"drawn/{prefix}.npz"
    if target.exists():
        return
    icons, brands, others = load_set(work, prefix)
    rows = select(prefix, list(icons), brands)
    pictures = draw(work, [svg(icons[icon]) for icon, _, _ in rows])
    ink = (pictures < 200).any(-1).mean((1, 2))
    keep = (ink > 0.004) & (ink < 0.97)  # neither blank (or failed: all zero) nor a full square
    rows, pictures = [r for r, k in zip(rows, keep) if k], pictures[keep]
    colour = (pictures.max(-1).astype(int) - pictures.min(-1) > 40).mean((1, 2)) > 0.004
    if not colour.any():
        pictures = pictures[..., 0]
    names = [np.array(column, dtype=str) for column in zip(*rows)]
    other = np.array(["|".join(others.get(icon, [])) for icon, _, _ in rows])
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as file:
        np.savez(
            file,
            pictures=pictures,
            colour=colour,
            icons=names[0],
            names=names[1],
            styles=names[2],
            others=other,
        )
    Path(file.name).replace(target)
    print(
        f"{prefix}: {len(rows)} icons, {int(colour.sum())} in colour, {int((~keep).sum())} left out as blank or full",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=HERE / "work")
    parser.add_argument("--only", nargs="+", metavar="SET")
    args = parser.parse_args()
    sets = [s for s in read_sets() if not args.only or s["set"] in args.only]
    fetch(args.work, sets)
    (args.work / "drawn").mkdir(exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda s: render_set(args.work, s["set"]), sets))


if __name__ == "__main__":
    main()
