"""Time and peak memory of `compatbench adapt` on files larger than it may hold: `python -m benchmark.bench_adapt`.

Makes synthetic pairs from a fixed seed (by default 1,000,000 x 512: 2 GB a file), fits, applies to .npy and to Parquet, each
in a process of its own, and removes all files. Peaks are of the whole process, Python and torch included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

PROBE = """
import json, sys, time
from pathlib import Path
from benchmark.__main__ import main

def held(name):
    return 1024e-9 * int(Path("/proc/self/status").read_text().split(name)[1].split()[0])

import benchmark.adapt
before, start = held("VmRSS:"), time.perf_counter()
status = main(sys.argv[2:])
figures = {"seconds": time.perf_counter() - start, "loaded_gb": before, "peak_gb": held("VmHWM:")}
Path(sys.argv[1]).write_text(json.dumps(figures))
sys.exit(status)
"""


def make(folder: Path, rows: int, dim: int) -> None:
    """new.npy, and old.npy that is new turned and disturbed; new.parquet with ids and a column, in one row group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(dim, dim)))[0].astype(np.float32)
    files = [np.lib.format.open_memmap(folder / f"{n}.npy", "w+", np.float32, (rows, dim)) for n in ("new", "old")]
    schema = pa.schema([("id", pa.string()), ("vector", pa.list_(pa.float32(), dim)), ("shop", pa.string())])
    with pq.ParquetWriter(folder / "new.parquet", schema) as writer:
        for at in range(0, rows, 50_000):
            n = min(50_000, rows - at)
            x = rng.standard_normal((n, dim), dtype=np.float32)
            files[0][at : at + n] = x
            files[1][at : at + n] = x @ turn + 0.5 * rng.standard_normal((n, dim), dtype=np.float32)
            names, shops = [f"item-{i}" for i in range(at, at + n)], [f"shop-{i % 7}" for i in range(n)]
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), dim)
            writer.write_table(pa.table([names, vectors, shops], schema=schema))
    for file in files:
        file.flush()


def measure(folder: Path, *arguments: str) -> dict[str, Any]:
    out = folder / "figures.json"
    subprocess.run([sys.executable, "-c", PROBE, str(out), "adapt", *arguments], cwd=folder, check=True)
    return json.loads(out.read_text())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmark.bench_adapt", description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--folder", type=Path, help="where the files go for the while (default: the temporary one)")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args(arguments)
    fit = ["--old", "old.npy", "--new", "new.npy", "--out", "adapter.safetensors", "--method"]
    use = ["--adapter", "adapter.safetensors"]
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        make(folder, args.rows, args.dim)
        figures = {
            "fit Procrustes": measure(folder, *fit, "Procrustes"),
            "fit Procrustes, Ridge, LowRank": measure(folder, *fit, "Procrustes", "Ridge", "LowRank"),
            "apply, .npy": measure(folder, "--apply", "new.npy", *use, "--out", "out.npy"),
            "apply, Parquet": measure(folder, "--apply", "new.parquet", *use, "--out", "out.parquet"),
        }
    threads = os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count())
    machine = {
        "cores": os.cpu_count(),
        "threads": threads,
        "load": os.getloadavg(),
        "python": platform.python_version(),
    }
    table = Table(
        "adapt",
        "seconds",
        "peak, GB",
        "of it loaded packages, GB",
        title=f"{args.rows:,} x {args.dim}, {threads} threads",
    )
    for what, row in figures.items():
        table.add_row(what, f"{row['seconds']:.1f}", f"{row['peak_gb']:.2f}", f"{row['loaded_gb']:.2f}")
    Console().print(table)
    if args.out:
        args.out.write_text(
            json.dumps({"rows": args.rows, "dim": args.dim, "machine": machine, "figures": figures}, indent=1)
        )


if __name__ == "__main__":
    main()
