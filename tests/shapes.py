"""While testing, the calls of the numeric core are checked against the shapes and types of their annotations."""

from __future__ import annotations

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

CHECKED = (
    "dtt_plugin.alignment",
    "dtt_plugin.tokens",
    "dtt_plugin.training.soft_prompt",
    "dtt_plugin.transfer",
)
check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # a whole number is a float, too
# Before anything is imported from there: pytest loads this module first (`-p tests.shapes`).
install_import_hook(CHECKED, "tests.shapes.check")
