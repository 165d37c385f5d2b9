"""What is measured: names below the output folder, and sizes."""

from __future__ import annotations

MODEL_NAME = "Qwen2.5-Coder-0.5B-Instruct"
MODEL, TWIN, SIBLING = f"models/{MODEL_NAME}", "models/twin", "models/drifted"
NATIVE = "tokens/native.safetensors"
STEPS, BATCH, LABEL_TOKENS, HELD_OUT, EVERY = 100, 8, 32, 32, 25
STARTS = ("adapted", "from-random")
"""Token files of the two trainings on the sibling: from the transferred tokens, and from N(0, I)."""
CURVE_STEPS, CURVE_RECORDS = (25, 50), 64
"""The curves' other points, step 0 and the last, come from the runs over all records, cut to the same 64."""
UTILITY = {"none": None, "native": "native"}
"""Token files of the runs on the model that measure utility."""
UTILITY_KINDS = ("log_likelihood", "multiple_choice")
UTILITY_RECORDS = 64
CHOICE_TASKS, CHOICE_ITEMS = ("social_iqa", "vitaminc_fact_verification"), 100
"""BIG-bench tasks, and how many of the first items of each."""
CELLS = {"base": 5, "twin": 3, "drifted": 5}
"""Runs of lm-eval over all records, per sweep."""
ENGINE = {"dtype": "float32", "max_model_len": 4096, "enforce_eager": True, "early_decision": True}
COSTS = {
    "base": ["train native"],
    "twin": [],
    "drifted": ["drift", "align drifted", "transfer drifted"],
    "curves": [f"train {name}" for name in STARTS],
    "utility": [f"{kind} {name}" for kind in UTILITY_KINDS for name in UTILITY],
}
"""Steps whose times a section of the page names, beside its runs of lm-eval."""
