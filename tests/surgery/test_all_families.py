"""Every family of the installed transformers goes the whole way, or fails for the reason that its table gives."""

import json
import sys
from pathlib import Path

import pytest
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import family_table
from families.shrink import shrunk
from families.trial import DENSE_TOO, NAMES, attempt

RESULTS = json.loads(family_table.RESULTS.read_text(encoding="utf-8"))
KEPT = {family["model_type"]: family for family in RESULTS["families"]}
BEFORE_OURS = ("build", "inputs", "forward of the dense", "plan: found", DENSE_TOO)
SAME_VERSION = RESULTS["transformers"] == transformers.__version__


@pytest.mark.parametrize("name", NAMES)
def test_a_family_goes_the_whole_way_or_fails_for_the_known_reason(name: str) -> None:
    """A family that has begun to pass has to come into the table: make it again."""
    if name not in KEPT or not (SAME_VERSION or KEPT[name]["passed"]):
        pytest.skip(f"transformers {RESULTS['transformers']} made the table, this is {transformers.__version__}")
    outcome = attempt(name)
    if not SAME_VERSION and outcome.reason.startswith(BEFORE_OURS):  # another version's config or forward
        pytest.skip(outcome.reason)
    assert (outcome.passed, outcome.reason) == (KEPT[name]["passed"], KEPT[name]["reason"])
    assert {region: list(part) for region, part in outcome.ffns.items()} == KEPT[name]["ffns"]


def test_at_least_sixty_pass_and_each_meets_what_it_replaces() -> None:
    passed = [family for family in KEPT.values() if family["passed"]]
    assert len(passed) >= 60
    assert all(family["ffns"] for family in passed)
    for family in passed:
        met, replaced = family["reached"]
        assert 0 < met <= replaced
        assert met > replaced / 2 or family["reason"].startswith("words alone")


def test_the_page_is_what_the_kept_results_give() -> None:
    assert family_table.page(RESULTS) == family_table.PAGE.read_text(encoding="utf-8")
    assert set(family_table.WHY) <= {name for name, family in KEPT.items() if not family["passed"]}


def test_a_config_is_made_small_by_rule_and_keeps_one_layer_of_each_kind() -> None:
    config = shrunk("qwen3_5")  # three linear layers, then one of full attention
    assert config.text_config.layer_types == ["linear_attention", "full_attention"]
    assert config.text_config.num_hidden_layers == 2
    assert (config.text_config.hidden_size, config.text_config.intermediate_size) == (32, 48)
    assert (config.vision_config.hidden_size, config.vision_config.out_hidden_size) == (16, 32)
    assert config.image_token_id < config.text_config.vocab_size == 128
