"""Speed and memory of the published PreDiff's networks on two threads of a CPU.

    python tests/benchmarks/bench_prediff.py [--bf16] [--repeats 7] [--threads 2]

Units and memory are those of `bench_model.py`; a denoiser's figures are for each member of a batch, the
autoencoder's for each frame of 128 x 128.
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable

import psutil
import torch
from bench_model import timed
from rich.console import Console
from rich.table import Table

from earthformer.autoencoder import Autoencoder
from earthformer.denoiser import Denoiser
from earthformer.presets import AUTOENCODERS, DENOISERS

PRESET = "prediff_sevir_lr"
ROWS = {
    "denoiser, 1 member": (1, 38.0),
    "denoiser, 2 members": (2, 38.0),
    "denoiser, 4 members": (4, 38.0),
    "encode": (7, 3.6),
    "decode": (6, 8.1),
}
"""What a call takes in, and the original's units for each."""


def forward(row: str, count: int) -> Callable[[], object]:
    """One call of the row's network."""
    if row.startswith("denoiser"):
        config = DENOISERS[PRESET].denoiser
        denoiser = Denoiser(config).eval()
        z, context = torch.randn(count, *config.target), torch.randn(count, *config.context)
        t = torch.tensor([500])
        return lambda: denoiser(z, t, context)
    autoencoder = Autoencoder(AUTOENCODERS[PRESET]).eval()
    frames = torch.rand(1, count, *autoencoder.config.frame)
    latents = torch.randn(1, count, *autoencoder.config.latent)
    if row == "encode":
        return lambda: autoencoder.encode(frames)
    return lambda: autoencoder.decode(latents)


def measure(row: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Units (median, least), seconds of a call, and GB of one row, in this process."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    left, right = torch.randn(2048, 2048), torch.randn(2048, 2048)
    count, _ = ROWS[row]
    run = forward(row, count)
    half = torch.autocast("cpu", torch.bfloat16) if arguments.bf16 else contextlib.nullcontext()
    timed(lambda: left @ right)
    before = psutil.Process().memory_info().rss
    seconds: list[float] = []
    units: list[float] = []

    def call() -> None:
        with half:
            run()

    with torch.inference_mode():
        call()
        for _ in range(arguments.repeats):
            units += [timed(lambda: left @ right) for _ in range(2)]
            seconds.append(timed(call))
            units += [timed(lambda: left @ right) for _ in range(2)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "units": statistics.median(seconds) / statistics.median(units) / count,
        "least": min(seconds) / min(units) / count,
        "seconds": statistics.median(seconds),
        "unit": statistics.median(units),
        "peak": (peak - before) / 1e9,
        "total": peak / 1e9,
    }


def main() -> None:
    """Measure each row in a process of its own and print the table."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--row", choices=ROWS, help="measure this row alone and print JSON")
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(measure(arguments.row, arguments)))
        return
    options = ", bf16" if arguments.bf16 else ""
    load = os.getloadavg()[0]
    table = Table(title=f"{PRESET}, {arguments.threads} threads{options}; load before {load:.1f}")
    for name in ("", "units", "of least times", "original", "s a call", "unit s", "GB", "GB in all"):
        table.add_column(name, justify="left" if not name else "right")
    for row, (_, original) in ROWS.items():
        command = [sys.executable, __file__, "--row", row, *sys.argv[1:]]
        # Threads that spin while they wait for one another stall one another when the machine is shared.
        passive = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
        run = subprocess.run(command, check=True, capture_output=True, text=True, env=passive)
        found = json.loads(run.stdout)
        table.add_row(
            row,
            f"{found['units']:.1f}",
            f"{found['least']:.1f}",
            f"{original:.1f}",
            f"{found['seconds']:.2f}",
            f"{found['unit']:.3f}",
            f"{found['peak']:.2f}",
            f"{found['total']:.2f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
