"""The README cannot rot: its Python runs, its commands exist, and every command is in it."""

import re
import subprocess
import sys
from pathlib import Path

from s3nn_deploy import cli

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


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
