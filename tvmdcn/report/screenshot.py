# SPDX-License-Identifier: Apache-2.0
"""Pictures of a page, taken by the Chromium of this machine without a window."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tvmdcn.errors import TvmdcnError

__all__ = ["BROWSERS", "ScreenshotError", "find_browser", "take_screenshot"]

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
"""Names that Chromium goes by, in the order in which they are looked for."""

_TIMEOUT = 120  # seconds
# Milliseconds of the page's own clock, which runs as fast as the scripts allow: the charts are drawn long before.
_TIME_TO_DRAW = 20_000


class ScreenshotError(TvmdcnError):
    """No picture could be taken."""


def find_browser() -> Path:
    """Return the Chromium of this machine.

    Raises
    ------
    ScreenshotError
        If there is none.
    """
    for name in BROWSERS:
        found = shutil.which(name)
        if found is not None:
            return Path(found)
    raise ScreenshotError(
        f"a picture needs Chromium, and none of {', '.join(BROWSERS)} is on the PATH: install it (Debian: apt install "
        "chromium), or open the page and take the picture by hand."
    )


def take_screenshot(page: Path, picture: Path, *, width: int = 1280, height: int = 1390) -> None:
    """Write what a window of that size shows of a page as PNG.

    Parameters
    ----------
    page : Path
        An HTML file.
    picture : Path
        The file to write.
    width, height : int
        Size of the window in pixels.

    Raises
    ------
    ScreenshotError
        If there is no Chromium, or it gives no picture; the message ends with what it said.
    OSError
        If the picture cannot be written.
    """
    browser = find_browser()
    picture.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tvmdcn-browser-") as folder:
        made = Path(folder, "page.png")
        command = [
            *(str(browser), "--headless", "--hide-scrollbars", "--disable-gpu", "--disable-dev-shm-usage"),
            *(f"--user-data-dir={folder}/profile", f"--window-size={width},{height}", f"--screenshot={made}"),
            *("--force-color-profile=srgb", f"--virtual-time-budget={_TIME_TO_DRAW}"),
            # Chromium refuses to run as root with its sandbox; the page is our own file.
            *(["--no-sandbox"] if os.geteuid() == 0 else []),
            page.resolve().as_uri(),
        ]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise ScreenshotError(f"{browser} gave no picture of {page} in {_TIMEOUT} s.") from error
        if done.returncode or not made.exists():
            said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
            raise ScreenshotError(f"{browser} gave no picture of {page} (exit code {done.returncode}): {said}")
        shutil.copyfile(made, picture)
