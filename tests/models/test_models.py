"""The networks have the published sizes, and trained weights give in them the accuracy they were published with."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clipq.data import ImageSamples, ImageSet, PictureSamples, load_data, load_images
from clipq.errors import RecipeError
from clipq.models import MODELS, CifarResNet, build


def parameters(name: str, kind: str = "") -> int:
    return sum(p.numel() for key, p in build(name).named_parameters() if kind in key)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lenet-300-100", 266_610),
        ("lenet-5", 431_080),
        ("resnet-20", 269_722),
        ("resnet-32", 464_154),
        ("resnet-44", 658_586),
        ("resnet-56", 853_018),
        ("resnet-110", 1_727_962),
        ("mobilenet-v1-0.25", 470_072),
    ],
)
def test_number_of_parameters(name: str, expected: int) -> None:
    assert parameters(name) == expected


def test_lenet_5_is_caffes() -> None:
    assert (parameters("lenet-5", "weight"), parameters("lenet-5", "bias")) == (430_500, 580)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_reached_by_the_gradient(name: str) -> None:
    torch.manual_seed(0)
    model = build(name)
    images = {"lenet": (1, 28, 28), "resnet": (3, 32, 32), "mobilenet": (3, 224, 224)}[name.partition("-")[0]]
    scores = model(torch.randn(4, *images))
    assert scores.shape == (4, 1000 if name.startswith("mobilenet") else 10)
    torch.nn.functional.cross_entropy(scores, torch.arange(4)).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_same_seed_gives_the_same_network() -> None:
    for name in MODELS:
        torch.manual_seed(3)
        first = build(name).state_dict()
        torch.manual_seed(3)
        second = build(name).state_dict()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_an_option_a_shortcut_has_no_parameters_and_pads_with_zeros() -> None:
    model = CifarResNet(20)
    block = model.layer2[0]
    torch.nn.init.zeros_(block.bn2.weight)  # silences the residual branch
    x = torch.rand(2, 16, 8, 8)
    out = block(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"'resnet20'.*did you mean 'resnet-20'"):
        build("resnet20")


@pytest.mark.parametrize("depth", [2, 21, 0])
def test_a_resnet_of_another_depth_is_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"depth is {depth}; .* 6n \+ 2"):
        CifarResNet(depth)


@cache
def images(name: str, root: Path) -> ImageSet:
    return load_images(name, root)


def correct(name: str, weights: str, data_set: str, root: Path, every: int = 1) -> int:
    """How many test images the network gets right, of each ``every``-th one."""
    model = build(name)
    model.load_state_dict(load_file(root / "weights" / f"{weights}.safetensors"), strict=True)
    model.eval()
    data = images(data_set, root)
    assert len(data.test) == 10_000
    test = data.test.subset(torch.arange(0, len(data.test), every))
    samples = ImageSamples(data_set, test, data.normalisation)
    with torch.inference_mode():
        return sum(int((model(inputs).argmax(1) == targets).sum()) for inputs, targets in samples.batches(500))


@pytest.mark.parametrize(
    ("name", "weights", "expected"),
    [
        ("lenet-300-100", "mnist_lenet300100_dense", 9772),
        ("lenet-300-100", "mnist_lenet300100_sparse", 9801),
        ("lenet-5", "mnist_lenet5_dense", 9909),
        ("lenet-5", "mnist_lenet5_sparse", 9909),
    ],
)
def test_trained_lenets_get_as_many_of_the_test_images_right_as_known(
    real_data: Path, name: str, weights: str, expected: int
) -> None:
    assert correct(name, weights, "mnist", real_data) == expected


# Of 10,000 as published with the weights; of every fifth image as once measured.
RESNETS = [("cifar10_resnet20", 8103, 1609), ("cifar10_resnet20_jpegft", 8812, 1753)]


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "expected", "_"), RESNETS)
def test_trained_resnets_get_as_many_of_the_test_images_right_as_known(
    real_data: Path, weights: str, expected: int, _: int
) -> None:
    assert correct("resnet-20", weights, "cifar10", real_data) == expected


@pytest.mark.parametrize(("weights", "_", "expected"), RESNETS)
def test_trained_resnets_get_as_many_of_every_fifth_test_image_right_as_known(
    real_data: Path, weights: str, _: int, expected: int
) -> None:
    assert correct("resnet-20", weights, "cifar10", real_data, every=5) == expected


PHOTOGRAPHS = """
train: photos/val
test: photos/val
classes: photos/classes.txt
resize: 256
mean: [0.5, 0.5, 0.5]
std: [0.5, 0.5, 0.5]
"""


def test_trained_mobilenet_gets_as_many_of_every_fifth_photograph_right_as_once_measured(
    real_data: Path, tmp_path: Path, vision: None
) -> None:
    (tmp_path / "photographs.yaml").write_text(PHOTOGRAPHS)
    samples = load_data(str(tmp_path / "photographs.yaml"), real_data).test
    assert isinstance(samples, PictureSamples)
    assert len(samples) == 911
    samples = replace(samples, images=samples.images.subset(torch.arange(0, 911, 5)))
    model = build("mobilenet-v1-0.25")
    model.load_state_dict(load_file(real_data / "weights" / "imagenet_mobilenet_v1_0.25_224.safetensors"), strict=False)
    model.eval()
    with torch.inference_mode():
        correct = sum(int((model(inputs).argmax(1) == targets).sum()) for inputs, targets in samples.batches(64))
    assert correct == 92  # of all 911, 468


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("torchvision/googlenet", 6_624_904),
        ("torchvision/resnet18", 11_689_512),
        ("torchvision/mobilenet_v2", 3_504_872),
        ("timm/vit_small_patch16_224", 22_050_664),
    ],
)
def test_networks_of_libraries_have_their_size_and_give_scores(name: str, expected: int, vision: None) -> None:
    pytest.importorskip(name.partition("/")[0])
    with torch.device("meta"):
        model = build(name)
        assert sum(p.numel() for p in model.parameters()) == expected
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 1000)


def test_a_librarys_unknown_network_suggests_the_nearest(vision: None) -> None:
    with pytest.raises(RecipeError, match=r"torchvision has no network 'resnet5O' \(did you mean 'resnet50'\?\)"):
        build("torchvision/resnet5O")


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_library_that_is_not_there_is_asked_for_by_name(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setitem(sys.modules, f"{library}.models", None)
    with pytest.raises(RecipeError, match=rf"networks need {library}, .*pip install 'clipq\[vision\]'"):
        build(f"{library}/resnet50")
