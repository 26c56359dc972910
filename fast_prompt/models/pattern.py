"""Regular expressions from anywhere: tried on names in a process that ends with its time, as Python's own need not.

Python's engine tries all ways to match, of which a short expression may have more than there is time for, and nothing
can interrupt it. An adapter's file may hold such an expression; one that is harmless gives what it always gave.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence

# It is done in milliseconds but for Python's start, which may be slow on a busy machine.
SECONDS = 10.0

# The alarm is for the case that nobody is left to end it.
PROGRAM = """
import json, re, signal, sys
getattr(signal, "alarm", int)(60)
pattern, names = json.load(sys.stdin)
print(json.dumps([name for name in names if re.fullmatch(pattern, name)]))
"""


def check_pattern(field: str, pattern: str) -> None:
    """Raise a ValueError that names the ``field`` unless ``pattern`` is a regular expression."""
    try:
        re.compile(pattern)
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{field}: expected a regular expression, got {pattern!r} ({error})") from error


def matching(field: str, pattern: str, names: Sequence[str]) -> list[str]:
    """Those of ``names`` that all of ``pattern`` matches; a ValueError names the ``field`` if time runs out."""
    command, given = [sys.executable, "-I", "-S", "-c", PROGRAM], json.dumps([pattern, names])
    try:
        done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=SECONDS, check=True)
    except subprocess.TimeoutExpired as error:
        raise ValueError(
            f"{field}: the regular expression {pattern!r} is not done after {SECONDS:g} seconds; name the modules in a "
            "list, or write it so that there is one way to match"
        ) from error
    except subprocess.CalledProcessError as error:
        raise ValueError(f"{field}: the regular expression {pattern!r} cannot be tried ({error.stderr})") from error
    return json.loads(done.stdout)
