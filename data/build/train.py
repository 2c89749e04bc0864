"""Step 2: pre-trains the mini-CLIP on the drawn icons and their names; writes OpenAI's layout.

    python train.py --minutes 90 [--work work] [--out work/mini_clip.pt]
    python train.py --minutes 90 --start ../mini_clip.pt    starts from given weights
    python train.py --evaluate ../mini_clip.pt    loss and accuracy of a checkpoint

The learning rate follows the time spent, so a run ends when you say, on any machine. A checkpoint
is saved every five minutes, and the same command resumes from it. What is printed is also written
to train.log in the folder of work.
"""
import argparse
import hashlib
import json
import math
import random
import sys
import time
from collections import Counter
from pathlib import Path

import clip
import numpy as np
import torch
import torch.nn.functional as F
from clip.model import CLIP, build_model

from captions import COLOURS, FILLER, caption, noise, read_tags, true_of
from icons import HERE, SET_STYLES, near_duplicates, picture_hash, read_sets, thumbnails
from mini_coop import EOT, SOS

BATCH = 512
LR = 1e-3
WEIGHT_DECAY = 0.05
WARM_UP = 50  # steps
EMA = 0.998  # decay per step of the average of the weights, which is what ships
# A pre-training drawing that correlates more than this with a held-out one is left out; chosen by
# looking at pairs.
THRESHOLD = 0.95
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def new_model():
    """A CLIP small enough for a CPU: embedding 256, ResNet (1, 1, 1, 1) of width 32 on 64 pixels,
    text transformer of width 128 with 2 heads and 4 layers; random weights."""
    return CLIP(256, 64, (1, 1, 1, 1), 32, None, 77, 49408, 128, 2, 4)


# ---------------------------------------------------------------- the drawings

def measured_style(gray):
    """(N, 64, 64) uint8 -> style of each drawing, read off its pixels: what is left of the ink when
    strokes are worn away."""
    ink = torch.from_numpy((gray < 128)[:, None].astype(np.float32))
    middle = torch.from_numpy(((gray > 70) & (gray < 235))[:, None].astype(np.float32))

    def worn(x, k):
        return (-F.max_pool2d(-x, k, 1, k // 2)).mean((1, 2, 3))

    amount = ink.mean((1, 2, 3)).clamp(min=1e-6)
    after_3 = (worn(ink, 3) / amount).tolist()
    after_7 = (worn(ink, 7) / amount).tolist()
    tone = (worn(middle, 5) > 0.02).tolist()
    styles = []
    for thin, thick, two_tone in zip(after_3, after_7, tone):
        if two_tone:
            styles.append("two-tone")
        elif thin < 0.12:
            styles.append("thin")
        else:
            styles.append("solid" if thick > 0.2 else "outline")
    return styles


def load_drawn(work, role, only=None):
    """The drawn sets of one role -> list of (row of sets.tsv, arrays of its .npz)."""
    sets = []
    for row in read_sets():
        file = work / f"drawn/{row['set']}.npz"
        if row["role"] == role and file.exists() and (not only or row["set"] in only):
            sets.append((row, dict(np.load(file))))
    return sets


class Icons:
    """The pre-training drawings, without near-duplicates of held-out ones, and batches of them."""

    def __init__(self, work, only=None):
        held = [thumbnails(data["pictures"]) for _, data in load_drawn(work, "held-out", only)]
        held = np.concatenate(held or [np.zeros((1, 256), np.float32)])
        self.tags = read_tags(work / "node_modules")
        self.gray = []
        self.rgb = []
        self.where = []  # of each drawing: whether it is in rgb, and at which place
        self.names = []
        self.others = []  # other names of the same drawing, from its set
        self.styles = []
        self.weight = []
        hashes = []
        removed = 0
        for row, data in load_drawn(work, "pretrain", only):
            keep = ~near_duplicates(thumbnails(data["pictures"]), held, THRESHOLD)
            removed += int((~keep).sum())
            self._add(row["set"], data, np.flatnonzero(keep))
            hashes += [picture_hash(data["pictures"][i]) for i in np.flatnonzero(keep)]
        self.gray = np.array(self.gray)
        self.rgb = np.array(self.rgb).reshape(-1, 64, 64, 3)
        self.weight = np.cumsum(self.weight) / np.sum(self.weight)
        self.hashes = np.unique(np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 5), axis=0)
        print(f"{len(self.names)} pre-training drawings of {len(set(self.names))} names; "
              f"{removed} near-duplicates of held-out ones left out", flush=True)

    def _add(self, prefix, data, indices):
        """Takes the drawings at `indices` of one set."""
        pictures = data["pictures"]
        measured = measured_style(pictures if pictures.ndim == 3 else pictures.mean(-1))
        many = prefix in ("material-symbols", "material-symbols-light", "ic")  # much alike
        for i in indices:
            in_colour = bool(data["colour"][i])
            styles = ["colour"] if in_colour else [str(data["styles"][i]) or measured[i]]
            if styles == ["outline"] and measured[i] == "thin":
                styles.append("thin")
            if SET_STYLES.get(prefix) and SET_STYLES[prefix] not in styles:
                styles.append(SET_STYLES[prefix])
            store = self.rgb if pictures.ndim == 4 else self.gray
            self.where.append((pictures.ndim == 4, len(store)))
            store.append(pictures[i])
            self.names.append(str(data["names"][i]))
            others = str(data["others"][i]).split("|")
            self.others.append([word.replace("-", " ") for word in others if word])
            self.styles.append(styles)
            self.weight.append(2.0 if in_colour else 0.5 if many else 1.0)

    def batch(self, rng, size):
        """-> images (B, 3, 64, 64) in [0, 1], captions (B,), true (B, B) bool: true[i, j] where
        caption j is true of image i."""
        picks = np.searchsorted(self.weight, [rng.random() for _ in range(size)])
        images = np.empty((size, 64, 64, 3), np.float32)
        captions = []
        told = []
        known = []
        for row, i in enumerate(picks):
            images[row], colour, inverted = self._picture(rng, i)
            tags = self.tags.get(self.names[i], [])
            said = self.names[i]
            if self.others[i] and rng.random() < 0.2:
                said = rng.choice(self.others[i])
            if tags and rng.random() < 0.2:
                said = rng.choice(tags)
            mention = colour if rng.random() < 0.5 else ""
            text, claims = caption(rng, said, self.styles[i], mention,
                                   inverted and rng.random() < 0.6)
            captions.append(text)
            told.append(claims)
            facts = {f"name {word}" for word in (self.names[i], *self.others[i], *tags)}
            facts |= {f"style {style}" for style in self.styles[i]}
            facts |= {f"colour {colour}"} if colour else set()
            facts |= {"inverted"} if inverted else set()
            known.append(facts)
        true = torch.eye(size, dtype=torch.bool)
        image_at, caption_at = zip(*true_of(told, known))
        true[list(image_at), list(caption_at)] = True
        return torch.from_numpy(images).permute(0, 3, 1, 2), captions, true

    def _picture(self, rng, i):
        """Drawing i -> (64, 64, 3) in [0, 1], the colour it was given or "", inverted or not.

        A quarter of the black drawings get a colour, 8 % of all are inverted (dark mode).
        """
        in_rgb, at = self.where[i]
        picture = (self.rgb[at] if in_rgb else self.gray[at][..., None]).astype(np.float32) / 255
        colour = ""
        if not in_rgb and rng.random() < 0.25:
            colour = rng.choice(list(COLOURS))
            picture = 1 - (1 - picture) * (1 - np.array(COLOURS[colour], np.float32) / 255)
        inverted = rng.random() < 0.08
        return 1 - picture if inverted else picture, colour, inverted


def augment(images):
    """Rotates up to 8.6 degrees, scales 0.75 to 1.2, shifts up to 11 %; (B, 3, 64, 64) both.

    What comes in at the edges has the colour of the drawing's own corner. A third of the drawings
    get thicker or thinner lines, by up to a pixel on each side.
    """
    n = len(images)
    thicker = -F.max_pool2d(-images, 3, 1, 1)
    thinner = F.max_pool2d(images, 3, 1, 1)
    share = (torch.rand(n) * (torch.rand(n) < 0.33)).view(n, 1, 1, 1).to(images.device)
    other = torch.where(torch.rand(n, 1, 1, 1).to(images.device) < 0.5, thicker, thinner)
    images = torch.lerp(images, other, share)
    angle = (torch.rand(n) - 0.5) * 0.3
    scale = 1 / (0.75 + 0.45 * torch.rand(n))
    shift = (torch.rand(2, n) - 0.5) * 0.44
    cos = scale * angle.cos()
    sin = scale * angle.sin()
    theta = torch.stack([cos, -sin, shift[0], sin, cos, shift[1]], 1).view(n, 2, 3)
    grid = F.affine_grid(theta, images.shape, align_corners=False).to(images.device)
    background = images[:, :, :1, :1]
    return background + F.grid_sample(images - background, grid, align_corners=False)


def normalise(images):
    """CLIP's mean and standard deviation."""
    return (images - MEAN.to(images.device)) / STD.to(images.device)


# ---------------------------------------------------------------- the model's two sides

class Tokenizer:
    """clip.tokenize, a word at a time from a table: the same tokens, quicker; and the noise."""

    def __init__(self):
        self.encode = clip.simple_tokenizer.SimpleTokenizer().encode
        self.words = {}
        self.filler = sum((self.encode(word) for word in FILLER), [])

    def tokens(self, text):
        ids = []
        for word in text.split():
            if word not in self.words:
                self.words[word] = self.encode(word)
            ids += self.words[word]
        return ids

    def __call__(self, texts, rng=None):
        """Texts -> padded tokens (B, L); with an rng, half of them get noise."""
        rows = []
        for text in texts:
            before, after = noise(rng, self.filler) if rng else ([], [])
            ids = [SOS, *before, *self.tokens(text), *after]
            rows.append(torch.tensor(ids[:76] + [EOT]))
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def encode_text(model, tokens):
    """CLIP's encode_text on rows (B, L), L <= 77 -> (B, E).

    In four parts of like length: nothing after a part's longest EOT is computed."""
    lengths = tokens.argmax(1) + 1
    order = lengths.argsort()
    features = []
    for part in order.chunk(4):
        L = int(lengths[part].max())
        x = model.token_embedding(tokens[part, :L]) + model.positional_embedding[:L]
        x = x.permute(1, 0, 2)  # (L, b, D), as CLIP's attention wants it
        mask = model.build_attention_mask()[:L, :L].to(x)
        for block in model.transformer.resblocks:
            y = block.ln_1(x)
            x = x + block.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
            x = x + block.mlp(block.ln_2(x))
        x = model.ln_final(x.permute(1, 0, 2)).float()
        features.append(x[torch.arange(len(part)), lengths[part] - 1] @ model.text_projection)
    return torch.cat(features)[order.argsort()]


def contrastive_loss(model, batch, tokenizer, rng, device, half):
    """CLIP's symmetric loss on one augmented batch. A caption that is also true of another image
    is no negative for it. half: bfloat16 encoders."""
    images, captions, true = batch
    images = normalise(augment(images.to(device)))
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.autocast(device, torch.bfloat16, enabled=half):
        image = model.visual(images).float()
        text = encode_text(model, tokenizer(captions, rng).to(device)).float()
    scale = model.logit_scale.exp()
    logits = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T  # (B, B)
    other = true & ~torch.eye(len(true), dtype=torch.bool)
    logits = logits.masked_fill(other.to(device), -1e4)
    target = torch.arange(len(true), device=device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


# ---------------------------------------------------------------- the yardstick

class Yardstick:
    """Top-1 accuracy among the most frequent names of the held-out sets.

    Up to three drawings per name, drawn with a fixed seed. role: whose drawings, those of the
    held-out sets, for the log, or of the sets that are trained on ("pretrain").
    """

    def __init__(self, work, role="held-out", names=1000, each=3):
        counts = Counter()
        for _, data in load_drawn(work, "held-out"):
            counts.update(data["names"].tolist())
        self.names = [name for name, _ in counts.most_common(names)]
        by_name = {name: [] for name in self.names}
        for _, data in load_drawn(work, role):
            for name, picture in zip(data["names"].tolist(), data["pictures"]):
                if name in by_name:
                    by_name[name].append(picture)
        rng = random.Random(0)
        pictures = []
        labels = []
        for label, name in enumerate(self.names):
            for picture in rng.sample(by_name[name], min(each, len(by_name[name]))):
                flat = picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, -1)
                pictures.append(flat)
                labels.append(label)
        self.pictures = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
        self.labels = torch.tensor(labels)

    @torch.no_grad()
    def accuracy(self, model, tokenizer, device):
        """In %."""
        model.eval()
        text = F.normalize(encode_text(model, tokenizer(self.names).to(device)), dim=1)
        predicted = []
        for part in self.pictures.split(500):
            image = F.normalize(model.visual(normalise(part.to(device) / 255)), dim=1)
            predicted.append((image @ text.T).argmax(1).cpu())
        model.train()
        return 100 * (torch.cat(predicted) == self.labels).float().mean().item()


# ---------------------------------------------------------------- the run

class Run:
    """Model, average of its weights, optimiser and progress; saved in work/checkpoint.pt."""

    def __init__(self, work, device, start=None):
        torch.manual_seed(0)
        self.device = device
        self.file = work / "checkpoint.pt"
        self.log_file = work / "train.log"
        self.start = hashlib.sha256(start.read_bytes()).hexdigest() if start else None
        self.model = new_model()
        if start:
            state = torch.load(start, map_location="cpu", weights_only=True)
            self.model.load_state_dict({key: state[key] for key in self.model.state_dict()})
        self.model.to(device, memory_format=torch.channels_last).train()
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": WEIGHT_DECAY},
                                            {"params": others, "weight_decay": 0.0}],
                                           lr=LR, betas=(0.9, 0.98))
        self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.step = 0
        self.spent = 0.0  # seconds
        if self.file.exists():
            state = torch.load(self.file, map_location=device, weights_only=True)
            if state.get("start") != self.start:
                sys.exit(f"{self.file} is a run that started from other weights: move it away to "
                         "begin a new one, or give the same --start to resume it")
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average = state["average"]
            self.step = state["step"]
            self.spent = state["spent"]

    def log(self, text):
        line = f"{self.spent / 60:6.1f} min  step {self.step:5}  {text}"
        print(line, flush=True)
        with open(self.log_file, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def save(self):
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                 "average": self.average, "step": self.step, "spent": self.spent,
                 "start": self.start}
        torch.save(state, self.file.with_suffix(".tmp"))
        self.file.with_suffix(".tmp").replace(self.file)

    def averaged(self):
        """A model of the averaged weights."""
        model = new_model().to(self.device, memory_format=torch.channels_last)
        model.load_state_dict(self.average)
        return model

    def update(self, loss, lr):
        """One step of the optimiser, the average after it."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        decay = min(EMA, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=math.log(100))
            for key, value in self.model.state_dict().items():
                if value.is_floating_point():
                    self.average[key].lerp_(value, 1 - decay)
                else:
                    self.average[key].copy_(value)
        self.step += 1


def train(run, icons, held_out, tokenizer, minutes, half):
    """Steps until `minutes` are spent: warm-up, then a cosine over the time."""
    rng = random.Random(run.step)
    budget = 60 * minutes
    saved = run.spent
    losses = []
    while run.spent < budget:
        start = time.perf_counter()
        cosine = 0.5 * (1 + math.cos(math.pi * run.spent / budget))
        lr = LR * min(1, (run.step + 1) / WARM_UP) * cosine
        batch = icons.batch(rng, BATCH)
        loss = contrastive_loss(run.model, batch, tokenizer, rng, run.device, half)
        run.update(loss, lr)
        losses.append(loss.item())
        run.spent += time.perf_counter() - start
        if run.step % 50 == 0:
            scale = run.model.logit_scale.exp().item()
            run.log(f"loss {np.mean(losses[-50:]):.3f}  scale {scale:.1f}  lr {lr:.2e}")
        if run.spent - saved > 300:
            saved = run.spent
            run.save()
            accuracy = held_out.accuracy(run.averaged(), tokenizer, run.device)
            run.log(f"held-out top-1 of 1000 names {accuracy:.1f} %")


def write(run, out):
    """The averaged weights in OpenAI's layout, fp16."""
    state = {}
    for key, value in run.average.items():
        state[key] = value.cpu().half() if value.is_floating_point() else value.cpu()
    build_model(dict(state))  # refuses what OpenAI's code could not read
    torch.save(state, out.with_suffix(".tmp"))
    out.with_suffix(".tmp").replace(out)
    print(f"{out}: try it with --model")


@torch.no_grad()
def evaluate(path, icons, held_out, seen, tokenizer, device, half):
    """Prints the numbers of a checkpoint that the data card gives."""
    state = torch.load(path, map_location=device, weights_only=True)
    model = build_model(dict(state)).float().to(device).eval()
    torch.manual_seed(0)
    rng = random.Random(-1)
    losses = []
    for _ in range(20):
        batch = icons.batch(rng, BATCH)
        losses.append(contrastive_loss(model, batch, tokenizer, rng, device, half).item())
    numbers = {"steps": int(state["visual.bn1.num_batches_tracked"]),
               "loss on 20 augmented batches": round(float(np.mean(losses)), 3),
               "logit scale": round(model.logit_scale.exp().item(), 1),
               "held-out top-1 of 1000, %": round(held_out.accuracy(model, tokenizer, device), 1),
               "of the sets trained on, %": round(seen.accuracy(model, tokenizer, device), 1)}
    print(json.dumps(numbers))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    todo = parser.add_mutually_exclusive_group(required=True)
    todo.add_argument("--minutes", type=float)
    todo.add_argument("--evaluate", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--start", type=Path, metavar="CHECKPOINT", help="weights to start from")
    parser.add_argument("--work", type=Path, default=HERE / "work")
    parser.add_argument("--out", type=Path, help="default: mini_clip.pt in the folder of work")
    parser.add_argument("--only", nargs="+", metavar="SET", help="a small run: these sets alone")
    parser.add_argument("--half", action="store_true", help="bfloat16: three times faster")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    icons = Icons(args.work, args.only)
    held_out = Yardstick(args.work)
    tokenizer = Tokenizer()
    if args.evaluate:
        seen = Yardstick(args.work, "pretrain")
        evaluate(args.evaluate, icons, held_out, seen, tokenizer, device, args.half)
        return
    run = Run(args.work, device, args.start)
    train(run, icons, held_out, tokenizer, args.minutes, args.half)
    run.save()
    accuracy = held_out.accuracy(run.averaged(), tokenizer, device)
    run.log(f"the end: {run.step * BATCH} drawings, held-out top-1 of 1000 names {accuracy:.1f} %")
    write(run, args.out or args.work / "mini_clip.pt")
    np.save(args.work / "pretraining_hashes.npy", icons.hashes)


if __name__ == "__main__":
    main()
