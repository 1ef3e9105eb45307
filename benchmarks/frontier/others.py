"""Uniform quantization-aware training, and NNCodec on the float network."""

from __future__ import annotations

import lzma
import subprocess
from pathlib import Path

import numpy as np
import torch
from archive import ENVIRONMENT
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks.frontier.bench import ROOT, Bench


class LearnedStep(nn.Module):
    """Quantization to whole multiples of a step that is learned (LSQ: Esser et al., ICLR 2020)."""

    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__()
        self.most = 2 ** (bits - 1) - 1
        self.step = nn.Parameter(2 * weight.detach().abs().mean() / self.most**0.5)
        self._scale = (weight.numel() * self.most) ** -0.5

    def forward(self, weight: Tensor) -> Tensor:
        step = self.step * self._scale + (self.step * (1 - self._scale)).detach()
        position = (weight / step).clamp(-self.most, self.most)
        return (position + (position.round() - position).detach()) * step

    def codes(self, weight: Tensor) -> Tensor:
        """int8, shape of the weight."""
        return (weight / self.step).clamp(-self.most, self.most).round().to(torch.int8)


def qat(bench: Bench, setting: str, folder: Path) -> Path:
    """Every weight tensor in so many bits, 2**b - 1 levels; the codes packed in bits, then LZMA; biases in float32.

    Args:
        setting: b.
    """
    bits = int(setting)
    layers = [module for module in bench.network.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    steps = {layer: LearnedStep(layer.weight, bits) for layer in layers}
    for layer, step in steps.items():
        parametrize.register_parametrization(layer, "weight", step)
    bench.train(bench.network.parameters(), range(bench.net.epochs))
    parts = []
    with torch.no_grad():
        for layer, step in steps.items():
            codes = step.codes(layer.parametrizations.weight.original)
            packed = np.unpackbits((codes.flatten().numpy() + step.most).astype(np.uint8)[:, None], axis=1)[:, -bits:]
            content = lzma.compress(np.packbits(packed).tobytes(), lzma.FORMAT_RAW, filters=FILTERS)
            parts += [step.step.numpy().tobytes(), content, layer.bias.detach().numpy().tobytes()]
            unpacked = np.unpackbits(
                np.frombuffer(lzma.decompress(content, lzma.FORMAT_RAW, filters=FILTERS), np.uint8)
            )
            values = unpacked[: packed.size].reshape(-1, bits) @ (1 << np.arange(bits)[::-1])
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
            restored = torch.from_numpy(values - step.most).float().reshape(layer.weight.shape) * step.step
            layer.weight.copy_(restored)
    path = folder / "model.bin"
    path.write_bytes(b"".join(parts))
    return path


FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]


def nncodec(bench: Bench, setting: str, folder: Path) -> Path:
    """DeepCABAC with its own quantization of the trained network, dependent (trellis-coded) as by default; no training.

    Args:
        setting: the quantization parameter.
    """
    arrays = {name: tensor.numpy() for name, tensor in bench.network.state_dict().items()}
    np.savez(folder / "net.npz", **arrays)
    worker = ROOT / "benchmarks" / "frontier" / "nncodec_worker.py"
    subprocess.run([ENVIRONMENT / "bin" / "python", worker, folder, setting], check=True, capture_output=True, cwd=ROOT)
    with np.load(folder / "decoded.npz") as decoded:
        bench.network.load_state_dict({name: torch.from_numpy(decoded[name]) for name in arrays})
    return folder / "model.nnc"
