"""The published way to encode CoOp's prompts, shared by tests, the benchmark and lesson 2.

Written from the paper: 77 tokens for every class, every class on its own, CLIP's own transformer
and its own mask. Slow, and easy to check against section 3.2.
"""

import clip
import torch
import torch.nn.functional as F


def reference_features(coop, classes=None, model=None):
    """Unit-norm text features (K, E) of a CoOp's prompts, in float32; gradients reach `coop.ctx`.

    classes: the places of the classes to encode; None for all. model: another CLIP to encode with,
    for instance the same one in half precision.
    """
    model = coop.clip_model if model is None else model
    M = coop.n_ctx
    before = {"end": M, "middle": M // 2, "front": 0}[coop.class_position]
    encode = clip.simple_tokenizer.SimpleTokenizer().encode
    prompts = []
    ends = []
    for k in range(len(coop.classnames)) if classes is None else classes:
        # "X X ... X name." is tokenised as the published code does it: M placeholders, name, period
        name = coop.classnames[k].replace("_", " ")
        prompt = " ".join(["X"] * M) + f" {name}."
        tokens = clip.tokenize(prompt)[0].long().to(coop.ctx.device)  # (77,)
        ends.append(int(tokens.argmax()))  # EOT has the largest id
        words = model.token_embedding(tokens).type(model.dtype)  # (77, D)
        ctx = (coop.ctx[k] if coop.class_specific else coop.ctx).to(words.dtype)  # (M, D)
        # the placeholders' embeddings are replaced by the context, before and after the name
        n = min(len(encode(name)), ends[-1] - M - 1)  # the name's tokens; EOT is none of them
        start = words[:1]  # SOS
        own = words[1 + M :]  # name, period, EOT, padding
        prompts.append(torch.cat([start, ctx[:before], own[:n], ctx[before:], own[n:]]))
    x = torch.stack(prompts) + model.positional_embedding.type(model.dtype)  # (K, 77, D)
    x = model.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)
    x = model.ln_final(x)[torch.arange(len(x)), ends]  # (K, D), read at the EOT
    return F.normalize((x @ model.text_projection).float(), dim=-1)
