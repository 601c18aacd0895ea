"""What a service forecasts with and from, and whether what is asked of it fits."""

from dataclasses import asdict, dataclass, replace

from pipelines import configs, plans, runs
from pipelines.archives import records, store
from pipelines.archives.store import Archive
from pipelines.errors import InputError
from pipelines.events import parse_events
from pipelines.exceedances import Levels
from pipelines.plans import Drawing, Ensemble
from pipelines.serving.asked import EventsRequest, ForecastRequest, Inline, Referenced
from pipelines.serving.contexts import Context, Refused, read_context, refusing
from pipelines.serving.forecast import Forecast
from pipelines.serving.settings import Settings
from pipelines.serving.tally import Job
from pipelines.tasks import Task


@dataclass(frozen=True, eq=False)
class Model:
    """A run, its alignment network, and the archives that contexts are taken from."""

    settings: Settings
    run: runs.Run
    grid: tuple[int, int]
    """Height and width."""
    guiding: Drawing
    """Its precision; the alignment network, its hash and its strength, if there is one."""
    archives: dict[str, Archive]

    @classmethod
    def open(cls, settings: Settings) -> "Model":
        """
        Raises:
            InputError: the run, the alignment's run or an archive is absent, unfinished or of another kind.
        """
        run = runs.open_run(settings.run)
        if run.config.trainable != "denoiser":
            raise InputError(
                f"{settings.run} is a run of {run.config.trainable}: needed one of a denoiser, whose "
                "members differ"
            )
        precision = "bf16" if settings.bf16 else "float32"
        guiding = plans.checked(Drawing(alignment=settings.alignment, precision=precision), run)
        archives = {name: store.open_archive(url) for name, url in settings.archives.items()}
        task = run.config.task
        for name, archive in archives.items():
            if archive.kind != task.archive:
                raise InputError(
                    f"archive {name} is of {archive.kind}: task {task.name} needs {task.archive}"
                )
        _, height, width, _ = configs.fields(run.config)["context"]
        return cls(settings, run, (height, width), guiding, archives)

    @property
    def task(self) -> Task:
        """Of the run."""
        return self.run.config.task

    def forecast(self, number: str, asked: ForecastRequest, chunk: int) -> Forecast:
        """A forecast as asked, `chunk` members at a time.

        Raises:
            Refused: it does not fit the model, an archive or a limit.
        """
        limits = self.settings
        members = asked.members or (limits.max_members if asked.until_ci else 32)
        for name, found, most in (
            ("members", members, limits.max_members),
            ("steps", asked.steps, limits.max_steps),
            ("events", len(asked.events), limits.max_events),
            ("quantiles", len(asked.quantiles), limits.max_quantiles),
        ):
            if found > most:
                raise Refused(name, f"is {found}: this service allows {most}")
        drawing = replace(self.guiding, sampler=asked.sampler, steps=asked.steps)
        with refusing("steps"):
            plans.check_sampling(drawing, self.run)
        if asked.guidance is None:
            drawing = replace(drawing, alignment=None, alignment_hash=None, strength=None)
        elif self.guiding.alignment is None:
            raise Refused("guidance", "this service has no alignment network: needed none")
        else:
            strength = asked.guidance.strength
            drawing = replace(
                drawing,
                deviations=asked.guidance.deviations,
                strength=self.guiding.strength if strength is None else strength,
            )
        with refusing("events"):
            events = parse_events(asked.events, "events") if asked.events else ()
            ensemble = Ensemble(members, asked.until_ci, events, tuple(asked.quantiles), asked.keep_members)
        context = self.context(asked.context)
        with refusing("events"):
            bound = context.samples.bind(events)
        job = Job(bound, Levels.of(self.task), ensemble.quantiles, ensemble.keep_members, drawing)
        return Forecast(number, asked, context, job, ensemble, chunk)

    def identity(self, asked: Referenced | Inline) -> str:
        """Of the model and of a context's archive: what beside the request decides a member's values."""
        archive = self.archives.get(asked.archive) if isinstance(asked, Referenced) else None
        decides = {
            "run": self.run.hash,
            "drawing": {**asdict(self.guiding), "alignment": None},
            "archive": archive.config_hash if archive is not None else None,
        }
        return records.config_hash(decides)

    def context(self, asked: Referenced | Inline) -> Context:
        """The context that is asked for.

        Raises:
            Refused: it is unknown, malformed or does not fit.
        """
        most = int(self.settings.max_body_mb * 1e6)
        return read_context(asked, self.task, self.grid, self.archives, most)

    def validate(self, asked: EventsRequest) -> list[str]:
        """Names of the events, if all of them can be asked.

        Raises:
            Refused: an event does not fit.
        """
        with refusing("events"):
            events = parse_events(asked.events, "events")
        if asked.context is not None:
            with refusing("events"):
                self.context(asked.context).samples.bind(events)
        return [event.name for event in events]
