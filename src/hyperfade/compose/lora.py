"""LoRA on the language model's attention while the FFNs fade, through PEFT; merged at the end, so nothing stays."""

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hyperfade.errors import PlanError
from hyperfade.surgery import region_of

_ATTENTION = ("q_proj", "k_proj", "v_proj", "query", "key", "value", "qkv_proj", "query_key_value")


def add_lora_(model: nn.Module, rank: int, alpha: int) -> None:
    """Add trainable adapters (W + alpha/rank · B A) to every query, key and value projection of the language model.

    Raises `PlanError` where the model has none that we know by name.
    """
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in _ATTENTION and region_of(name) == "language"
    ]
    if not targets:
        raise PlanError(
            f"{type(model).__name__} has no attention projections called {', '.join(_ATTENTION[:3])} ….",
            "Set train.lora_rank: 0.",
        )
    for name in targets:
        # merging writes into the base weight in place, which a teacher may share
        linear = model.get_submodule(name)
        linear.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)  # type: ignore[union-attr]
    training = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=True), model)
    for parameter in training:  # PEFT freezes whatever is not an adapter
        parameter.requires_grad_(True)


def merge_lora_(model: nn.Module) -> None:
    """Fold all adapters into the weights they adapt and remove them."""
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]:
        layer.merge()  # type: ignore[attr-defined]
        model.set_submodule(name, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
