"""Training: a cosine schedule on a recipe's module, resumable after any epoch, ending with a hardened model.pt.

A recipe's `amp` rounds the sums of training; the hardened model's are the integers that the hardware sums, in any case.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from s3nn_deploy.activity import observing
from s3nn_deploy.backends import pytorch
from s3nn_deploy.capture import capture
from s3nn_deploy.conversion import Conversion, conversion
from s3nn_deploy.data import Dataset
from s3nn_deploy.errors import DeployError
from s3nn_deploy.files import existing, replacing, sha256, write_text
from s3nn_deploy.model import save_model
from s3nn_deploy.recipes import Recipe, build
from s3nn_deploy.twins import relu


@dataclass(frozen=True)
class Epoch:
    """What one epoch gave while training.

    Attributes:
        twin: whether it was the full-precision twin's, which trains first where the recipe distils.
        loss, accuracy: means over the epoch.
        synops: mean synaptic operations per sample, as the emulator counts them (none in a twin).
        rates: the mean firing rate of each spike layer.
        dead: of each spike layer the channels that were silent, or fired, all the time, where there are any.
        advice: what to do about layers that are dead for the most part.
    """

    epoch: int
    twin: bool
    loss: float
    accuracy: float
    synops: float
    rates: dict[str, float]
    dead: dict[str, int]
    advice: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Trained:
    """The outcome of a training run: held-out accuracy of the hardened program, counted, and where everything lies.

    Attributes:
        first: whether this process is the one that reports, of those that `torchrun` started.
    """

    path: Path
    metrics: Path
    correct: int
    total: int
    seconds: float
    sha256: str
    first: bool = True

    @property
    def accuracy(self) -> float:
        return self.correct / self.total


Report = Callable[[int, int, Epoch | None], None]


@dataclass(frozen=True)
class Processes:
    """This process among those that `torchrun` started: its rank, how many there are, and its device."""

    rank: int
    count: int
    device: str

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value, summed over the processes."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return total.tolist()


def processes(device: str) -> Processes:
    """The processes that torchrun's environment names (this one alone without it), joined into a group on first use.

    Raises:
        DeployError: a device that is not there.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise DeployError("device 'cuda'", "is not available to this PyTorch", hint="Use --device cpu.")
    rank, count, local = (int(os.environ.get(key, n)) for key, n in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if count > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    return Processes(rank, count, f"cuda:{local}" if device == "cuda" else device)


def train(
    recipe: Recipe,
    data: Dataset,
    out: str | Path,
    *,
    resume: bool = False,
    finish: bool = False,
    device: str = "cpu",
    tensorboard: str | Path | None = None,
    report: Report = lambda *_: None,
) -> Trained:
    """Train `recipe` on `data` (its pixels cut to the recipe's `input_bits`) and write the hardened model to `out`.

    Beside it lie `<out>.metrics.jsonl`, one line an epoch, and while training `<out>.resume`, from which `resume=True`
    goes on after an interruption: on the CPU, with the same number of threads, to the same weights. Where the recipe
    distils, the twin's lie at `<out>.twin.*`. Started by `torchrun`, each process takes its share of every batch
    (batch norm sees only that share) and the first one writes.

    Args:
        finish: train no further, but harden what an interrupted run has left in `<out>.resume`.
        tensorboard: a folder for TensorBoard's event files.
        report: called with (steps done, steps in all, the epoch that has just ended or None), in the first process.

    Raises:
        DeployError: a device or TensorBoard that is not there, nothing to resume or another recipe's, or a network that
            cannot be converted.
    """
    group = processes(device)
    if not group.first:
        tensorboard, report = None, lambda *_: None
    data, out = data.quantised(recipe.input_bits), Path(out)
    clock = time.perf_counter()
    with _events(tensorboard) as log:
        teacher, stages, twin_correct = None, 1, {}
        if recipe.distil and not finish:
            twin, twin_out, stages = replace(recipe, distil=0.0, synops_target=0), out.with_name(out.name + ".twin"), 2
            teacher = relu(_fresh(recipe, data))
            again = resume and _state(twin_out).exists()
            _fit(_Fit(teacher, twin, data, group, (0, stages)), twin_out, again, log, report)
            if group.first:
                twin_correct = {"twin_correct": classified(teacher, data.test_x, data.test_y, group.device)}
            resume = resume and _state(out).exists()  # else it was interrupted while the twin trained
        module = _fresh(recipe, data)
        last = _Fit(module, recipe, data, group, (stages - 1, stages), teacher)
        made = _fit(last, out, resume or finish, log, report, finish)
    correct = 0
    if group.first:
        converted = conversion(capture(module.cpu(), data.train_x.shape[1:], recipe.input_bits))
        correct = correct_predictions(converted, data.test_x, data.test_y)
        provenance = {
            **converted.net.provenance,
            "recipe": recipe.plain(),
            "data": data.name,
            "test_correct": correct,
            "test_total": len(data.test_y),
            **twin_correct,
            **made,
        }
        save_model(converted.program, out, data.train_x.shape[1:], recipe.input_bits, data.classes, provenance)
        for name in (out, out.with_name(out.name + ".twin")):
            _state(name).unlink(missing_ok=True)
    correct = int(group.sum(correct)[0])
    seconds = time.perf_counter() - clock
    return Trained(out, _metrics(out), correct, len(data.test_y), seconds, sha256(out), group.first)


def bfloat16(kind: str) -> bool:
    """Whether a kind of device has bfloat16 products; a processor without them would be many times slower with them."""
    return kind != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def fit(
    module: torch.nn.Module,
    recipe: Recipe,
    data: Dataset,
    out: str | Path,
    report: Report = lambda *_: None,
    device: str = "cpu",
) -> None:
    """Train any `module` in place by a recipe's data and schedule; metrics and a resumable state lie beside `out`, as `train` does.

    Its layers may be others than the recipe's: a twin (`twins`), or a network of your own. Nothing is converted.
    """
    _fit(_Fit(module, recipe, data.quantised(recipe.input_bits), processes(device)), Path(out), False, None, report)


def correct_predictions(converted: Conversion, x: np.ndarray, y: np.ndarray, batch: int = 512) -> int:
    """How many of the samples PyTorch's run of the hardened program classifies as `y` says."""
    return sum(
        int((pytorch.run(converted, x[i : i + batch]).predictions == y[i : i + batch]).sum())
        for i in range(0, len(x), batch)
    )


def classified(module: torch.nn.Module, x: np.ndarray, y: np.ndarray, device: str = "cpu", batch: int = 500) -> int:
    """How many of the samples `module`, such as a twin, classifies as `y` says, on the device where it is."""
    module.eval()
    with torch.no_grad():
        parts = [module(_on(device, x[i : i + batch]).float()).argmax(1).cpu().numpy() for i in range(0, len(x), batch)]
    return int((np.concatenate(parts) == y).sum())


def _fresh(recipe: Recipe, data: Dataset) -> torch.nn.Module:
    torch.manual_seed(recipe.seed)
    return build(recipe, data.train_x.shape[1:], len(data.classes))


def _state(out: Path) -> Path:
    return out.with_name(out.name + ".resume")


def _metrics(out: Path) -> Path:
    return out.with_name(out.name + ".metrics.jsonl")


@dataclass(frozen=True)
class _Fit:
    """What is trained: `module` by `recipe` on `data`, as `stage` (index, count) of the run."""

    module: torch.nn.Module
    recipe: Recipe
    data: Dataset
    group: Processes
    stage: tuple[int, int] = (0, 1)
    teacher: torch.nn.Module | None = None

    @property
    def twin(self) -> bool:
        return self.stage[0] + 1 < self.stage[1]


def _fit(fit: _Fit, out: Path, resume: bool, log: Any, report: Report, finish: bool = False) -> dict[str, Any]:
    """Train the module in place, leave metrics and the resumable state beside `out`, and say how it was made.

    `finish` trains no further than the state that it resumes.
    """
    module, recipe, group = fit.module, fit.recipe, fit.group
    module.to(group.device)
    optimisers = _optimisers(module, recipe)
    started, history = 0, []
    made: dict[str, Any] = {}
    kind = torch.device(group.device).type
    if resume:
        state = _load_resume(_state(out), recipe)
        module.load_state_dict(state["module"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        started, history, made = state["epoch"], list(state["history"]), state["made"]
    shared = module if group.count == 1 else torch.nn.parallel.DistributedDataParallel(module)
    per_epoch = math.ceil(len(fit.data.train_x) / recipe.batch_size)
    before, total = fit.stage[0] * recipe.epochs, fit.stage[1] * recipe.epochs * per_epoch
    for epoch in range(started, started if finish else recipe.epochs):
        steps = partial(_steps, report, (before + epoch) * per_epoch, total)
        result = _epoch(fit, shared, optimisers, epoch, steps)
        history.append(json.dumps({**asdict(result), "seconds": round(result.seconds, 3)}))
        made = {
            "epochs": epoch + 1,
            "torch": str(torch.__version__),
            "device": torch.cuda.get_device_name() if kind == "cuda" else kind,
            "bfloat16": recipe.amp and bfloat16(kind),
            "processes": group.count,
        }
        if group.first:
            write_text(_metrics(out), "\n".join(history) + "\n")
            with replacing(_state(out)) as temporary:
                torch.save(
                    {
                        "recipe": _fingerprint(recipe),
                        "epoch": epoch + 1,
                        "history": history,
                        "made": made,
                        "module": module.state_dict(),
                        "optimisers": [optimiser.state_dict() for optimiser in optimisers],
                    },
                    temporary,
                )
            _log(log, result)
        report((before + epoch + 1) * per_epoch, total, result)
    return made


def _steps(report: Report, before: int, total: int, step: int) -> None:
    report(before + step, total, None)


def _epoch(
    fit: _Fit,
    module: torch.nn.Module,
    optimisers: list[torch.optim.Optimizer],
    epoch: int,
    report: Callable[[int], None],
) -> Epoch:
    clock, recipe, data, group = time.perf_counter(), fit.recipe, fit.data, fit.group
    draw = np.random.default_rng((recipe.seed, epoch))
    order = draw.permutation(len(data.train_x))
    per_epoch = math.ceil(len(order) / recipe.batch_size)
    module.train()
    kind = torch.device(group.device).type
    autocast = torch.autocast(kind, torch.bfloat16, enabled=recipe.amp and bfloat16(kind))
    totals = torch.zeros(3, dtype=torch.float64, device=group.device)  # read once an epoch: a GPU would wait each time
    seen, passes = 0, 0
    fired: dict[str, torch.Tensor] = {}
    with observing(module) as activity:
        for step in range(per_epoch):
            chosen = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
            images, mine = augmented(data.train_x[chosen], recipe, draw), len(chosen) // group.count
            if mine < 2:  # batch norm has no variance of one sample
                continue
            share = slice(group.rank * mine, (group.rank + 1) * mine) if group.count > 1 else slice(None)
            x, y = _on(group.device, images[share]).float(), _on(group.device, data.train_y[chosen][share])
            for optimiser, factor in zip(optimisers, RATES, strict=False):
                for parameters in optimiser.param_groups:
                    parameters["lr"] = factor * learning_rate(recipe, epoch + step / per_epoch)
            activity.clear()
            with autocast:
                logits = module(x)
            loss = F.cross_entropy(logits, y, label_smoothing=recipe.label_smoothing)
            if fit.teacher is not None:
                with autocast:
                    taught = _distillation(logits, fit.teacher, x, recipe.temperature)
                loss = (1 - recipe.distil) * loss + recipe.distil * taught
            if recipe.synops_target:
                loss = loss + recipe.synops_weight * (activity.total / recipe.synops_target - 1).clamp(min=0)
            module.zero_grad()
            loss.backward()
            for optimiser in optimisers:
                optimiser.step()
            right = (logits.argmax(1) == y).sum()
            with torch.no_grad():
                totals += torch.stack([loss.to(totals) * len(x), right.to(totals), activity.total.to(totals) * len(x)])
            seen, passes = seen + len(x), passes + 1
            for name, rate in activity.rates.items():
                name = name.removeprefix("module.")  # DDP's
                fired[name] = fired[name] + rate if name in fired else rate
            report(step + 1)
    if not passes:
        raise DeployError(
            f"data set {data.name!r}", expected="at least two training samples a process", got=str(len(order))
        )
    loss_sum, correct, synops, samples = group.sum(*totals.tolist(), seen)
    by_channel = {
        name: [channel / passes / group.count for channel in group.sum(*total.tolist())]
        for name, total in fired.items()
    }
    means, dead, advice = health(by_channel)
    seconds = time.perf_counter() - clock
    return Epoch(
        epoch + 1,
        fit.twin,
        loss_sum / samples,
        correct / samples,
        round(synops / samples, 1),
        means,
        dead,
        advice,
        seconds,
    )


def _on(device: str, array: np.ndarray) -> torch.Tensor:
    """The array as a tensor on `device`; images lie there with their channels last, as a GPU's convolutions want them."""
    tensor = torch.from_numpy(array)
    if not device.startswith("cuda"):
        return tensor.to(device)
    there = tensor.pin_memory().to(device, non_blocking=True)
    return there.contiguous(memory_format=torch.channels_last) if there.ndim == 4 else there


def _distillation(logits: torch.Tensor, teacher: torch.nn.Module, x: torch.Tensor, temperature: float) -> torch.Tensor:
    """The Kullback-Leibler divergence from the teacher's softened outputs, times temperature^2 (arXiv 1503.02531)."""
    teacher.eval()
    with torch.no_grad():
        wanted = F.log_softmax(teacher(x) / temperature, 1)
    found = F.log_softmax(logits / temperature, 1)
    return F.kl_div(found, wanted, reduction="batchmean", log_target=True) * temperature**2


@contextmanager
def _events(folder: str | Path | None) -> Iterator[Any]:
    """A TensorBoard writer into `folder`; None without one."""
    if folder is None:
        yield None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        hint = "Run: pip install tensorboard. The same figures are in the metrics file."
        raise DeployError("TensorBoard", "is not installed", hint=hint) from error
    with SummaryWriter(str(folder)) as writer:
        yield writer


def _log(writer: Any, epoch: Epoch) -> None:
    if writer is None:
        return
    who = "twin/" if epoch.twin else ""
    for name in ("loss", "accuracy", "synops"):
        writer.add_scalar(f"{who}{name}", getattr(epoch, name), epoch.epoch)
    for layer, rate in epoch.rates.items():
        writer.add_scalar(f"{who}firing/{layer}", rate, epoch.epoch)
        writer.add_scalar(f"{who}dead/{layer}", epoch.dead.get(layer, 0), epoch.epoch)


def health(rates: dict[str, list[float]]) -> tuple[dict[str, float], dict[str, int], tuple[str, ...]]:
    """Mean firing rates, dead channels and advice (as in `Epoch`), from each layer's firing rates by channel."""
    means, dead, advice = {}, {}, []
    for name, each in rates.items():
        means[name] = round(sum(each) / len(each), 4)
        silent, constant = each.count(0.0), each.count(1.0)
        if silent + constant:
            dead[name] = silent + constant
        if 2 * (silent + constant) >= len(each):
            what = "are silent" if silent >= constant else "fire for every sample"
            advice.append(
                f"{name}: {max(silent, constant)} of {len(each)} channels {what}, so nothing passes through them. "
                "Lower learning_rate, or give the layers before it more bits."
            )
    return means, dead, tuple(advice)


def learning_rate(recipe: Recipe, epoch: float) -> float:
    """The learning rate after `epoch` epochs: a linear rise over `warm_up` of them, within a cosine from start to end."""
    rise = min(1.0, epoch / recipe.warm_up) if recipe.warm_up else 1.0
    return recipe.learning_rate * rise * (1 + math.cos(math.pi * epoch / recipe.epochs)) / 2


def augmented(x: np.ndarray, recipe: Recipe, draw: np.random.Generator) -> np.ndarray:
    """The images x uint8 [N, C, H, W] shifted (zeros moving in), mirrored and cut out at random, as the recipe says."""
    (height, width), shift, side = x.shape[2:], recipe.shift, recipe.cutout
    if shift:
        padded = np.pad(x, ((0, 0), (0, 0), (shift, shift), (shift, shift)))
        moves = draw.integers(0, 2 * shift + 1, (len(x), 2))
        x = np.stack([p[:, dy : dy + height, dx : dx + width] for p, (dy, dx) in zip(padded, moves, strict=True)])
    if recipe.flip:
        x = np.where(draw.random(len(x))[:, None, None, None] < 0.5, x[..., ::-1], x)
    if side:
        corners = draw.integers((-side + 1, -side + 1), (height, width), (len(x), 2))
        x = x.copy()
        for image, (top, left) in zip(x, corners, strict=True):
            image[:, max(top, 0) : top + side, max(left, 0) : left + side] = 0
    return x


RATES = (1.0, 0.1)
"""Shares of the learning rate: of a recipe's optimiser, and of AdamW beside Muon."""


def _optimisers(module: torch.nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the weights of hidden layers with AdamW for the rest; no decay on batch norm and biases."""
    matrices = [p for p in module.parameters() if p.ndim > 1]
    others: list[dict[str, Any]] = [{"params": [p for p in module.parameters() if p.ndim <= 1], "weight_decay": 0.0}]
    rate, decay = recipe.learning_rate, recipe.weight_decay
    if recipe.optimiser == "adamw":
        return [torch.optim.AdamW([{"params": matrices, "weight_decay": decay}, *others], lr=rate)]
    hidden = [p for p in matrices[:-1] if p[0].numel() > 1]  # the last one reads out
    left = [p for p in matrices if not any(p is h for h in hidden)]
    return [
        _Muon(hidden, rate, decay),
        torch.optim.AdamW([{"params": left, "weight_decay": decay}, *others], lr=RATES[1] * rate),
    ]


class _Muon(torch.optim.Muon):
    """torch's takes matrices: the weights of a convolution are one here, [outputs, all the rest]."""

    def __init__(self, weights: list[torch.nn.Parameter], rate: float, decay: float) -> None:
        self.weights = weights
        super().__init__([weight.detach().flatten(1) for weight in weights], lr=rate, weight_decay=decay)

    def step(self, closure: Any = None) -> Any:
        for matrix, weight in zip(self.param_groups[0]["params"], self.weights, strict=True):
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        return super().step(closure)


def _fingerprint(recipe: Recipe) -> str:
    return json.dumps(
        {k: v for k, v in recipe.plain().items() if k not in ("name", "summary", "measured")}, sort_keys=True
    )


def _load_resume(path: Path, recipe: Recipe) -> dict[str, Any]:
    hint = "Start without --resume and --finish."
    if not path.is_file():
        raise DeployError(str(path), "there is nothing to resume", hint=hint)
    try:
        state = torch.load(existing(path), map_location="cpu", weights_only=True)
        same = state["recipe"] == _fingerprint(recipe)
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise DeployError(str(path), f"is not a readable training state ({type(error).__name__})", hint=hint) from error
    if not same:
        raise DeployError(
            str(path),
            "belongs to another recipe or other settings",
            hint="Give the same --set options, or start without --resume.",
        )
    return state
