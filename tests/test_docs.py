"""Every command and snippet of the documentation is run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from clipq import clip_quantize

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN_ELSEWHERE = {"clipq demo"}  # tests/cli/test_demo.py


@dataclass(frozen=True)
class Block:
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [Block(language, text) for language, text in found]


def commands(block: Block) -> list[str]:
    return [line.removeprefix("$ ") for line in block.text.splitlines() if line.startswith("$ ")]


def surroundings(folder: Path) -> dict[str, Any]:
    """What the pages take for granted: a network, its optimizer and loop, a file of quantized weights."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = {"weight": clip_quantize(torch.randn(50, 50), 0.5, 3).quantized, "bias": torch.randn(50)}
    safetensors.torch.save_file(state, folder / "quantized.safetensors")
    (folder / "bert").mkdir()
    (folder / "bert" / "config.json").write_text("{}")
    safetensors.torch.save_file(state, folder / "bert" / "model.safetensors", {"format": "pt"})
    (folder / "recipes").symlink_to(ROOT / "recipes")

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(torch.randn(3, 8)).square().sum().backward()
        optimizer.step()

    return {"model": model, "optimizer": optimizer, "train": train, "__name__": "documentation"}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_what_a_page_shows_works(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(tmp_path)
    names = surroundings(tmp_path)
    if any("--data-root data" in block.text for block in blocks(page)):
        (tmp_path / "data").symlink_to(request.getfixturevalue("real_data"))
    if any("init_process_group" in block.text for block in blocks(page)):  # what torchrun sets
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
            monkeypatch.setenv(name, value)
    if any("recipes/imagenet" in block.text for block in blocks(page) if block.language == "console"):
        request.getfixturevalue("vision")
    makefile = (ROOT / "Makefile").read_text()
    for block in blocks(page):
        if block.language == "python":
            file = re.match(r"# (\w+\.py)\n", block.text)
            if file:
                (tmp_path / file[1]).write_text(block.text)
            else:
                exec(compile(block.text, f"{page.name} snippet", "exec"), names)
        elif block.language == "console":
            assert commands(block), f"{page.name}: a console block shows its commands after '$ '"
            for command in commands(block):
                if command in RUN_ELSEWHERE:
                    continue
                program, *arguments = shlex.split(command, comments=True)
                code = int((re.search(r"# exit code (\d)", command) or [0, 0])[1])
                if program == "make":
                    assert re.search(rf"^{arguments[0]}:", makefile, re.MULTILINE), command
                    continue
                module = {"clipq": "clipq", "torchrun": "torch.distributed.run"}.get(program)
                assert module is not None, f"{page.name}: no way to test {command!r}"
                if arguments[0] == "compress" and not {"--epochs", "--resume"} & set(arguments):
                    arguments += ["--epochs", "1"]  # the recipes' own numbers are for the results page
                result = subprocess.run(
                    [sys.executable, "-m", module, *arguments],
                    env=os.environ | {"COLUMNS": "200"},
                    capture_output=True,
                    text=True,
                    check=False,
                )
                assert result.returncode == code, f"{page.name}: {command}\n{result.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists() or target == "commands.md", f"{page.name} links to {target}"
