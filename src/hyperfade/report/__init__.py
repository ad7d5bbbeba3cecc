"""Results for people: lines that commands print, the report page, its plots. Reads files and writes files, measures
nothing."""

from hyperfade.report.lines import (
    allocation_lines,
    fault_text,
    few_tokens_text,
    fit_text,
    harness_lines,
    plan_lines,
    quality_lines,
)
from hyperfade.report.page import read_metrics, write_report

__all__ = [
    "allocation_lines",
    "fault_text",
    "few_tokens_text",
    "fit_text",
    "harness_lines",
    "plan_lines",
    "quality_lines",
    "read_metrics",
    "write_report",
]
