"""The `earthformer` command: one verb a stage."""

import json
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from pipelines.errors import InputError, boundary_error

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Deep-learning Earth-system forecasting on Ray: archive → Zarr → Earthformer → forecast → scores.",
)
console = Console()
errors = Console(stderr=True)

Workers = Annotated[int | None, typer.Option(help="Parallel workers; default: one a processor.")]
Prices = Annotated[
    str | None, typer.Option("--prices", metavar="FILE", help="With --dry-run: YAML of prices, for the cost.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]
ConfigFile = Annotated[
    str | None, typer.Option("--config", metavar="FILE", help="YAML or JSON laid over the preset.")
]
Assignments = Annotated[list[str] | None, typer.Option("--set", help="section.key=value, repeatable.")]
Archive = Annotated[str, typer.Option(metavar="URL", help="Of the prepared archive.")]
Forecasts = Annotated[
    list[str], typer.Option("--forecast", metavar="URL", help="Of a forecast; repeat to compare.")
]


@app.command()
def synthesize(
    kind: Annotated[str, typer.Argument(help="sevir, enso or radar")],
    out: Annotated[str, typer.Option(metavar="URL", help="Folder for the raw files.")],
    events: Annotated[int, typer.Option(help="SEVIR events, or radar sequences.")] = 24,
    seed: int = 0,
    modalities: Annotated[str, typer.Option(help="SEVIR: comma-separated image types.")] = "vil",
) -> None:
    """Write a synthetic raw archive in the real format: storms for sevir and radar, an ocean for enso."""
    from pipelines.archives import synthetic
    from pipelines.storage import local_folder

    if kind not in ("sevir", "enso", "radar"):
        raise InputError(f"kind {kind!r} is unknown: needed sevir, enso or radar")
    with local_folder(out) as folder:
        if kind == "sevir":
            synthetic.write_sevir(folder, events=events, seed=seed, modalities=tuple(modalities.split(",")))
        elif kind == "enso":
            synthetic.write_enso(folder, seed=seed)
        else:
            synthetic.write_radar(folder, sequences=events, seed=seed)
    console.print(f"{out}: synthetic {kind}, seed {seed}")


@app.command()
def prepare(
    kind: Annotated[str, typer.Argument(help="sevir, sevir-lr, enso or radar")],
    source: Annotated[str, typer.Option(metavar="URL", help="Of the raw archive.")],
    archive: Annotated[str, typer.Option(metavar="URL", help="Of the Zarr archive to write.")],
    modalities: Annotated[str, typer.Option(help="SEVIR: comma-separated image types.")] = "vil",
    variable: Annotated[
        str | None, typer.Option(help="Radar: name of the rain rate in files of other layouts.")
    ] = None,
    workers: Workers = None,
    memory_mb: Annotated[int | None, typer.Option(help="Memory that a worker claims, in MB.")] = None,
    shard_mb: Annotated[int, typer.Option(help="Size of a shard before compression, in MB.")] = 128,
    strict: Annotated[bool, typer.Option("--strict", help="A series that cannot be read is fatal.")] = False,
    dry_run: DryRun = False,
    prices: Prices = None,
) -> None:
    """Read a raw archive and write it as sharded Zarr; the same command resumes, and adds what is new."""
    from pipelines import costs
    from pipelines import prepare as stage

    types = tuple(name.strip() for name in modalities.split(","))
    asked: dict[str, Any] = {
        "modalities": types,
        "variable": variable,
        "workers": workers,
        "shard_mb": shard_mb,
    }
    if dry_run:
        table = costs.read_prices(prices) if prices else None
        found = stage.estimate(kind, source, archive, prices=table, **asked)
        console.print(escape(str(found)), highlight=False, soft_wrap=True)
        return
    summary = stage.prepare(kind, source, archive, memory_mb=memory_mb, strict=strict, **asked)
    _print_quarantine(summary.quarantine)
    console.print(escape(str(summary)), highlight=False, soft_wrap=True)


def _print_quarantine(rows: Sequence[dict[str, str]], most: int | None = 20) -> None:
    if not rows:
        return
    table = Table(title=f"quarantine: {len(rows)} series that could not be read", title_justify="left")
    for name in ("series", "file", "reason"):
        table.add_column(name, overflow="fold")
    for row in rows[:most]:
        table.add_row(*(escape(row[name]) for name in ("series", "file", "reason")))
    console.print(table)
    if most is not None and len(rows) > most:
        console.print(f"… and {len(rows) - most} more, which `earthformer inspect` lists", highlight=False)


@app.command()
def train(
    trainable: Annotated[str, typer.Argument(help="earthformer, autoencoder, denoiser or alignment")],
    archive: Archive,
    run: Annotated[str, typer.Option(metavar="URL", help="Of the run directory.")],
    task: Annotated[str, typer.Option(help="sevir, sevir-lr, enso, radar or radar-256")],
    preset: Annotated[str | None, typer.Option(help="Model preset; default: the task's.")] = None,
    autoencoder: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Denoiser, alignment: of the autoencoder's finished run."),
    ] = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    workers: Annotated[
        str,
        typer.Option(
            metavar="N | MIN:MAX",
            help="Data-parallel workers; MIN:MAX: as many as there is room for, while nodes come and go.",
        ),
    ] = "1",
    gpu: Annotated[bool, typer.Option("--gpu", help="One GPU a worker.")] = False,
    max_failures: Annotated[int, typer.Option(help="Restarts from the last checkpoint; -1: any number.")] = 3,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved configuration, and do nothing.")
    ] = False,
) -> None:
    """Train on Ray Train; the same command resumes after a kill."""
    from pipelines import configs
    from pipelines.train import train

    asked = parse_workers(workers)
    overlay = configs.read_overlay(config, assignments or [])
    resolved = configs.resolve(task, preset, overlay, trainable=trainable, autoencoder=autoencoder)
    if dry_run:
        console.print_json(json.dumps({"config_hash": resolved.hash, **asdict(resolved)}))
        return
    trained = train(
        resolved,
        archive,
        run,
        autoencoder=autoencoder,
        workers=asked,
        gpu=gpu,
        max_failures=max_failures,
    )
    console.print(str(trained), highlight=False, soft_wrap=True)


def parse_workers(text: str) -> int | tuple[int, int]:
    """A number of workers, such as 4, or the fewest and the most of them, such as 1:4.

    Raises:
        InputError: it is neither.
    """
    if not re.fullmatch(r"\d+(:\d+)?", text):
        raise InputError(f"--workers {text}: needed a number, or the fewest and the most, such as 1:4")
    fewest, _, most = text.partition(":")
    return (int(fewest), int(most)) if most else int(fewest)


@app.command()
def forecast(
    archive: Archive,
    out: Annotated[str, typer.Option(metavar="URL", help="Of the forecast Zarr to write.")],
    run: Annotated[
        str | None, typer.Option(metavar="URL", help="Of a finished earthformer or denoiser run.")
    ] = None,
    forecaster: Annotated[
        str | None,
        typer.Option(help="A baseline instead of a run: persistence, extrapolation, displaced or steps."),
    ] = None,
    split: Annotated[str, typer.Option(help="train, val or test")] = "test",
    task: Annotated[str | None, typer.Option(help="For a baseline: the task.")] = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many windows.")] = None,
    every: Annotated[int, typer.Option(help="Only each so many-th window.")] = 1,
    seed: int = 0,
    members: Annotated[int, typer.Option(help="Members of the ensemble.")] = 1,
    events: Annotated[
        str | None, typer.Option(metavar="FILE", help="YAML list of events to give probabilities of.")
    ] = None,
    quantiles: Annotated[str, typer.Option(help="Comma-separated, such as 0.1,0.5,0.9.")] = "",
    keep_members: Annotated[
        bool, typer.Option("--keep-members", help="Write the members, which `score` needs.")
    ] = False,
    until_ci: Annotated[
        float | None,
        typer.Option(help="Draw members until no event's confidence interval has a larger half-width."),
    ] = None,
    max_members: Annotated[int | None, typer.Option(help="With --until-ci: members at most.")] = None,
    sampler: Annotated[str | None, typer.Option(help="Diffusion: ddpm, ddim, dpm++ or unipc.")] = None,
    steps: Annotated[int | None, typer.Option(help="Diffusion: calls of the denoiser a member.")] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Diffusion: the denoiser in bfloat16.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Diffusion: compile the denoiser.")] = False,
    alignment: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Diffusion: run of an alignment network, to guide the forecast."),
    ] = None,
    deviations: Annotated[
        float, typer.Option(help="With --alignment: n of the functional's mu + n sigma that is asked for.")
    ] = 0.0,
    strength: Annotated[
        float | None,
        typer.Option(help="With --alignment: scale of the guidance; default: the network's own."),
    ] = None,
    workers: Annotated[int, typer.Option(help="Replicas of the forecaster; they share the processors.")] = 1,
    gpu: Annotated[bool, typer.Option("--gpu", help="One GPU a replica.")] = False,
    batch_size: Annotated[int, typer.Option(help="Windows, or members, a forward pass.")] = 8,
    dry_run: DryRun = False,
    prices: Prices = None,
) -> None:
    """Forecast a split of an archive into a CF Zarr; the same command resumes."""
    from pipelines import configs, costs, plans
    from pipelines import forecast as stage
    from pipelines.baselines import BASELINES
    from pipelines.events import read_events

    if (run is None) == (forecaster is None):
        raise InputError("needed either --run URL or --forecaster NAME")
    if forecaster is not None and forecaster not in BASELINES:
        configs.unknown("forecaster", forecaster, BASELINES)
    overlay = configs.read_overlay(config, assignments or [])
    if overlay and not task:
        raise InputError("--config and --set lie over the task of a baseline: needed --task NAME beside them")
    if until_ci is not None and members != 1:
        raise InputError(f"--members {members} beside --until-ci: needed --max-members for the most of them")
    if max_members is not None and until_ci is None:
        raise InputError(f"--max-members {max_members} is for --until-ci: needed --members, or both")
    ensemble = plans.Ensemble(
        members=members if until_ci is None else 1000 if max_members is None else max_members,
        until_ci=until_ci,
        events=read_events(events) if events else (),
        quantiles=plans.parse_quantiles(quantiles),
        keep_members=keep_members,
    )
    asked: dict[str, Any] = {
        "sampler": sampler,
        "steps": steps,
        "alignment": alignment,
        "strength": strength,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    if bf16 or compiled or deviations or given:
        precision = "bf16" if bf16 else "float32"
        drawing = plans.Drawing(**given, precision=precision, compile=compiled, deviations=deviations)
    else:
        drawing = None
    planned = plans.plan(
        run or forecaster or "",
        archive,
        split,
        task=configs.resolve_task(task, overlay) if task else None,
        seed=seed,
        limit=limit,
        every=every,
        ensemble=ensemble,
        drawing=drawing,
    )
    if dry_run:
        priced = costs.read_prices(prices) if prices else None
        work = stage.estimate(planned, out, workers=workers, gpu=gpu, batch_size=batch_size)
        template = stage.template(planned)
        rows = {"shards": f"{planned.shards}, of which {work.tasks} are to be written", **work.rows(priced)}
        first = f"{out}: would hold {len(planned.keys)} windows by {planned.forecaster}"
        said = [str(template), first, *(f"  {name:<8} {text}" for name, text in rows.items())]
        console.print(escape("\n".join(said)), highlight=False, soft_wrap=True)
        return
    done = stage.forecast(planned, out, workers=workers, gpu=gpu, batch_size=batch_size)
    console.print(escape(str(done)), highlight=False, soft_wrap=True)


@app.command("serve")
def serve_(
    run: Annotated[str | None, typer.Option(metavar="URL", help="Of a finished denoiser run.")] = None,
    archive: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL", help="NAME=URL, or a URL, of an archive to take contexts from; repeat for more."
        ),
    ] = None,
    alignment: Annotated[
        str | None, typer.Option(metavar="URL", help="Of an alignment network's run, for guided forecasts.")
    ] = None,
    results: Annotated[
        str | None, typer.Option(metavar="URL", help="Of the folder where forecasts are kept.")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="YAML or JSON of all settings, over which these options lie."),
    ] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="setting=value, repeatable; such as max_members=500.")
    ] = None,
    replicas: Annotated[
        int | None, typer.Option(help="Replicas of the model; they share the processors.")
    ] = None,
    gpu: Annotated[bool | None, typer.Option("--gpu", help="One GPU a replica.")] = None,
    chunk: Annotated[int | None, typer.Option(help="Members that a replica draws at once.")] = None,
    host: Annotated[str, typer.Option(help="Other than loopback only with --token-file.")] = "127.0.0.1",
    port: int = 8000,
    token_file: Annotated[str | None, typer.Option(metavar="FILE", help="Of the bearer token.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved settings, and do nothing.")
    ] = False,
) -> None:
    """Serve ensemble forecasts and event probabilities over HTTP, with a page; stops at Ctrl-C."""
    from pipelines import serve
    from pipelines.serving import settings as of

    given = {
        "run": run,
        "archives": of.named(archive) if archive else None,
        "alignment": alignment,
        "results": results,
        "replicas": replicas,
        "gpu": gpu,
        "chunk": chunk,
        "token_file": token_file,
    }
    settings = of.resolve(config, given, assignments or [])
    if dry_run:
        console.print_json(settings.model_dump_json())
        return
    running = serve.run(settings, host, port)
    console.print(f"http://{host}:{port}: serving {settings.run}; the API is at /docs", soft_wrap=True)
    running.until_stopped()


@app.command()
def request(
    event: Annotated[str | None, typer.Option(help="Event of the service's archive.")] = None,
    start: Annotated[int, typer.Option(help="Index of the context's first frame in the event.")] = 0,
    tile: Annotated[tuple[int, int] | None, typer.Option(help="Radar: first row and column.")] = None,
    archive: Annotated[
        str | None, typer.Option(help="The service's name of it; default: its only one.")
    ] = None,
    context: Annotated[
        str | None, typer.Option(help="NetCDF or Zarr of (time, y, x), instead of an event.")
    ] = None,
    members: Annotated[int | None, typer.Option(help="Members of the ensemble; default: 32.")] = None,
    until_ci: Annotated[
        float | None, typer.Option(help="Draw until no event's interval has a larger half-width.")
    ] = None,
    events: Annotated[
        str | None, typer.Option(metavar="FILE", help="YAML list of events to give probabilities of.")
    ] = None,
    at: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Longitude and latitude: where events without a region are asked."),
    ] = None,
    quantiles: Annotated[str, typer.Option(help="Comma-separated, such as 0.1,0.5,0.9.")] = "",
    keep_members: Annotated[bool, typer.Option("--keep-members", help="Have the members as well.")] = False,
    sampler: Annotated[str, typer.Option(help="ddpm, ddim, dpm++ or unipc.")] = "dpm++",
    steps: Annotated[int, typer.Option(help="Calls of the denoiser a member.")] = 20,
    deviations: Annotated[
        float | None, typer.Option(help="Guide the forecast to mu + n sigma of the functional.")
    ] = None,
    strength: Annotated[float | None, typer.Option(help="Scale of the guidance.")] = None,
    seed: int = 0,
    deadline: Annotated[float | None, typer.Option(help="Seconds; what there is by then is kept.")] = None,
    out: Annotated[str | None, typer.Option(help="Path of a NetCDF file to write.")] = None,
    url: Annotated[str, typer.Option(help="Of the service.")] = "http://127.0.0.1:8000",
    token_file: Annotated[str | None, typer.Option(metavar="FILE", help="Of the bearer token.")] = None,
) -> None:
    """Ask a running service for a forecast, and print the probabilities of its events."""
    import xarray as xr

    from pipelines import client, plans
    from pipelines.events import read_events
    from pipelines.serving.settings import first_line

    asked = read_events(events) if events else ()
    found, status = client.request(
        url,
        event=event,
        start=start,
        tile=tile,
        archive=archive,
        context=None if context is None else xr.open_dataset(context),
        members=members,
        until_ci=until_ci,
        events=asked if at is None else [event.at(*at) for event in asked],
        quantiles=plans.parse_quantiles(quantiles),
        keep_members=keep_members,
        sampler=sampler,
        steps=steps,
        deviations=deviations,
        strength=strength,
        seed=seed,
        deadline=deadline,
        token=first_line(token_file) if token_file else None,
        progress=True,
    )
    if status["events"]:
        console.print(client.table(status))
    console.print(escape(client.summary(status)), highlight=False, soft_wrap=True)
    if out is not None:
        found.to_netcdf(out, engine="h5netcdf")
        console.print(f"{out}: written")


@app.command()
def score(
    forecasts: Forecasts,
    archive: Archive,
    workers: Workers = None,
) -> None:
    """Score forecasts against the archive, side by side; writes JSON beside each, and reads it next time."""
    from pipelines import score as stage
    from pipelines import sheets

    for table in sheets.tables(stage.scored(forecasts, archive, workers=workers)):
        console.print(table)


@app.command()
def report(
    forecasts: Forecasts,
    archive: Archive,
    out: Annotated[str, typer.Option(metavar="URL", help="Of the HTML page to write.")],
) -> None:
    """One self-contained HTML page: score tables, skill against lead time, and forecast frames."""
    from pipelines import sheets
    from pipelines.report import report

    page = report(forecasts, archive, out)
    for table in sheets.tables(page.cards):
        console.print(table)
    done = "written" if page.written else "all there before"
    console.print(escape(f"{out}: {done}"), highlight=False, soft_wrap=True)


@app.command()
def inspect(url: Annotated[str, typer.Argument(metavar="URL", help="Archive, run or forecast.")]) -> None:
    """Print what an archive, run or forecast holds, finished or not."""
    from pipelines import runs
    from pipelines.archives import checks, records

    run = runs.describe(url)
    console.print(escape(run or checks.describe(url)), highlight=False, soft_wrap=True)
    if not run:
        _print_quarantine(records.quarantined(url), most=None)


@app.command()
def validate(url: Annotated[str, typer.Argument(metavar="URL", help="Archive or forecast.")]) -> None:
    """Check an archive's or a forecast's completeness and every checksum."""
    from pipelines.archives import checks

    problems = checks.validate(url)
    if not problems:
        console.print(f"{url}: complete, all checksums match", highlight=False, soft_wrap=True)
        return
    for problem in problems:
        console.print(escape(problem), highlight=False, soft_wrap=True)
    raise InputError(
        f"{url} is not whole: {problems[0]}" + (f" (and {len(problems) - 1} more)" if problems[1:] else "")
    )


@app.command()
def lineage(
    url: Annotated[str, typer.Argument(metavar="URL", help="Archive or forecast.")],
    chunk: Annotated[
        str,
        typer.Option(help="Key of an object, vil/c/3/0/0/0, or index of a chunk within it, vil/57/0/0/0."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say where a chunk is from: source file and bytes, windows and run, code, configuration and time."""
    from pipelines import lineage as of

    found = of.lineage(url, chunk)
    if as_json:
        console.print_json(json.dumps(found))
        return
    for line in of.lines(found):
        console.print(escape(line), highlight=False, soft_wrap=True)


@app.command()
def reprocess(
    config: Annotated[str, typer.Option(metavar="FILE", help="YAML of the campaign.")],
    dry_run: DryRun = False,
    prices: Prices = None,
) -> None:
    """Prepare archives, forecast them by several runs and score the forecasts; the same command resumes."""
    from pipelines import reprocess as stage

    todo = list(stage.steps(stage.read_campaign(config)))
    for step in todo:
        try:
            parse(step.words)
        except Exception as error:
            # Typer has its own copy of Click, whose errors are those that know how to say themselves.
            if not hasattr(error, "format_message"):
                raise
            raise InputError(f"campaign {config}: {step.words[0]}: {error.format_message()}") from error

    def command(words: Sequence[str]) -> None:
        console.print(
            escape(f"earthformer {shlex.join(words)}"), highlight=False, soft_wrap=True, style="bold"
        )
        app(words, standalone_mode=False)

    if not dry_run:
        stage.run(todo, command)
        return
    for step in todo:
        if missing := stage.missing(step):
            said = f"earthformer {shlex.join(step.words)}\n  needs {', '.join(missing)}, not there yet"
            console.print(escape(said), highlight=False, soft_wrap=True)
        elif step.words[0] != "report":
            priced = ("--prices", prices) if prices else ()
            command((*step.words, "--dry-run", *priced))


def parse(words: Sequence[str]) -> dict[str, Any]:
    """The options that a verb will be run with, by name.

    Raises:
        UsageError: there is no such verb or option, or a value is missing; Typer says it, with exit code 2.
    """
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    context = typer.Context(group, info_name="earthformer")
    name, command, rest = group.resolve_command(context, list(words))
    assert command is not None
    with command.make_context(name, rest, parent=context) as made:
        given = dict(made.params)
    # What kind of word each is says its place in the help.
    given["kinds"] = {option.name: option.metavar for option in command.params}
    return given


def main(command: Callable[[], None] = app) -> None:
    """Run the command; errors at the boundary are one line and exit code 2."""
    warnings.showwarning = lambda message, *_, **__: errors.print(f"warning: {escape(str(message))}")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    try:
        command()
    except InputError as error:
        _fail(str(error))
    except OSError as error:
        # A full or absent disk, an unreachable store: the message names the file.
        _fail(f"{type(error).__name__}: {error}")
    except Exception as error:
        cause = boundary_error(error)
        if cause is None:
            raise
        _fail(str(cause))


def _fail(message: str) -> None:
    errors.print(f"error: {escape(' '.join(message.split()))}", soft_wrap=True, highlight=False)
    sys.exit(2)


if __name__ == "__main__":
    main()
