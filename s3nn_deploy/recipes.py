"""Recipes: what to train and how, as TOML, and the module that a recipe describes."""

import math
import tomllib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s3nn_deploy.errors import DeployError, suggestion
from s3nn_deploy.files import builtin, existing

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Recipe:
    """One recipe; every field but `measured` is a key of the TOML file, and can be set with `--set key=value`.

    Attributes:
        data: the name of a data set.
        input_bits: of each 8-bit pixel the highest so many are kept; the input's range is 0 .. 2^bits - 1.
        layers: tables `{conv = channels, kernel, stride, padding, groups, bits}`, `{linear = features, bits}`, `{pool = size}` or
            `{block = channels, stride, bits}` (`nn.Residual`), in order; each conv and linear layer is followed by batch norm
            and spikes, and the readout comes by itself.
        bits: width of the weights, where a layer does not say otherwise.
        step: "rule" (from the weights in each pass) or "learned", see `nn.STEPS`.
        surrogate: a name in `surrogate.SURROGATES`.
        optimiser: "adamw" (arXiv 1711.05101), or "muon" (arXiv 2502.16982): orthogonal updates of the weights of hidden
            layers, and AdamW at a tenth of the learning rate for everything else.
        epochs, batch_size, learning_rate, weight_decay, label_smoothing: of the optimiser, with a cosine schedule.
        warm_up: epochs in which the learning rate rises linearly from zero, before the cosine.
        shift: augmentation; images are moved by up to that many pixels, at random.
        flip: augmentation; every other image is mirrored left to right, at random.
        cutout: augmentation; a square of that many pixels a side is blanked, at random (arXiv 1708.04552).
        synops_target: mean synaptic operations per inference to train down to; 0: as many as come. Accuracy is the price.
        synops_weight: of that in the loss: synops_weight * max(0, synops / synops_target - 1).
        distil: share of the loss that is learned from the full-precision ReLU twin, which is then trained first (0 to 1).
        temperature: of that distillation (arXiv 1503.02531).
        amp: convolutions and linear layers in bfloat16 while training. Spikes, pixels and integer weights are exact in it; sums
            are rounded to eight bits, and batch norm, surrogates and the optimiser stay in float32. What is deployed is hardened
            and counted in float32, as ever. Without effect on a processor that has no bfloat16 products.
        seed: of everything.
        measured: what was reached with it, where and by which command.
    """

    name: str
    summary: str
    data: str
    layers: tuple[Mapping[str, Any], ...]
    input_bits: int = 8
    bits: int = 8
    step: str = "rule"
    surrogate: str = "s2nn"
    optimiser: str = "adamw"
    epochs: int = 30
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    label_smoothing: float = 0.0
    warm_up: int = 0
    shift: int = 0
    flip: bool = False
    cutout: int = 0
    synops_target: int = 0
    synops_weight: float = 1.0
    distil: float = 0.0
    temperature: float = 2.0
    amp: bool = False
    seed: int = 0
    measured: Mapping[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """The recipe as plain data, for provenance."""
        return {**asdict(self), "layers": [dict(layer) for layer in self.layers]}


_LAYERS = {
    "conv": {"kernel", "stride", "padding", "groups", "bits"},
    "linear": {"bits"},
    "pool": set(),
    "block": {"stride", "bits"},
}
_CHOICES = {"step": ("rule", "learned"), "optimiser": ("adamw", "muon")}
_RANGES = {
    **dict.fromkeys(("epochs", "batch_size"), (1, math.inf)),
    **dict.fromkeys(("bits", "input_bits"), (1, 8)),
    **dict.fromkeys(("shift", "cutout", "warm_up", "synops_target", "synops_weight"), (0, math.inf)),
    **dict.fromkeys(("learning_rate", "weight_decay"), (0, math.inf)),
    **dict.fromkeys(("label_smoothing", "distil"), (0, 1)),
    "temperature": (0.01, math.inf),
}
_WORDS = {
    "tuple": "a list of tables",
    "dict": "a table",
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
}


def names() -> list[str]:
    """The names of the shipped recipes."""
    return sorted(path.stem for path in builtin("models").glob("*.toml"))


def load(name_or_path: str, settings: tuple[str, ...] = ()) -> Recipe:
    """A shipped recipe by name, or a TOML file by path, with `key=value` settings applied.

    Raises:
        DeployError: no such recipe, an unknown key (with a suggestion), or a value of the wrong type.
    """
    if Path(name_or_path).suffix == ".toml":
        path = existing(name_or_path)
    elif name_or_path in names():
        path = builtin("models") / f"{name_or_path}.toml"
    else:
        raise DeployError(
            f"recipe {name_or_path!r}",
            "is not known",
            hint=f"{suggestion(name_or_path, names())} Or give a path to a .toml file.",
        )
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise DeployError(str(path), f"is not readable TOML ({error})") from error
    for setting in settings:
        key, _, value = setting.partition("=")
        try:
            table[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            table[key.strip()] = value.strip()
    return parse(path.stem, table, str(path))


def parse(name: str, table: Mapping[str, Any], where: str) -> Recipe:
    """The recipe in a TOML table. Raises as `load` does."""
    known = [f.name for f in fields(Recipe) if f.name != "name"]
    for key in table:
        if key not in known:
            raise DeployError(where, f"unknown key {key!r}", hint=suggestion(key, known))
    for key in ("summary", "data", "layers"):
        if key not in table:
            raise DeployError(where, f"the key {key!r} is missing")
    default = Recipe(name, "", "", ())
    for key, value in table.items():
        wanted = type(getattr(default, key))
        number = wanted is float and isinstance(value, int | float)
        fits = isinstance(value, list if wanted is tuple else wanted) or number
        if not fits or isinstance(value, bool) is not (wanted is bool):
            raise DeployError(
                where, f"key {key!r}", expected=_WORDS.get(wanted.__name__, wanted.__name__), got=repr(value)
            )
    recipe = replace(default, **{**table, "layers": tuple(table["layers"])})
    for key, (low, high) in _RANGES.items():
        value = getattr(recipe, key)
        if not low <= value <= high:
            expected = f"at least {low:g}" if value < low or high == math.inf else f"at most {high:g}"
            raise DeployError(where, f"key {key!r}", expected=expected, got=str(value))
    for key, words in _CHOICES.items():
        if getattr(recipe, key) not in words:
            raise DeployError(where, f"key {key!r}", expected=" or ".join(words), got=repr(getattr(recipe, key)))
    for index, layer in enumerate(recipe.layers):
        place = f"{where}, layers[{index}]"
        kind = next((k for k in _LAYERS if isinstance(layer, dict) and k in layer), None)
        if kind is None:
            raise DeployError(place, expected=f"a table with one of {', '.join(_LAYERS)}", got=str(layer))
        for key, value in layer.items():
            if key != kind and key not in _LAYERS[kind]:
                raise DeployError(
                    place, f"unknown key {key!r} in a {kind} layer", hint=suggestion(key, [kind, *_LAYERS[kind]])
                )
            if not isinstance(value, int) or isinstance(value, bool) or value < (0 if key == "padding" else 1):
                raise DeployError(place, f"key {key!r}", expected="a positive integer", got=repr(value))
    return recipe


def build(recipe: Recipe, input_shape: tuple[int, ...], classes: int) -> "torch.nn.Module":
    """The module that `recipe` describes, for samples of `input_shape` (C, H, W), with freshly drawn weights.

    Raises:
        DeployError: layers that do not fit the input.
    """
    import torch

    from s3nn_deploy import nn

    modules: OrderedDict[str, torch.nn.Module] = OrderedDict()
    shape = input_shape
    for index, layer in enumerate(recipe.layers, 1):
        where = f"recipe {recipe.name!r}, layers[{index - 1}]"
        bits = int(layer.get("bits", recipe.bits))
        if "linear" in layer:
            if len(shape) == 3:
                modules["flatten"] = torch.nn.Flatten()
                shape = (shape[0] * shape[1] * shape[2],)
            modules[f"fc{index}"] = nn.IntLinear(shape[0], layer["linear"], bias=False, bits=bits, step=recipe.step)
            modules[f"bn{index}"] = torch.nn.BatchNorm1d(layer["linear"])
            shape = (layer["linear"],)
        elif len(shape) != 3:
            raise DeployError(where, "a conv, pool or block layer behind a linear one", hint="Put linear layers last.")
        elif "pool" in layer:
            modules[f"pool{index}"] = torch.nn.MaxPool2d(layer["pool"])
            shape = (shape[0], shape[1] // layer["pool"], shape[2] // layer["pool"])
        elif "block" in layer:
            channels, stride = layer["block"], layer.get("stride", 1)
            modules[f"block{index}"] = nn.Residual(
                shape[0], channels, stride, bits=bits, surrogate=recipe.surrogate, step=recipe.step
            )
            shape = (channels, *((n - 1) // stride + 1 for n in shape[1:]))
        else:
            conv = nn.IntConv2d(
                shape[0],
                layer["conv"],
                layer.get("kernel", 3),
                layer.get("stride", 1),
                layer.get("padding", 0),
                groups=layer.get("groups", 1),
                bias=False,
                bits=bits,
                step=recipe.step,
            )
            modules[f"conv{index}"], modules[f"bn{index}"] = conv, torch.nn.BatchNorm2d(layer["conv"])
            shape = (
                layer["conv"],
                *(
                    (n + 2 * layer.get("padding", 0) - layer.get("kernel", 3)) // layer.get("stride", 1) + 1
                    for n in shape[1:]
                ),
            )
        if min(shape) < 1:
            raise DeployError(where, "nothing is left of the image", got=f"shape {shape}", hint="Pool less, or pad.")
        if "pool" not in layer and "block" not in layer:
            modules[f"spike{index}"] = nn.Spike(recipe.surrogate)
    if len(shape) == 3:
        modules["flatten"] = torch.nn.Flatten()
        shape = (shape[0] * shape[1] * shape[2],)
    modules["readout"] = nn.IntLinear(shape[0], classes, bits=recipe.bits, per_channel=False, step=recipe.step)
    return torch.nn.Sequential(modules)
