"""The `earthformer` command: the pipeline's verbs, `submit`, which sends them to a cluster, and `doctor`."""

from cluster import submit
from cluster.doctor import doctor
from pipelines import cli

cli.app.add_typer(submit.app, name="submit")
cli.app.command()(doctor)


def main() -> None:
    """Run the command; errors at the boundary are one line and exit code 2."""
    cli.main()


if __name__ == "__main__":
    main()
