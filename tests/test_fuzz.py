"""Hostile files and values: what is read is right, or refused by a named error, at bounded cost.

`fuzzing.py` says what is tried and prints the table of a campaign.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

FUZZING = Path(__file__).with_name('fuzzing.py')


def campaign(cases, values, seed):
    "What it printed, and its exit code: 0 without faults."
    words = [sys.executable, str(FUZZING), str(cases), str(values), str(seed)]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    return done.stdout + done.stderr[-2000:], done.returncode


@pytest.mark.process
def test_some_hostile_files_and_values():
    said, code = campaign(cases=300, values=300, seed=0)
    assert code == 0, said
    assert int(re.search(r'together +(\d+)', said)[1]) > 600


@pytest.mark.slow
def test_the_campaign():
    said, code = campaign(cases=20_000, values=3_000, seed=1)
    print(said)
    assert code == 0, said
    assert int(re.search(r'together +(\d+)', said)[1]) > 23_000
