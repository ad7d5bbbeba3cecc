"""The teacher costs no weights, and nothing that happens to the student reaches it."""

from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, logits
from toy import batch_of, calibration, swapped, train

from hyperfade.build import choose_trained_
from hyperfade.compose.lora import merge_lora_
from hyperfade.distill import distill_, fit_, teacher_of, unshare_
from hyperfade.recipe import Fit, Layer, Replace
from hyperfade.surgery import plan, swap_


@pytest.mark.parametrize("family", FAMILIES)
def test_a_teacher_shares_all_storage_computes_the_same_and_is_frozen(family: str) -> None:
    model = FAMILIES[family].build()
    trained = [parameter.requires_grad for parameter in model.parameters()]
    teacher = teacher_of(model)
    own, twin = dict(model.named_parameters()), dict(teacher.named_parameters())
    assert own.keys() == twin.keys()
    assert all(own[name].data_ptr() == twin[name].data_ptr() for name in own)
    buffers = dict(teacher.named_buffers())
    assert all(b.data_ptr() == buffers[name].data_ptr() for name, b in model.named_buffers())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert not teacher.training
    assert torch.equal(logits(model, FAMILIES[family]), logits(teacher, FAMILIES[family]))


def test_tied_weights_stay_tied_in_the_teacher() -> None:
    teacher = teacher_of(FAMILIES["qwen2"].build())
    assert teacher.lm_head.weight is teacher.model.embed_tokens.weight


@pytest.mark.parametrize("family", ["llava_siglip", "qwen2_5_vl", "blip2_opt"])
def test_swapping_the_student_leaves_the_teacher_as_it_was(family: str) -> None:
    model = FAMILIES[family].build()
    before = logits(model, FAMILIES[family])
    teacher = teacher_of(model)
    modules = [type(module) for module in teacher.modules()]
    replace = Replace(language=Layer(n=4), vision=Layer(n=2))
    swap_(model, plan(model, replace))
    assert [type(module) for module in teacher.modules()] == modules
    assert torch.equal(logits(teacher, FAMILIES[family]), before)


@pytest.mark.parametrize("basis", ["none", "energy"])
def test_no_training_of_the_student_reaches_the_teacher(basis: str, tmp_path: Path) -> None:
    """Light layers, the head and the embeddings (`train_also`), LoRA with its merge."""
    student, teacher, the_plan = swapped()
    batch = batch_of(range(4))
    with torch.no_grad():
        before = teacher(**batch).logits
    frozen = {name: parameter.clone() for name, parameter in teacher.named_parameters()}
    fit_(student, the_plan, calibration(), Fit(sweeps=2, basis=basis))
    recipe = train(
        train_also=("*lm_head*", "*embed_tokens*"), lora_rank=2, dense_learning_rate=1e-2, fade_steps=2, polish_steps=2
    )
    choose_trained_(student, recipe)
    distill_(student, teacher, 16, batch_of, recipe, seed=0, folder=tmp_path)
    merge_lora_(student)
    trained = dict(student.named_parameters())
    for name in ("lm_head.weight", "model.language_model.layers.0.self_attn.q_proj.weight"):
        assert not torch.equal(trained[name], frozen[name])  # they did train
    assert all(torch.equal(parameter, frozen[name]) for name, parameter in teacher.named_parameters())
    with torch.no_grad():
        assert torch.equal(teacher(**batch).logits, before)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())


def test_a_parameter_that_stops_sharing_keeps_its_value_and_identity() -> None:
    model = FAMILIES["llama"].build()
    teacher, parameter = teacher_of(model), model.lm_head.weight
    unshare_(parameter)
    assert model.lm_head.weight is parameter
    assert parameter.data_ptr() != teacher.lm_head.weight.data_ptr()
    assert torch.equal(parameter, teacher.lm_head.weight)
