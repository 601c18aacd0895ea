"""Speed and memory of the published SEVIR model, batch 1, on two threads of a CPU.

    python tests/benchmarks/bench_model.py [--bf16] [--compile] [--repeats 5] [--threads 2]

Time is counted in units: a unit is one float32 product of two 2048 x 2048 matrices, taken in turn with what
is measured, so that the figures bear comparison across machines and under load. Every row runs in a process
of its own; memory is its peak, less what it held before the inputs were made (and, beside it, in all).
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import torch
from rich.console import Console
from rich.table import Table

from earthformer.presets import EARTHFORMERS
from earthformer.transformer import Earthformer

PRESET = "earthformer_sevir"
# The original's units and GB, and what ours may take at most.
BARS = {
    "forward, plain": (35, 1.4, "20, aim 14", "0.8"),
    "forward, fused": (35, 1.4, "20, aim 14", "0.8"),
    "training step": (135, 6.5, "80", "4"),
}


def timed(function: Callable[[], object]) -> float:
    """Seconds one call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(row: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Units (median), seconds, and GB of one row, in this process."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    left, right = torch.randn(2048, 2048), torch.randn(2048, 2048)
    config = EARTHFORMERS[PRESET]
    model = Earthformer(config)
    model = model.fuse() if row == "forward, fused" else model
    model.train(row == "training step")
    run: Callable[[torch.Tensor], torch.Tensor] = torch.compile(model) if arguments.compile else model
    half = torch.autocast("cpu", torch.bfloat16) if arguments.bf16 else contextlib.nullcontext()
    optimizer = torch.optim.AdamW(model.parameters()) if row == "training step" else None
    timed(lambda: left @ right)
    before = psutil.Process().memory_info().rss
    context, target = torch.rand(1, *config.context), torch.rand(1, *config.target)

    def step() -> None:
        if optimizer is None:
            with torch.inference_mode(), half:
                run(context)
            return
        optimizer.zero_grad()
        with half:
            loss = (run(context).float() - target).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    step()
    units, seconds = [], []
    for _ in range(arguments.repeats):
        units += [timed(lambda: left @ right) for _ in range(2)]
        seconds.append(timed(step))
        units += [timed(lambda: left @ right) for _ in range(2)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    unit, second = statistics.median(units), statistics.median(seconds)
    gigabytes = {"peak": (peak - before) / 1e9, "total": peak / 1e9}
    return {"units": second / unit, "seconds": second, "unit": unit, **gigabytes}


def difference() -> float:
    """Greatest difference of the fused forecast from the plain one at full size, in float64."""
    torch.manual_seed(0)
    model = Earthformer(EARTHFORMERS[PRESET]).double().eval()
    context = torch.rand(1, *model.config.context, dtype=torch.float64)
    with torch.inference_mode():
        return (model.fuse()(context) - model(context)).abs().max().item()


def main() -> None:
    """Measure each row in a process of its own and print the table."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--exact", action="store_true", help="also compare fused and plain in float64")
    parser.add_argument("--row", choices=BARS, help="measure this row alone and print JSON")
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(measure(arguments.row, arguments)))
        return
    options = (", bf16" if arguments.bf16 else "") + (", compiled" if arguments.compile else "")
    load = os.getloadavg()[0]
    table = Table(title=f"{PRESET}, batch 1, {arguments.threads} threads{options}; load before {load:.1f}")
    for name in ("", "units", "at most", "original", "s", "unit s", "GB", "at most", "original", "GB in all"):
        table.add_column(name, justify="left" if not name else "right")
    for row, (original, original_gb, most, most_gb) in BARS.items():
        command = [sys.executable, __file__, "--row", row, *sys.argv[1:]]
        # Threads that spin while they wait for one another stall one another when the machine is shared.
        passive = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
        run = subprocess.run(command, check=True, capture_output=True, text=True, env=passive)
        found = json.loads(run.stdout)
        table.add_row(
            row,
            f"{found['units']:.1f}",
            most,
            str(original),
            f"{found['seconds']:.2f}",
            f"{found['unit']:.3f}",
            f"{found['peak']:.2f}",
            most_gb,
            str(original_gb),
            f"{found['total']:.2f}",
        )
    Console(width=120).print(table)
    if arguments.exact:
        Console().print(f"fused - plain, float64: at most {difference():.1e}")


if __name__ == "__main__":
    main()
