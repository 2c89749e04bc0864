"""The linear probe."""

import math

import torch

from conftest import solvable
from mini_coop import linear_probe


def test_linear_probe_solves_and_searches():
    features, labels = solvable(n=12)
    classifier = linear_probe(features, labels, features[::3], labels[::3])
    assert classifier.score(features.numpy(), labels.numpy()) == 1.0 and 1e-8 < classifier.C < 1e8


def test_linear_probe_follows_the_validation_set(monkeypatch):
    """With an accuracy that peaks at C = 10 ** 0.6 the search must end near it."""
    import sklearn.linear_model

    class Fake:
        def __init__(self, C, max_iter):
            assert max_iter == 1000
            self.C = C

        def fit(self, x, y):
            return self

        def score(self, x, y):
            return -abs(math.log10(self.C) - 0.6)

    monkeypatch.setattr(sklearn.linear_model, "LogisticRegression", Fake)
    assert abs(math.log10(linear_probe(*[torch.zeros(2)] * 4).C) - 0.6) < 0.02
