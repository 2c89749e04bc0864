"""Step 1: draws the held-out sets of sets.tsv at 64 x 64 pixels, into one .npz file per set.

    python render.py [--work work]

The sets come from the npm registry: Node.js with npm is needed. Sets that are already drawn are
skipped, so the same command resumes after an interruption.
"""
import argparse
import json
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from icons import HERE, read_sets, select

MARGIN = 0.03  # of the icon's size, on every side
RENDERER = "@resvg/resvg-js@2.6.2"


def fetch(work, sets):
    """npm packages at their pinned versions, without running install scripts."""
    packages = [f"@iconify-json/{s['set']}@{s['version']}" for s in sets] + [RENDERER]
    names = [package.rpartition("@")[0] for package in packages]
    if all((work / "node_modules" / name).is_dir() for name in names):
        return
    work.mkdir(parents=True, exist_ok=True)
    # all at once: npm removes what it is not told of
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--no-save",
               "--prefix", ".", *packages]
    subprocess.run(command, cwd=work, check=True, stdout=subprocess.DEVNULL)


def load_set(work, prefix):
    """icons.json -> (icons {name: svg body and box}, brand names)."""
    folder = work / f"node_modules/@iconify-json/{prefix}"
    data = json.loads((folder / "icons.json").read_text())
    meta = json.loads((folder / "metadata.json").read_text())
    # an icon's own box goes before the set's
    box = {"left": 0, "top": 0, "width": data.get("width", 16), "height": data.get("height", 16)}
    icons = {k: {**box, **v} for k, v in data["icons"].items() if not v.get("hidden")}
    brands = set()
    for title, names in meta.get("categories", {}).items():
        if any(word in title.lower() for word in ("brand", "logo", "social")):
            brands.update(names)
    return icons, brands


def svg(icon):
    """One icon's SVG document, black where it has no colour, in a square box with our margin."""
    side = max(icon["width"], icon["height"]) * (1 + 2 * MARGIN)
    left = icon["left"] - (side - icon["width"]) / 2
    top = icon["top"] - (side - icon["height"]) / 2
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="64" height="64" viewBox="{left} {top} {side} {side}" color="#000">'
        f'{icon["body"]}</svg>'
    )


def draw(work, documents):
    """SVG documents -> (N, 64, 64, 3) uint8; one that cannot be drawn comes back all zero."""
    pictures = np.zeros((len(documents), 64, 64, 3), np.uint8)
    command = ["node", str(HERE / "render.mjs")]
    done = 0
    while done < len(documents):
        with tempfile.TemporaryFile("w+") as lines:
            for document in documents[done:]:
                lines.write(json.dumps({"svg": document, "background": "#fff"}) + "\n")
            lines.seek(0)
            out = subprocess.run(command, cwd=work, stdin=lines, capture_output=True).stdout
        # whole pictures only: the renderer may have stopped within one
        whole = len(out) // 16384 * 16384
        drawn = np.frombuffer(out, np.uint8)[:whole].reshape(-1, 64, 64, 4)
        not_blank = drawn.max((1, 2, 3), keepdims=True) > 0
        pictures[done : done + len(drawn)] = drawn[..., :3] * not_blank
        done += len(drawn) + 1  # the one that stopped the renderer stays zero
    return pictures


def render_set(work, row):
    """Draws a set of sets.tsv -> work/drawn/<set>.npz with pictures, colour, icons, names, styles.
    The pictures are gray where the whole set is black and white."""
    prefix = row["set"]
    target = work / f"drawn/{prefix}.npz"
    if target.exists():
        return
    icons, brands = load_set(work, prefix)
    rows = select(list(icons), brands, row["style"] == "emoji")
    pictures = draw(work, [svg(icons[icon]) for icon, _, _ in rows])
    # leave out blank drawings (a failed one is all zero) and full squares
    ink = (pictures < 200).any(-1).mean((1, 2))
    keep = (ink > 0.004) & (ink < 0.97)
    rows = [row for row, kept in zip(rows, keep) if kept]
    pictures = pictures[keep]
    # coloured: more than 0.4 % of the pixels differ between their channels
    spread = pictures.max(-1).astype(int) - pictures.min(-1)
    colour = (spread > 40).mean((1, 2)) > 0.004
    if not colour.any():
        pictures = pictures[..., 0]
    drawn, names, styles = [np.array(column, dtype=str) for column in zip(*rows)]
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as file:
        np.savez(file, pictures=pictures, colour=colour, icons=drawn, names=names, styles=styles)
    Path(file.name).replace(target)
    print(f"{prefix}: {len(rows)} icons, {int(colour.sum())} in colour, "
          f"{int((~keep).sum())} left out as blank or full", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE / "work")
    args = parser.parse_args()
    sets = [row for row in read_sets() if row["role"] == "held-out"]
    fetch(args.work, sets)
    (args.work / "drawn").mkdir(exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(partial(render_set, args.work), sets))


if __name__ == "__main__":
    main()
