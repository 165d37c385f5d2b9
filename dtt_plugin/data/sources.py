"""Where the files of the data folder come from, under which licence, and by what they are known.

A benchmark's files are pinned to a commit and to their digests. The addresses end at short commit ids; should a host
not resolve one, the newest version at the same place is asked for, and is used only if it is the same file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """One file of the data folder and where it comes from."""

    name: str
    url: str
    licence: str
    install: Callable[[Path, Path], None] | None = None
    """(downloaded file, file to write): checks the first and writes the second; None: what the digest names is kept."""
    set: str = "alpacafarm"
    """What `--only` calls it."""
    size: int = 0
    """Bytes; with a digest the exact size, else about."""
    sha256: str = ""
    git_blob: str = ""
    """Git's own hash of the file, where nobody may tell its SHA-256."""

    @property
    def urls(self) -> list[str]:
        """The address, and where the same file stands if that one is not resolved."""
        host, separator, path = self.url.partition("raw.githubusercontent.com/")
        parts = path.split("/")
        if not separator or len(parts) < 4:
            return [self.url]
        return [self.url, host + separator + "/".join([*parts[:2], "HEAD", *parts[3:]])]


def _pinned(
    set_name: str, repository: str, folder: str, licence: str, files: Sequence[tuple[str, int, str]]
) -> list[Source]:
    """Return sources of one folder of a repository; `files` are (path below both folders, bytes, SHA-256)."""
    return [
        Source(
            f"{set_name}/{path}",
            f"https://raw.githubusercontent.com/{repository}/{folder}/{path}",
            licence,
            set=set_name,
            size=size,
            sha256=sha256,
        )
        for path, size, sha256 in files
    ]


SEP_FILE = "sep/SEP_dataset.json"
SEP_892_FILE = "sep/SEP_validation_feb25.json"
CYBERSECEVAL2_FILE = "cyberseceval2/prompt_injection.json"

BENCHMARKS: tuple[Source, ...] = (
    Source(
        SEP_FILE,
        "https://raw.githubusercontent.com/egozverev/Should-It-Be-Executed-Or-Processed/main/datasets/SEP_dataset.json",
        "none stated in its repository",
        set="sep",
        size=12_000_000,
        git_blob="76943aae9aa9ffd30e17c6820dc46685daec34cd",
    ),
    *_pinned(
        "sep",
        "egozverev/aside",
        "a2de054/experiments/data",
        "Apache-2.0",
        [
            ("SEP_validation_feb25.json", 1162776, "ad98e682cea9f0e4cd1a02701aa2662d487fc5c1d913d7951226038c09a05d76"),
        ],
    ),
    *_pinned(
        "cyberseceval2",
        "meta-llama/PurpleLlama",
        "4be64c3/CybersecurityBenchmarks/datasets/prompt_injection",
        "MIT",
        [
            ("prompt_injection.json", 199176, "069e4d5d36f6d19f972a3bbc65df840cc729354f89358a9031aeb44d95b18a9a"),
        ],
    ),
    *_pinned(
        "bipia",
        "microsoft/BIPIA",
        "1a2a91d/benchmark",
        "MIT",
        [
            ("email/test.jsonl", 30334, "217b403faaa1d0cb12c24892bea39f4a0b9e2819919ac7e2b902006e28278cdb"),
            ("email/train.jsonl", 31586, "82207193cb8ce06713eeb7c33ca0716446613512e2ad9303b302ba14d425ddd4"),
            ("text_attack_test.json", 6322, "75750e7b4e8b34e8f9d88d89b357aeaaf02bd07f9e493ccd37eda74a0cd7c7f8"),
            ("text_attack_train.json", 5999, "63f95d3e67eac4178cdabdbdaf192cd05f2b6ed0702b578f1d30d556e5155670"),
            ("code_attack_test.json", 16356, "892545c5aaec0645b1ded65dc7816b3d70e9ef4eadcba2301a7a3db93676b6e0"),
        ],
    ),
    *_pinned(
        "bipia",
        "microsoft/BIPIA",
        "1a2a91d/benchmark",
        "CC BY-SA 4.0",
        [
            ("table/test.jsonl", 183302, "3d5eaab192b80bada762e3cd7655583a14e5888ba8b845a01f0434e4ccc4291e"),
            ("code/test.jsonl", 100451, "ed40b84f541352fb45753032a80750922de8d5e0b70997924df3d04cf942e058"),
        ],
    ),
    *_pinned(
        "piarena",
        "sleeepeer/PIArena",
        "215dad1/datasets",
        "MIT",
        [
            ("squad_v2.json", 241920, "564d23aa5523c47364d90cf5fd22053be8dd339c0dabad30439e3487d74a944b"),
            ("dolly_closed_qa.json", 356691, "d0ae030e433f2412dc687a3933774bec3227815726c804848db2c9ef41fe9c46"),
            (
                "dolly_information_extraction.json",
                388021,
                "14c0678627cfe044b8b1812d62d5e5e3e73c037fe425ccf5c8e3fd840884a3db",
            ),
            ("nq_rag.json", 613092, "eeaaf8afbd1cf03a892b6f228b447b94c3129124f04b73ec38e1ef1a62853e45"),
        ],
    ),
    *_pinned(
        "injecagent",
        "sleeepeer/PIArena",
        "215dad1/agents/InjecAgent/data",
        "MIT",
        [
            ("test_cases_dh_base.json", 672918, "0a8186468d21389af432e8c7b399ae42264d1b93a07b65c7a489468508604305"),
            ("test_cases_dh_enhanced.json", 721878, "885602716b72c18af80695ce6c2e1f242fa03163bc90b0788b0c5e4ab6216d50"),
            ("test_cases_ds_base.json", 765370, "4daab35c62a3845e8b9400f4dca58b9c9f37e57cd33b2337552557fbb26282e9"),
            ("test_cases_ds_enhanced.json", 817594, "7bc510868df032511053fc40e8470e68a041fb7148d055112093594bf73ab0ce"),
            ("tools.json", 541498, "e21a8f70b1d5de4677d6d52642936a322655d79b17a72c84f600550384083a1e"),
            (
                "attacker_simulated_responses.json",
                1359580,
                "b1da2e1fb75f266c069b832fef6738c295f01d8962fae15bdac9ff6625e5594e",
            ),
        ],
    ),
    *_pinned(
        "injecagent",
        "uiuc-kang-lab/AdaptiveAttackAgent",
        "7ea08cf/InjecAgent/data",
        "MIT",
        [
            (
                "test_cases_dh_base_subset.json",
                68723,
                "9dc5103e0093e9e7b32f4b0d193c22c2d84ffac0a7a7061fdb2e92f26340eef4",
            ),
            (
                "test_cases_ds_base_subset.json",
                77605,
                "a75e69da4e512cbae59ba614162699632df48c602d5537cc40e888859ccbbf0a",
            ),
        ],
    ),
    Source(
        "utility/gsm8k_test.jsonl",
        "https://raw.githubusercontent.com/openai/grade-school-math/3101c7d/grade_school_math/data/test.jsonl",
        "MIT",
        set="utility",
        size=749738,
        sha256="3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
    ),
    Source(
        "utility/ifeval_joined.parquet",
        "https://raw.githubusercontent.com/facebookresearch/Meta_SecAlign/2031502/lm_eval_config/ifeval/joined_ifeval.parquet",
        "CC BY-NC 4.0 repository, IFEval itself Apache-2.0",
        set="utility",
        size=618174,
        sha256="c87fa95c15115a201f4cf365d8f45ad5d8e6ec9a98c059874233571e8e3444ff",
    ),
)
"""The files of the benchmarks; `dtt fetch --only` downloads them."""
