"""Reports, comparisons and sweeps: the same figures as the engines give, on pages that load nothing and run nothing."""

import base64
import hashlib
import json
import pickle
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import ZOO, random_net, samples

from s3nn_deploy import cli, document, formats, machine, page, sweep, targets
from s3nn_deploy.backends import emulator, reference
from s3nn_deploy.files import builtin
from s3nn_deploy.intnet import INPUT, Dense, Input, IntNet, Population, Projection, check
from s3nn_deploy.pricing import price, twins
from s3nn_deploy.simulation import simulate

EVIL = '<script>alert("1")</script>&\'<img src=x onerror=alert(1)>'


def call(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(cli.main, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def saved(net: IntNet, folder: Path, name: str = "net.npz") -> tuple[Path, Path]:
    """The network and its samples as files."""
    formats.export(net, folder / name, "emulator")
    np.save(folder / "x.npy", samples(net, 12))
    return folder / name, folder / "x.npy"


def gathered(net: IntNet, folder: Path, target: str = "emulator", **options: Any) -> dict[str, Any]:
    path, x = saved(net, folder)
    return document.gather(path, targets.load(target), np.load(x), None, "samples", **options)


class Page(HTMLParser):
    """Elements and texts of a page, and what a browser would fetch or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br", "wbr", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def check_page(text: str) -> Page:
    """Well nested, self-contained, and its style sheet is the one that its policy admits."""
    found = Page(text)
    assert not found.open
    assert not {"script", "img", "link", "iframe", "object", "base", "form"} & set(found.tags)
    names = {name for name, _ in found.attributes}
    assert not names & {"src", "href", "style"}
    assert not any(name.startswith("on") for name in names)
    assert not re.search(r"url\(|@import", text)
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'sha256-{digest}'" in text
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)
    return found


@pytest.mark.parametrize("seed", range(4))
def test_a_report_has_the_figures_of_the_engines(seed: int, tmp_path: Path) -> None:
    net = random_net(seed)
    plain = json.loads(json.dumps(gathered(net, tmp_path)))
    x = samples(net, 12)
    trace, bill = emulator.run(net, x), price(emulator.run(net, x).counts, "emulator")
    assert plain["schema"] == document.SCHEMA
    assert plain["bill"]["total"] == bill.total
    assert [p["name"] for p in plain["populations"]] == [p.name for p in net.populations]
    for p in plain["populations"]:
        assert p["counts"] == {kind: int(n.sum()) / len(x) for kind, n in trace.counts.events[p["name"]].items()}
        assert p["energy_nj"] == bill.per_population[p["name"]]
        assert sum(p["energy_by_kind_nj"].values()) == pytest.approx(p["energy_nj"])  # floats of a picture
        if p["name"] in trace.spikes:
            fired = reference.run(net, x).spikes[p["name"]].sum(0)
            assert (p["silent"], p["always"]) == ((fired == 0).sum(), (fired == len(x)).sum())
    assert sum(plain["rate_histogram"]["counts"]) == sum(p.size for p in net.spiking)
    assert sum(plain["energy_histogram"]["counts"]) == len(x)
    held = machine.place(net, targets.load("emulator").machine)
    assert plain["machine"] == machine.figures(net, held, x, trace.spikes).summary.plain()
    assert {row["equal_to_emulator"] for row in plain["accuracy"].values()} == {len(x)}
    check_page(page.report(plain))


@pytest.mark.parametrize("target", targets.names())
def test_no_page_has_a_bare_total_with_an_unpriced_term(target: str, tmp_path: Path) -> None:
    plain = gathered(ZOO["lenet"], tmp_path, target)
    words = check_page(page.report(plain)).words
    for source in (line["source"] for line in plain["bill"]["lines"]):
        assert source in words
    assert set(plain["bill"]["not_modelled"]) <= set(words)
    complete = plain["bill"]["total"] is not None and bool(plain["bill"]["lines"])
    figures = document.summary(plain)
    assert (figures["energy, nJ"] is not None) == complete
    if plain["bill"]["unpriced"]:
        assert "unpublished, not zero" in words
        assert not plain["bill"]["lines"] or "at least" in document.verdict(plain).lower()


def test_a_report_prices_the_network_without_spikes_too(tmp_path: Path) -> None:
    net = ZOO["lenet"]
    plain = gathered(net, tmp_path)
    bills = twins(net, emulator.run(net, samples(net, 12)).counts, targets.load("emulator"))
    assert plain["twins_nj"] == {name: bill.total for name, bill in bills.items()}
    words = check_page(page.report(plain)).words
    for name, nj in plain["twins_nj"].items():
        assert {f"{name} twin", document.figure(nj)} <= set(words)
    unpriced = gathered(net, tmp_path, "loihi")
    assert unpriced["twins_nj"] == {}
    assert "Against networks without spikes" not in page.report(unpriced)


def _evil(value: Any) -> Any:
    """Every text of plain data, made hostile, but for what the page looks up."""
    if isinstance(value, dict):
        return {k: v if k in ("event", "bound", "energy_by_kind_nj") else _evil(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_evil(v) for v in value]
    return value + EVIL if isinstance(value, str) else value


@pytest.mark.parametrize("target", ["emulator", "loihi", "loihi2"])
def test_what_comes_from_names_and_files_is_escaped(target: str, tmp_path: Path) -> None:
    plain = _evil(gathered(ZOO["lenet"], tmp_path, target))
    plain["accuracy"]["emulator"]["correct"] = 3
    found = check_page(page.report(plain, [plain], fit=EVIL))
    assert any(EVIL in words for words in found.words)
    compared = _evil(document.compare(plain, plain))
    assert any(EVIL in words for words in check_page(page.comparison(compared)).words)
    ElementTree.fromstring(page.scatter([(EVIL, 1.0, 0.5)], EVIL, EVIL, alone=True))


def test_the_command_writes_a_page_and_data_that_compare_reads(tmp_path: Path) -> None:
    path, x = saved(ZOO["lenet"], tmp_path)
    run = ("report", path, "--input", x)
    made = tmp_path / "report.html"
    one = call(*run, "--html", made, "--json")
    plain = json.loads(one.stdout)
    assert plain["command"].startswith("s3nn-deploy report")
    assert "--input" in plain["command"]
    assert document.verdict(plain) in "".join(check_page(made.read_text(encoding="utf-8")).words)
    assert document.verdict(plain) in call(*run).stdout
    for name, target in (("a", "emulator"), ("b", "loihi")):
        (tmp_path / name).write_text(call(*run, "--target", target, "--json").stdout, encoding="utf-8")
    same = json.loads(call("compare", tmp_path / "a", tmp_path / "a", "--json").stdout)
    assert all(row["difference"] in (0, None) for row in same["rows"])
    assert "same network" in " ".join(same["notes"])
    other = call("compare", tmp_path / "a", tmp_path / "b", "--html", tmp_path / "c.html").stdout
    assert "prices of emulator and loihi" in other
    check_page((tmp_path / "c.html").read_text(encoding="utf-8"))
    rows = json.loads(call("compare", tmp_path / "a", tmp_path / "b", "--json").stdout)["rows"]
    assert all(row["difference"] is None for row in rows if "energy" in row["figure"])
    assert all(row["difference"] == 0 for row in rows if row["figure"] == "synaptic operations")


def test_a_loihi_report_shows_the_cores(tmp_path: Path) -> None:
    path, x = saved(random_net(1, residual=False), tmp_path)
    made = tmp_path / "report.html"
    call("report", path, "--input", x, "--target", "loihi2", "--html", made)
    assert re.search(r"Fits on \d+ cores of \d+ chip", made.read_text(encoding="utf-8"))
    check_page(made.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema": "other/1"}', '{"schema": "s3nn-deploy-report/1"}', "[" * 9999]
)
def test_compare_refuses_what_is_no_report(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    assert "a.json" in call("compare", tmp_path / "a.json", tmp_path / "a.json", code=2).stderr


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.just("p"), st.floats(0, 1e9), st.floats(0, 1)), min_size=1, max_size=20))
def test_the_front_is_what_no_point_beats(points: list[tuple[str, float, float]]) -> None:
    kept = {points[i][1:] for i in page.front(points)}
    beaten = {(c, q) for _, c, q in points if any(c2 <= c and q2 >= q and (c2, q2) != (c, q) for _, c2, q2 in points)}
    assert kept == {p[1:] for p in points} - beaten
    ElementTree.fromstring(page.scatter(points, "nJ", "accuracy", alone=True))


def _inputs(x: np.ndarray) -> Any:
    return lambda _: (x, None, x)


def test_a_killed_sweep_goes_on_and_computes_nothing_twice(tmp_path: Path) -> None:
    path, x_file = saved(ZOO["lenet"], tmp_path)
    x, out = np.load(x_file), tmp_path / "sweep.jsonl"
    vary = {"events.synops.pj": ["10", "20"]}
    todo = sweep.points([path], [None, 4], ["emulator"], vary, _inputs(x))
    assert len({p.key for p in todo}) == 4
    rows = sweep.sweep(todo, out, _inputs(x), jobs=2)
    lines = out.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 4
    bill = price(simulate(ZOO["lenet"], x).counts, targets.load("emulator", {"events.synops.pj": "10"}))
    assert rows[0]["at_least_nj"] == bill.total
    assert rows[0]["at_least_nj"] < rows[1]["at_least_nj"]
    assert [row["weight_bits"] for row in rows][2:] == [4, 4]
    # a line that is there is taken as it is: the mark shows that it was not computed again
    marked = json.dumps({**json.loads(lines[0]), "mark": True})
    out.write_text("\n".join([marked, lines[1], lines[2][:40]]), encoding="utf-8")
    seen: list[tuple[int, int]] = []
    again = sweep.sweep(todo, out, _inputs(x), jobs=1, progress=lambda done, total, _: seen.append((done, total)))
    assert seen[0] == (2, 4)
    assert [row.pop("mark", False) for row in again].count(True) == 1
    assert again == rows
    assert len(sweep.read(out)) == 4


@pytest.mark.parametrize("name", sorted(ZOO))
def test_requantising_keeps_what_fits_and_narrows_what_does_not(name: str) -> None:
    net = ZOO[name]
    if net.input.bits > 8:
        pytest.skip("quantise calibrates with 8-bit inputs")
    widest = max(map(sweep._width, net.populations))
    assert sweep.requantised(net, samples(net), widest) is net
    if widest <= 3:
        return
    made = sweep.requantised(net, samples(net), 3)
    assert max(map(sweep._width, made.populations)) <= 3
    assert made.input == net.input
    assert made.readout.size == net.readout.size


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("bits", [2, 7])
def test_the_float_twin_decides_as_the_network_does(seed: int, bits: int) -> None:
    import torch

    net = random_net(seed)
    x = samples(net, 32)
    with torch.no_grad():
        found = sweep._module(net, bits)(torch.as_tensor(x, dtype=torch.float32)).argmax(1).numpy()
    assert found.tolist() == simulate(net, x).predictions.tolist()


def test_a_sweep_varies_the_machine_and_names_what_does_not_fit(tmp_path: Path) -> None:
    net, (path, x_file) = ZOO["lenet"], saved(ZOO["lenet"], tmp_path)
    x = np.load(x_file)
    vary = {"machine.cores": ["1", "4"], "machine.weights.bytes": ["64", "1048576"]}
    todo = sweep.points([path], [None], ["emulator"], vary, _inputs(x))
    rows = sweep.sweep(todo, tmp_path / "s.jsonl", _inputs(x))
    assert [bool(row["refused"]) for row in rows] == [True, False, True, False]
    assert "bits of weights on one core" in rows[0]["refused"]
    spikes = emulator.run(net, x).spikes
    for row in rows[1::2]:
        target = targets.load("emulator", row["changes"])
        found = machine.figures(net, machine.place(net, target.machine), x, spikes).summary.plain()
        assert (row["cycles"], row["queue_peak"]) == (found["cycles"]["mean"], found["queue_peak"])
    assert rows[1]["cycles"] > rows[3]["cycles"]
    out = call("sweep", path, "--input", x_file, "--out", tmp_path / "t.jsonl", "--vary", "machine.cores=1,4").stdout
    assert all(f"{row['cycles']:,.0f}" in out for row in rows[1::2])


def test_what_has_no_price_is_swept_and_not_plotted_beside_what_has(tmp_path: Path) -> None:
    path, x_file = saved(ZOO["lenet"], tmp_path)
    x = np.load(x_file)
    vary = {"machine.weights.bytes": ["1048576", "1048577"]}
    todo = sweep.points([path], [None], ["emulator"], vary, _inputs(x))
    rows = sweep.sweep(todo, tmp_path / "s.jsonl", _inputs(x))
    assert [row["unpriced"] for row in rows] == [[], ["weight_bits"]]
    assert [point[0] for point in sweep.comparable(rows)] == [rows[0]["label"]]
    assert len(sweep.comparable(rows[1:])) == 1
    bill = price(simulate(ZOO["lenet"], x).counts, targets.load("emulator", rows[1]["changes"]))
    assert bill.total is None
    assert "no price for weights of 1,048,577 bytes" in bill.reasons["weight_bits"]


def test_a_sweep_hands_on_the_name_of_a_mapped_file_and_not_its_contents(tmp_path: Path) -> None:
    path, x_file = saved(ZOO["lenet"], tmp_path)
    x = np.load(x_file, mmap_mode="r")
    for some in (x, x[:3]):
        sent = sweep._Mapped.of(some)
        assert len(pickle.dumps(sent)) < 1000
        assert np.array_equal(pickle.loads(pickle.dumps(sent)).open(), some)
    for other in (x[1:], x[::2], np.array(x)):
        assert sweep._Mapped.of(other) is other
    todo = sweep.points([path], [None, 3], ["emulator"], {}, _inputs(x))
    whole = sweep.sweep(todo, tmp_path / "a.jsonl", _inputs(np.array(x)), jobs=2)
    assert sweep.sweep(todo, tmp_path / "b.jsonl", _inputs(x), jobs=2) == whole


def test_the_sweep_command_prints_writes_and_refuses(tmp_path: Path) -> None:
    path, x = saved(ZOO["lenet"], tmp_path)
    run = ("sweep", path, "--input", x, "--out", tmp_path / "s.jsonl", "--jobs", 1)
    mine = tmp_path / "mine.toml"
    mine.write_text((builtin("targets") / "emulator.toml").read_text(encoding="utf-8"), encoding="utf-8")
    out = call(*run, "--targets", f"emulator,{mine}", "--csv", tmp_path / "s.csv", "--svg", tmp_path / "s.svg").stdout
    assert "different prices" in out
    assert (tmp_path / "s.csv").read_text(encoding="utf-8").count("\n") == 3
    for target in ("emulator", "mine"):
        ElementTree.parse(tmp_path / f"s-{target}.svg")
    assert len(json.loads(call(*run, "--json").stdout)) == 1
    assert "2 to 8" in call(*run, "--bits", "1", code=2).stderr
    assert "comma-separated" in call(*run, "--bits", "x", code=2).stderr
    assert "events.nothing" in call(*run, "--vary", "events.nothing=3", code=2).stderr
    assert "TOML value" in call(*run, "--vary", "events.synops.pj=}", code=2).stderr
    assert "at least one target" in call(*run, "--targets", ",", code=2).stderr
    np.save(tmp_path / "none.npy", np.load(x)[:0])
    for command in ("sweep", "report"):
        assert "at least one" in call(command, path, "--input", tmp_path / "none.npy", code=2).stderr
    (tmp_path / "s.jsonl").write_text("{}\n", encoding="utf-8")
    assert "is not a result of a sweep" in call(*run, code=2).stderr


def test_requantising_leaves_a_narrow_population_alone() -> None:
    rng = np.random.default_rng(0)
    first, last = rng.integers(-5, 6, (6, 9)), rng.integers(-100, 101, (4, 6))
    net = check(
        IntNet(
            Input((9,), 4),
            (
                Population("hidden", (6,), (Projection(INPUT, Dense(first)),), threshold=[0] * 6),
                Population("readout", (4,), (Projection("hidden", Dense(last)),), bias=[0] * 4),
            ),
        )
    )
    made = sweep.requantised(net, samples(net, 64), 4)
    assert made.populations[0].projections[0].synapses.weight.tolist() == first.tolist()
    assert sweep._width(made.readout) == 4


def test_a_sweep_that_is_killed_leaves_whole_lines_and_no_worker(tmp_path: Path) -> None:
    path, x = saved(ZOO["lenet"], tmp_path)
    out = tmp_path / "s.jsonl"
    command = [sys.executable, "-m", "s3nn_deploy.cli", "sweep", path, "--input", x, "--out", out, "--jobs", 1]
    command = [str(part) for part in (*command, "--bits", "7,6,5,4,3,2")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while process.poll() is None and not (out.exists() and out.read_text(encoding="utf-8").count("\n") >= 2):
        time.sleep(0.01)
    process.kill()
    process.communicate()  # ends when no worker holds the pipe any longer
    kept = out.read_text(encoding="utf-8").rpartition("\n")[0].split("\n")
    assert len(kept) >= 2
    plain = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert out.read_text(encoding="utf-8").split("\n")[: len(kept)] == kept
    assert [row["bits"] for row in plain] == [None, 7, 6, 5, 4, 3, 2]
