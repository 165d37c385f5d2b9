"""The checks of `tests/shapes.py` are there while testing, and in no other process."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from dtt_plugin.alignment.heldout import retrieval
from dtt_plugin.alignment.polar import polar_factor
from dtt_plugin.tokens.files import DefensiveTokens


def test_a_wrong_shape_or_type_is_told() -> None:
    with pytest.raises(TypeError, match="parameter 'M'"):
        polar_factor(np.eye(3)[0])
    with pytest.raises(TypeError, match="parameter 'targets'"):
        retrieval(np.eye(3, dtype=np.float32), np.ones((3, 4), np.float32))
    with pytest.raises(TypeError, match="parameter 'rows'"):
        DefensiveTokens(np.ones((5, 8)), "a model", "random", "model")  # type: ignore[arg-type]


def test_in_use_nothing_checks() -> None:
    code = (
        "import sys, dtt_plugin.alignment, dtt_plugin.tokens.files, dtt_plugin.transfer.move\n"
        "print(sorted({'jaxtyping', 'beartype'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
