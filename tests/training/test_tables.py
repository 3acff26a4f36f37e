import csv
import io

from hypothesis import given
from hypothesis import strategies as st

from ring_rl.training.tables import csv_table, markdown_table


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.text("x,\"y\n'"), min_size=1)))
def test_records_come_back_from_their_csv(records):
    names = list(dict.fromkeys(name for record in records for name in record))
    read = list(csv.DictReader(io.StringIO(csv_table(records), newline="")))
    assert read == [{name: record.get(name, "") for name in names} for record in records]


def test_what_is_not_known_is_left_empty():
    assert csv_table([{"seconds": None}, {"seconds": 1.5, "peak": 2}]) == "seconds,peak\n,\n1.5,2\n"
    assert csv_table([]) == ""


def test_a_markdown_table_has_a_rule_below_its_first_row():
    assert markdown_table([["a", "b"], ["1", "2"]]).splitlines()[1].replace(" ", "").strip("|").split("|") == [
        "---",
        "---",
    ]
