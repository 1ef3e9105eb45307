"""Saving and loading: every bit, name, dtype, shape and tie comes back, and a misfit changes nothing."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import clipq
from clipq.errors import ArchiveError, DamagedFileError, MismatchError, TooLargeError

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64,
    torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex32, torch.complex64,
    torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
]  # fmt: skip


def from_bytes(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).reshape(shape)


def assert_same(left: Tensor, right: Tensor) -> None:
    assert left.dtype == right.dtype
    assert left.shape == right.shape
    if left.numel():
        bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (left, right)]
        assert torch.equal(*bits)


def round_trip(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    report = clipq.save(state, path)
    assert report.bytes == path.stat().st_size
    assert [t.name for t in report.tensors] == list(state)
    loaded = clipq.load(path)
    assert list(loaded) == list(state)
    for name in state:
        assert_same(loaded[name], state[name])
    return loaded


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 0, 2), (5, 4, 3, 3)], ids=str)
@pytest.mark.parametrize("distinct", [1, 5, 10**9])
def test_every_dtype_and_shape_comes_back_bit_for_bit(
    dtype: torch.dtype, shape: tuple[int, ...], distinct: int, tmp_path: Path
) -> None:
    n = int(np.prod(shape)) if shape else 1
    size = 1 if dtype == torch.bool else dtype.itemsize
    rng = np.random.default_rng(n + distinct)
    values = rng.integers(0, 2 if dtype == torch.bool else 256, (min(distinct, max(n, 1)), size), dtype=np.uint8)
    data = values[rng.integers(0, len(values), n)].tobytes()
    round_trip({"t": from_bytes(data, dtype, shape) if n else torch.empty(shape, dtype=dtype)}, tmp_path / "f.clipq")


def test_signed_zeros_nan_payloads_and_infinities_survive(tmp_path: Path) -> None:
    patterns = [0x00000000, 0x80000000, 0x7FC00000, 0x7FC00001, 0xFFC12345, 0x7F800001, 0x7F800000, 0xFF800000, 1]
    few = np.array(patterns, np.uint32)
    many = np.concatenate([few, np.arange(5000, dtype=np.uint32)])
    for bits in (np.tile(few, 500), many):
        round_trip({"t": torch.from_numpy(bits.view(np.float32))}, tmp_path / "f.clipq")


@given(
    data=st.data(),
    shape=st.lists(st.integers(0, 12), max_size=4),
    levels=st.integers(1, 300),
    density=st.floats(0, 1),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=80, deadline=None)
def test_tensors_of_few_values_come_back(
    data: st.DataObject, shape: list[int], levels: int, density: float, seed: int
) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int8]))
    rng = np.random.default_rng(seed)
    values = torch.from_numpy(rng.normal(size=levels) * 50).to(dtype)
    values[0] = 0
    index = rng.integers(0, levels, tuple(shape)) * (rng.random(tuple(shape)) < density)
    state = {"weight": values[torch.from_numpy(np.asarray(index))]}
    loaded = clipq.load(_saved(state))
    assert_same(loaded["weight"], state["weight"])


def _saved(state: dict[str, Tensor], effort: str = "default") -> bytes:
    from clipq import archive, files

    return archive.encode_file(files.to_arrays(state), effort=effort)  # type: ignore[arg-type]


def test_strides_do_not_matter(tmp_path: Path) -> None:
    base = torch.randn(6, 5, 4)
    views = {
        "transposed": base.transpose(0, 2),
        "strided": base[::2, 1:4, ::3],
        "expanded": torch.randn(3, 1).expand(3, 4),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "conjugate": torch.randn(4, dtype=torch.complex64).conj(),
        "negative": torch.randn(4, dtype=torch.complex64).conj().imag,
    }
    loaded = round_trip({name: view.resolve_conj().resolve_neg() for name, view in views.items()}, tmp_path / "a")
    for name, tensor in clipq.load(_saved(views)).items():
        assert_same(tensor, loaded[name])


def test_tied_tensors_are_stored_once_and_come_back_tied(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 300, bias=False), nn.ReLU(), nn.Linear(300, 64), nn.Linear(64, 300))
    model[3].weight = model[0].weight
    untied = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = clipq.save(model, tmp_path / "tied")
    assert report.bytes < clipq.save(untied, tmp_path / "untied").bytes - 60_000
    assert {t.name: t.tied_to for t in report.tensors}["3.weight"] == "0.weight"
    loaded = clipq.load(tmp_path / "tied")
    assert loaded["3.weight"].data_ptr() == loaded["0.weight"].data_ptr()
    assert torch.equal(loaded["0.weight"], untied["0.weight"])


def test_overlapping_views_of_other_geometry_are_not_tied(tmp_path: Path) -> None:
    base = torch.randn(4, 4)
    loaded = round_trip({"a": base, "b": base.T, "c": base[:2], "d": base.view(16)}, tmp_path / "f")
    assert len({t.data_ptr() for t in loaded.values()}) == 4


def test_a_model_is_filled_in_place(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))

    source, target = build(), build()
    clipq.save(source, tmp_path / "m.clipq")
    before = {name: tensor.data_ptr() for name, tensor in target.state_dict().items()}
    assert clipq.load(tmp_path / "m.clipq", into=target) is target
    for name, tensor in target.state_dict().items():
        assert tensor.data_ptr() == before[name]
        assert_same(tensor, source.state_dict()[name])


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (nn.Linear(4, 2), r"weight is float32 \(3, 4\) in the file and float32 \(2, 4\) in the model"),
        (nn.Linear(4, 3, bias=False), "bias is in the file and not in the model"),
        (nn.Linear(4, 3).double(), "float64"),
        (nn.Sequential(nn.Linear(4, 3)), "0.weight is in the model and not in the file"),
    ],
)
def test_a_model_that_does_not_fit_is_left_alone(other: nn.Module, named: str, tmp_path: Path) -> None:
    clipq.save(nn.Linear(4, 3), tmp_path / "m.clipq")
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(MismatchError, match=named):
        clipq.load(tmp_path / "m.clipq", into=other)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_what_is_no_tensor_is_named() -> None:
    with pytest.raises(ArchiveError, match="extra: a dict is no tensor"):
        _saved({"extra": {}})  # type: ignore[dict-item]
    with pytest.raises(ArchiveError, match="sparse: only dense"):
        _saved({"sparse": torch.eye(3).to_sparse()})
    with pytest.raises(ArchiveError, match="meta: only dense"):
        _saved({"meta": torch.empty(3, device="meta")})


def test_sources_and_limit(tmp_path: Path) -> None:
    path = tmp_path / "m.clipq"
    state = {"w": torch.zeros(1000, 100), "b": torch.randn(5)}
    clipq.save(state, path)
    content = path.read_bytes()
    with path.open("rb") as file:
        for source in (path, str(path), content, bytearray(content), io.BytesIO(content), file, f"file://{path}"):
            assert_same(clipq.load(source)["b"], state["b"])
    with pytest.raises(TooLargeError, match="limit"):
        clipq.load(path, limit=1000)
    with pytest.raises(DamagedFileError, match=r"no \.clipq file"):
        clipq.load(b"PK\x03\x04something else")
    with pytest.raises(ArchiveError, match="cannot be opened"):
        clipq.load(tmp_path / "missing.clipq")


def test_the_plan_is_shown(tmp_path: Path) -> None:
    class Theta:
        pruning_rate, bits = 0.7, 3

    class Plan:
        tensors = {"weight": Theta()}  # noqa: RUF012

    report = clipq.save(nn.Linear(4, 3), tmp_path / "m.clipq", plan=Plan())
    assert (report.tensors[0].pruning_rate, report.tensors[0].bits) == (0.7, 3)
    assert report.tensors[1].pruning_rate is None
