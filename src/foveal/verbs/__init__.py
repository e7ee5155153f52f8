"""The verbs: one short file each, which strings the rooms together and holds no maths.

Rooms are imported inside the functions, so that reading the signatures (`foveal --help`) does not import torch.
"""
