"""One `train` node: build the method, fit it with Lightning, keep the released encoder. Resumable at every epoch."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmark import catalog
from benchmark.bridge import Bridge, Side, join, multiply_adds
from benchmark.embeddings import Link, View
from benchmark.errors import UserError
from benchmark.heads import Head
from benchmark.images import ImageLoader
from benchmark.method import Context, Encoder, Method
from benchmark.plan import Node
from benchmark.protocol import Protocol, derive_seed, to_json
from benchmark.store import Store
from benchmark.task import Task

Report = Callable[[int, int], None]  # (done, total)


def bare_context(spec: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """What of a `Context` is known without any input: enough to build the network."""
    t = spec["t"]
    return {
        "t": t,
        "seed": spec.get("seed", 0),
        "release": task.protocol.releases[t],
        "classes": task.classes(t),
        "similarity": spec["similarity"],
        "backbone": partial(task.backbone, t),
        "head": partial(task.head, t),
        "prototype_head": partial(_prototype_head, task.protocol, t),
        "old_dim": spec["old_dim"],
        "k": spec.get("k", t - 1 if t else None),
        "dims": {name: dim for name, (_, dim) in spec["needs"].items()},
    }


def _prototype_head(protocol: Protocol, t: int, rows: torch.Tensor) -> Head:
    return Head(rows.clone(), protocol.head, protocol.releases[t].recipe.label_smoothing).requires_grad_(False)


def build(node: Node, context: Context) -> Method:
    """The method with its start weights, drawn in float64 where it trains so: no rounding to float32 on any way."""
    cls = catalog.load("method", node.spec["method"])
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if context.release.recipe.precision == "64-true" else torch.float32)
    try:
        return cls(context, **node.spec["hyperparameters"])
    finally:
        torch.set_default_dtype(before)


def load_released(node: Node, task: Task, store: Store) -> tuple[Encoder, Link]:
    """The frozen encoder of a `train` or `frozen` node, and the link that serves its queries."""
    with torch.random.fork_rng(devices=[]):
        method = build(node, Context(**bare_context(node.spec, task)))
    encoder, link = method.released(), method.link()
    weights = store.read_tensors(node, "encoder.safetensors")
    encoder.to(next((w.dtype for w in weights.values() if w.is_floating_point()), torch.float32))
    try:
        encoder.load_state_dict(weights)
        if link.state_dict():
            link.load_state_dict(store.read_tensors(node, "link.safetensors"))
    except RuntimeError as error:
        raise UserError(
            f"{node.label}: the stored weights do not fit the network: {str(error).splitlines()[1].strip()}"
        ) from None
    return encoder.to(task.device), link.float().to(task.device).eval().requires_grad_(False)


def load_link(nodes: Sequence[Node], task: Task, store: Store) -> Link:
    """The link of some nodes, newest first: of released encoders, or of the steps of a `Bridge`."""
    links = []
    for node in nodes:
        if "k" not in node.spec:
            links.append(load_released(node, task, store)[1])
            continue
        with torch.random.fork_rng(devices=[]):
            link = build(node, Context(**bare_context(node.spec, task))).link().float()  # as stored embeddings are
        link.load_state_dict(store.read_tensors(node, "link.safetensors"))
        links.append(link.to(task.device).eval().requires_grad_(False))
    return join(links)


def served(node: Node, task: Task, store: Store) -> tuple[Link, dict[str, dict[View, Tensor]]]:
    """The link of a cell, and the views of its "query" and "gallery" items."""
    sides: dict[str, dict[View, Tensor]] = {"query": {}, "gallery": {}}
    for name, source in node.inputs.items():
        if not name.startswith("link"):
            side, release, view = name.split("/")
            encoder, views = source.inputs["encoder"].spec["t"], store.embeddings(source).views
            kept = views.get(
                (encoder, view), views.get((encoder, "main"))
            )  # side information is the main view of its encoder
            assert kept is not None
            sides[side][int(release), view] = kept.to(task.device)
    links = [source for name, source in node.inputs.items() if name.startswith("link")]
    return load_link(links, task, store), sides


def fit(node: Node, task: Task, store: Store, report: Report) -> None:
    """Make a closed-form step from stored embeddings; writes link.safetensors and train.json."""
    method = build(node, full_context(node, task, store))
    assert isinstance(method, Bridge)
    facts = method.fit()
    store.write_tensors(node, "link.safetensors", method.link().state_dict())
    store.write_json(node, "train.json", {"history": [], "images_seen": 0, "teacher_forwards": 0, **facts})


def full_context(node: Node, task: Task, store: Store) -> Context:
    """All that a method may know, with every need loaded."""
    bare = bare_context(node.spec, task)
    encoders, means, embeddings = {}, {}, {}
    for name, source in node.inputs.items():
        if source.kind == "means":
            means[name] = store.read_tensors(source, "means.safetensors")["means"].to(task.device)
        elif source.kind == "embed":
            embeddings[name] = store.embeddings(source)
        else:
            encoders[name] = load_released(source, task, store)[0]
    loader = partial(_loader, task, node.spec["t"], node.spec["seed"])
    return Context(**bare, encoders=encoders, means=means, embeddings=embeddings, loader=loader)


def train(node: Node, task: Task, store: Store, report: Report) -> float:
    """Fit one release or step; write train.json, encoder.safetensors (of a release), link.safetensors (if it has weights).

    Returns the seconds that interrupted attempts had spent before this one.
    """
    context = full_context(node, task, store)
    encoders, loader = context.encoders, partial(_loader, task, node.spec["t"], node.spec["seed"])
    method = build(node, context)
    recipe = method.recipe(context.release.recipe)
    if recipe.precision == "64-true":
        method.double()  # Lightning does so too, but only after it has read the checkpoint's weights into float32
    before = {name: _fingerprint(encoder) for name, encoder in encoders.items()}
    checkpoint = store.folder(node) / ".last.ckpt"
    epochs = EpochEnd(checkpoint, node.label, report, recipe.epochs)
    _quiet()
    trainer = lightning.Trainer(
        max_epochs=recipe.epochs,
        accelerator="gpu" if task.device.startswith("cuda") else "cpu",
        devices=1,
        precision=recipe.precision,
        gradient_clip_val=recipe.clip_norm,
        callbacks=[epochs],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        default_root_dir=store.folder(node),
    )
    resume = checkpoint if checkpoint.is_file() else None
    batches = loader(method.view)
    if isinstance(batches, ImageLoader) and batches.ways and recipe.epochs > batches.ways:
        for encoder in encoders.values():
            encoder.keep(batches)
    try:
        if recipe.epochs:
            trainer.fit(method, batches, ckpt_path=resume, weights_only=True)
        else:
            method.solve()
    except SystemExit:  # what Lightning makes of Ctrl-C
        raise KeyboardInterrupt from None
    if any(_fingerprint(encoders[name]) != value for name, value in before.items()):
        raise AssertionError(f"{node.label}: training changed a frozen encoder")
    link = method.link()
    if "k" not in node.spec:
        store.write_tensors(node, "encoder.safetensors", method.released().state_dict())
    if link.state_dict():
        store.write_tensors(node, "link.safetensors", link.state_dict())
    images = trainer.global_step * batches.batch_size
    facts = {
        "history": method.history,
        "images_seen": images,
        "steps": trainer.global_step,
        "teacher_forwards": epochs.teacher_forwards,
        "recipe": to_json(recipe),
        "deviates": recipe != context.release.recipe,
    }
    store.write_json(node, "train.json", facts)
    checkpoint.unlink(missing_ok=True)
    return epochs.spent_before


def _loader(task: Task, t: int, seed: int, view: str) -> Any:
    return task.train_loader(t, view, derive_seed(seed, t, "loader"))


class EpochEnd(Checkpoint):
    """After every epoch: save for resuming, report progress, stop a diverged run before hours are lost.

    A subclass of Lightning's `Checkpoint` because those run after the module's own end-of-epoch hook.
    """

    def __init__(self, path: Path, label: str, report: Report, epochs: int):
        self.path, self.label, self.report, self.epochs = path, label, report, epochs
        self.finished, self.teacher_forwards = False, 0
        self.filled: list[str] = []  # encoders whose kept embeddings are billed: a resumed run makes them again
        self.started, self.spent_before = time.monotonic(), 0.0

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        if index % 20 == 0:
            self.report(trainer.global_step, int(trainer.estimated_stepping_batches))

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        bad = {name: value for name, value in module.history[-1].items() if not math.isfinite(value)}
        if bad:
            name, value = next(iter(bad.items()))
            raise UserError(
                f"{self.label}: loss term '{name}' became {value} in epoch {trainer.current_epoch}; lower the learning rate or "
                "its weight, or set recipe.clip_norm"
            )
        for name, encoder in module.context.encoders.items():
            self.teacher_forwards += encoder.images_seen
            encoder.images_seen = 0
            if encoder.images_kept and name not in self.filled:
                self.teacher_forwards += encoder.images_kept
                self.filled.append(name)
        self.finished = trainer.current_epoch + 1 >= self.epochs
        if not self.finished:
            partial_path = self.path.with_suffix(".partial")
            try:
                trainer.save_checkpoint(partial_path)
                partial_path.replace(self.path)
            except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as RuntimeError
                raise UserError(
                    f"cannot write {self.path}: {str(error).splitlines()[0]}; free space or choose another --runs"
                ) from None

    def state_dict(self) -> dict[str, Any]:
        return {
            "teacher_forwards": self.teacher_forwards,
            "filled": self.filled,
            "seconds": self.spent_before + time.monotonic() - self.started,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.teacher_forwards, self.spent_before = state["teacher_forwards"], state["seconds"]
        self.filled = state.get("filled", [])  # of a checkpoint from before embeddings were kept: none


def _fingerprint(encoder: Encoder) -> list[float]:
    return [float(value.double().sum()) for value in encoder.state_dict().values()]


class Size(NamedTuple):
    """What a release's network is, known without training it."""

    trained_parameters: int
    released_parameters: int
    multiply_adds: int  # of embedding one item, counted by torch on matmuls and convolutions


def size(node: Node, task: Task) -> Size:
    """Size of the network of a `train` or `frozen` node."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.random.fork_rng(devices=[]):
        method = build(node, Context(**bare_context(node.spec, task)))
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)  # before `released` freezes them
    encoder = method.released().float()
    x = {name: value.cpu() for name, value in task.sample(node.spec["t"]).items()}
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the fused transformer layer hides its products from the counter
    try:
        with parametrize.cached(), torch.no_grad():
            encoder(x)  # orthogonal weights are constants of a released model: made here, not counted below
            with FlopCounterMode(display=False) as counter:
                encoder(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return Size(trained, sum(p.numel() for p in encoder.network.parameters()), counter.get_total_flops() // 2)


class StepSize(NamedTuple):
    """What a step between two releases is, known without fitting it."""

    trained_parameters: (
        int  # set by a gradient or a closed form; of a release with a step of its own, the release's too
    )
    parameters: int  # of the maps that serve
    multiply_adds: Mapping[Side, int]  # side -> per vector that passes


def step_size(node: Node, task: Task) -> StepSize:
    """Size of the maps between two releases that a node holds."""
    with torch.random.fork_rng(devices=[]):
        method = build(node, Context(**bare_context(node.spec, task)))
    assert isinstance(method, Bridge)
    passed = method.passed()
    weights = method.link().buffers(recurse=False)  # of a link that does more than its maps: a fusion's
    serving = sum(numbers(module) for module in passed.values()) + sum(weight.numel() for weight in weights)
    fitted = sum(p.numel() for p in method.parameters() if p.requires_grad)
    adds = {side: multiply_adds(module) for side, module in passed.items()}
    return StepSize(serving if method.closed_form else fitted, serving, adds)


def numbers(module: nn.Module) -> int:
    """Numbers of a map: its parameters, one under a constraint once, as the matrix that serves; buffers where a closed form keeps
    its solution. Running statistics of batch norm are not counted, as they are not in releases.
    """
    total = 0
    for name, part in module.named_modules():
        if "parametrizations" in name.split("."):
            continue  # what a constrained weight is made from
        total += sum(p.numel() for p in part.parameters(recurse=False))
        if not isinstance(part, nn.modules.batchnorm._BatchNorm):
            total += sum(b.numel() for b in part.buffers(recurse=False))
        if parametrize.is_parametrized(part):
            total += sum(getattr(part, weight).numel() for weight in part.parametrizations)
    return total


def _quiet() -> None:
    """Lightning's hints on hardware and loaders are for other set-ups than ours."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")
