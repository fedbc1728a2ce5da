"""Training: AdamW with a cosine schedule on a recipe's module, resumable after any epoch, ending with a hardened model.pt."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from s3nn_deploy import __version__
from s3nn_deploy.backends import pytorch
from s3nn_deploy.capture import capture
from s3nn_deploy.conversion import Conversion, conversion
from s3nn_deploy.data import Dataset
from s3nn_deploy.errors import DeployError
from s3nn_deploy.files import existing, replacing, sha256
from s3nn_deploy.model import save_model
from s3nn_deploy.nn import Spike
from s3nn_deploy.recipes import Recipe, build


@dataclass(frozen=True)
class Epoch:
    """What one epoch gave while training.

    Attributes:
        loss, accuracy: means over the epoch.
        rates: the mean firing rate of each spike layer.
        dead: of each spike layer the channels that were silent, or fired, all the time, where there are any.
        advice: what to do about layers that are dead for the most part.
    """

    epoch: int
    loss: float
    accuracy: float
    rates: dict[str, float]
    dead: dict[str, int]
    advice: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Trained:
    """The outcome of a training run: held-out accuracy of the hardened program, counted, and where everything lies."""

    path: Path
    metrics: Path
    correct: int
    total: int
    seconds: float
    sha256: str

    @property
    def accuracy(self) -> float:
        return self.correct / self.total


def train(
    recipe: Recipe,
    data: Dataset,
    out: str | Path,
    *,
    resume: bool = False,
    device: str = "cpu",
    report: Callable[[int, int, Epoch | None], None] = lambda *_: None,
) -> Trained:
    """Train `recipe` on `data` (its pixels cut to the recipe's `input_bits`) and write the hardened model to `out`.

    Beside it lie `<out>.metrics.jsonl`, one line an epoch, and while training `<out>.resume`, from which `resume=True`
    goes on after an interruption: on the CPU, with the same number of threads, to the same weights.

    Args:
        report: called with (steps done, steps in all, the epoch that has just ended or None).

    Raises:
        DeployError: a device that is not there, nothing to resume or another recipe's, or a network that cannot be converted.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise DeployError("device 'cuda'", "is not available to this PyTorch", hint="Use --device cpu.")
    data, out = data.quantised(recipe.input_bits), Path(out)
    resume_path, metrics_path = out.with_name(out.name + ".resume"), out.with_name(out.name + ".metrics.jsonl")
    torch.manual_seed(recipe.seed)
    module = build(recipe, data.train_x.shape[1:], len(data.classes)).to(device)
    optimiser = torch.optim.AdamW(_parameter_groups(module, recipe.weight_decay), lr=recipe.learning_rate)
    started, history = 0, []
    if resume:
        state = _load_resume(resume_path, recipe)
        module.load_state_dict(state["module"])
        optimiser.load_state_dict(state["optimiser"])
        started, history = state["epoch"], list(state["history"])
    clock = time.perf_counter()
    per_epoch = math.ceil(len(data.train_x) / recipe.batch_size)
    for epoch in range(started, recipe.epochs):
        result = _epoch(module, optimiser, recipe, data, epoch, device, report)
        history.append(json.dumps({**asdict(result), "seconds": round(result.seconds, 3)}))
        with replacing(metrics_path) as temporary:
            temporary.write_text("\n".join(history) + "\n", encoding="utf-8")
        with replacing(resume_path) as temporary:
            torch.save(
                {
                    "recipe": _fingerprint(recipe),
                    "epoch": epoch + 1,
                    "history": history,
                    "module": module.state_dict(),
                    "optimiser": optimiser.state_dict(),
                },
                temporary,
            )
        report((epoch + 1) * per_epoch, recipe.epochs * per_epoch, result)
    converted = conversion(capture(module, data.train_x.shape[1:], recipe.input_bits))
    correct = correct_predictions(converted, data.test_x, data.test_y)
    provenance = {
        "recipe": recipe.plain(),
        "data": data.name,
        "torch": torch.__version__,
        "tool": f"s3nn-deploy {__version__}",
        "test_correct": correct,
        "test_total": len(data.test_y),
        "device": device,
    }
    save_model(converted.program, out, data.train_x.shape[1:], recipe.input_bits, data.classes, provenance)
    resume_path.unlink(missing_ok=True)
    return Trained(out, metrics_path, correct, len(data.test_y), time.perf_counter() - clock, sha256(out))


def correct_predictions(converted: Conversion, x: np.ndarray, y: np.ndarray, batch: int = 512) -> int:
    """How many of the samples PyTorch's run of the hardened program classifies as `y` says."""
    return sum(
        int((pytorch.run(converted, x[i : i + batch]).predictions == y[i : i + batch]).sum())
        for i in range(0, len(x), batch)
    )


def _epoch(
    module: torch.nn.Module,
    optimiser: torch.optim.Optimizer,
    recipe: Recipe,
    data: Dataset,
    epoch: int,
    device: str,
    report: Callable[[int, int, Epoch | None], None],
) -> Epoch:
    clock = time.perf_counter()
    draw = np.random.default_rng((recipe.seed, epoch))
    order = draw.permutation(len(data.train_x))
    per_epoch = math.ceil(len(order) / recipe.batch_size)
    fired: dict[str, torch.Tensor] = {}
    handles = [
        m.register_forward_hook(
            lambda _m, _i, out, name=name: fired.__setitem__(name, fired.get(name, 0) + _rates(out.detach()))
        )
        for name, m in module.named_modules()
        if isinstance(m, Spike)
    ]
    module.train()
    loss_sum, correct = 0.0, 0
    try:
        for step in range(per_epoch):
            chosen = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
            x = torch.from_numpy(augmented(data.train_x[chosen], recipe, draw)).to(device, torch.float32)
            y = torch.from_numpy(data.train_y[chosen]).to(device)
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(recipe, epoch + step / per_epoch)
            logits = module(x)
            loss = F.cross_entropy(logits, y, label_smoothing=recipe.label_smoothing)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            loss_sum += float(loss.detach()) * len(chosen)
            correct += int((logits.argmax(1) == y).sum())
            report(epoch * per_epoch + step + 1, recipe.epochs * per_epoch, None)
    finally:
        for handle in handles:
            handle.remove()
    by_channel = {name: (total / per_epoch).tolist() for name, total in fired.items()}
    seconds = time.perf_counter() - clock
    return Epoch(epoch + 1, loss_sum / len(order), correct / len(order), *health(by_channel), seconds)


def _rates(spikes: torch.Tensor) -> torch.Tensor:
    """The firing rate of each channel of [N, C, ...]."""
    return spikes.mean((0, *range(2, spikes.ndim)))


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


def _parameter_groups(module: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on synapses only, not on batch norm and biases."""
    decayed = [p for p in module.parameters() if p.ndim > 1]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": [p for p in module.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _fingerprint(recipe: Recipe) -> str:
    return json.dumps(
        {k: v for k, v in recipe.plain().items() if k not in ("name", "summary", "measured")}, sort_keys=True
    )


def _load_resume(path: Path, recipe: Recipe) -> dict[str, Any]:
    hint = "Start without --resume."
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
