"""The `earthformer` command: the pipeline's verbs, and `submit`, which sends them to a cluster."""

from cluster import submit
from pipelines import cli

cli.app.add_typer(submit.app, name="submit")


def main() -> None:
    """Run the command; errors at the boundary are one line and exit code 2."""
    cli.main()


if __name__ == "__main__":
    main()
