"""Where the FFNs are, what becomes of them, and the change itself."""

from hyperfade.surgery.basis import (
    contribution_order,
    energy_order,
    kept_errors,
    permute_hidden_,
    pruned_error,
    refitted_writer,
)
from hyperfade.surgery.experts import Experts, close_experts_, find_experts, tensor_names
from hyperfade.surgery.families import (
    FFN,
    Dense,
    dense_matrices,
    features,
    find_ffns,
    region_of,
    weight_of,
)
from hyperfade.surgery.plan import Plan, Swap, human, kept_units, matched_low_rank, plan, spec_of
from hyperfade.surgery.swap import blends, drop_dense_, install_, join_readers_, set_alpha_, swap_

__all__ = [
    "FFN",
    "Dense",
    "Experts",
    "Plan",
    "Swap",
    "blends",
    "close_experts_",
    "contribution_order",
    "dense_matrices",
    "drop_dense_",
    "energy_order",
    "features",
    "find_experts",
    "find_ffns",
    "human",
    "install_",
    "join_readers_",
    "kept_errors",
    "kept_units",
    "matched_low_rank",
    "permute_hidden_",
    "plan",
    "pruned_error",
    "refitted_writer",
    "region_of",
    "set_alpha_",
    "spec_of",
    "swap_",
    "tensor_names",
    "weight_of",
]
