from __future__ import annotations

import subprocess
import sys


def test_opening_a_folder_imports_nothing_heavy(image_folder):
    root = image_folder("a/1.png", "b/2.png")
    program = f"""
import sys
from foveal.data import checks, dataset, folder, hub, images, samples, scan, shards, split, table, worlds
from foveal.data.open import open_dataset
import numpy as np
data = open_dataset({str(root)!r})
scanned = np.array([scan.scan(data.image(row)) for row in range(2)])
groups = checks.near_duplicate_groups(scanned["phash"], np.eye(2, 8))
split.folds(np.array([0, 0, 1, 1]), np.arange(4), 2, seed=0)
open_dataset("sample:digits")
heavy = {{"torch", "sklearn", "faiss", "datasets", "pandas", "pyarrow", "scipy", "timm"}}
print(sorted(heavy & set(sys.modules)))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
