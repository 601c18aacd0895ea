"""How few sampler steps lose how much CRPS, what a member costs, and what memory an ensemble takes.

    make demo
    python tests/benchmarks/bench_ensemble.py --run demo/runs/denoiser --archive demo/archive.zarr

Every sampler at every number of steps draws the same members (the same seeds) of the same test windows;
its fair CRPS stands beside that of the published sampler, 1000 steps of DDPM. The standard error of the
difference is over windows. Memory is the peak of a process that reduces one ensemble of 32 or 256 members.
"""

import argparse
import math
import resource
import statistics
import subprocess
import sys
import time

import torch

from earthformer.ensemble_scores import Crps
from earthformer.forecasters import members_of, present
from earthformer.prediff import Sampling
from pipelines import runs, windows
from pipelines.archives.store import open_archive
from pipelines.ensembles import Reduction
from pipelines.forecast_store import member_seeds
from pipelines.plans import Drawing, Ensemble, plan

SAMPLERS = ("ddpm", "ddim", "dpm++", "unipc")


def curve(run: str, archive: str, count: int, members: int, steps: list[int], longest: int) -> None:
    """Print fair CRPS and seconds a member of every sampler and number of steps."""
    opened, trained = open_archive(archive), runs.open_run(run)
    task, forecaster = trained.config.task, trained.forecaster()
    keys = windows.enumerate_windows(task, opened, "test")
    keys = keys[:: max(1, len(keys) // count)][:count]
    pixels = {name: torch.from_numpy(p) for name, p in windows.read(task, opened, keys).items()}
    truth = torch.where(present(pixels["target"]), pixels["target"].float(), math.nan)
    seeds = member_seeds(0, keys, members)

    def scores(sampler: str, steps: int) -> tuple[list[float], float]:
        forecaster.sampling = Sampling(sampler, steps)
        began, found = time.perf_counter(), []
        for i in range(len(keys)):
            drawn = forecaster.forecast(pixels["context"][i : i + 1], seeds[i : i + 1])
            found.append(Crps.of(drawn, truth[i : i + 1], scale=task.error_scale).result()["fair CRPS"])
        return found, (time.perf_counter() - began) / (len(keys) * members)

    reference, seconds = scores("ddpm", longest)
    print(f"{trained.config.model_preset}: {len(keys)} test windows, {members} members")
    print(f"{'sampler':8}{'steps':>6}{'fair CRPS':>11}{'vs longest':>12}{'s.e.':>8}{'s/member':>10}")
    print(f"{'ddpm':8}{longest:6}{statistics.mean(reference):11.5f}{'':12}{'':8}{seconds:10.2f}", flush=True)
    for sampler in SAMPLERS:
        for number in steps:
            found, seconds = scores(sampler, number)
            changes = [100 * (a / b - 1) for a, b in zip(found, reference, strict=True)]
            mean = 100 * (statistics.mean(found) / statistics.mean(reference) - 1)
            error = statistics.stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else math.nan
            print(
                f"{sampler:8}{number:6}{statistics.mean(found):11.5f}{mean:11.2f}%{error:8.2f}{seconds:10.2f}",
                flush=True,
            )


def reduce_one(run: str, archive: str, members: int) -> None:
    """Reduce an ensemble of one window, and print this process's peak memory in MB."""
    planned = plan(
        run, archive, "test", limit=1, ensemble=Ensemble(members=members), drawing=Drawing("dpm++", 2)
    )
    forecaster, reduction = planned.load(), Reduction(planned.bound(), 0)
    context = torch.from_numpy(windows.read(planned.task, planned.archive, planned.keys)["context"])
    for some in members_of(forecaster, context, member_seeds(0, planned.keys, members), 8):
        reduction.add(some.fields[0, ..., 0].numpy())
    reduction.result()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True)
    parser.add_argument("--archive", required=True)
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--steps", default="5,10,20,50")
    parser.add_argument("--longest", type=int, default=1000)
    parser.add_argument("--reduce", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.reduce:
        reduce_one(asked.run, asked.archive, asked.reduce)
        return
    for members in (32, 256):
        command = [sys.executable, __file__, "--run", asked.run, "--archive", asked.archive]
        peak = subprocess.run(
            [*command, "--reduce", str(members)], capture_output=True, text=True, check=True
        )
        print(f"ensemble of {members}: peak {peak.stdout.strip()} MB")
    curve(
        asked.run,
        asked.archive,
        asked.windows,
        asked.members,
        [int(n) for n in asked.steps.split(",")],
        asked.longest,
    )


if __name__ == "__main__":
    main()
