"""Which code it was: what records say, so that results can be traced to the sources that made them."""

import hashlib
from functools import cache
from pathlib import Path

import earthformer
import pipelines

SOURCES = {".py", ".html", ".j2"}
DIGITS = 12


@cache
def code_version() -> str:
    """The release and the first hex digits of a SHA-256 over the sources, such as `0.1.0+3f9c2a71b04d`.

    The same for the same sources, whether they are installed, a checkout or sent along with a job. `cluster`,
    which decides where they run and not what they make, does not count.
    """
    digest = hashlib.sha256()
    for package in (earthformer, pipelines):
        root = Path(str(package.__file__)).parent
        found = {path.relative_to(root.parent).as_posix(): path for path in root.rglob("*")}
        for name in sorted(name for name, path in found.items() if path.suffix in SOURCES and path.is_file()):
            text = found[name].read_bytes()
            # With its length, so that no line can move from the end of one file to the start of the next.
            digest.update(f"{name}\0{len(text)}\0".encode() + text)
    return f"{pipelines.__version__}+{digest.hexdigest()[:DIGITS]}"


# Now, and not when a record is written: days later the files may be those of another state.
code_version()
