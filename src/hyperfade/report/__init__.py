"""Results for people: lines that commands print, how far work has come, the report page, its plots. Reads files and
writes files, measures nothing."""

from hyperfade.report.lines import (
    allocation_lines,
    fault_text,
    few_tokens_text,
    harness_lines,
    plan_lines,
    quality_lines,
)
from hyperfade.report.page import read_metrics, write_report
from hyperfade.report.progress import batch_progress, fit_progress, time_left

__all__ = [
    "allocation_lines",
    "batch_progress",
    "fault_text",
    "few_tokens_text",
    "fit_progress",
    "harness_lines",
    "plan_lines",
    "quality_lines",
    "read_metrics",
    "time_left",
    "write_report",
]
