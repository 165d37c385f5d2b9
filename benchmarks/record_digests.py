"""Write `dtt_plugin/assets/benchmark_digests.json` anew, from the files in DTT_DATA_DIR that are the known ones.

    DTT_DATA_DIR=FOLDER python benchmarks/record_digests.py

For a benchmark whose file has been added to `dtt_plugin/data/sources.py`.
"""

from __future__ import annotations

import json

from dtt_plugin.data.benchmark_files import DIGESTS, load_benchmark, record_digests
from dtt_plugin.data.records import data_folder
from dtt_plugin.data.sources import BENCHMARKS
from dtt_plugin.files.replacing import write_json


def main() -> None:
    digests = json.loads(DIGESTS.read_text(encoding="utf-8"))
    for source in BENCHMARKS:
        is_json = source.name.endswith((".json", ".jsonl"))
        if is_json and source.sha256 and (data_folder() / source.name).is_file():
            found = "".join(record_digests(load_benchmark(source.name)))
            digests |= {source.name: found} if found else {}
    write_json(DIGESTS, digests)


if __name__ == "__main__":
    main()
