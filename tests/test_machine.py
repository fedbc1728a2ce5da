"""The machine's figures are those of a simulation that moves one event at a time; what does not fit is refused."""

import json
import re
from collections import deque
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import ZOO, random_net, samples
from test_emulator import synapses

from s3nn_deploy.backends import reference
from s3nn_deploy.cli import main
from s3nn_deploy.errors import DeployError
from s3nn_deploy.files import builtin
from s3nn_deploy.formats import export
from s3nn_deploy.intnet import INPUT, Dense, IntNet
from s3nn_deploy.machine import FIGURES, Machine, Memory, check_queues, figures, join, place
from s3nn_deploy.stimuli import stimuli
from s3nn_deploy.targets import load

ROOMY = Machine(3, 4, 100, 64, 32, 8, Memory(1 << 20, 32), Memory(1 << 20, 256), Memory(1 << 20, 32), "a test")


def by_events(net: IntNet, machine: Machine, x: np.ndarray) -> dict[str, dict[str, int]]:
    """One sample, event by event: queues are queues, and every cycle reads, adds or sends one thing."""
    spikes = {name: s[0].reshape(-1) for name, s in reference.run(net, x[None]).spikes.items()}
    signals = {INPUT: x.reshape(-1) != 0, **spikes}
    homes = {p.name: [c // -(-p.channels // machine.cores) for c in range(p.channels)] for p in net.populations}
    queues = [deque() for _ in range(machine.cores)]
    rows = {}  # (population, projection): source -> core -> (tap's row) -> target channels
    for p in net.populations:
        places = p.size // p.channels
        for number, j in enumerate(p.projections):
            found, source = {}, net.source(j).shape
            every = synapses(j, source, p.shape)
            if isinstance(j.synapses, Dense):
                targets = np.repeat(np.arange(p.size), int(np.prod(source)))
            else:
                one = replace(
                    j,
                    synapses=replace(
                        j.synapses, weight=np.arange(j.synapses.weight.size).reshape(j.synapses.weight.shape)
                    ),
                )
                per = j.synapses.weight[0].size
                targets, walked = [], iter(synapses(one, source, p.shape))
                pending = next(walked, None)
                for n in range(p.size):  # a target's synapses are consecutive; its kernel's numbers ascend
                    last = -1
                    while pending is not None and pending[1] // per == n // places and pending[1] > last:
                        last = pending[1]
                        targets.append(n)
                        pending = next(walked, None)
            assert len(targets) == len(every)
            for (i, _), n in zip(every, targets, strict=True):
                channel, position = int(n) // places, int(n) % places
                found.setdefault(i, {}).setdefault(homes[p.name][channel], {}).setdefault(position, []).append(channel)
            rows[p.name, number] = found
    count = {p.name: dict.fromkeys(FIGURES, 0) for p in net.populations}

    def reaches(p, j, neuron):
        """The cores that hold a channel which the neuron's channel drives."""
        if isinstance(j.synapses, Dense):
            return sorted(set(homes[p.name]))
        shape = net.source(j).shape
        group = neuron // (shape[1] * shape[2]) // (shape[0] // j.synapses.groups)
        each = p.channels // j.synapses.groups
        return sorted(set(homes[p.name][group * each : (group + 1) * each]))

    def send(source, neuron):
        cycles = 0
        for p in net.populations:
            for number, j in enumerate(p.projections):
                if j.source == source:
                    count[p.name]["spikes_in"] += 1
                    for core in reaches(p, j, neuron):
                        queues[core].append((p.name, number, neuron))
                        count[p.name]["spike_write_bits"] += machine.event_bits
                        cycles += 1
        return cycles

    for neuron in np.flatnonzero(signals[INPUT]):
        send(INPUT, int(neuron))
    for p in net.populations:
        got, places = count[p.name], p.size // p.channels
        got["queue_peak"] = max(map(len, queues))
        slowest = 0
        for core in range(machine.cores):
            clock = 0
            for event in [e for e in queues[core] if e[0] == p.name]:
                queues[core].remove(event)
                got["spike_read_bits"] += machine.event_bits
                clock += 1
                for channels in rows[p.name, event[1]].get(event[2], {}).get(core, {}).values():
                    while channels:
                        channels = channels[machine.lanes :]
                        clock += 1
                        got["weight_read_bits"] += machine.weights.width
                        got["membrane_read_bits"] += machine.membranes.width
                        got["membrane_write_bits"] += machine.membranes.width
            slowest = max(slowest, clock)
        got["cycles"] += slowest
        slowest = 0
        for core in range(machine.cores):
            clock, mine = 0, [c for c in range(p.channels) if homes[p.name][c] == core]
            while mine:
                now, mine = mine[: machine.lanes], mine[machine.lanes :]
                clock += 1
                got["membrane_read_bits"] += machine.membranes.width
                for position in range(places):
                    clock += 1
                    got["membrane_read_bits"] += machine.membranes.width
                    got["membrane_write_bits"] += machine.membranes.width
                    for c in now:
                        if not p.spiking:
                            took = 1
                        elif signals[p.name][c * places + position]:
                            got["spikes_out"] += 1
                            took = send(p.name, c * places + position)
                        else:
                            took = 0
                        clock += took
                        got["messages"] += took
            slowest = max(slowest, clock)
        got["cycles"] += slowest
    assert not any(queues)
    return count


def emulated(net, machine, x):
    return figures(net, place(net, machine), x, reference.run(net, x).spikes)


def plain(made):
    return {p: {k: v.tolist() for k, v in kinds.items()} for p, kinds in made.events.items()}


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 5), st.integers(1, 5))
def test_figures_are_those_of_moving_one_event_at_a_time(seed, cores, elements):
    net, machine = random_net(seed, max_side=5), replace(ROOMY, cores=cores, elements=elements, weight_bits=16)  # some weights have 9
    x = samples(net, 3, seed)
    want = [by_events(net, machine, one) for one in x]
    got = plain(emulated(net, machine, x))
    assert got == {p.name: {k: [w[p.name][k] for w in want] for k in FIGURES} for p in net.populations}


@pytest.mark.parametrize("name", ["lenet", "residual"])
def test_figures_depend_neither_on_batches_nor_on_order(name):
    net = ZOO[name]
    x = samples(net, 9)
    whole = plain(emulated(net, ROOMY, x))
    parts = [emulated(net, ROOMY, part) for part in np.split(x, [2, 3])]
    joined = {p: {k: [n for part in parts for n in plain(part)[p][k]] for k in kinds} for p, kinds in whole.items()}
    assert joined == whole
    summary = emulated(net, ROOMY, x).summary
    assert join([part.summary for part in parts[::-1]]) == replace(summary, placement=parts[2].placement)
    turned = plain(emulated(net, ROOMY, x[::-1]))
    assert {p: {k: v[::-1] for k, v in kinds.items()} for p, kinds in turned.items()} == whole


def test_what_does_not_fit_is_refused_with_population_figure_limit_and_way_out():
    net = ZOO["lenet"]
    small = Memory(64, 256)
    for machine, said in (
        (replace(ROOMY, accumulator_bits=9), "could overflow.*at most 9 bits.*it can reach"),
        (replace(ROOMY, weights=Memory(64, 32)), "at most 512 bits of weights"),
        (replace(ROOMY, membranes=small), "at most 512 bits of potentials"),
        (replace(ROOMY, spikes=Memory(8, 32)), "at most 2 events waiting"),
        (replace(ROOMY, event_bits=6), "at most 6 bits of an event"),
    ):
        with pytest.raises(DeployError, match=r"population '.*") as error:
            check_queues(emulated(net, machine, samples(net, 4)).summary)
        assert re.search(said, str(error.value), re.DOTALL)


def test_simulate_shows_the_machine_or_says_why_not(tmp_path):
    path = tmp_path / "net.npz"
    export(ZOO["lenet"], path, "emulator")
    small = tmp_path / "small.toml"
    shipped = (builtin("targets") / "emulator.toml").read_text()
    small.write_text(shipped.replace("accumulator_bits = 32", "accumulator_bits = 9"))
    run = lambda *more: CliRunner().invoke(main, ["simulate", str(path), *more])  # noqa: E731
    made = json.loads(run("--json").stdout)
    assert made["machine_refusal"] is None
    x = stimuli(ZOO["lenet"], 64)
    assert made["machine"] == emulated(ZOO["lenet"], load("emulator").machine, x).summary.plain()
    assert set(made["twins_nj"]) == {
        f"{kind}, {way}" for kind in ("int", "float32") for way in ("dense", "zero-skipping")
    }
    refused = json.loads(run("--json", "--target", str(small)).stdout)
    assert refused["machine"] is None
    assert "could overflow" in refused["machine_refusal"]
    assert "could overflow" in run("--target", str(small)).stdout


def test_figures_are_plain_data():
    made = json.loads(json.dumps(emulated(ZOO["mlp"], ROOMY, samples(ZOO["mlp"], 4)).summary.plain()))
    assert made["cycles"]["max"] / ROOMY.clock_mhz == made["microseconds"]["max"]
    assert set(FIGURES) < set(next(iter(made["populations"].values())))
