# SPDX-License-Identifier: Apache-2.0
"""How much Python a call runs: what its overhead is made of, and what a busy machine does not change."""

import sys
from collections.abc import Callable


def functions_entered(call: Callable[[], object]) -> list[str]:
    """Return the names of the Python functions that a call enters, once it has been made before."""
    call()
    names: list[str] = []

    def note(frame, event, _):
        if event == "call":
            names.append(frame.f_code.co_name)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return names
