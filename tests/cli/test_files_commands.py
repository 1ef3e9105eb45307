"""The commands that work on files: pack, unpack, inspect, verify, diff."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import clipq
import clipq.cli


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs ``clipq`` in a folder of its own; gives (exit code, output, errors)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def program(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["clipq", *arguments])
        with pytest.raises(SystemExit) as stopped:
            clipq.cli.main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return program


@pytest.fixture
def state(tmp_path: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {
        "layer.weight": clipq.clip_quantize(torch.randn(40, 50), 0.8, 3).quantized,
        "layer.bias": torch.randn(40, dtype=torch.float64),
        "steps": torch.tensor(7),
    }
    safetensors.torch.save_file(tensors, tmp_path / "m.safetensors")
    torch.save(tensors, tmp_path / "m.pt")
    return tensors


@pytest.mark.parametrize("source", ["m.safetensors", "m.pt"])
@pytest.mark.parametrize("effort", ["default", "max"])
def test_pack_and_unpack_give_every_bit_back(
    run: Any, state: dict[str, torch.Tensor], source: str, effort: str
) -> None:
    assert run("pack", source, "--effort", effort)[0] == 0
    code, out, _ = run("unpack", "m.clipq", "--out", "again.safetensors")
    assert code == 0
    assert "3 tensors" in out
    again = safetensors.torch.load_file("again.safetensors")
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) and again[name].dtype == state[name].dtype for name in state)


def test_a_file_that_is_there_is_kept_unless_forced(run: Any, state: dict[str, torch.Tensor]) -> None:
    Path("m.clipq").write_text("precious")
    code, _, err = run("pack", "m.pt")
    assert (code, Path("m.clipq").read_text()) == (1, "precious")
    assert "m.clipq is there already" in err
    assert run("pack", "m.pt", "--force")[0] == 0
    assert run("unpack", "m.clipq")[0] == 1


def test_inspect_shows_every_tensor_and_the_bytes_on_disk(run: Any, state: dict[str, torch.Tensor]) -> None:
    plan = clipq.Plan({"layer.weight": clipq.plan.TensorPlan((40, 50), 0.8, 3)})
    clipq.save(state, "m.clipq", plan=plan)
    size = Path("m.clipq").stat().st_size
    code, out, _ = run("inspect", "m.clipq")
    assert code == 0
    assert re.search(r"layer\.weight +40×50 +0\.8 +3 +20\.. % +8 ", out)
    assert "layer.bias" in out
    assert f"{size:,} bytes" in out
    values = json.loads(run("inspect", "m.clipq", "--json")[1])
    assert values["bytes"] == size == values["overhead_bytes"] + sum(t["bytes"] for t in values["tensors"])
    assert values["ratio"] == values["float32_bytes"] / size
    assert [t["name"] for t in values["tensors"]] == list(state)


def test_verify_tells_a_whole_file_from_a_damaged_one(run: Any, state: dict[str, torch.Tensor]) -> None:
    clipq.save(state, "m.clipq")
    assert run("verify", "m.clipq")[0] == 0
    content = bytearray(Path("m.clipq").read_bytes())
    content[-5] ^= 1
    Path("m.clipq").write_bytes(content)
    code, out, err = run("verify", "m.clipq")
    assert code == 3
    assert "1 damaged" in out or "2 damaged" in out
    assert any(name in err for name in state)
    assert json.loads(run("verify", "m.clipq", "--json")[1])["damaged"]
    Path("m.clipq").write_bytes(b"not one of ours")
    assert run("verify", "m.clipq")[0] == 1


def test_salvage_writes_what_is_whole_and_names_the_rest(run: Any, state: dict[str, torch.Tensor]) -> None:
    clipq.save(state, "m.clipq")
    content = bytearray(Path("m.clipq").read_bytes())
    content[-5] ^= 1  # of layer.weight, the last block
    Path("m.clipq").write_bytes(content)
    code, _, err = run("unpack", "m.clipq", "--out", "again.safetensors")
    assert (code, Path("again.safetensors").exists()) == (1, False)
    assert "layer.weight" in err
    assert "--salvage" in err
    code, out, err = run("unpack", "m.clipq", "--salvage", "--out", "whole.npz")
    assert code == 3
    assert "1 damaged and left out: layer.weight" in " ".join(out.split())
    with np.load("whole.npz") as whole:
        assert set(whole.files) == set(state) - {"layer.weight"}
        assert all(np.array_equal(whole[name], state[name].numpy()) for name in whole.files)


def test_a_bomb_is_refused_by_a_limit_that_can_be_raised(run: Any) -> None:
    clipq.save({"zeros": torch.zeros(1000, 1000)}, "bomb.clipq")
    assert Path("bomb.clipq").stat().st_size < 200
    for command in ("unpack", "inspect", "verify"):
        code, _, err = run(command, "bomb.clipq", "--limit", "1MB")
        assert code == 1
        assert "4000000 bytes" in err
        assert "--limit" in err
        assert run(command, "bomb.clipq", "--limit", "4MiB")[0] == 0
    assert run("diff", "bomb.clipq", "bomb.clipq", "--limit", "3999999")[0] == 1
    assert run("unpack", "bomb.clipq", "--limit", "much")[0] == 2


def test_diff_says_what_differs_and_by_how_much(run: Any, state: dict[str, torch.Tensor]) -> None:
    assert run("pack", "m.pt")[0] == 0
    code, out, _ = run("diff", "m.safetensors", "m.clipq")
    assert (code, out) == (0, "3 tensors are the same, 0 differ\n")
    changed = state | {"layer.bias": state["layer.bias"].clone(), "new": torch.ones(2)}
    changed["layer.bias"][3] += 0.5
    safetensors.torch.save_file(changed, "other.safetensors")
    code, out, _ = run("diff", "m.clipq", "other.safetensors")
    assert code == 3
    assert re.search(r"layer\.bias +values +1 of 40 +0\.5", out)
    assert "2 tensors are the same, 2 differ" in out
    found = json.loads(run("diff", "m.clipq", "other.safetensors", "--json")[1])
    assert (found["same"], [d["name"] for d in found["different"]]) == (2, ["layer.bias", "new"])


def test_a_folder_goes_both_ways(run: Any, state: dict[str, torch.Tensor]) -> None:
    Path("bert").mkdir()
    Path("bert/config.json").write_text("{}")
    safetensors.torch.save_file(state, "bert/model.safetensors", {"format": "pt"})
    assert run("pack", "bert")[0] == 0
    assert sorted(p.name for p in Path("bert-clipq").iterdir()) == ["config.json", "model.clipq"]
    assert run("unpack", "bert-clipq", "--out", "again")[0] == 0
    assert Path("again/model.safetensors").read_bytes() == Path("bert/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pack", "m.onnx2"], "has the ending '.onnx2'; accepted are"),
        (["pack", "none.pt"], "none.pt cannot be read"),
        (["unpack", "none.clipq"], "none.clipq"),
        (["inspect", "none.clipq"], "none.clipq"),
        (["verify", "m.pt"], "clipq"),
    ],
)
def test_bad_input_is_one_message(run: Any, state: dict[str, torch.Tensor], arguments: list[str], message: str) -> None:
    code, _, err = run(*arguments)
    assert code == 1
    assert message in err
    assert "Traceback" not in err
