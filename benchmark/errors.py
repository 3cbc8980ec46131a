"""The one exception that users see: a single line that names the thing and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend. The command line prints it as one line and exits with 2."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """A `UserError` for a name that does not exist, with the nearest names that do."""
    names = sorted(known)
    near = difflib.get_close_matches(name.lower(), [n.lower() for n in names], n=3, cutoff=0.5)
    hint = [n for n in names if n.lower() in near] or names
    return UserError(f"unknown {kind} '{name}'; {'did you mean' if near else 'known'}: {', '.join(hint)}")
