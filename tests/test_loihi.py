"""The mapping onto Loihi is exact and reversible, its fit holds every limit, and the delivery says everything."""

from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from s3nn_deploy import formats, golden
from s3nn_deploy.backends import lava_builder, reference, run
from s3nn_deploy.errors import DeployError
from s3nn_deploy.files import read_npz, write_npz
from s3nn_deploy.formats import lava
from s3nn_deploy.intnet import INPUT, Conv2d, Dense, Input, IntNet, Population, Projection, check, clamp_thresholds
from s3nn_deploy.loihi import cost, delivery, drawing, mapping
from s3nn_deploy.loihi.fit import grid, place, receptive_box
from s3nn_deploy.loihi.plan import ENCODINGS, GRADED, PerChannel
from s3nn_deploy.targets import LIMITS, Limit, Target, load
from tests.nets import ZOO, random_net, samples

RANDOM = {f"random{seed}": random_net(seed) for seed in range(300, 360)}


def chain(spec, *layers, thresholds=()):
    """A network of the given synapses and first thresholds."""
    source, at, populations = INPUT, spec.shape, []
    for index, synapses in enumerate(layers):
        at = synapses.out_shape(at)
        theta = thresholds[index] if index < len(thresholds) else 1
        neurons = {"bias" if index == len(layers) - 1 else "threshold": np.broadcast_to(theta, at[0])}
        populations.append(Population(f"p{index}", at, (Projection(source, synapses),), **neurons))
        source = f"p{index}"
    return check(IntNet(spec, tuple(populations)))


def made(net, encoding="auto", generation=0):
    """The plan, or None where it is refused."""
    try:
        return mapping.make(net, encoding, generation)
    except DeployError:
        return None


# -- the plan


def computed(plan, net, x):
    """What the plan's neurons do in int64, as the documentation of the file says: {group: values [N, *shape]}."""
    feeds, _ = lava_builder.injected(*_loaded(plan), x)
    values = {s.name: feeds[s.name] for s in plan.sources}
    always = {g.name for g in plan.groups if g.role == "always-on"}
    for group in plan.groups:
        if group.name in always:
            values[group.name] = np.ones((len(x), *group.shape), dtype=np.int64)
            continue
        total = np.zeros((len(x), *group.shape), dtype=np.int64)
        for c in plan.into(group):
            source = values[c.source]
            if isinstance(c.wires, PerChannel):
                part = (source.reshape(len(x), -1) @ c.wires.weight.astype(np.int64).T).reshape(
                    len(x), -1, *[1] * (len(group.shape) - 1)
                )
            elif isinstance(c.wires, Dense | Conv2d):
                part = reference.potential(c.wires, source)
            else:
                part = c.wires.weight * source
            total = total + (part << c.weight_exp if c.weight_exp >= 0 else part >> -c.weight_exp)
        assert np.abs(total).max() <= (mapping.VTH_MAX if group.neuron != GRADED else mapping.GRADED_MAX)
        if group.bias is not None:
            bias = group.bias.astype(np.int64) << (group.bias_exp - 6)
            total = total + bias.reshape(-1, *[1] * (len(group.shape) - 1))
        values[group.name] = total if group.role == "readout" else (total > group.vth).astype(np.int64)
    last = plan.readout
    result = values[last.name] // last.scale
    if last.host_bias is not None:
        result = result + last.host_bias.astype(np.int64).reshape(-1, *[1] * (len(last.shape) - 1))
    return {**values, last.name: result}


def _loaded(plan):
    from s3nn_deploy.loihi.plan import to_plain

    return to_plain(plan)


@pytest.mark.parametrize("encoding", ["auto", *ENCODINGS])
def test_for_every_network_and_encoding_the_plan_computes_the_reference(encoding):
    done = 0
    for net in (ZOO | RANDOM).values():
        if (plan := made(net, encoding)) is None:
            continue
        x = samples(net, 5, seed=3)
        want, got = reference.run(net, x), computed(plan, net, x)
        for p in net.spiking:
            if p.name in got:
                assert np.array_equal(got[p.name].astype(bool), want.spikes[p.name]), (encoding, p.name)
        assert np.array_equal(got[net.readout.name].reshape(len(x), -1), want.readout)
        done += 1
    assert done > 20


def test_whatever_the_input_every_shared_network_is_mapped():
    for name, net in (ZOO | RANDOM).items():
        assert made(net) is not None, name


@pytest.mark.parametrize("encoding", ["auto", "graded", "host", "planes", "thermometer"])
def test_a_file_gives_back_the_network_from_what_runs_alone(encoding, tmp_path):
    for net in (ZOO | RANDOM).values():
        if made(net, encoding) is not None:
            net = replace(net, provenance={"model": "m.pt"}, classes=tuple(f"é{i}" for i in range(net.readout.size)))
            path = formats.export(net, tmp_path / "x.lava", "lava", encoding=encoding)
            back = formats.read(path)
            assert back == clamp_thresholds(net)
            assert (back.classes, back.provenance) == (net.classes, net.provenance)


def test_every_stored_number_is_within_its_field():
    for net in (ZOO | RANDOM).values():
        for encoding in ENCODINGS:
            if (plan := made(net, encoding)) is None:
                continue
            for c in plan.connections:
                weight = np.asarray(c.wires.weight)
                assert weight.min() >= -256
                assert weight.max() <= 254
                assert not np.any(weight & 1)
                assert -8 <= c.weight_exp <= 7
            for g in plan.groups:
                assert 0 <= g.vth <= (mapping.GRADED_MAX if g.neuron == GRADED else mapping.VTH_MAX)
                assert g.neuron == GRADED or g.vth >= 1
                assert 0 <= g.bias_exp <= 7
                if g.bias is not None:
                    assert -4096 <= g.bias.min() <= g.bias.max() <= 4095


def test_all_paths_into_a_group_have_one_length():
    for net in (ZOO | RANDOM).values():
        plan = made(net)
        depth = {s.name: 0 for s in plan.sources} | {g.name: g.depth for g in plan.groups}
        for c in plan.connections:
            if not isinstance(c.wires, PerChannel):
                assert depth[c.target] == depth[c.source] + c.lag + 1
        assert plan.latency == max(depth.values())
    relays = [g.name for g in mapping.make(ZOO["residual"]).groups if g.role == "relay"]
    assert relays == ["a2+1"]


def test_the_passes_say_what_they_did_in_order():
    plan = mapping.make(ZOO["residual"])
    assert [step.name for step in plan.passes] == list(mapping.PASSES)
    said = {step.name: " ".join(step.lines) for step in plan.passes}
    assert "stem" in said["encode the input"]
    assert "a2+1: relays the 252 neurons of a2 to b2" in said["align paths"]
    assert "belongs to no sample" in said["fill the pipeline"]
    net = chain(Input((2,), 1), Dense([[3, -2], [1, 1]]), Dense([[1, 1]]), thresholds=([1 << 40, 1],))
    assert "p0: 1 of 2 thresholds moved" in mapping.make(net).passes[0].lines[0]


def test_the_encoding_is_chosen_by_what_holds():
    small, wide = Dense([[1, 2], [3, -4]]), Dense(np.full((2, 600), 127))
    assert mapping.make(chain(Input((2,), 1), small, Dense([[1, 1]]))).encoding == "spikes"
    assert mapping.make(chain(Input((2,), 8), small, Dense([[1, 1]]))).encoding == "graded"
    assert mapping.make(chain(Input((2,), 8), small, Dense([[1, 1]])), generation=1).encoding == "host"
    assert mapping.make(chain(Input((600,), 8), wide, Dense([[1, 1]]))).encoding == "host"
    assert mapping.make(chain(Input((2,), 9), small, Dense([[1, 1]]))).encoding == "host"
    assert mapping.make(chain(Input((600,), 5), wide)).readout.neuron == GRADED
    assert mapping.make(chain(Input((2,), 8), small), generation=1).encoding == "planes"  # the host would leave nothing
    least = chain(Input((2,), 8), Dense([[-128, 127]]), Dense([[1]]))
    digits = [c.wires.weight for c in mapping.make(least, "planes").connections if c.target == "p0"]
    assert [(d.min(), d.max()) for d in digits] == [(0, 254), (-256, 254)]


def refused(words, *arguments):
    with pytest.raises(DeployError) as caught:
        mapping.make(*arguments)
    for word in words:
        assert word in str(caught.value), (word, str(caught.value))


def test_what_cannot_be_mapped_is_refused_by_name_value_limit_and_way_out():
    small = Dense([[1, 2], [3, -4]])
    net = chain(Input((2,), 8), small, Dense([[1, 1]]))
    refused(["'gradet'", "Did you mean 'graded'?"], net, "gradet")
    refused(["one-bit input", "got 8 bits"], net, "spikes")
    refused(["Loihi 1 has no graded spikes", "host"], net, "graded", 1)
    refused(["at most 8 input bits"], chain(Input((2,), 9), small, Dense([[1, 1]])), "graded")
    refused(["at most 255", "511", "planes"], chain(Input((2,), 9), small, Dense([[1, 1]])), "thermometer")
    refused(["nothing is left for the chip"], chain(Input((2,), 8), small), "host")
    hidden = chain(Input((2,), 1), Dense(np.ones((1100, 2))), Dense(np.full((2, 1100), 127)), Dense([[1, 1]]))
    refused(["population 'p1'", "LIF neuron, the only one of Loihi 1", "131,071", "139,700"], hidden, "auto", 1)
    assert mapping.make(hidden)["p1"].neuron == GRADED
    monster = chain(Input((40000,), 8), wide_ones := Dense(np.full((1, 40000), 127)), Dense([[1]]))
    refused(["population 'p0'", "8,388,607", "--input-encoding host"], monster, "graded")
    assert wide_ones.weight.size == 40000
    heavy = chain(Input((1, 2, 2), 1), Conv2d(np.full((1, 1, 2, 2), 3000)), Dense([[1]]))
    refused(["population 'p0'", "8-bit", "-2,016..2,016", "3,000"], heavy)


def test_notes_name_what_the_chip_may_not_have():
    net = chain(Input((130,), 1), Dense(np.full((2, 130), 127)), Dense([[1, 1]]))
    assert mapping.notes(mapping.make(net), net) == []
    net = chain(Input((260,), 1), Dense(np.full((2, 260), 127)), Dense([[1, 1]]))
    assert "p0: sums up to 33,020 can exceed 16-bit accumulators (32,767)" in mapping.notes(mapping.make(net), net)[0]
    wide = chain(Input((1, 2, 256), 1), Conv2d(np.ones((1, 1, 2, 2))), Dense(np.ones((1, 255))))
    assert "2 x 256" in formats.notes(wide, "lava")[0]
    assert "graded neurons" in formats.notes(chain(Input((600,), 5), Dense(np.full((2, 600), 127))), "lava")[1]


# -- damaged files


@pytest.fixture
def written(tmp_path):
    return lava.write(ZOO["residual"], tmp_path / "x.lava")


def unreadable(path):
    with pytest.raises(DeployError, match=r"x\.lava"):
        lava.read(path)


def test_truncated_and_foreign_files_are_refused(written):
    data = written.read_bytes()
    for size in (0, 10, len(data) // 2, len(data) - 1):
        written.write_bytes(data[:size])
        unreadable(written)
    np.savez(written.with_suffix(".npz"), a=np.zeros(3))
    written.with_suffix(".npz").replace(written)
    unreadable(written)


def test_any_changed_number_is_refused(written):
    meta, arrays = read_npz(written, lava.SCHEMA)
    for name, array in arrays.items():
        changed = np.array(array)
        changed.flat[-1] += 2
        write_npz(written, meta, {**arrays, name: changed})
        try:
            assert lava.read(written) != lava.lower(ZOO["residual"]), name  # a weight: another network, and so it says
        except DeployError:
            assert "bias" in name or "threshold" in name or "weight" in name
        write_npz(written, meta, {k: v for k, v in arrays.items() if k != name})
        unreadable(written)


CHANGES = {
    "a relay's source": lambda plan: plan["connections"][3].update(source="b1"),
    "a lag": lambda plan: plan["connections"][1].update(lag=3),
    "a depth": lambda plan: plan["groups"][0].update(depth=2),
    "a threshold": lambda plan: plan["groups"][3].update(vth=7),
    "a scale": lambda plan: plan["groups"][0].update(scale=4),
    "an exponent": lambda plan: plan["connections"][0].update(weight_exp=99),
    "a neuron": lambda plan: plan["groups"][0].update(neuron="graded"),
    "a role": lambda plan: plan["groups"][0].update(role="relay"),
    "wires": lambda plan: plan["connections"][0]["wires"].update(kind="sparse"),
    "an encoding": lambda plan: plan.update(encoding="graded"),
    "no groups": lambda plan: plan.update(groups=[]),
    "a list": lambda plan: plan.update(host=3),
    "the order": lambda plan: plan.update(order=["a"]),
    "the latency": lambda plan: plan.update(latency=9),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_plan_is_refused(written, change):
    meta, arrays = read_npz(written, lava.SCHEMA)
    CHANGES[change](meta["plan"])
    write_npz(written, meta, arrays)
    unreadable(written)


# -- the fit

VGG = chain(
    Input((3, 32, 32), 8),
    *[Conv2d(np.ones((o, i, 3, 3)), padding=(1, 1)) for i, o in ((3, 32), (32, 64))],
    Conv2d(np.ones((64, 1, 2, 2)), (2, 2), groups=64),
    Conv2d(np.ones((64, 64, 3, 3)), (2, 2), (1, 1)),
    Dense(np.ones((100, 4096))),
    Dense(np.ones((10, 100))),
)


@pytest.mark.parametrize("name", ["loihi", "loihi2"])
@pytest.mark.parametrize("which", ["residual", "lenet", "random12", "vgg"])
def test_a_placement_holds_every_limit_and_every_neuron_once(name, which):
    target = load(name)
    net = VGG if which == "vgg" else ZOO[which]
    plan = mapping.make(net, "auto", delivery.generation(target))
    fit = place(plan, target)
    assert not fit.unplaced
    for core in fit.cores:
        for key in fit.limits:
            assert core.use(key) <= target.limits[key].max
        assert all(0 <= share <= 1 for share in fit.utilisation(core).values())
    for group in plan.groups:
        seen = np.zeros(grid(group.shape), dtype=int)
        for core in fit.on(group.name):
            for tile in (t for t in core.tiles if t.group == group.name):
                (c0, c1), (h0, h1), (w0, w1) = tile.box
                seen[c0:c1, h0:h1, w0:w1] += 1
                assert tile.neurons <= tile.uses["neurons_per_core"]
        assert np.all(seen == 1)
    assert fit.chips == -(-len(fit.cores) // 128)


def test_what_a_tile_is_said_to_use_is_at_least_what_it_uses():
    target = load("loihi")
    plan = mapping.make(VGG, "host", 1)
    fit = place(plan, target)
    assert len(fit.cores) > 60
    for group in plan.groups:
        shape = grid(group.shape)
        for c in plan.into(group):
            source = np.zeros(grid(VGG[c.source].shape), dtype=int)
            for core in fit.on(group.name):
                for tile in (t for t in core.tiles if t.group == group.name):
                    box = receptive_box(c, source.shape, group, tile.box)
                    incoming = np.prod([end - first for first, end in box])
                    assert incoming <= tile.uses["input_axons_per_core"]
                    source[tuple(slice(*span) for span in box)] += 1
            for core in fit.on(c.source):
                for tile in (t for t in core.tiles if t.group == c.source):
                    leaving = source[tuple(slice(*span) for span in tile.box)].sum()
                    assert leaving <= tile.uses["output_axons_per_core"]
        assert shape


def test_intels_own_figures_are_met():
    """784-128-64-10 took 5 cores of Loihi 2, its first layer 3 (lava-dl's MNIST notebook)."""
    w = lambda o, i: Dense(np.ones((o, i)))  # noqa: E731
    fit = place(mapping.make(chain(Input((784,), 1), w(128, 784), w(64, 128), w(10, 64))), load("loihi2"))
    assert len(fit.on("p0")) == 3
    assert len(fit.cores) in (4, 5)


def test_a_population_that_no_core_holds_is_named_with_what_would_make_it_fit(tmp_path):
    net = chain(Input((4, 40, 40), 1), Conv2d(np.ones((4, 4, 1, 1))), Dense(np.ones((2, 6400))), Dense(np.ones((2, 2))))
    fit = place(mapping.make(net), load("loihi"))
    assert [u.group for u in fit.unplaced] == ["p1"]
    text = str(fit.unplaced[0])
    for word in ("p1", "6,400", "4,096", "Davies", "at most 2 channels in p0 (now 4)", "pooling"):
        assert word in text
    with pytest.raises(DeployError, match="does not hold the network"):
        delivery.deliver(net, load("loihi"), tmp_path / "x.net", samples(net, 3))
    assert not list(tmp_path.iterdir())
    tiny = Target("tiny", "a chip", limits={"synapse_bits_per_core": Limit(640, "a source"), "cores": Limit(2, "x")})
    text = str(place(mapping.make(ZOO["mlp"]), tiny).unplaced[0])
    for word in ("640", "a source", "4-bit weights", "shared"):
        assert word in text
    small = Target("small", "a chip", limits={"neurons_per_core": Limit(7, "x"), "cores": Limit(2, "x")})
    assert place(mapping.make(ZOO["mlp"]), small).chips == 4  # 3 + 3 + 2 cores of two a chip


def test_the_picture_shows_every_core():
    plan = mapping.make(VGG, "host", 1)
    fit = place(plan, load("loihi"))
    root = ElementTree.fromstring(drawing.svg(fit))
    titles = [e.text for e in root.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == len(fit.cores)
    assert titles[0].startswith("core 0: ")


# -- the bill


@pytest.mark.parametrize("seed", range(8))
def test_synaptic_operations_are_those_of_the_emulator(seed):
    net = random_net(600 + seed)
    net = replace(net, input=Input(net.input.shape, 1))
    plan, x = mapping.make(net), samples(net, 6)
    sums = cost.spikes(plan, net, x)
    found = [n for n, c in zip(cost.synops(plan, sums), plan.connections, strict=True) if c.projection >= 0]
    assert sum(found) == int(run(net, x, "emulator").counts.total("synops").sum())


def test_a_bill_has_a_source_for_every_price_and_no_price_without_one():
    for name in ("loihi", "loihi2"):
        target = load(name)
        net = ZOO["residual"]
        plan = mapping.make(net, "auto", delivery.generation(target))
        x = samples(net, 4)
        bill = cost.cost(plan, place(plan, target), target, cost.spikes(plan, net, x), 4, rate_hz=100.0)
        known = {line.event: line for line in bill.lines}
        assert known["neuron_updates"].count == sum(g.size for g in plan.groups)
        for line in bill.lines:
            assert (line.pj is None) == (line.evidence == "unpublished")
            assert line.source
        if name == "loihi":
            assert bill.at_least == pytest.approx(sum(line.nj for line in bill.lines if line.nj is not None))
            assert bill.static_nj == 104 * 1e6 / 100
            assert bill.step_ns > 465
            assert bill.latency_ns == bill.step_ns * (plan.latency + 1)
        else:
            assert (bill.at_least, bill.static_nj, bill.step_ns) == (None, None, None)
            assert any("PilotNet" in reference for reference in bill.references)
    with pytest.raises(DeployError, match="positive"):
        cost.cost(plan, place(plan, target), target, cost.spikes(plan, net, x), 4, rate_hz=0.0)


def test_a_spike_is_counted_once_for_each_core_that_it_reaches():
    net = chain(Input((4,), 1), Dense(np.eye(4)), Dense(np.ones((6, 4))))
    tiny = Target("tiny", "x", limits={"neurons_per_core": Limit(2, "x"), "cores": Limit(128, "x")})
    plan = mapping.make(net)
    fit = place(plan, tiny)
    assert [len(fit.on(g.name)) for g in plan.groups] == [2, 3]
    x = np.array([[1, 1, 0, 1], [1, 0, 0, 0]], dtype=np.uint8)
    bill = cost.cost(plan, fit, tiny, cost.spikes(plan, net, x), 2)
    known = {line.event: line.count for line in bill.lines}
    assert known["spikes"] == (3 + 1) * 3 / 2
    assert known["synops"] == (3 + 1) * (4 + 6) / 2
    assert known["injected"] == 2
    assert known["hops_ew"] == (2 * 1 + 1 * 1 + 1 * 1) / 2  # cores 0 and 1 to 2, 3 on tile 0 and 4 on tile 1


# -- the delivery


@pytest.mark.parametrize("name", ["loihi", "loihi2"])
@pytest.mark.parametrize("which", ["mlp", "lenet", "residual"])
def test_a_delivery_has_all_files_and_its_golden_samples_are_the_reference(which, name, tmp_path):
    net = replace(ZOO[which], classes=())
    x = samples(net, 14)
    made = delivery.deliver(net, load(name), tmp_path / "own.net", x, rate_hz=10.0)
    names = {path.name for path in made.files}
    wanted = {"own.lava", "own.lava.golden.npz", "lava_builder.py", f"own.{name}.md", f"own.{name}.svg"}
    assert wanted <= names == {path.name for path in tmp_path.iterdir()}
    assert ("own.net" in names) == (which == "mlp")
    assert made.path.name == ("own.net" if which == "mlp" else "own.lava")
    assert formats.read(made.path) == clamp_thresholds(net)
    vectors = golden.read(clamp_thresholds(net), tmp_path / "own.lava")
    assert len(vectors.x) == 10
    assert np.array_equal(vectors.readout, reference.run(net, x[:10]).readout)
    text = (tmp_path / f"own.{name}.md").read_text()
    for word in (
        "## The mapping",
        "## Loading it on the chip",
        "## 10 golden samples",
        "## Cores",
        "## Energy and time",
    ):
        assert word in text
    assert "## What the simulator cannot check" in text
    assert "vDecay = 4096" in text
    assert f"Latency: {made.plan.latency} steps" in text
    assert all(path.name in text for path in made.files if path.suffix != ".md")
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "note", "exec")
    assert ("no netx file" in text) == (which != "mlp")
    assert set(delivery.plain(made)) >= {"passes", "cores", "cost", "notes", "encoding", "latency"}


def test_the_note_loads_no_netx_file_whose_biases_exceed_13_bits(tmp_path):
    wide = Conv2d(np.full((1, 1, 1, 40), 127))  # sums 0..5,080, doubled with the thresholds
    net = chain(Input((1, 1, 41), 1), Conv2d(np.concatenate([wide.weight, -wide.weight])), Dense(np.ones((2, 4))))
    for high, loads in ((2000, "netx.hdf5.Network"), (5000, "lava_builder.load")):
        net = check(replace(net, populations=(replace(net["p0"], threshold=[high, -high]), net.readout)))
        made = delivery.deliver(net, load("loihi2"), tmp_path / "own.net", samples(net, 3))
        assert made.path.name == "own.net"
        assert loads in (tmp_path / "own.loihi2.md").read_text()
        assert any("p0's biases exceed 13 bits" in note for note in made.notes) == (high == 5000)


def test_the_limits_of_both_generations_are_stated_with_their_disagreements():
    first, second = load("loihi"), load("loihi2")
    for target in (first, second):
        assert {"neurons_per_core", "synapse_bits_per_core", "input_axons_per_core", "groups_per_core"} <= set(
            target.limits
        )
        assert set(target.limits) <= set(LIMITS)
    assert "8192" in second.limits["neurons_per_core"].also
    assert "192 KB" in second.limits["synapse_bits_per_core"].also
    assert "120" in second.limits["cores"].also
