"""Uniform quantization-aware training, NNCF, coremltools, and NNCodec on the float network."""

from __future__ import annotations

import lzma
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from archive import ENVIRONMENT
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks.frontier.bench import ROOT, Bench

Layer = nn.Linear | nn.Conv2d | nn.Embedding


@dataclass(frozen=True)
class Coded:
    """A layer's weights as a file has them.

    Attributes:
        codes: from 0 up, integers of the weights' shape.
        meaning: what the file has beside them, float32: a table of values, or the steps that codes count.
        center: the code of zero, if ``meaning`` is steps; None if it is a table.
    """

    codes: Tensor
    meaning: Tensor
    center: int | None

    def weight(self, codes: Tensor) -> Tensor:
        """What codes stand for."""
        return self.meaning[codes] if self.center is None else (codes - self.center).float() * self.meaning


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
    bits, names = int(setting), list(bench.float_state())
    layers = [module for module in bench.network.modules() if isinstance(module, Layer)]
    steps = {layer: LearnedStep(layer.weight, bits) for layer in layers}
    for layer, step in steps.items():
        parametrize.register_parametrization(layer, "weight", step)
    bench.train(bench.network.parameters(), range(bench.net.epochs))
    codes = {}
    with torch.no_grad():
        for layer, step in steps.items():
            integers = step.codes(layer.parametrizations.weight.original)
            codes[layer] = Coded(integers + step.most, step.step.detach(), step.most)
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return through_a_file(bench, names, codes, bits, folder)


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
    kept = list(bench.float_state())
    bench.network.to(memory_format=torch.contiguous_format)  # its pruning raises on channels_last
    bench.network = nncf.prune(bench.network, mode, ratio=float(setting), examples_inputs=inputs[:2])
    bench.train(bench.network.parameters(), range(half))
    bench.network = nncf.quantize(bench.network, nncf.Dataset(inputs.split(1)))  # a copy
    bench.train(bench.network.parameters(), range(half, bench.net.epochs))
    modules = dict(bench.network.named_modules())
    codes = {}
    with torch.no_grad():
        for name, layer in modules.items():
            mask = modules.get(f"__nncf_hooks.post_hooks.{name.replace('.', ':')}:weight__0.0")
            if mask is not None:
                layer.weight.copy_(mask(layer.weight))
            if isinstance(layer, nn.Linear | nn.Conv2d):
                before = f"__nncf_hooks.pre_hooks.{name.replace('.', '/')}/"
                quantizer = next(m for n, m in modules.items() if n.startswith(before) and n.endswith("__1.0"))
                step = quantizer.scale.detach() / 127
                codes[layer] = Coded((quantizer(layer.weight) / step).round().clamp(-127, 127) + 127, step, 127)
    return through_a_file(bench, kept, codes, 8, folder)


def coremltools(bench: Bench, setting: str, folder: Path) -> Path:
    """DKM and magnitude pruning of coremltools, in one training; pruned over the first half of it.

    The only calls that run: the palettizer is prepared first, then the pruner; the palettizer works from the first
    step on and takes no steps of its own (``step`` raises once it works); the palettizer is finalized first. The file
    has the codes packed as for `qat`, and the tables.

    Args:
        setting: "p,b": the share of weights pruned, bits of an index.
    """
    from coremltools.optimize.torch.palettization import DKMPalettizer, DKMPalettizerConfig
    from coremltools.optimize.torch.pruning import MagnitudePruner, MagnitudePrunerConfig

    pruned, bits = float(setting.split(",")[0]), int(setting.split(",")[1])
    kept, steps = list(bench.float_state()), bench.steps_per_epoch * bench.net.epochs
    scheduler = {"update_steps": [steps * k // 8 for k in range(5)]}
    pruning = MagnitudePrunerConfig.from_dict({"global_config": {"scheduler": scheduler, "target_sparsity": pruned}})
    sharing = {"n_bits": bits, "weight_threshold": 0, "milestone": 0}
    # A LayerNorm that has a bias can't be finalized; no other method shares the values of norms.
    without = {"LayerNorm": None}
    shared = DKMPalettizerConfig.from_dict({"global_config": sharing, "module_type_configs": without})
    palettizer = DKMPalettizer(bench.network, shared)
    pruner = MagnitudePruner(palettizer.prepare(inplace=True), pruning)
    bench.network = pruner.prepare(inplace=True)
    bench.train(bench.network.parameters(), range(bench.net.epochs), after_step=pruner.step)
    palettizer.finalize(inplace=True)
    bench.network = pruner.finalize(inplace=True)
    codes = {}
    for layer in bench.network.modules():
        if isinstance(layer, Layer):
            table, indices = layer.weight.detach().unique(return_inverse=True)
            codes[layer] = Coded(indices, table, None)
    return through_a_file(bench, kept, codes, bits, folder)


@torch.no_grad()
def through_a_file(bench: Bench, names: list[str], layers: dict[Layer, Coded], bits: int, folder: Path) -> Path:
    """Write codes packed in bits and then by LZMA, what they stand for, and all other tensors in float32; give the
    layers what the file has.

    Args:
        names: of all tensors of the network that is compressed.
    """
    state, coded = bench.float_state(), {layer.weight.data_ptr() for layer in layers}
    parts = [state[name].numpy().tobytes() for name in names if state[name].data_ptr() not in coded]
    for layer, of in layers.items():
        flat = of.codes.flatten().numpy().astype(np.uint8)
        packed = np.packbits(np.unpackbits(flat[:, None], axis=1)[:, -bits:])
        content = lzma.compress(packed.tobytes(), lzma.FORMAT_RAW, filters=FILTERS)
        parts += [of.meaning.numpy().tobytes(), content]
        unpacked = np.frombuffer(lzma.decompress(content, lzma.FORMAT_RAW, filters=FILTERS), np.uint8)
        found = np.unpackbits(unpacked)[: flat.size * bits].reshape(-1, bits) @ (1 << np.arange(bits)[::-1])
        layer.weight.copy_(of.weight(torch.from_numpy(found).reshape(layer.weight.shape)))
    path = folder / "model.bin"
    path.write_bytes(b"".join(parts))
    return path


FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]


def nncodec(bench: Bench, setting: str, folder: Path) -> Path:
    """DeepCABAC with its own quantization of the trained network, dependent (trellis-coded) as by default; no training.

    Args:
        setting: the quantization parameter.
    """
    arrays = {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in bench.float_state().items()}
    np.savez(folder / "net.npz", **arrays)
    worker = ROOT / "benchmarks" / "frontier" / "nncodec_worker.py"
    subprocess.run([ENVIRONMENT / "bin" / "python", worker, folder, setting], check=True, capture_output=True, cwd=ROOT)
    with np.load(folder / "decoded.npz") as decoded:
        state = bench.network.state_dict()
        bench.network.load_state_dict(state | {name: torch.from_numpy(decoded[name]) for name in arrays})
    return folder / "model.nnc"
