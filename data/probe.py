"""The linear probe, CoOp's rival with as many labels: `mini_coop.probe` is this file."""
import warnings

import torch


def linear_probe(train, train_labels, val, val_labels):
    """The paper's baseline: scikit-learn's logistic regression on image features (N, E), C searched on a validation set.

    A coarse grid of C from 1e6 to 1e-6, then 8 steps that halve the range around the best in log space; returns the fitted
    LogisticRegression of the last step (`.C` tells what was chosen, `.predict` and `.score` take NumPy features).
    """
    from sklearn.exceptions import ConvergenceWarning  # here, as it takes a second to import
    from sklearn.linear_model import LogisticRegression
    train, train_labels, val, val_labels = (torch.as_tensor(t).cpu().numpy() for t in (train, train_labels, val, val_labels))

    def accuracy(log_C):
        classifier = LogisticRegression(C=10 ** log_C, max_iter=1000).fit(train, train_labels)
        return classifier.score(val, val_labels), classifier

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # max_iter is the paper's
        warnings.filterwarnings("ignore", "The number of unique classes")  # with one shot there are as many as images
        best = max((6, 4, 2, 0, -2, -4, -6), key=lambda log_C: accuracy(log_C)[0])  # the first of equals
        low, high = best - 1, best + 1
        for _ in range(8):
            (at_low, low_fit), (at_high, high_fit), middle = accuracy(low), accuracy(high), (low + high) / 2
            low, high, chosen = (middle, high, high_fit) if at_low < at_high else (low, middle, low_fit)
    return chosen
