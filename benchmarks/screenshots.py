"""Pictures of a report page, as docs/ has them: light, dark, and as narrow as a telephone; or of the docs' first page.

    python -m benchmarks.screenshots REPORT.html [--out docs/results]
    python -m benchmarks.screenshots site/index.html --name site --only light    # after `make docs`

Needs Chromium (`apt-get install chromium-headless-shell`, or name one in CHROMIUM) and the extra `test`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from dtt_plugin.errors import DttError

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PICTURES: dict[str, dict[str, Any]] = {
    "light": {"viewport": {"width": 1100, "height": 900}},
    "dark": {"viewport": {"width": 1100, "height": 900}, "color_scheme": "dark"},
    "narrow": {"viewport": {"width": 400, "height": 900}},
}
"""Per picture, how the page is opened; only what a screen shows at once is taken."""


def take(report: Path, out: Path, *, name: str = "report", only: str | None = None) -> list[Path]:
    """Write `NAME-PICTURE.png` for each picture, or `only` for one, into `out`, and return the files.

    Raises:
        DttError: there is no report, or no Chromium.
    """
    from playwright.sync_api import sync_playwright

    if not report.is_file():
        raise DttError(f"{report} is no file; make it with `dtt leaderboard RESULTS --html {report}`.")
    chromium = os.environ.get("CHROMIUM") or next((path for name in NAMES if (path := shutil.which(name))), None)
    if not chromium:
        raise DttError("There is no Chromium; install chromium-headless-shell, or name one in CHROMIUM.")
    out.mkdir(parents=True, exist_ok=True)
    files = []
    with sync_playwright() as playwright:
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's own does not start as root
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        for picture in [only] if only else PICTURES:
            page = browser.new_page(**PICTURES[picture])
            page.goto(report.resolve().as_uri())
            files.append(out / f"{name}-{picture}.png")
            page.screenshot(path=files[-1])
            page.close()
        browser.close()
    return files


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--name", default="report", help="what the files' names begin with (default: %(default)s)")
    parser.add_argument("--only", choices=[*PICTURES])
    args = parser.parse_args()
    try:
        files = take(args.report, args.out, name=args.name, only=args.only)
    except DttError as error:
        print(error, file=sys.stderr)
        return 2
    for file in files:
        print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
