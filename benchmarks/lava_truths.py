"""Intel's own ground truths, as lava-dl 0.6.0 ships them with its tests, in our Lava environment. Runs in Lava's interpreter:

    $(python -c 'from s3nn_deploy import lava_env; print(lava_env.find())') -I benchmarks/lava_truths.py FOLDER

FOLDER is `tests/lava/lib/dl/netx` of lava-dl's wheel. `python -m benchmarks.lava_acceptance` fetches it and runs
this. Prints a line of JSON a truth: {"truth", "values", "different"}. After test_hdf5.py and test_hdf5_nx.py of lava-dl.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("lava_child", ROOT / "s3nn_deploy" / "backends" / "lava_child.py")
assert spec is not None
assert spec.loader is not None
child = importlib.util.module_from_spec(spec)
spec.loader.exec_module(child)


def tinynet(folder, netx, io, run):
    """Three convolutions with leaky neurons, reset every 17 steps: the output spikes."""
    net = netx.hdf5.Network(net_config=str(folder / "tiny.net"))
    steps = 17 + len(net)
    sink = io.sink.RingBuffer(shape=net.out_layer.out.shape, buffer=steps)
    net.out_layer.out.connect(sink.a_in)
    for index, layer in enumerate(net.layers):
        for variable in (layer.neuron.u, layer.neuron.v):
            io.reset.Reset(interval=17, offset=index - 1).connect_var(variable)
    net.in_layer.neuron.bias_mant.init = np.load(folder / "gts/tinynet/input_bias.npy")
    run(net, steps)
    truth = np.load(folder / "gts/tinynet/output.npy")[0].transpose(2, 1, 0, 3)[..., 1:]
    return sink.data.get()[..., 2:17], truth


def ntidigits(folder, netx, io, run):
    """Dense layers with axonal delays: the spikes of the last step, as Intel's test compares them."""
    samples = np.load(folder / "gts/ntidigits/input.npy")
    net = netx.hdf5.Network(net_config=str(folder / "gts/ntidigits/ntidigits.net"), num_layers=5)
    sink = io.sink.RingBuffer(shape=net.out_layer.shape, buffer=samples.shape[1])
    io.source.RingBuffer(data=samples).s_out.connect(net.inp)
    net.out.connect(sink.a_in)
    run(net, samples.shape[1])
    return sink.data.get()[:, -1], np.load(folder / "gts/ntidigits/output.npy")[:, 1]


def pilotnet(layer, folder, netx, io, run):
    """PilotNet on spikes, which Intel's test runs on the chip: the current of one layer's neurons after 16 steps."""
    net = netx.hdf5.Network(
        net_config=str(folder / "gts/pilotnet_lif/network.net"),
        num_layers=layer + 2,
        skip_layers=1,
        reset_interval=16,
        reset_offset=1,
    )
    samples = np.load(folder / "gts/pilotnet_lif/input-s.npy").astype(int)
    io.source.RingBuffer(data=samples).s_out.connect(net.inp)
    run(net, 16)
    return net.out_layer.neuron.u.get(), np.load(folder / f"gts/pilotnet_lif/conv-{layer}-u.npy")[..., 15]


def main(folder: Path) -> int:
    child.builder.import_lava()
    netx = child.import_netx()
    from lava.magma.core.run_conditions import RunSteps
    from lava.magma.core.run_configs import Loihi2SimCfg
    from lava.proc import io

    def run(net, steps):
        net.run(condition=RunSteps(num_steps=steps), run_cfg=Loihi2SimCfg(select_tag="fixed_pt"))
        running.append(net)

    truths = {"tinynet": tinynet, "ntidigits": ntidigits}
    truths |= {f"pilotnet conv-{n}": lambda *given, n=n: pilotnet(n, *given) for n in range(4)}
    wrong = 0
    for name, truth in truths.items():
        running: list = []
        got, want = truth(folder, netx, io, run)
        for net in running:
            net.stop()
        different = int((got != want).sum())
        wrong += different
        print(json.dumps({"truth": name, "values": int(want.size), "different": different}), flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    status = main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(status)
