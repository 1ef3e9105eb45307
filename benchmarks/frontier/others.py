"""Uniform quantization-aware training, NNCF, and NNCodec on the float network."""

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
    codes = {}
    with torch.no_grad():
        for layer, step in steps.items():
            codes[layer] = step.codes(layer.parametrizations.weight.original), step.step
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return _through_a_file(codes, bits, folder)


def nncf(bench: Bench, setting: str, folder: Path) -> Path:
    """NNCF's pruning by magnitude, then its training with 8-bit weights and activations, half of the epochs each.

    Its own files keep a byte a weight at least; here the codes are packed as for `qat`.

    Args:
        setting: the share of weights pruned.
    """
    import nncf
    from nncf.parameters import PruneMode

    inputs, _ = next(bench.data.batches("validation", 300))
    mode, half = PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL, bench.net.epochs // 2
    names = {module: name for name, module in bench.network.named_modules()}
    layers = [module for module in names if isinstance(module, nn.Linear | nn.Conv2d)]
    bench.network = nncf.prune(bench.network, mode, ratio=float(setting), examples_inputs=inputs[:2])
    bench.train(bench.network.parameters(), range(half))
    bench.network = nncf.quantize(bench.network, nncf.Dataset(inputs.split(1)))
    bench.train(bench.network.parameters(), range(half, bench.net.epochs))
    hooks = dict(bench.network.named_modules())
    codes = {}
    with torch.no_grad():
        for layer in layers:
            mask = hooks[f"__nncf_hooks.post_hooks.{names[layer]}:weight__0.0"]
            quantizer = next(
                m
                for n, m in hooks.items()
                if n.startswith(f"__nncf_hooks.pre_hooks.{names[layer]}/") and n.endswith("__1.0")
            )
            step = quantizer.scale / 127
            codes[layer] = (quantizer(mask(layer.weight)) / step).round().clamp(-127, 127).to(torch.int8), step
    return _through_a_file(codes, 8, folder)


Codes = dict[nn.Linear | nn.Conv2d, tuple[Tensor, Tensor]]


@torch.no_grad()
def _through_a_file(codes: Codes, bits: int, folder: Path) -> Path:
    """Write integer codes, -most to most, packed in bits and then by LZMA, steps and biases; give the layers what the
    file has."""
    most, parts = 2 ** (bits - 1) - 1, []
    for layer, (integers, step) in codes.items():
        unsigned = (integers.flatten().numpy().astype(np.int16) + most).astype(np.uint8)
        packed = np.packbits(np.unpackbits(unsigned[:, None], axis=1)[:, -bits:])
        content = lzma.compress(packed.tobytes(), lzma.FORMAT_RAW, filters=FILTERS)
        parts += [step.detach().numpy().tobytes(), content, layer.bias.detach().numpy().tobytes()]
        unpacked = np.frombuffer(lzma.decompress(content, lzma.FORMAT_RAW, filters=FILTERS), np.uint8)
        values = np.unpackbits(unpacked)[: unsigned.size * bits].reshape(-1, bits) @ (1 << np.arange(bits)[::-1])
        layer.weight.copy_(torch.from_numpy(values - most).float().reshape(layer.weight.shape) * step)
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
