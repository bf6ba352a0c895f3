"""Markdown tables, and the machine's name."""

import os

from gaq_export.report.markdown import machine, markdown_table


def test_a_table_has_a_line_a_row_and_a_rule_below_its_head() -> None:
    assert markdown_table(("a", "b"), [("1", "2"), ("3", "4")]) == [
        "| a | b |",
        "| --- | --- |",
        "| 1 | 2 |",
        "| 3 | 4 |",
    ]


def test_the_machine_has_a_processor_and_cores() -> None:
    name, _, cores = machine().rpartition(", ")
    assert name
    assert cores == f"{os.cpu_count()} cores"
