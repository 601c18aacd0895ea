"""A campaign: archives prepared, forecast by several runs and scored, each step a command of its own.

A step whose result is there says so and does nothing, so that the same campaign goes on after a kill, and
when a source has gained files.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pipelines import configs
from pipelines.archives import records
from pipelines.errors import InputError

Options = dict[str, Any]


class Campaign(BaseModel):
    """What a campaign's YAML holds: options are those of the verbs, as on the command line."""

    model_config = ConfigDict(extra="forbid")

    out: str
    """URL of the folder for all that the campaign makes."""
    prepare: dict[str, Options]
    """Name of each archive to `kind`, `source` and other options of `prepare`; or to the `archive` that there
    is already."""
    forecast: dict[str, Options] = {}
    """Name of each forecast to options of `forecast`; it is made of all archives, or of those in `of`."""
    report: bool = True
    """Whether the forecasts of an archive are scored side by side, on a page."""


@dataclass(frozen=True)
class Step:
    """A command, and the results that it needs."""

    words: tuple[str, ...]
    makes: str
    needs: tuple[str, ...] = ()


def read_campaign(path: str) -> Campaign:
    """A campaign's YAML.

    Raises:
        InputError: it cannot be read, or holds something else than a campaign.
    """
    try:
        campaign = Campaign.model_validate(configs.read_overlay(path, []))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(f"campaign {path}: {place}: {first['msg'].lower()}") from error
    for name, options in campaign.forecast.items():
        for archive in options.get("of", ()):
            if archive not in campaign.prepare:
                configs.unknown(f"campaign {path}: forecast.{name}.of", str(archive), campaign.prepare)
    return campaign


def steps(campaign: Campaign) -> Iterator[Step]:
    """The commands of a campaign, in an order in which they can be run."""
    out = campaign.out.rstrip("/")
    for name, given in campaign.prepare.items():
        options = {"archive": f"{out}/{name}.zarr", **given}
        archive = str(options["archive"])
        if "source" in options:
            kind = [str(options.pop("kind"))] if "kind" in options else []
            yield Step(("prepare", *kind, *_words(options)), archive)
        forecasts = []
        for of, each in campaign.forecast.items():
            chosen = {key: value for key, value in each.items() if key != "of"}
            if name in each.get("of", campaign.prepare):
                place = f"{out}/{name}/{of}.zarr"
                forecasts.append(place)
                words = _words({**chosen, "archive": archive, "out": place})
                yield Step(("forecast", *words), place, (archive,))
        if forecasts and campaign.report:
            page = f"{out}/{name}.html"
            words = _words({"forecast": forecasts, "archive": archive, "out": page})
            yield Step(("report", *words), page, (archive, *forecasts))


def _words(options: Mapping[str, Any]) -> list[str]:
    """Options as on a command line."""
    found: list[str] = []
    for key, value in options.items():
        name = f"--{key.replace('_', '-')}"
        for each in value if isinstance(value, list) else [value]:
            if each is True:
                found.append(name)
            elif each is not None and each is not False:
                found += [name, str(each)]
    return found


def run(todo: Sequence[Step], command: Callable[[Sequence[str]], None]) -> None:
    """Run the steps one after another; where one fails those that need its result are left out.

    Raises:
        InputError: some steps failed; the first of them is named.
    """
    failed: dict[str, str] = {}
    for step in todo:
        lost = next((need for need in step.needs if need in failed), None)
        if lost is not None:
            failed[step.makes] = failed[lost]
            continue
        try:
            command(step.words)
        except InputError as error:
            failed[step.makes] = str(error)
    if failed:
        place, why = next(iter(failed.items()))
        raise InputError(f"{len(failed)} of {len(todo)} steps were not done, the first {place}: {why}")


def missing(step: Step) -> list[str]:
    """What a step needs and is not there yet."""
    return [url for url in step.needs if not records.is_complete(url)]
