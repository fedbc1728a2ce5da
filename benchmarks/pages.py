"""Sections of a documentation page that a command writes: what lies between two comments that name it."""

from pathlib import Path

from s3nn_deploy.errors import DeployError
from s3nn_deploy.files import write_text


def put(page: Path, section: str, text: str) -> None:
    """Replace what lies between `<!-- SECTION: begin -->` and `<!-- SECTION: end -->` by `text`.

    Raises:
        DeployError: the page has no such section.
    """
    begin, end = f"<!-- {section}: begin -->", f"<!-- {section}: end -->"
    before, opened, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (opened and closed):
        raise DeployError(str(page), expected=f"the lines {begin} and {end}", got="no such section")
    write_text(page, f"{before}{begin}\n{text.rstrip()}\n{end}{after}")
