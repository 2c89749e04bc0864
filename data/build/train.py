"""Step 2: pre-trains the mini-CLIP on the drawn icons and their names, and writes it in OpenAI's layout.

    python train.py --minutes 90 [--work work] [--out ../mini_clip.pt]
    python train.py --evaluate ../mini_clip.pt      the figures of the data card: steps, loss, accuracy on held-out sets

The learning rate follows the time spent, so that a run ends when you say, on any machine. A checkpoint is kept every five
minutes and taken up again by the same command. What is printed is also the training log: work/train.log.
"""
import argparse
import math
import random
import time
from collections import Counter
from pathlib import Path

import clip
import numpy as np
import torch
import torch.nn.functional as F
from clip.model import CLIP, build_model

from icons import COLOURS, HERE, SET_STYLES, SYNONYMS, caption, near_duplicates, picture_hash, read_sets, thumbnails

BATCH, LR, WEIGHT_DECAY, WARM_UP = 512, 1.5e-3, 0.05, 200
THRESHOLD = 0.95  # correlation with a held-out drawing from which a pre-training drawing is left out: chosen by looking at pairs
STYLES = list(SYNONYMS)


def measured_style(gray):
    """(N, 64, 64) uint8 -> style of each drawing read off its pixels: what is left of the ink when strokes are worn away."""
    ink = torch.from_numpy((gray < 128)[:, None].astype(np.float32))
    left = [(-F.max_pool2d(-ink, k, 1, k // 2)).mean((1, 2, 3)) / ink.mean((1, 2, 3)).clamp(min=1e-6) for k in (3, 7)]
    middle = torch.from_numpy(((gray > 70) & (gray < 235))[:, None].astype(np.float32))
    tone = (-F.max_pool2d(-middle, 5, 1, 2)).mean((1, 2, 3)) > 0.02
    return ["two-tone" if t else "thin" if a < 0.12 else "solid" if b > 0.2 else "outline" for a, b, t in zip(*left, tone)]


class Icons:
    """The pre-training drawings (those of held-out sets and their near-duplicates removed) and how to draw batches of them."""

    def __init__(self, work, only=None):
        rows = [r for r in read_sets() if (work / f"drawn/{r['set']}.npz").exists() and (not only or r["set"] in only)]
        load = lambda row: dict(np.load(work / f"drawn/{row['set']}.npz"))  # noqa: E731
        held = np.concatenate([thumbnails(load(r)["pictures"]) for r in rows if r["role"] == "held-out"] or [np.zeros((1, 256), np.float32)])
        self.gray, self.rgb, self.where, self.names, self.others, self.styles, self.weight = [], [], [], [], [], [], []
        hashes, removed = [], 0
        for row in [r for r in rows if r["role"] == "pretrain"]:
            data = load(row)
            pictures = data["pictures"]
            keep = ~near_duplicates(thumbnails(pictures), held, THRESHOLD)
            removed += int((~keep).sum())
            measured = measured_style(pictures if pictures.ndim == 3 else pictures.mean(-1))
            for i in np.flatnonzero(keep):
                picture, set_style = pictures[i], SET_STYLES.get(row["set"])
                styles = ["colour"] if data["colour"][i] else [str(data["styles"][i]) or measured[i]]
                styles += ["thin"] if styles == ["outline"] and measured[i] == "thin" else []
                styles += [set_style] if set_style and set_style not in styles else []
                store = self.rgb if picture.ndim == 3 else self.gray
                self.where.append((picture.ndim == 3, len(store)))
                store.append(picture)
                self.names.append(str(data["names"][i]))
                self.others.append([w.replace("-", " ") for w in str(data["others"][i]).split("|") if w])
                self.styles.append(styles)
                self.weight.append(2.0 if data["colour"][i] else 0.5 if row["set"] in ("material-symbols", "material-symbols-light", "ic") else 1.0)
                hashes.append(picture_hash(picture))
        self.gray, self.rgb = np.array(self.gray), np.array(self.rgb).reshape(-1, 64, 64, 3)
        self.weight = np.cumsum(self.weight) / np.sum(self.weight)
        self.ids = {name: i for i, name in enumerate(sorted(set(self.names)))}
        self.hashes = np.unique(np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 5), axis=0)
        print(f"{len(self.names)} pre-training drawings of {len(self.ids)} names; {removed} near-duplicates of held-out ones left out", flush=True)

    def batch(self, rng, size):
        """-> images (B, 3, 64, 64) in [0, 1], captions (B,), true (B, B) bool: caption j is true of image i."""
        picks = np.searchsorted(self.weight, [rng.random() for _ in range(size)])
        images, captions, facts = np.empty((size, 64, 64, 3), np.float32), [], []
        for row, i in enumerate(picks):
            in_rgb, at = self.where[i]
            images[row] = self.rgb[at] / 255 if in_rgb else (self.gray[at] / 255)[..., None]
            colour = rng.choice(list(COLOURS)) if not in_rgb and rng.random() < 0.25 else ""
            if colour:
                images[row] = 1 - (1 - images[row]) * (1 - np.array(COLOURS[colour], np.float32) / 255)
            said = rng.choice(self.others[i]) if self.others[i] and rng.random() < 0.3 else self.names[i]
            mention = colour if rng.random() < 0.5 else ""
            text = caption(rng, said, self.styles[i], mention)
            captions.append(text)
            told = {s for s in self.styles[i] if any(w in text for w in SYNONYMS[s])} | ({mention} - {""})
            facts.append((self.ids[self.names[i]], set(self.styles[i]) | ({colour} - {""}), told, said in text))
        names = torch.tensor([f[0] for f in facts])
        same = names[:, None] == names[None]
        true = torch.eye(size, dtype=torch.bool)
        for i, j in same.nonzero().tolist() + [(i, j) for j, f in enumerate(facts) if not f[3] for i in range(size)]:
            true[i, j] |= facts[j][2] <= facts[i][1]
        return torch.from_numpy(images).permute(0, 3, 1, 2), captions, true


MEAN, STD = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])


def augment(images):
    """Rotation up to 8.6 degrees, scale 0.75 to 1.2, shift up to 11 %, on white, then CLIP's mean and std; (B, 3, 64, 64)."""
    n = len(images)
    angle, scale = (torch.rand(n) - 0.5) * 0.3, 1 / (0.75 + 0.45 * torch.rand(n))
    theta = torch.stack([scale * angle.cos(), -scale * angle.sin(), (torch.rand(n) - 0.5) * 0.44,
                         scale * angle.sin(), scale * angle.cos(), (torch.rand(n) - 0.5) * 0.44], 1).view(n, 2, 3)
    grid = F.affine_grid(theta, images.shape, align_corners=False).to(images.device)
    images = 1 - F.grid_sample(1 - images, grid, align_corners=False)
    return normalise(images)


def normalise(images):
    return (images - MEAN.to(images.device).view(3, 1, 1)) / STD.to(images.device).view(3, 1, 1)


class Tokenizer:
    """clip.tokenize, a word at a time from a table: the same tokens, without cleaning every word anew."""

    def __init__(self):
        self.encode, self.words = clip.simple_tokenizer.SimpleTokenizer().encode, {}

    def __call__(self, texts):
        rows = []
        for text in texts:
            ids = [49406]
            for word in text.split():
                if word not in self.words:
                    self.words[word] = self.encode(word)
                ids += self.words[word]
            rows.append(torch.tensor(ids[:76] + [49407]))
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def encode_text(model, tokens):
    """CLIP's encode_text on rows (B, 77 or fewer): nothing after a chunk's longest EOT is computed (B, E)."""
    lengths, out = tokens.argmax(1) + 1, [None] * len(tokens)
    order = lengths.argsort()
    for part in order.chunk(4):
        x = tokens[part, : lengths[part].max()]
        h = model.token_embedding(x) + model.positional_embedding[: x.shape[1]]
        h = h.permute(1, 0, 2)
        for block in model.transformer.resblocks:
            mask = model.build_attention_mask()[: len(h), : len(h)].to(h)
            y = block.ln_1(h)
            h = h + block.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
            h = h + block.mlp(block.ln_2(h))
        h = model.ln_final(h.permute(1, 0, 2)).float()
        for row, feature in zip(part.tolist(), h[torch.arange(len(part)), lengths[part] - 1] @ model.text_projection):
            out[row] = feature
    return torch.stack(out)


def contrastive_loss(model, images, captions, true, tokenizer, device):
    """CLIP's symmetric loss on one augmented batch; a caption that is true of another image too is no negative for it."""
    images = augment(images.to(device)).contiguous(memory_format=torch.channels_last)
    with torch.autocast(device, torch.bfloat16):
        image = model.visual(images).float()
        text = encode_text(model, tokenizer(captions).to(device)).float()
    logits = model.logit_scale.exp() * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T  # (B, B)
    logits = logits.masked_fill((true & ~torch.eye(len(true), dtype=torch.bool)).to(device), -1e4)
    target = torch.arange(len(true), device=device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@torch.no_grad()
def held_out_accuracy(model, work, tokenizer, device, names=1000, each=3):
    """Top-1 among the most frequent names of the held-out sets, `each` drawings a name: the log's yardstick, nothing is chosen by it."""
    pictures, labels = [], []
    for row in [r for r in read_sets() if r["role"] == "held-out" and (work / f"drawn/{r['set']}.npz").exists()]:
        data = dict(np.load(work / f"drawn/{row['set']}.npz"))
        labels += data["names"].tolist()
        pictures += [p if p.ndim == 3 else np.repeat(p[..., None], 3, -1) for p in data["pictures"]]
    classes = [name for name, _ in Counter(labels).most_common(names)]
    rng, by_name = random.Random(0), {}
    for i, label in enumerate(labels):
        by_name.setdefault(label, []).append(i)
    picks = [(i, k) for k, name in enumerate(classes) for i in rng.sample(by_name[name], min(each, len(by_name[name])))]
    model.eval()
    text = F.normalize(encode_text(model, tokenizer(classes).to(device)), dim=1)
    right = 0
    for part in [picks[i : i + 500] for i in range(0, len(picks), 500)]:
        x = torch.from_numpy(np.stack([pictures[i] for i, _ in part])).to(device).permute(0, 3, 1, 2) / 255
        right += ((F.normalize(model.visual(normalise(x)), dim=1) @ text.T).argmax(1).cpu() == torch.tensor([k for _, k in part])).sum().item()
    model.train()
    return 100 * right / len(picks)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    todo = parser.add_mutually_exclusive_group(required=True)
    todo.add_argument("--minutes", type=float)
    todo.add_argument("--evaluate", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--work", type=Path, default=HERE / "work")
    parser.add_argument("--out", type=Path, default=HERE.parent / "mini_clip.pt")
    parser.add_argument("--only", nargs="+", metavar="SET", help="a small run: these sets alone")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    icons, tokenizer = Icons(args.work, args.only), Tokenizer()
    if args.evaluate:
        state = torch.load(args.evaluate, map_location=device, weights_only=True)
        model, rng = build_model(dict(state)).float().to(device).eval(), random.Random(-1)
        torch.manual_seed(0)
        with torch.no_grad():
            losses = [contrastive_loss(model, *icons.batch(rng, BATCH), tokenizer, device).item() for _ in range(20)]
        print(f"{state['visual.bn1.num_batches_tracked']} steps of {BATCH}; loss on 20 augmented pre-training batches {np.mean(losses):.3f}; "
              f"top-1 of 1000 names on held-out sets {held_out_accuracy(model, args.work, tokenizer, device):.1f} %")
        return
    torch.manual_seed(0)
    model = CLIP(256, 64, (1, 1, 1, 1), 32, None, 77, 49408, 128, 2, 4).to(device, memory_format=torch.channels_last).train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": WEIGHT_DECAY},
                                   {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}], lr=LR, betas=(0.9, 0.98))
    checkpoint, step, spent = args.work / "checkpoint.pt", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    rng, losses, saved, budget = random.Random(step), [], spent, 60 * args.minutes
    while spent < budget:
        start = time.perf_counter()
        lr = LR * min(1, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * spent / budget))
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = contrastive_loss(model, *icons.batch(rng, BATCH), tokenizer, device)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=np.log(100))
        losses.append(loss.item())
        step, spent = step + 1, spent + time.perf_counter() - start
        if step % 50 == 0:
            print(f"{spent / 60:6.1f} min  step {step}  samples {step * BATCH}  loss {np.mean(losses[-50:]):.3f}  scale {model.logit_scale.exp():.1f}  lr {lr:.2e}", flush=True)
        if spent - saved > 300:
            saved = spent
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "spent": spent}, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
            print(f"{spent / 60:6.1f} min  held-out top-1 of 1000 names: {held_out_accuracy(model, args.work, tokenizer, device):.1f} %", flush=True)
    print(f"{spent / 60:6.1f} min  step {step}  samples {step * BATCH}  held-out top-1 of 1000 names: {held_out_accuracy(model, args.work, tokenizer, device):.1f} %")
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.float().cpu().state_dict().items()}
    build_model(dict(state))  # refuses what OpenAI's code could not read
    torch.save(state, args.out.with_suffix(".tmp"))
    args.out.with_suffix(".tmp").replace(args.out)
    if not args.only:
        np.save(HERE / "pretraining_hashes.npy", icons.hashes)


if __name__ == "__main__":
    main()
