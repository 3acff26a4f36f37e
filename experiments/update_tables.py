"""Puts the tables of experiments/results/ into README.md, between their markers. `--check` only compares.

A table stands between `<!-- table: experiments/results/<claim>/table.md -->` and `<!-- end of table -->`.
"""

import argparse
import re
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
_MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def with_tables(text: str, repository: Path) -> str:
    """`text` with every marked table replaced by the file that its marker names.

    Raises:
        FileNotFoundError: A marker names a table that is not there.
    """
    return _MARKED.sub(lambda match: f"{match[1]}{(repository / match[2]).read_text()}{match[3]}", text)


def main() -> None:
    """Rewrites README.md, or says that it is out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is out of date")
    check = parser.parse_args().check
    readme = REPOSITORY / "README.md"
    text = readme.read_text()
    updated = with_tables(text, REPOSITORY)
    if check and updated != text:
        sys.exit("error: README.md shows old tables; run python experiments/update_tables.py")
    if updated != text:
        readme.write_text(updated)


if __name__ == "__main__":
    main()
