"""The README cannot rot: its Python runs, its commands exist, and every command is in it."""

import re
import subprocess
import sys
from pathlib import Path

from s3nn_deploy import cli
from s3nn_deploy.loihi import mapping

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        subprocess.run([sys.executable, "-c", block], cwd=tmp_path, check=True)


def test_the_example_runs() -> None:
    example = Path(__file__).resolve().parent.parent / "examples" / "own_network.py"
    made = subprocess.run([sys.executable, example], check=True, capture_output=True, text=True)
    assert "equal, spike by spike" in made.stdout


def test_the_commands_of_the_readme_exist_and_none_is_missing() -> None:
    named = set(re.findall(r"(?:^    |`)s3nn-deploy (\w+)", README, re.MULTILINE))
    assert named <= set(cli.main.commands)
    assert set(cli.main.commands) - named <= {"demo", "models"}


def test_the_page_about_loihi_has_every_pass_every_encoding_and_every_option() -> None:
    page = (ROOT / "docs" / "loihi.md").read_text(encoding="utf-8")
    for name in mapping.PASSES:
        assert f"| {name} |" in page
    for name in set(mapping.ENCODINGS) - {"spikes"}:  # which needs no asking for
        assert f"| `{name}` |" in page
    for option in re.findall(r"(?<![-\w])--[a-z][a-z-]+", page):
        known = {
            name
            for c in [cli.main, *cli.main.commands.values(), *cli.setup.commands.values()]
            for p in c.params
            for name in p.opts
        }
        assert option in known, option
