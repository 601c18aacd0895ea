"""The one error that users see: a single line, exit code 2."""

import sys


class InputError(Exception):
    """Something at the boundary is wrong: the message names what was found and what was needed."""


def one_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).strip("'\"").split()) or type(error).__name__


def boundary_error(error: BaseException | None) -> Exception | None:
    """The boundary error that Ray wrapped on its way from a worker, if there is one."""
    seen: set[int] = set()
    queue = [error]
    while queue:
        found = queue.pop()
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        workers = getattr(found, "worker_failures", None) or {}
        wrapped = [getattr(found, name, None) for name in ("cause", "controller_failure")]
        numbered = getattr(found, "errno", 0) is not None
        # Ray's wrapper is of the class of what it wraps, but its message is a traceback.
        if isinstance(found, InputError | OSError) and numbered and not any(wrapped):
            return found
        if _unreachable(found):
            return OSError(one_line(found))
        queue += [found.__cause__, found.__context__, *wrapped, *workers.values()]
    return None


def _unreachable(error: BaseException) -> bool:
    """Whether an object store did not answer, or wants credentials: botocore has errors of its own."""
    botocore = sys.modules.get("botocore.exceptions")
    return botocore is not None and isinstance(error, botocore.BotoCoreError)
