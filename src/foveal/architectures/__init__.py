"""Architectures of papers that timm lacks; importing this package registers them with timm.

import timm, foveal.architectures
model = timm.create_model("hornet_tiny_7x7")
"""

from importlib import import_module
from pathlib import Path

for _file in sorted(Path(__file__).parent.glob("[!_]*.py")):
    import_module(f"{__name__}.{_file.stem}")
