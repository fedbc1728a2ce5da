"""Verification notices every single wrong integer that can change any output; see `mutation` for what a mutant is."""

from pathlib import Path

import pytest
from mutation import ENGINE, FILES, engine_score, file_score

MUTANTS = 40


@pytest.mark.parametrize("format", FILES)
def test_a_file_with_one_wrong_number_does_not_read_back_as_the_network(format: str, tmp_path: Path) -> None:
    score = file_score(format, MUTANTS, tmp_path)
    assert score.missed == 0
    assert score.by_reading + score.equivalent == MUTANTS
    assert score.equivalent == 0 or format == "nir"


@pytest.mark.parametrize("kind", ENGINE)
def test_an_engine_with_one_wrong_integer_is_noticed_unless_it_cannot_matter(kind: str) -> None:
    score = engine_score(kind, MUTANTS)
    assert score.missed == 0
    noticed = score.by_reading + score.by_network + score.by_population
    assert (noticed + score.equivalent, noticed > score.equivalent) == (MUTANTS, True)
