"""``clipq bench-data``: how fast data comes, without a network."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from clipq.cli.common import console, print_json


def bench_data(
    data: Annotated[str, typer.Argument(help="The data, as a recipe names it.", show_default=False)],
    data_root: Annotated[Path | None, typer.Option(help="Folder of the data.")] = None,
    part: Annotated[
        Literal["train", "validation", "test"],
        typer.Option(help="train, with augmentation; validation or test, without."),
    ] = "train",
    batch_size: Annotated[int, typer.Option(min=1, help="Samples a batch.")] = 128,
    batches: Annotated[int, typer.Option(min=1, help="How many to read; fewer if the part is smaller.")] = 100,
    workers: Annotated[int, typer.Option(min=0, help="Processes that make the samples; 0 for this one.")] = 0,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Memory layout of images.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the measurement as JSON.")] = False,
) -> None:
    """Measure how many samples a second the data gives: reading, decoding and augmentation alone.

    Example: `clipq bench-data recipes/imagenet/data/torchvision.yaml --data-root /data/imagenet --workers 8`

    A GPU that trains faster than this waits for its data; give the recipe more workers then.
    """
    from clipq.data import load_data

    made = load_data(data, None if data_root is None else str(data_root), workers=workers)
    started = time.monotonic()
    read = made.batches(part, batch_size, channels_last=channels_last)
    total = min(batches, read.total)
    first, samples = 0.0, 0
    for _ in range(total):
        inputs, _targets = next(read)
        samples += len(inputs)
        first = first or time.monotonic() - started
    seconds = time.monotonic() - started
    if json:
        values = {"part": part, "samples": samples, "batches": total, "workers": workers}
        print_json(values | {"seconds": seconds, "first_batch_seconds": first, "samples_per_second": samples / seconds})
    else:
        console.print(
            f"{samples / seconds:,.0f} samples a second: {samples:,} ({part}) in {seconds:.2f} s with {workers} "
            f"workers, the first batch after {first:.2f} s",
            highlight=False,
        )
