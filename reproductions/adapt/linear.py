"""Logistic regression on EfficientNet-Lite0 features of three samples, one 75/25 split each.

Beside it: scikit-learn's cross-validated logistic regression on the same rows, and a logistic regression that sees
only the mean and the deviation of each photo's brightness, which says how much of the task is exposure.
"""

import numpy as np
from sklearn.linear_model import LogisticRegressionCV
from sklearn.metrics import balanced_accuracy_score
from sklearn.preprocessing import StandardScaler

from foveal.blocks.logistic import GRID
from foveal.data.open import open_dataset
from foveal.features.small import Labelled, balanced_accuracy, brightness_of, features_of, fitted
from foveal.methods.adapt.linear import Linear


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    values: dict[str, float] = {}
    for world in ("elpv", "elpv-type", "textile"):
        dataset = open_dataset(f"sample:{world}")
        rows = features_of(dataset, tiny)
        train, test = rows.halves(seed)
        values[f"linear.{world}.balanced_accuracy"] = balanced_accuracy(fitted(Linear(), train, seed), test)
        if world == "elpv":
            values["scikit-learn.elpv.balanced_accuracy"] = scikit_learn(train, test, seed)
            train, test = brightness_of(dataset, tiny).halves(seed)
            values["brightness.elpv.balanced_accuracy"] = balanced_accuracy(fitted(Linear(), train, seed), test)
    return values


def scikit_learn(train: Labelled, test: Labelled, seed: int) -> float:
    scaler = StandardScaler().fit(train.X.numpy())
    model = LogisticRegressionCV(
        Cs=np.array(GRID[:5]), cv=3, scoring="neg_log_loss", class_weight="balanced", max_iter=200, tol=1e-3,
        l1_ratios=(0,), use_legacy_attributes=False,
    )  # fmt: skip
    model.fit(scaler.transform(train.X.numpy()), train.y.numpy())
    return float(balanced_accuracy_score(test.y.numpy(), model.predict(scaler.transform(test.X.numpy()))))
