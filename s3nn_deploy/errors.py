"""The package's one error type."""

from functools import partial
from typing import Any


class DeployError(Exception):
    """Something a user can mend: says where, what was expected, what was found, and the way out.

    Attributes:
        where: the file, population, module or option that is concerned.
        expected: what would have been right.
        got: what was found.
        hint: what to do about it.
    """

    def __init__(self, where: str, problem: str = "", *, expected: str = "", got: str = "", hint: str = "") -> None:
        self.where, self.expected, self.got, self.hint = where, expected, got, hint
        facts = [problem] if problem else []
        if expected:
            facts.append(f"expected {expected}" + (f", got {got}" if got else ""))
        elif got:
            facts.append(f"got {got}")
        text = f"{where}: {'; '.join(facts)}."
        super().__init__(f"{text} {hint}" if hint else text)
        self._problem = problem

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors travel between processes and machines with everything that they say."""
        facts = {"expected": self.expected, "got": self.got, "hint": self.hint}
        return partial(DeployError, self.where, self._problem, **facts), ()


def suggestion(word: str, known: list[str]) -> str:
    """A hint that names the nearest of the `known` words, or lists them."""
    from difflib import get_close_matches

    near = get_close_matches(word, known, n=1)
    return f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(sorted(known))}."
