"""Models of other formats and tools go into a .clipq file and come back, and nothing hostile is run or read."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors
import safetensors.torch
import torch
from sklearn.cluster import KMeans
from torch import nn

import clipq
from clipq.errors import ArchiveError
from clipq.folder import pack_folder, unpack_folder
from clipq.formats import read_metadata, read_state, write_state


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "fc.weight": rng.choice([-0.5, 0, 0, 0.25], (30, 20)).astype(np.float32),
        "file": rng.normal(size=5),
        "fortran": np.asfortranarray(rng.normal(size=(3, 4)).astype(np.float16)),
        "big-endian": np.arange(4, dtype=">i4"),
        "scalar": np.array(7),
        "flags": np.array([True, False]),
    }


def test_numpy_archives_go_both_ways(tmp_path: Path) -> None:
    content = arrays()
    file = content.pop("file")
    np.savez(tmp_path / "m.npz", **content)
    state = dict(read_state(tmp_path / "m.npz"))
    assert all(np.array_equal(state[name].numpy(), array) for name, array in content.items())
    state["file"] = torch.from_numpy(file)
    write_state(tmp_path / "again.npz", state)
    with np.load(tmp_path / "again.npz", allow_pickle=False) as again:
        assert set(again.files) == set(arrays())
        assert all(np.array_equal(again[name], array) for name, array in arrays().items())
    np.save(tmp_path / "fc.npy", content["fc.weight"])
    assert list(read_state(tmp_path / "fc.npy")) == ["fc"]
    with pytest.raises(ArchiveError, match=r"w: NumPy has no type bfloat16; write \.safetensors"):
        write_state(tmp_path / "b.npz", {"w": torch.ones(3, dtype=torch.bfloat16)})


def test_objects_in_a_numpy_archive_are_not_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz", w=np.array([print], dtype=object))
    with pytest.raises(ArchiveError, match="cannot be read"):
        read_state(tmp_path / "m.npz")


def _model(initializers: list[object], **graph: object) -> object:
    made = onnx.helper.make_graph([], "g", [], [], initializer=initializers, **graph)
    return onnx.helper.make_model(made)


def test_onnx_initializers_are_read(tmp_path: Path) -> None:
    content = {name: array for name, array in arrays().items() if name != "big-endian"}
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in content.items()]
    four_bits = onnx.helper.make_tensor("four", onnx.TensorProto.UINT4, (5,), [1, 15, 0, 7, 3])
    brain = onnx.helper.make_tensor("brain", onnx.TensorProto.BFLOAT16, (2,), [1.5, -2])
    onnx.save(_model([*tensors, four_bits, brain]), tmp_path / "m.onnx")
    onnx.save(_model(tensors), tmp_path / "outside.onnx", save_as_external_data=True, size_threshold=0, location="w")
    assert (tmp_path / "w").stat().st_size > 0
    for path in (tmp_path / "m.onnx", tmp_path / "outside.onnx"):
        state = read_state(path)
        assert all(np.array_equal(state[name].numpy(), array) for name, array in content.items())
    state = read_state(tmp_path / "m.onnx")
    assert state["four"].tolist() == [1, 15, 0, 7, 3]
    assert state["four"].dtype == torch.uint8
    assert (state["brain"].dtype, state["brain"].tolist()) == (torch.bfloat16, [1.5, -2])


def test_the_package_that_reads_onnx_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ArchiveError, match=r"pip install 'clipq\[onnx\]'"):
        read_state(tmp_path / "m.onnx")


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "link", "none", ""])
def test_onnx_data_are_read_from_the_models_folder_only(location: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(100))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "secret")
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[2], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    (folder / "m.onnx").write_bytes(_model([tensor]).SerializeToString())  # type: ignore[attr-defined]
    with pytest.raises(ArchiveError, match="w is said to lie in"):
        read_state(folder / "m.onnx")


def test_a_net_that_scikit_learn_clustered_becomes_small(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(100, 80), nn.ReLU(), nn.Linear(80, 10))
    with torch.no_grad():
        for layer in (net[0], net[2]):
            found = KMeans(8, n_init=1, random_state=0).fit(layer.weight.reshape(-1, 1).numpy())
            shared = torch.from_numpy(found.cluster_centers_[found.labels_]).reshape(layer.weight.shape)
            layer.weight.copy_(shared)
    report = clipq.save(net, tmp_path / "m.clipq")
    assert {t.name: t.levels for t in report.tensors if "weight" in t.name} == {"0.weight": 8, "2.weight": 8}
    assert report.bytes < report.float32_bytes / 9
    loaded = clipq.load(tmp_path / "m.clipq")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in net.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*deprecated:UserWarning")
def test_integers_of_torchs_own_quantization_become_small(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = torch.quantize_per_channel(
        torch.randn(200, 300), torch.full((200,), 0.5), torch.zeros(200), 0, torch.qint8
    )
    with pytest.raises(ArchiveError, match="dequantize"):
        clipq.save({"w": weight}, tmp_path / "m.clipq")
    for stored in (weight.int_repr(), weight.dequantize()):
        report = clipq.save({"w": stored, "scales": weight.q_per_channel_scales()}, tmp_path / "m.clipq")
        assert report.tensors[0].bits_per_element < 4
        assert torch.equal(clipq.load(tmp_path / "m.clipq")["w"], stored)


def _hub_folder(folder: Path, ending: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    state = {f"layer{i}.weight": torch.randint(-3, 4, (40, 30)).float() for i in range(4)} | {"bias": torch.randn(40)}
    folder.mkdir()
    (folder / ".git").mkdir()
    (folder / ".git" / "large").write_text("not to be copied")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("a\nb\n")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    stem = "model" if ending == ".safetensors" else "pytorch_model"
    shards = {f"{stem}-0000{i + 1}-of-00002{ending}": list(state)[i::2] for i in range(2)}
    for shard, names in shards.items():
        part = {name: state[name] for name in names}
        if ending == ".safetensors":
            safetensors.torch.save_file(part, folder / shard, {"format": "pt"})
        else:
            torch.save(part, folder / shard)
    places = {name: shard for shard, names in shards.items() for name in names}
    (folder / f"{stem}{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}, indent=2))
    return state


def test_a_hub_folder_comes_back_byte_for_byte(tmp_path: Path) -> None:
    _hub_folder(tmp_path / "bert", ".safetensors")
    reports = pack_folder(tmp_path / "bert", tmp_path / "packed")
    assert list(reports) == ["model-00001-of-00002.clipq", "model-00002-of-00002.clipq"]
    assert sum(report.bytes for report in reports.values()) < 3000
    unpack_folder(tmp_path / "packed", tmp_path / "again")
    before, after = (
        {p.relative_to(tmp_path / f): p.read_bytes() for p in (tmp_path / f).rglob("*") if p.is_file()}
        for f in ("bert", "again")
    )
    del before[Path(".git/large")]
    assert before == after


def test_a_hub_folder_of_pickles_comes_back_as_safetensors(tmp_path: Path) -> None:
    state = _hub_folder(tmp_path / "bert", ".bin")
    pack_folder(tmp_path / "bert", tmp_path / "packed")
    unpack_folder(tmp_path / "packed", tmp_path / "again")
    index = json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(state)
    for name, shard in index["weight_map"].items():
        assert torch.equal(read_state(tmp_path / "again" / shard)[name], state[name])
        assert read_metadata(tmp_path / "again" / shard) == {"format": "pt"}


def test_a_folder_that_cannot_be_packed_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArchiveError, match="holds no weights"):
        pack_folder(tmp_path / "empty", tmp_path / "out")
    _hub_folder(tmp_path / "bert", ".safetensors")
    (tmp_path / "bert" / "zz.safetensors").write_bytes(b"broken")
    with pytest.raises(ArchiveError, match=r"zz\.safetensors"):
        pack_folder(tmp_path / "bert", tmp_path / "out")
    with pytest.raises(ArchiveError, match="is there already"):
        pack_folder(tmp_path / "bert", tmp_path / "empty")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bert", "empty"]


def test_rounding_the_rest_keeps_weights_dtypes_and_ties(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 400), nn.BatchNorm1d(400), nn.Linear(400, 3))
    model[1].bias = model[0].bias
    exact, small = tmp_path / "exact.clipq", tmp_path / "small.clipq"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert clipq.save(model, small, bfloat16_rest=True).bytes < clipq.save(model, exact).bytes - 700
    loaded = clipq.load(small)
    for name, tensor in before.items():
        expected = tensor.bfloat16().float() if tensor.is_floating_point() and tensor.dim() == 1 else tensor
        assert torch.equal(loaded[name], expected), name
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(model.state_dict()[name], tensor)
    assert loaded["1.bias"].data_ptr() == loaded["0.bias"].data_ptr()
    with pytest.raises(ArchiveError, match="b: a value is too large for bfloat16"):
        clipq.save({"b": torch.tensor([1e300], dtype=torch.float64)}, small, bfloat16_rest=True)
