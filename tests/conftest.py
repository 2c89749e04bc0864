import os
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes: not all cores for each of them
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

import clip.model
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "data"))  # the scripts: grid, prepare


@pytest.fixture(scope="session")
def tiny():
    """A CLIP with random weights, small enough for a test: (model, preprocess)."""
    torch.manual_seed(0)
    model = clip.model.CLIP(32, 64, (1, 1, 1, 1), 32, None, 77, 49408, 128, 2, 2)
    # words, not positions, decide
    torch.nn.init.normal_(model.token_embedding.weight, std=0.2)
    return model.float().eval().requires_grad_(False), clip.clip._transform(64)


@pytest.fixture(scope="session")
def mini():
    """The built-in CLIP: (model, preprocess)."""
    import mini_coop
    return mini_coop.load_clip("mini", "cpu")
