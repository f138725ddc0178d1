"""Identities as people write them, as numbers and back."""

from __future__ import annotations

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from tvilfm.data.people import number_people, people_of, person_name, with_people


@given(st.lists(st.text("ap019 -", min_size=1, max_size=4).filter(str.strip), min_size=1))
def test_different_texts_are_different_people_and_keep_their_names(written: list[str]) -> None:
    numbers, names = number_people(written)
    assert set(numbers) == set(written)
    if not any(text.strip().lstrip("-").isdigit() for text in written):
        same = {
            (numbers[one] == numbers[other]) == (one.strip() == other.strip()) for one in written for other in written
        }
        assert same == {True}
    for text, number in numbers.items():
        spelled = {other.strip() for other in written if numbers[other] == number}
        assert names.get(number, str(number)) in spelled and text.strip() in spelled


def test_numbers_stay_what_they_are() -> None:
    assert number_people(["7", "0042", " 3 "]) == ({"7": 7, "0042": 42, " 3 ": 3}, {42: "0042"})
    assert number_people(["-1", "5"]) == ({"-1": -1, "5": 5}, {})


def test_text_is_numbered_in_natural_order() -> None:
    numbers, names = number_people(["p10", "p2", "alice", "-1", "7"])
    assert numbers == {"7": 1, "alice": 2, "p2": 3, "p10": 4, "-1": -1}
    assert names == {1: "7", 2: "alice", 3: "p2", 4: "p10"}
    numbers, names = number_people(["0001", "alice", "1"])
    assert numbers == {"0001": 1, "alice": 2, "1": 1} and names == {1: "0001", 2: "alice"}
    huge = "9" * 20
    assert number_people([huge, "8"]) == ({"8": 1, huge: 2}, {1: "8", 2: huge})


def test_names_travel_with_the_manifest() -> None:
    table = with_people(pa.table({"pid": [1, 2]}).replace_schema_metadata({"other": "x"}), {1: "alice"})
    assert people_of(table) == {1: "alice"} and table.schema.metadata[b"other"] == b"x"
    assert [person_name(table, pid) for pid in (1, 2)] == ["alice", "2"]
    assert people_of(pa.table({"pid": [1]})) == {}
