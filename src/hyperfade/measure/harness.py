"""Public benchmarks: tasks of EleutherAI's lm-evaluation-harness, run on a model as it is in memory.

The harness has its own prompts, metrics and standard errors, and is asked for them as it stands: numbers can be laid
beside those that others publish. A model that takes images goes through the harness's `hf-multimodal`, which runs text
tasks too, any other through `hf`.
"""

from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hyperfade.errors import DataError, MissingLibraryError
from hyperfade.hub import takes_images

# What of the harness's results says what was measured; the rest is its environment and settings in full.
_KEPT = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")


def run_tasks(
    model: Any,
    processor: Any,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    chat: bool = False,
) -> dict[str, Any]:
    """The harness's results for `tasks`: names of tasks, groups or tags, or patterns like "arc_*".

    processor: a text-only model's tokenizer; of a model that takes images the harness reads the processor from the
    folder that the model came from. include: a folder with more tasks (YAML). limit: only the first examples of each
    task. chat: write prompts by the chat template. Returns `results` (task → metric → value, and its standard error)
    and what identifies them: `versions`, `n-shot`, `n-samples`, `higher_is_better`, `groups` if any, and
    `lm_eval_version`. Raises `MissingLibraryError` without lm-eval, `DataError` for tasks that cannot be found or whose
    data cannot be read.
    """
    try:  # optional: it brings thirty packages
        evaluator, text, images = (
            import_module(f"lm_eval.{name}") for name in ("evaluator", "models.huggingface", "models.hf_vlms")
        )
    except ImportError as error:
        raise MissingLibraryError(
            f"Tasks of lm-evaluation-harness were asked for, and lm-eval cannot be imported: {error}.",
            'pip install "hyperfade[lm-eval]"',
        ) from error
    names = [name.strip() for name in tasks if name.strip()]
    manager = _manager(names, include)
    if takes_images(model.config):
        wrapped = images.HFMultimodalLM(pretrained=model, batch_size=batch_size)
    else:
        wrapped = text.HFLM(pretrained=model, tokenizer=processor, batch_size=batch_size)
    try:
        found = evaluator.simple_evaluate(
            model=wrapped,
            tasks=manager.match_tasks(names),
            task_manager=manager,
            limit=limit,
            batch_size=batch_size,
            apply_chat_template=chat,
            log_samples=False,
        )
    except OSError as error:  # of data sets on a hub, and of files
        raise DataError(
            f"The data of {', '.join(names)} cannot be loaded: {error}",
            "Check the network, or the data_files of the task's YAML file.",
        ) from error
    return {key: found[key] for key in _KEPT if key in found} | {"lm_eval_version": version("lm_eval")}


def _manager(tasks: Sequence[str], include: Path | None) -> Any:
    """The harness's index of tasks, with the folder `include`, in which all of `tasks` are known."""
    from lm_eval.tasks import TaskManager

    if not tasks:
        raise DataError("No task of lm-evaluation-harness is named.", "Give names like arc_easy,hellaswag.")
    if include is not None:
        if not include.is_dir():
            raise DataError(f"{include} is no folder.", "Give the folder that holds the tasks' YAML files.")
        own = TaskManager(include_path=str(include), include_defaults=False)
        if set(tasks) <= set(own.all_subtasks):  # spares reading the harness's own files, more than ten thousand
            return own
    manager = TaskManager(include_path=None if include is None else str(include))
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        place = f", nor has {include}" if include is not None else ""
        raise DataError(
            f"lm-evaluation-harness has no task {', '.join(unknown)}{place}.",
            "`lm-eval ls tasks` lists its tasks; --include FOLDER adds tasks of your own.",
        )
    return manager
