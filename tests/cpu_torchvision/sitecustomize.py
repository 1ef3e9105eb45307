"""Lets torchvision's builds for CUDA be imported beside a torch for the CPU; Python runs this at its start.

torchvision registers what its operators give under torch.compile, and needs them declared; the transforms and networks
do not call them. The file is found through PYTHONPATH, which the fixture ``vision`` sets.
"""

import importlib.util

import torch

if importlib.util.find_spec("torchvision") and torch.version.cuda is None and not hasattr(torch.ops.torchvision, "nms"):
    DECLARED = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        DECLARED.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
