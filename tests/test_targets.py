"""Targets say what they hold and cost, with sources; and a network that does not fit is refused by name."""

from fractions import Fraction

import numpy as np
import pytest
from nets import ZOO

from s3nn_deploy.counts import KINDS
from s3nn_deploy.errors import DeployError
from s3nn_deploy.files import builtin
from s3nn_deploy.formats import FORMATS
from s3nn_deploy.intnet import INPUT, Conv2d, Dense, Input, IntNet, Population, Projection, check
from s3nn_deploy.targets import LIMITS, Limit, Target, check_limits, load, names

PRICE = '[events.synops]\npj = 2.5\nscope = "marginal"\nevidence = "metered"\nsource = "a paper"\n'


def written(tmp_path, text: str, head: str = 'name = "mine"\nsummary = "a chip"\n'):
    path = tmp_path / "mine.toml"
    path.write_text(head + text)
    return path


def refused(tmp_path, text: str, head: str = 'name = "mine"\nsummary = "a chip"\n') -> str:
    with pytest.raises(DeployError) as caught:
        load(written(tmp_path, text, head))
    return str(caught.value)


def binary(*weights: np.ndarray) -> IntNet:
    """A multi-layer perceptron on spikes with these weights."""
    *hidden, last = (Dense(w) for w in weights)
    populations = [
        Population(
            f"fc{i}", (len(d.weight),), (Projection(f"fc{i - 1}" if i else INPUT, d),), threshold=[1] * len(d.weight)
        )
        for i, d in enumerate(hidden)
    ]
    readout = Population(
        "readout",
        (len(last.weight),),
        (Projection(populations[-1].name if hidden else INPUT, last),),
        bias=[0] * len(last.weight),
    )
    return check(IntNet(Input((weights[0].shape[1],), bits=1), (*populations, readout)))


def test_the_promised_targets_are_shipped():
    assert {"emulator", "loihi", "loihi2", "nir", "onnx"} <= set(names())
    assert {n: load(n).takes for n in ("emulator", "loihi", "loihi2", "nir", "onnx")} == {
        "emulator": "emulator",
        "loihi": "netx",
        "loihi2": "netx",
        "nir": "nir",
        "onnx": "onnx",
    }


@pytest.mark.parametrize("name", names())
def test_every_shipped_target_says_where_its_numbers_come_from(name):
    target = load(name)
    assert target.name == name
    assert target.summary
    assert target.takes is None or target.takes in FORMATS
    assert set(target.events) <= set(KINDS)
    assert set(target.limits) <= set(LIMITS)
    for entry in (*target.events.values(), *target.limits.values(), *([target.static] if target.static else [])):
        assert len(entry.source) > 10
    for price in target.events.values():
        assert (price.pj is None) == (price.evidence == "unpublished")
    assert target.not_modelled


def test_prices_are_exact_and_per_event():
    bit = load("emulator").events["weight_bits"]
    assert bit.each == Fraction(100, 64)
    assert load("loihi").events["synops"].each == Fraction(236, 10)
    assert load("loihi").events["synops"].bound == "min"


def test_loihi_2_and_the_formats_have_no_prices():
    for name in ("loihi2", "nir", "onnx"):
        assert all(price.pj is None for price in load(name).events.values())


def test_a_file_of_one_s_own_is_a_target(tmp_path, monkeypatch):
    path = written(tmp_path, PRICE + '[limits]\nweight_bits = { max = 4, source = "a paper" }\n')
    target = load(path)
    assert (target.takes, target.events["synops"].each) == (None, Fraction(5, 2))
    assert target.limits == {"weight_bits": Limit(4, "a paper")}
    monkeypatch.chdir(tmp_path)
    assert load("./mine.toml") == load("mine.toml") == target


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PRICE.replace("synops", "sinops"), "unknown key 'sinops'. Did you mean 'synops'?"),
        (PRICE.replace("scope", "scop"), "unknown key 'scop'. Did you mean 'scope'?"),
        (PRICE.replace("metered", "meterd"), "evidence 'meterd' is not known. Did you mean 'metered'?"),
        (PRICE.replace("marginal", "margin"), "scope 'margin' is not known. Did you mean 'marginal'?"),
        (PRICE.replace('source = "a paper"', ""), "source; expected a text, got nothing"),
        (PRICE.replace("pj = 2.5\n", ""), "without pj"),
        (PRICE.replace("metered", "unpublished"), "An unpublished price is not zero"),
        (PRICE.replace("2.5", "-1"), "a number of at least 0"),
        (PRICE.replace("2.5", "nan"), "is not readable TOML"),
        (PRICE.replace("2.5", "1e999999999"), "is not readable TOML"),
        (PRICE.replace("2.5", '"2.5"'), "a number of at least 0"),
        (PRICE + "per = 0\n", "per; expected an integer of at least 1, got 0"),
        (PRICE + 'covers = ["spike"]\n', "unknown key 'spike'. Did you mean 'spikes'?"),
        (PRICE + PRICE.replace("synops", "synops_nonzero"), "count the same operations"),
        (PRICE.replace("synops", "dense_macs"), "never charged"),
        (PRICE + 'covers = ["spikes"]\n' + PRICE.replace("synops", "spikes"), "covers 'spikes', which has an entry"),
        (PRICE.replace("marginal", "all-in") + PRICE.replace("synops", "spikes"), "an all-in price includes the rest"),
        (PRICE.replace("marginal", "all-in") + '[static]\nmw = 1\nevidence = "metered"\nsource = "x"\n', "no [static]"),
        ("[limits]\nweight_bit = 4\n", "unknown key 'weight_bit'. Did you mean 'weight_bits'?"),
        ("[limits]\nweight_bits = 4\n", "expected a table, got 4"),
        ("[limits]\nweight_bits = { max = 4 }\n", "source; expected a text"),
        ("[event]\n", "unknown key 'event'. Did you mean 'events'?"),
        ('[not_modelled]\nterms = "x"\n', "a list of texts"),
        ("[broken\n", "is not readable TOML"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_the_way_out(tmp_path, text, message):
    assert message in refused(tmp_path, text)


def test_an_unknown_format_or_target_gets_a_suggestion(tmp_path):
    assert "Did you mean 'netx'?" in refused(tmp_path, "", 'name = "mine"\nsummary = "a chip"\ntakes = "netz"\n')
    with pytest.raises(DeployError, match=r"Did you mean 'loihi'\?.*\./my\.toml"):
        load("loihy")
    with pytest.raises(DeployError, match="no such file"):
        load(tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("limits", "where", "words"),
    [
        ({"weight_bits": 4}, "population 'fc1'", ["at most 4", "5 bits (weights -9 to 3)", "at most 4 weight bits"]),
        ({"state_bits": 5}, "population 'fc1'", ["at most 5", "6 bits (it can reach -18 to 6)"]),
        ({"fan_in": 3}, "population 'fc0'", ["at most 3", "got 4"]),
        ({"neurons_per_core": 3}, "network", ["3 x 1 cores", "7, of which population 'readout' has 3"]),
        ({"neurons_per_core": 3, "cores": 2}, "network", ["3 x 2 cores = 6"]),
        ({"synapse_bits_per_core": 30, "cores": 2}, "network", ["30 x 2 cores = 60", "62, of which population 'fc0'"]),
    ],
)
def test_a_network_beyond_a_limit_is_refused_by_name_value_limit_and_way_out(limits, where, words):
    target = Target("tiny", "a chip", limits={key: Limit(most, f"source of {key}") for key, most in limits.items()})
    net = binary(np.array([[1, -2, 3, -4]] * 2), np.array([[-9, -9], [3, 3]]), np.array([[1, 2]] * 3))
    with pytest.raises(DeployError) as caught:
        check_limits(net, target)
    text = str(caught.value)
    assert caught.value.where == where
    assert caught.value.hint
    for word in [*words, f"source of {next(iter(limits))}", "'tiny'"]:
        assert word in text


def test_a_network_at_its_limits_fits():
    limits = {
        "input_bits": 1,
        "weight_bits": 5,
        "state_bits": 6,
        "fan_in": 4,
        "neurons_per_core": 7,
        "synapse_bits_per_core": 62,
    }
    net = binary(np.array([[1, -2, 3, -4]] * 2), np.array([[-9, -9], [3, 3]]), np.array([[1, 2]] * 3))
    check_limits(net, Target("tiny", "a chip", limits={key: Limit(most, "x") for key, most in limits.items()}))


def test_multi_bit_input_is_refused_where_only_spikes_go_in():
    with pytest.raises(DeployError, match="input: exceeds input_bits of target 'odin'"):
        check_limits(ZOO["lenet"], load("odin"))


def test_two_projections_from_one_source_share_its_axons():
    conv = Conv2d(np.ones((2, 2, 3, 3)), padding=(1, 1))
    net = check(
        IntNet(
            Input((2, 4, 4), bits=1),
            (
                Population("twice", (2, 4, 4), (Projection(INPUT, conv), Projection(INPUT, conv)), threshold=[1, 1]),
                Population("readout", (1,), (Projection("twice", Dense(np.ones((1, 32)))),), bias=[0]),
            ),
        )
    )
    check_limits(net, Target("tiny", "a chip", limits={"fan_in": Limit(32, "x")}))


@pytest.mark.parametrize("name", ["emulator", "nir", "onnx"])
def test_int8_networks_fit_the_targets_that_run_anywhere(name):
    for net in ZOO.values():
        check_limits(net, load(name))


@pytest.mark.parametrize(("size", "pj"), [(64, 10), (8192, 10), (8193, 20), (32768, 20), (1 << 20, 100)])
def test_a_price_follows_the_size_of_its_memory(size, pj):
    price = load("emulator", {"machine.weights.bytes": str(size)}).events["weight_bits"]
    assert (price.pj, price.each) == (pj, Fraction(pj, 64))
    assert "the price of a memory of" in price.source
    assert load("emulator", {"machine.spikes.bytes": str(size)}).events["spikes"].pj == pj


def test_a_memory_larger_than_any_with_a_price_has_none():
    price = load("emulator", {"machine.weights.bytes": str((1 << 20) + 1)}).events["weight_bits"]
    assert (price.each, price.evidence) == (None, "unpublished")
    assert price.source == "no price for weights of 1,048,577 bytes, the largest with one has 1,048,576"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('memory = "weights"', 'memory = "wieghts"', "Did you mean 'weights'"),
        ('memory = "weights"', 'memory = "weights"\npj = 3', "both pj and pj_at"),
        ("[machine]\n", "[machine]\ncored = 1\n", "unknown key 'cored'"),
        ("8192 = 10", '"8 KB" = 10', "bytes of a memory = picojoules"),
        ("8192 = 10, 32768 = 20, 1048576 = 100", "8192 = 10, 32768 = 20, 1048576 = -1", "at least 0"),
        ("8192 = 10, 32768 = 20, 1048576 = 100", "", "bytes of a memory = picojoules, got none"),
        ("clock_mhz = 500", "clock_mhz = 0", "at least 1"),
        ("clock_mhz = 500", "clock_mhz = 99999999999999999999", "at most 100,000"),
        ("cores = 4", "cores = 100000000", "at most 4,096"),
        ("pj = 0.1", "pj = -0.1", r"at least 0, got -0\.1"),
    ],
)
def test_a_machine_or_a_price_by_size_that_is_wrong_is_refused(old, new, said, tmp_path):
    text = (builtin("targets") / "emulator.toml").read_text(encoding="utf-8")
    assert old in text
    (tmp_path / "mine.toml").write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(DeployError, match=said):
        load(tmp_path / "mine.toml")


def test_a_price_by_size_needs_a_machine(tmp_path):
    text = (builtin("targets") / "emulator.toml").read_text(encoding="utf-8")
    before, _, after = text.partition("# What happens in which cycle")
    (tmp_path / "mine.toml").write_text(before + after[after.index("[not_modelled]") :], encoding="utf-8")
    with pytest.raises(DeployError, match=r"expected a \[machine\] in the file"):
        load(tmp_path / "mine.toml")
