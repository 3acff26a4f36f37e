"""Puts the tables of experiments/results/ into the pages that show them. `--check` only compares.

A table stands between `<!-- table: experiments/results/<claim>/table.md -->` and `<!-- end of table -->`.
"""

import argparse
import re
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PAGES = (
    *("README.md", "RESULTS.md"),
    *("ring_rl/kernels/README.md", "ring_rl/agent/README.md", "ring_rl/training/README.md"),
)
_MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def with_tables(text: str, repository: Path) -> str:
    """`text` with every marked table replaced by the file that its marker names.

    Raises:
        FileNotFoundError: A marker names a table that is not there.
    """

    def table(match: re.Match[str]) -> str:
        path = repository / match[2]
        if not path.exists():
            raise FileNotFoundError(f"there is no {match[2]}, which a page shows; measure it, or remove its marker")
        return f"{match[1]}{path.read_text()}{match[3]}"

    return _MARKED.sub(table, text)


def main() -> None:
    """Rewrites the pages, or says which of them are out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is out of date")
    check = parser.parse_args().check
    # All of them are made before the first is written: a table that is missing changes none.
    texts = {page: (REPOSITORY / page).read_text() for page in PAGES}
    try:
        updated = {page: with_tables(text, REPOSITORY) for page, text in texts.items()}
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
    old = [page for page in PAGES if updated[page] != texts[page]]
    if check and old:
        verb = "shows" if len(old) == 1 else "show"
        sys.exit(f"error: {' and '.join(old)} {verb} old tables; run python experiments/update_tables.py")
    for page in old:
        (REPOSITORY / page).write_text(updated[page])


if __name__ == "__main__":
    main()
