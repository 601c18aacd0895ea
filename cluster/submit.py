"""Sends any verb to a Ray cluster as a job: `earthformer submit [--address …] [--wait] -- VERB …`.

A verb is forwarded word for word, after it was read here as it will be there: a wrong option, a path of this
machine or more workers than the cluster has, or can have, are refused before anything is sent.
"""

import asyncio
import logging
import os
import secrets
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

import cluster
import earthformer
import pipelines
from cluster.capacity import Need, check
from pipelines import cli
from pipelines.clusters import knock
from pipelines.errors import InputError

if TYPE_CHECKING:
    # Ray is most of a second that other verbs need not wait.
    from ray.job_submission import JobDetails, JobSubmissionClient

DASHBOARD = "http://127.0.0.1:8265"
PACKAGES = (earthformer, pipelines, cluster)
ENTRY = "python -m cluster.cli"
RECONNECT_SECONDS = 2.0


class _Verbs(TyperGroup):
    """Commands of its own, and any other word is a verb to forward."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if self.get_command(ctx, args[0]) is None:
            args = ["verb", *args]
        return super().resolve_command(ctx, args)


app = typer.Typer(cls=_Verbs, no_args_is_help=True)


@dataclass(frozen=True)
class Sending:
    """How a job is sent."""

    address: str | None
    wait: bool
    working_dir: str | None
    installed: bool
    cluster_file: str | None
    reserve: dict[str, float] = field(default_factory=dict)
    """Of the job's own process: `cpus`, `gpus`, `memory_mb`."""
    environment: dict[str, str] = field(default_factory=dict)


@app.callback()
def options(
    context: typer.Context,
    address: Annotated[
        str | None,
        typer.Option(help=f"The cluster: its dashboard, or RAY_ADDRESS; default: {DASHBOARD}."),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Show the job's output, and exit with its code.")
    ] = False,
    working_dir: Annotated[
        str | None, typer.Option(help="Folder that is sent along: configurations and events lie in it.")
    ] = None,
    installed: Annotated[
        bool, typer.Option("--installed", help="Run what the cluster's image holds: send no code.")
    ] = False,
    cluster_file: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="The cluster's own YAML, KubeRay's or the launcher's: what it can grow to is counted.",
        ),
    ] = None,
    cpus: Annotated[float, typer.Option(help="Processors kept for the job's own process.")] = 0,
    gpus: Annotated[float, typer.Option(help="GPUs kept for the job's own process.")] = 0,
    memory_mb: Annotated[int, typer.Option(help="Memory kept for the job's own process, in MB.")] = 0,
    environment: Annotated[
        list[str] | None,
        typer.Option(
            "--env", help="NAME=VALUE, or NAME to pass this machine's; who reads the cluster sees it."
        ),
    ] = None,
) -> None:
    """Send a verb to a Ray cluster: earthformer submit [OPTIONS] -- VERB …"""
    context.obj = Sending(
        address,
        wait,
        working_dir,
        installed,
        cluster_file,
        {"cpus": cpus, "gpus": gpus, "memory_mb": memory_mb},
        dict(_variable(each) for each in environment or []),
    )


@app.command(
    "verb",
    hidden=True,
    add_help_option=False,
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,
    },
)
def send(context: typer.Context) -> None:
    """Forward the verb that was given."""
    sending: Sending = context.obj
    words = list(context.args)
    given = cli.parse(words)
    check_paths(given, sending.working_dir)
    with connected(sending.address) as client:
        unsure = check(list(needs(words[0], given, sending.reserve)), client, sending.cluster_file)
        if unsure:
            cli.errors.print(f"warning: {escape(unsure)}", highlight=False, soft_wrap=True)
        job = client.submit_job(
            entrypoint=f"{ENTRY} {shlex.join(words)}",
            submission_id=f"{words[0]}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}",
            runtime_env=_runtime_env(sending),
            metadata={"verb": words[0]},
            entrypoint_num_cpus=sending.reserve["cpus"] or None,
            entrypoint_num_gpus=sending.reserve["gpus"] or None,
            entrypoint_memory=int(sending.reserve["memory_mb"] * 1_000_000) or None,
        )
        if not sending.wait:
            cli.console.print(
                f"{job}: sent; follow it by `earthformer submit logs {job}`", highlight=False, soft_wrap=True
            )
            return
        code = follow(client, job)
    raise typer.Exit(code)


@app.command()
def status(context: typer.Context, job: Annotated[str, typer.Argument(help="The job's id.")]) -> None:
    """Say how a job stands, and what its command is; exit code 1 when it failed or was stopped."""
    from ray.job_submission import JobStatus

    with connected(context.obj.address) as client:
        found = client.get_job_info(job)
    for line in (_line(found), f"earthformer {_words(found)}"):
        cli.console.print(escape(line), highlight=False, soft_wrap=True)
    if found.status in (JobStatus.FAILED, JobStatus.STOPPED):
        raise typer.Exit(1)


@app.command()
def logs(context: typer.Context, job: Annotated[str, typer.Argument(help="The job's id.")]) -> None:
    """Show a job's output until it has ended, and exit with its code."""
    with connected(context.obj.address) as client:
        code = follow(client, job)
    raise typer.Exit(code)


@app.command()
def stop(context: typer.Context, job: Annotated[str, typer.Argument(help="The job's id.")]) -> None:
    """Stop a job; what it had finished stays, and the same verb goes on from there."""
    with connected(context.obj.address) as client:
        stopped = client.stop_job(job)
    said = "is being stopped" if stopped else "had ended before"
    cli.console.print(f"{job}: {said}", highlight=False, soft_wrap=True)


@app.command("list")
def list_(context: typer.Context) -> None:
    """List the jobs of the cluster, the latest first."""
    table = Table()
    for name in ("job", "status", "started", "took", "verb"):
        table.add_column(name, overflow="fold", no_wrap=name == "job")
    with connected(context.obj.address) as client:
        found = [job for job in client.list_jobs() if job.submission_id]
    for job in sorted(found, key=lambda job: job.start_time or 0, reverse=True):
        # Options are told by `status`: here they would not fit.
        verb, *_ = _words(job).split(" --")
        table.add_row(str(job.submission_id), job.status.value, _started(job), _took(job), escape(verb))
    cli.console.print(table)


# --------------------------------------------------------------------------------------------- before


def check_paths(given: dict[str, Any], working_dir: str | None) -> None:
    """Refuse what would be looked for on this machine, where the job is not."""
    for name, kind in given["kinds"].items():
        values = given.get(name)
        for value in values if isinstance(values, list | tuple) else [values]:
            if not isinstance(value, str) or kind not in ("URL", "FILE"):
                continue
            place = value.partition("=")[2] if name == "archive" and "=" in value else value
            last = place.rsplit("::", 1)[-1]
            if "://" in last or Path(last).is_absolute():
                continue
            if kind == "URL":
                raise InputError(
                    f"--{name} {value} lies here: needed a URL, or an absolute path that all nodes share"
                )
            if working_dir is None or not (Path(working_dir) / value).is_file():
                where = working_dir or "the cluster"
                raise InputError(
                    f"--{name} {value} is not in {where}: needed --working-dir FOLDER with it, to send along"
                )


def needs(verb: str, given: dict[str, Any], reserve: dict[str, float]) -> Iterator[Need]:
    """What a verb cannot do without."""
    if "workers" in given or "replicas" in given:
        # Training's workers and a service's replicas start together; others run as many as there is room for.
        together = int(given.get("replicas") or 1)
        if verb == "train":
            asked = cli.parse_workers(given["workers"])
            together = asked if isinstance(asked, int) else asked[0]
        small = 0.5 if verb in ("forecast", "serve") else 1.0
        each = {"GPU": 1.0} if given.get("gpu") else {"CPU": small}
        if memory := given.get("memory_mb"):
            each["memory"] = memory * 1e6
        yield Need(f"a worker of {verb}", each, together if verb in ("train", "serve") else 1)
    own = {"CPU": reserve["cpus"], "GPU": reserve["gpus"], "memory": reserve["memory_mb"] * 1e6}
    if any(own.values()):
        yield Need("the job's own process", {name: value for name, value in own.items() if value}, 1)


def _runtime_env(sending: Sending) -> dict[str, Any]:
    found: dict[str, Any] = {"env_vars": sending.environment}
    if not sending.installed:
        found["py_modules"] = [str(Path(str(package.__file__)).parent) for package in PACKAGES]
    if sending.working_dir is not None:
        found["working_dir"] = sending.working_dir
    return found


def _variable(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        if name not in os.environ:
            raise InputError(f"--env {name}: there is no such variable here; needed one, or {name}=VALUE")
        value = os.environ[name]
    return name, value


# ---------------------------------------------------------------------------------------------- after


def follow(client: "JobSubmissionClient", job: str) -> int:
    """Print what a job says until it has ended; its exit code."""
    from ray.job_submission import JobStatus

    try:
        asyncio.run(_print_logs(client, job))
    except KeyboardInterrupt:
        cli.errors.print(f"{job} goes on; `earthformer submit stop {job}` stops it", highlight=False)
        return 130
    found = client.get_job_info(job)
    cli.errors.print(escape(_line(found)), highlight=False, soft_wrap=True)
    if found.status == JobStatus.SUCCEEDED:
        return 0
    return found.driver_exit_code if found.driver_exit_code and found.driver_exit_code > 0 else 1


async def _print_logs(client: "JobSubmissionClient", job: str) -> None:
    import aiohttp

    printed = 0
    while True:
        seen = 0
        try:
            async for text in client.tail_job_logs(job):
                # After a lost connection it begins anew.
                sys.stdout.write(text[max(0, printed - seen) :])
                sys.stdout.flush()
                seen += len(text)
                printed = max(printed, seen)
        except (aiohttp.ClientError, RuntimeError):
            pass
        if client.get_job_status(job).is_terminal():
            return
        await asyncio.sleep(RECONNECT_SECONDS)


def _line(job: "JobDetails") -> str:
    from ray.job_submission import JobStatus

    took = _took(job)
    # Ray adds the end of the job's output, which is to be had whole.
    why, _, _ = (job.message or "").partition(", last available logs")
    said = f": {' '.join(why.split())}" if job.status == JobStatus.FAILED else ""
    return f"{job.submission_id}: {job.status.value.lower()}{f' after {took}' if took else ''}{said}"


def _words(job: "JobDetails") -> str:
    """The verb and its options, as they were given."""
    return job.entrypoint.removeprefix(f"{ENTRY} ")


def _started(job: "JobDetails") -> str:
    return f"{datetime.fromtimestamp(job.start_time / 1000, UTC):%Y-%m-%d %H:%M:%S}" if job.start_time else ""


def _took(job: "JobDetails") -> str:
    if not job.start_time:
        return ""
    ended = job.end_time / 1000 if job.end_time else datetime.now(UTC).timestamp()
    return f"{ended - job.start_time / 1000:.0f} s"


# ------------------------------------------------------------------------------------------ the cluster


@contextmanager
def connected(address: str | None) -> Iterator["JobSubmissionClient"]:
    """A client of the cluster's job server.

    Raises:
        InputError: none answers there; it wants a token, or another; there is no such job.
    """
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    if address is not None:
        # The client lets the environment go before its argument.
        os.environ["RAY_API_SERVER_ADDRESS"] = address
    elif not os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault("RAY_API_SERVER_ADDRESS", DASHBOARD)
    # What is packed and sent is Ray's own affair.
    logging.disable(logging.INFO)
    place = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ["RAY_ADDRESS"]
    try:
        knock(place)
        yield JobSubmissionClient()
    except ConnectionError as error:
        raise InputError(f"no Ray cluster answers at {place}: needed the address of its dashboard") from error
    except AuthenticationError as error:
        raise InputError(
            f"the Ray cluster at {place} wants its token: needed RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH with the one it was started with"
        ) from error
    except RuntimeError as error:
        raise InputError(f"the Ray cluster at {place} refused: {error}") from error


def main() -> None:
    """`python cluster/submit.py`: as `earthformer submit`."""
    cli.main(app)


if __name__ == "__main__":
    main()
