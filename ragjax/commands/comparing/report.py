"""`ragjax report`: a run, or two side by side, as one page that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ragjax.errors import InputError
from ragjax.evaluation.report_page import report_page
from ragjax.evaluation.run_results import read_run_results
from ragjax.pages.rendering import write_html

REPORT = "report.html"


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Writes the report of one run, or of a run and a second one that is compared with it, and returns its path.

    By default it is RUN/report.html, in the first run's folder. Raises `InputError` for a run that was not evaluated.
    """
    if len(folders) == 2 and folders[0].resolve() == folders[1].resolve():
        raise InputError(f"{folders[1]}: is the first run again; name another one")
    out = folders[0] / REPORT if out is None else out
    if out.is_dir():
        raise InputError(f"{out}: is a folder; name a file, such as {out / REPORT}")
    alike = len({folder.resolve().name for folder in folders}) < len(folders)  # then whole paths tell them apart
    runs = [read_run_results(folder, str(folder) if alike else None) for folder in folders]
    return write_html(out, report_page(runs))
