import clip.model
import pytest
import torch


@pytest.fixture(scope="session")
def tiny():
    """A CLIP with random weights, small enough for a test: (model, preprocess)."""
    torch.manual_seed(0)
    model = clip.model.CLIP(32, 64, (1, 1, 1, 1), 32, None, 77, 49408, 128, 2, 2)
    torch.nn.init.normal_(model.token_embedding.weight, std=0.2)  # so that words, not positions, decide
    return model.float().eval().requires_grad_(False), clip.clip._transform(64)


@pytest.fixture(scope="session")
def mini():
    """The embedded CLIP: (model, preprocess)."""
    import mini_coop
    return mini_coop.load_clip("mini", "cpu")
