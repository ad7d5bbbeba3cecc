"""Results for people: totals that add up, and a page and plots from files alone."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_models import FAMILIES

from hyperfade.recipe import Layer, Replace
from hyperfade.report import allocation_lines, few_tokens_text, harness_lines, plan_lines, write_report
from hyperfade.surgery import human, plan


def test_the_plans_lines_add_up_to_the_plan() -> None:
    the_plan = plan(FAMILIES["llava_siglip"].meta(), Replace(language=Layer(n=4), vision=Layer(n=4)))
    header, rule, *rows, total, kept = plan_lines(the_plan, 2)
    assert header.split()[:3] == ["region", "matrix", "features"]
    assert set(rule) == {"-", " "}
    cells = [re.split(r"\s{2,}", row) for row in rows]
    assert sum(int(row[3]) for row in cells) == len(the_plan.swaps)
    assert {(row[0], row[1]) for row in cells} == {(s.region, s.name.rpartition(".")[2]) for s in the_plan.swaps}
    assert f"keep {the_plan.ffn_params_ratio:.1%} of their parameters" in total
    assert f"{human(the_plan.parameters_before)} → {human(the_plan.parameters_after)}" in total
    assert "at 16 bits" in total
    assert kept.startswith(f"{len(the_plan.kept)} FFN matrices stay dense")
    assert "at 32 bits" in "\n".join(plan_lines(the_plan, 4))


def _score(value: float, count: int = 1000) -> dict[str, Any]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "count": count}


def _question(value: float) -> dict[str, Any]:
    """One model's quality: questions about images and in text, of one kind."""
    scores, few = ({"exact_match": _score(x, n), "vqa_accuracy": _score(x, n)} for x, n in ((value, 1000), (0.5, 10)))
    by = {"by_kind": {"color": few}, "by_modality": {"image": scores, "text": few}}
    return {"tasks": {"question": {"headline": "exact_match", "scores": scores, **by}}, "skipped": []}


def _entry(after: float, errors: tuple[float | None, float | None]) -> dict[str, Any]:
    dense, own = _question(0.8), _question(after)
    speed = {
        "prefill_seconds": 0.01,
        "decode_seconds_per_token": 0.002,
        "prefill_speedup": 1.5,
        "prefill_speedup_range": [1.4, 1.6],
        "decode_speedup": 2.5,
        "decode_speedup_range": [2.4, 2.6],
    }
    details = {"dense": dense, "compressed": own}
    return {
        "quality": {"dense": 0.8, "compressed": after, "retention": after / 0.8, "details": details},
        "ffn_params_ratio": 0.25,
        "params_ratio": 0.4,
        "disk_bytes": {"dense": 10_000_000, "compressed": 4_000_000},
        "prefill_speedup": 1.5,
        "decode_speedup": 2.5,
        "speed": speed,
        "reload_bit_equal": True,
        "fit_seconds": 3.0,
        "training": {"steps": 2, "resumed_from": 0, "seconds": 5.0},
        "layers": [{"name": "model.a.fc1", "label": "products", "error": errors[0], "low_rank_error": errors[1]}],
        "kept_dense": [],
    }


def _folder(path: Path, rivals: dict[str, Any], skipped: list[list[str]], steps: int = 2) -> Path:
    own = _entry(0.72, (0.123456, 0.2))
    facts = ("processor", "threads", "accelerator", "torch", "transformers", "hyperfade", "date")
    results = {
        "machine": {key: key for key in facts},
        "recipe": {"model": "some-model", "dtype": "float32", "data": {"evaluation": "easy-vqa:test"}},
        "parameters": dict.fromkeys(("dense", "compressed", *rivals), 6000000),
        "prompt_tokens": 40,
        "dense_speed": own["speed"],
        **own,
        "skipped": skipped,
        "rivals": rivals,
    }
    (path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    for work in (path / "work", *(path / "rivals" / name / "work" for name in rivals)):
        work.mkdir(parents=True)
        values = {"loss": 1.0, "cross_entropy": 0.5, "kl": 0.5, "reconstruction": 0.0, "alpha": 1.0}
        lines = [json.dumps({"step": step + 1, **values}) + "\n" for step in range(steps)]
        (work / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("steps", [0, 2])
def test_a_report_is_made_from_the_files_of_a_folder(steps: int, tmp_path: Path) -> None:
    rivals = {"low_rank": _entry(0.6, (0.2, 0.2)), "random": _entry(0.1, (None, None))}
    write_report(_folder(tmp_path, rivals, [["x.jsonl line 3", "image broken"]], steps))
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert page.startswith("# some-model, compressed\n")
    for text in ("72.00%", "60.00%", "10.0 MB", "4.0 MB", "1.50×", "| model.a.fc1 |", "0.1235"):
        assert text in page
    assert "- x.jsonl line 3: image broken" in page
    many, few = ([f"{x:.2%} ({x - 0.1:.1%}-{x + 0.1:.1%})" for x in xs] for xs in ((0.8, 0.72, 0.6, 0.1), (0.5,) * 4))
    for row in (
        ["examples", "number", "metric (95 % interval)", "dense", "compressed", "low_rank", "random"],
        ["all", "1000", "exact match", *many],
        ["all", "1000", "VQA accuracy", *many],
        ["kind color", "10", "exact match", *few],
        ["with image", "1000", "exact match", *many],
        ["text only", "10", "exact match", *few],
    ):
        assert f"| {' | '.join(row)} |" in page
    assert "| kept | | exact match | 100.0% | 90.0% | 75.0% | 12.5% |" in page
    assert "easy-vqa:test, 1,000 questions, greedy answers, exact match, Wilson interval." in page
    linked = re.findall(r"\((plots/[a-z]+\.png)\)", page)
    assert sorted(linked) == sorted(f"plots/{path.name}" for path in (tmp_path / "plots").iterdir())
    for name in linked:
        with Image.open(tmp_path / name) as image:
            image.load()
            assert image.format == "PNG"


def _with_captions(details: dict[str, Any], cider: float) -> dict[str, Any]:
    scores = {"cider": _score(cider, 50), "bleu4": _score(31.25, 50)}
    caption = {"headline": "cider", "scores": scores, "by_kind": {}, "by_modality": {"image": scores}}
    return details | {"tasks": details["tasks"] | {"caption": caption}}


def test_every_task_has_its_table_and_its_column(tmp_path: Path) -> None:
    folder = _folder(tmp_path, {"low_rank": _entry(0.6, (0.2, 0.2))}, [])
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    for entry in (results, results["rivals"]["low_rank"]):
        details = entry["quality"]["details"]
        details["dense"] = _with_captions(details["dense"], 1.25)
    own = results["quality"]["details"]
    own["compressed"] = _with_captions(own["compressed"], 1.0)  # of the rival no caption could be used
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    write_report(folder)
    page = (folder / "report.md").read_text(encoding="utf-8")
    assert re.findall("## Quality: (.*)", page) == ["question", "caption"]
    for row in (
        "| model | question: exact match (95 % interval) | caption: CIDEr (95 % interval) | kept, least of the tasks |",
        "| **hyperfade** | 72.00% (62.0%-82.0%) | 1.000 (0.90-1.10) |",
        "| low-rank, whitened | 60.00% (50.0%-70.0%) | - |",
        "| all | 50 | CIDEr | 1.250 (1.15-1.35) | 1.000 (0.90-1.10) | - |",
        "| all | 50 | BLEU-4 | 31.2 (31.1-31.4) | 31.2 (31.1-31.4) | - |",
        "| kept | | CIDEr | 100.0% | 80.0% | - |",
        "1,000 of task question, 50 of task caption, greedy answers; intervals are",
    ):
        assert row in page
    assert len({line.count("|") for line in page.splitlines()[2:7]}) == 1


def test_where_a_budget_went_is_said_for_every_model_that_has_one(tmp_path: Path) -> None:
    first = {"name": "model.a.mlp", "region": "language", "size": "8 of 32 units", "parameters": 25, "loss": 0.02}
    first |= {"dense_parameters": 100, "sensitivity": 2.0, "error": 0.1}
    shares = [first, first | {"name": "model.b.mlp", "size": "dense", "parameters": 100, "error": 0.0, "loss": 0.0}]
    allocation = {"budget": 0.65, "shares": shares, "loss": 0.02, "uniform_loss": 0.05}
    assert allocation_lines(allocation) == [
        "budget: language keeps 62.5% of its parameters, from 25.0% (model.a.mlp: 8 of 32 units, sensitivity 2) to "
        "100.0% (model.b.mlp: dense, sensitivity 2)",
        "budget: 62.50% of 65.00% used; predicted loss change 0.02 nats per answer token, with one size for all 0.05",
    ]
    write_report(_folder(tmp_path, {"pruned": _entry(0.6, (0.2, 0.2)) | {"allocation": allocation}}, []))
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert re.findall("## Where the budget went: (.*)", page) == ["pruned"]
    assert "| model.a.mlp | 8 of 32 units | 25.0% | 2 | 0.1000 | 0.02 |" in page
    assert "| model.b.mlp | dense | 100.0% | 2 | 0.0000 | 0 |" in page


def test_nothing_left_out_is_said_as_well(tmp_path: Path) -> None:
    write_report(_folder(tmp_path, {}, []))
    assert (tmp_path / "report.md").read_text(encoding="utf-8").endswith("## Samples left out\n\nNone.\n")


def test_a_random_start_has_no_errors_to_show(tmp_path: Path) -> None:
    folder = _folder(tmp_path, {}, [])
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    results["layers"] = _entry(0.1, (None, None))["layers"]
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    write_report(folder)
    assert "| model.a.fc1 | products | - | - |" in (folder / "report.md").read_text(encoding="utf-8")


def test_standard_errors_and_filters_are_written_where_there_are_any() -> None:
    found = {
        "results": {
            "gsm": {"alias": "gsm", "exact_match,strict": 0.5, "exact_match_stderr,strict": 0.1},
            "a": {"alias": "a", "bleu,none": 12, "bleu_stderr,none": "N/A", "note,none": "text"},
            "group": {"alias": "group", "acc,none": 0.25},
        },
        "n-samples": {"gsm": {"original": 20, "effective": 10}, "a": {"original": 3, "effective": 3}},
    }
    assert harness_lines(found) == [
        "gsm    exact_match (strict)  0.5000   ± 0.1000  of 10",
        "a      bleu                  12.0000            of 3",
        "group  acc                   0.2500",
    ]
    assert harness_lines({"results": {}, "n-samples": {}}) == []


def test_experts_that_calibration_hardly_reached_are_named_with_their_tokens() -> None:
    few = {str(expert): expert * 3 for expert in range(10)}
    assert few_tokens_text({"4": 0}).endswith("than on their own tokens: expert 4 (0)")
    assert few_tokens_text(few).endswith("expert 0 (0), 1 (3), 2 (6), 3 (9), 4 (12), 5 (15), 6 (18), 7 (21) and 2 more")
    assert few_tokens_text(few, None).endswith("8 (24), 9 (27)")
