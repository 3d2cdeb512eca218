"""Near-duplicates beside data-juicer: the deduplicator alone on a corpus, and its second half on given signatures.

    python -m benchmarks.dedup --corpus FILE --assets FOLDER [--quick] [--rounds 1] [--peer data-juicer|none]
    python -m benchmarks.dedup --corpus FILE --assets FOLDER --rows 1006218

The first form runs a YAML whose only operator is document_simhash_deduplicator. The second makes signatures from those
of real texts: one in ten a near copy, the others far from their original; and takes as many equal ones. Signatures in,
the first row of each cluster out. The last line is one JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.clean import corpus_of
from benchmarks.ours import Run, run_warm, told
from benchmarks.peer_data_juicer import (
    SIMHASH,
    PeerRun,
    check_peer,
    model_home,
    options_of,
    rows_of,
    run_peer,
    write_config,
)
from pipelines.clean.column import Column
from pipelines.clean.operators.simhash import document_simhash_deduplicator
from pipelines.report.page import environment
from pipelines.similarity.hamming import Signatures, first_of_near
from pipelines.similarity.on_ray import find_near
from pipelines.similarity.utf8 import Indices
from rayjobs.cluster import Cluster

DISTANCE = 6
QUICK_ROWS = 20_000
PEER = """
import sys, time
import numpy as np
from datasets import Dataset
from data_juicer.ops.deduplicator.document_simhash_deduplicator import DocumentSimhashDeduplicator
signatures = np.load(sys.argv[1])
rows = Dataset.from_dict({"simhash": [str(value) for value in signatures], "row": list(range(len(signatures)))})
rows = rows.rename_column("simhash", "__dj__simhash")
operator = DocumentSimhashDeduplicator(num_blocks=10, hamming_distance=6)
began = time.perf_counter()
kept, _ = operator.process(rows)
print("seconds", time.perf_counter() - began)
np.save(sys.argv[2], np.array(kept["row"]))
"""


def main() -> int:
    """Measure and print."""
    options = options_of(__doc__).parse_args()
    with tempfile.TemporaryDirectory(prefix="danlu-bench-") as temporary:
        folder = Path(temporary)
        os.environ.update(model_home(options.assets, folder / "models"))
        if options.peer != "none":
            check_peer(options.peer_python)
        summary = _signatures_alone(options, folder) if options.rows else _beside_peer(options, folder)
    print(json.dumps({"name": "dedup", **summary, "environment": environment().model_dump()}, ensure_ascii=False))
    return 0


def _beside_peer(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    source = corpus_of(options, folder)
    rows = pq.read_metadata(source).num_rows
    config = write_config(folder / "ours.yaml", source, folder / "ours.jsonl", [SIMHASH])
    theirs = write_config(folder / "theirs.yaml", source, folder / "theirs" / "theirs.jsonl", [SIMHASH])
    runs: list[Run] = []
    peers: list[PeerRun] = []
    for number in range(options.rounds):
        runs.append(run_warm(config, folder / f"warm-{number}", "export", ("export.overwrite=true",)))
        if options.peer != "none":
            peers.append(run_peer(options.peer_python, "dj-process", theirs, {}))
    ours = statistics.median(run.seconds for run in runs)
    peer = statistics.median(run.seconds for run in peers) if peers else None
    kept = [
        rows_of(path, ["id"]) for path in (folder / "ours.jsonl", folder / "theirs" / "theirs.jsonl") if path.exists()
    ]
    print(f"ours {ours:.2f} s, {len(kept[0])} of {rows} rows stay" + (f"; data-juicer {peer:.2f} s" if peer else ""))
    return {
        "ours": round(rows / ours, 1),
        "peer": round(rows / peer, 1) if peer else None,
        "unit": "rows/s",
        "ratio": round(peer / ours, 2) if peer else None,
        "equal": kept[0] == kept[1] if peers else None,
        "runs": {
            "rows": rows,
            "ours_seconds": [round(run.seconds, 2) for run in runs],
            "peer_seconds": [round(run.seconds, 2) for run in peers],
            "peer_cold": told(peers[-1].whole) if peers else None,
        },
    }


def _signatures_alone(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    rows = min(options.rows, QUICK_ROWS) if options.quick else options.rows
    signatures = made_signatures(options.corpus, rows)
    shapes = {"made": signatures, "equal": np.full(rows, signatures[0])}
    seconds: dict[str, list[float]] = {}
    found: dict[str, Indices] = {}
    with Cluster("local") as cluster:
        cluster.connect()
        first_of_near(signatures, DISTANCE, find_near)  # workers, where there are so many, and kernels
        for name, given in shapes.items():
            seconds[name] = []
            for _ in range(options.rounds):
                began = time.perf_counter()
                found[name] = first_of_near(given, DISTANCE, find_near)
                seconds[name].append(round(time.perf_counter() - began, 2))
    kept = {name: np.flatnonzero(first == np.arange(rows)) for name, first in found.items()}
    for name in shapes:
        print(f"{name}: {statistics.median(seconds[name]):.2f} s, {len(kept[name])} of {rows} stay")
    ours, peer, equal = statistics.median(seconds["made"]), None, None
    if options.peer != "none":
        peer, theirs = _peer_on(options.peer_python, signatures, folder)
        equal = bool(np.array_equal(theirs, kept["made"]))
        print(f"data-juicer, made: {peer:.2f} s, {len(theirs)} stay")
    return {
        "ours": ours,
        "peer": peer,
        "unit": "s",
        "ratio": round(peer / ours, 2) if peer else None,
        "equal": equal,
        "runs": {"rows": rows, "seconds": seconds, "kept": {name: len(which) for name, which in kept.items()}},
    }


def made_signatures(corpus: Path, rows: int, seed: int = 7) -> Signatures:
    """Signatures of real texts, each again and again with some of its bits turned over."""
    texts = Column(pq.read_table(corpus, columns=["response"])["response"].combine_chunks().cast(pa.large_string()))
    options = SIMHASH["document_simhash_deduplicator"]
    own = {key: options[key] for key in ("tokenization", "window_size", "lowercase", "ignore_pattern")}
    real: Signatures = document_simhash_deduplicator(texts, **own).to_numpy(zero_copy_only=False)  # type: ignore[arg-type]
    random = np.random.default_rng(seed)
    turned = np.where(random.random(rows) < 0.1, random.integers(1, DISTANCE, rows), random.integers(12, 32, rows))
    order = np.argsort(random.random((rows, 64), dtype=np.float32), axis=1)
    bits = np.where(np.arange(64) < turned[:, None], np.uint64(1) << order.astype(np.uint64), np.uint64(0))
    masks = np.bitwise_or.reduce(bits, axis=1)
    masks[: len(real)] = 0
    repeated: Signatures = real[np.arange(rows) % len(real)] ^ masks
    return repeated


def _peer_on(python: Path, signatures: Signatures, folder: Path) -> tuple[float, Indices]:
    """Seconds of data-juicer's own second half, and the rows it keeps."""
    given, kept = folder / "signatures.npy", folder / "kept.npy"
    np.save(given, signatures)
    command = [str(python), "-c", PEER, str(given), str(kept)]
    result = subprocess.run(command, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"data-juicer ended with {result.returncode}:\n{result.stderr[-4000:]}")
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("seconds ")]
    return round(float(line.split()[1]), 2), np.load(kept)


if __name__ == "__main__":
    sys.exit(main())
