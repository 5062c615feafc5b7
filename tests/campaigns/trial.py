"""One trial of a campaign: what came of it, and whether a user could live with that."""

import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qat.errors import QatError

SECONDS = 60
UNSAFE_ADVICE = ("weights_only", "safe_globals", "Traceback", "allow_pickle")


@dataclass(frozen=True)
class Outcome:
    """What a trial ended in: "taken", "refused" with a message, or "broken" with the reason."""

    end: str
    message: str = ""


def attempt(job: Callable[[], Any]) -> Outcome:
    """Run ``job`` under an alarm; only our own errors, of one line, count as refused."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"still running after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        job()
    except QatError as error:
        return _judged(str(error))
    except BaseException as error:  # what a user would see as a traceback
        return Outcome("broken", f"{type(error).__name__}: {error}")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return Outcome("taken")


def _judged(message: str) -> Outcome:
    faults = [word for word in UNSAFE_ADVICE if word in message]
    if not message.isprintable() or len(message) > 1500:
        faults.append("not one short line")
    if "expected" not in message:
        faults.append("does not say what was expected")
    return Outcome("broken", f"{faults} in: {message}") if faults else Outcome("refused", message)


def summary(outcomes: dict[str, Outcome]) -> str:
    """Return the count of each end, and name and end of each trial."""
    counts = Counter(outcome.end for outcome in outcomes.values())
    lines = [f"{name:40} {o.end:8} {o.message}" for name, o in outcomes.items()]
    return "\n".join([str(dict(counts)), *lines])
