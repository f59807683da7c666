"""The most memory of a process is its own."""

import subprocess
import sys

import pytest

from peft_jax.train.memory import peak_of_host


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing but ru_maxrss tells")
def test_the_peak_is_not_that_of_the_process_that_started_it():
    """Linux hands ``ru_maxrss`` on to what a process starts."""
    filled = b"x" * (700 << 20)
    program = "from peft_jax.train.memory import peak_of_host; print(peak_of_host())"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert 0 < int(told) < len(filled) < peak_of_host()
