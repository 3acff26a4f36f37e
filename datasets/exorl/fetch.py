"""Fetches a published ExoRL data set and unpacks it beside this file.

    python datasets/exorl/fetch.py walker rnd

Resumes after an interruption; overwrites nothing. What the data is: README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ring_rl.agent.environments.domains import DOMAINS
from ring_rl.agent.episodes.download import download, unpack
from ring_rl.atomic_file import atomic_file
from ring_rl.config import exit_on_bad_input

ALGORITHMS = ("aps", "diayn", "disagreement", "icm", "icm_apt", "proto", "random", "rnd", "smm")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("domain", choices=tuple(DOMAINS))
    parser.add_argument("algorithm", choices=ALGORITHMS)
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent / "data", help="where to")
    parser.add_argument(
        "--base-url",
        default="https://dl.fbaipublicfiles.com/exorl",
        help="fetches <base-url>/<domain>/<algorithm>.zip (default: %(default)s)",
    )
    parser.add_argument(
        "--largest-gigabytes",
        type=float,
        default=64.0,
        help="refuse an archive that unpacks to more (default: %(default)s)",
    )
    parser.add_argument("--keep-archive", action="store_true", help="keep the zip file after unpacking")
    return parser.parse_args()


def main() -> None:
    """Downloads, unpacks and says where."""
    arguments = parse_arguments()
    with exit_on_bad_input():
        folder = arguments.root / arguments.domain / arguments.algorithm
        record = folder / "fetch.json"
        if record.exists():
            print(f"{folder} was fetched before; to fetch it again, move it away")
            return
        folder.mkdir(parents=True, exist_ok=True)
        url = f"{arguments.base_url.rstrip('/')}/{arguments.domain}/{arguments.algorithm}.zip"
        archive = folder.with_name(f"{arguments.algorithm}.zip")
        download(url, archive, attempts=5, timeout_seconds=60.0, progress=True)
        largest_bytes = int(arguments.largest_gigabytes * 1e9)
        unpacked = unpack(archive, folder, largest_bytes=largest_bytes, progress=True)
        with atomic_file(record, overwrite=True) as temporary:
            temporary.write_text(json.dumps({"url": url, "archive_bytes": archive.stat().st_size}) + "\n")
        if not arguments.keep_archive:
            archive.unlink()
        print(f"{unpacked.written} files written to {folder}, {unpacked.already_there} were there already")


if __name__ == "__main__":
    main()
