"""How long a training will take, from a moment of it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmark.plan import Node
    from benchmark.task import Task

SECONDS = 2.0  # of real training steps timed for each release
PIXELS = 2**18  # of a batch timed on a CPU: a whole one of large images would take minutes, and all memory


def pixels(task: Task) -> int:
    image = next(iter(task.item_loader("test", "query"))).x["image"]  # (B, C, H, W)
    return image[0, 0].numel()


def time_steps(node: Node, task: Task, seconds: float = SECONDS) -> tuple[float, int, int, float]:
    """(seconds a step, steps timed, steps of the whole training, share of a batch timed) of a `train` node.

    By training it for a moment. The first two steps, which set up kernels and memory, are left out where there are more. On a
    CPU, steps on large images are timed on a part of the batch, and taken to be that much shorter.
    """
    import lightning
    import torch

    from benchmark import training
    from benchmark.method import Context

    t = node.spec["t"]
    method = training.build(node, Context(**training.bare_context(node.spec, task)))
    loader: Any = task.train_loader(t, method.view, node.spec["seed"])
    steps, whole = len(loader), loader.batch_size
    if task.device == "cpu":
        loader.batch_size = min(whole, max(2, PIXELS // pixels(task)))
    share = loader.batch_size / whole
    recipe = method.recipe(task.protocol.releases[t].recipe)
    marks: list[float] = []  # start, then the end of each step

    class Clock(lightning.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            marks.append(time.perf_counter())

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            if task.device.startswith("cuda"):
                torch.cuda.synchronize()
            marks.append(time.perf_counter())
            trainer.should_stop = len(marks) > 3 and marks[-1] - marks[2] > seconds

    training._quiet()
    trainer = lightning.Trainer(
        max_epochs=recipe.epochs,
        accelerator="gpu" if task.device.startswith("cuda") else "cpu",
        devices=1,
        precision=recipe.precision,
        gradient_clip_val=recipe.clip_norm,
        callbacks=[Clock()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(method, loader)
    timed = marks[2:] if len(marks) > 3 else marks
    return (timed[-1] - timed[0]) / (len(timed) - 1) / share, len(timed) - 1, recipe.epochs * steps, share
