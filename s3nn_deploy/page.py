"""Reports as one self-contained HTML page each, and plots as SVG; every text that comes from data is escaped."""

import base64
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from s3nn_deploy.counts import KINDS
from s3nn_deploy.document import ENGINES, figure, kind_name, verdict

WIDTH = 400
"""Of a plot, in its own units; about as many pixels on the page."""

COLOURS = ("#3b6fb6", "#c8553d", "#2e8b57", "#b58900", "#8a4f9e", "#1f9aa8", "#7a5230", "#c2478c", "#6b7280", "#557a1f")
DARK = ("#7fb0ee", "#f08a70", "#63c78f", "#e3bd4a", "#c491da", "#5fd0dc", "#c99d72", "#ee8fc2", "#a9b0bb", "#a3c963")


def _numbered(colours: Sequence[str]) -> str:
    return " ".join(f"--k{i}: {colour};" for i, colour in enumerate(colours))


STYLE = f"""
:root {{ color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --line: #d5dae0; --back: #ffffff; --card: #f6f7f9;
  --accent: #2457a5;
{_numbered(COLOURS)} }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e8eaed; --soft: #a3abb5; --line: #363c44; --back: #14171a;
  --card: #1d2125; --accent: #8db8f5;
{_numbered(DARK)} }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }}
main {{ max-width: 1120px; margin: 0 auto; padding: 2rem 1.25rem 3rem; }}
h1 {{ font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.2rem; margin: 2.25rem 0 .6rem; }}
h3 {{ font-size: 1rem; margin: 1.25rem 0 .3rem; }}
p {{ margin: .4rem 0; max-width: 75ch; overflow-wrap: anywhere; }}
p.soft, figcaption {{ color: var(--soft); font-size: .875rem; }}
.verdict {{ font-size: 1.15rem; border-left: 4px solid var(--accent); padding: .15rem 0 .15rem .9rem;
  margin: 1.1rem 0; }}
.scroll {{ overflow-x: auto; }}
.scroll:focus-visible {{ outline: 2px solid var(--accent); outline-offset: 2px; }}
table {{ border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }}
thead th {{ color: var(--soft); font-weight: 600; vertical-align: bottom; }}
td:last-child, th:last-child {{ padding-right: 0; }}
.brief table {{ width: auto; }} .brief th, .brief td {{ padding-right: 2rem; }}
td.n + td:not(.n), th.n + th:not(.n) {{ padding-left: .6rem; }}
th[scope=row] {{ font-weight: 500; max-width: 16rem; overflow-wrap: anywhere; min-width: 9.5rem; }}
.n {{ text-align: right; }} td.n {{ white-space: nowrap; }}
tfoot th[scope=row], tfoot td {{ font-weight: 700; border-bottom: 0; }}
.plots {{ columns: 2 400px; column-gap: 1rem; }}
figure {{ margin: 0 0 1rem; break-inside: avoid; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; padding: .9rem; }}
figure h3 {{ margin: 0 0 .2rem; font-size: .95rem; }}
figure svg {{ display: block; width: 100%; height: auto; max-width: 520px; }}
figure.paper {{ max-width: 680px; background: #fff; color: #1b1f24; }}
pre {{ background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; font-size: .875rem; }}
dt {{ color: var(--soft); }} dd {{ margin: 0; overflow-wrap: anywhere; }}
li {{ overflow-wrap: anywhere; }} ol, ul {{ padding-left: 1.5rem; font-size: .9rem; }}
.legend {{ list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1rem; padding: 0; margin: .5rem 0 0;
  font-size: .8rem; }}
.legend svg {{ display: inline-block; width: .8em; height: .8em; margin-right: .35em; }}
@media (max-width: 520px) {{ th[scope=row] {{ min-width: 6.5rem; }} main {{ padding: 1.1rem .9rem 2rem; }} dl {{ grid-template-columns: 1fr;
  }} dd {{ margin-bottom: .4rem; }} }}
@media print {{
:root {{ --ink: #000; --soft: #444; --line: #bbb; --back: #fff; --card: #fff; --accent: #2457a5; {_numbered(COLOURS)} }}
body {{ font-size: 10pt; }} main {{ max-width: none; padding: 0; }} .scroll {{ overflow: visible;
  }} table {{ font-size: 7.5pt; }}
figure, tr, pre {{ break-inside: avoid; }} h2 {{ break-after: avoid; }} .plots {{ columns: 2 200px;
  }} thead {{ display: table-header-group; }}
th, td {{ padding-right: .35rem; }} tfoot {{ display: table-row-group; }} th[scope=row] {{ min-width: 0; }} * {{ print-color-adjust: exact;
  -webkit-print-color-adjust: exact; }} }}
"""

PLOT_STYLE = (
    ".plot text { font: 11px system-ui, 'DejaVu Sans', sans-serif; fill: var(--ink, #1b1f24); } "
    ".plot .soft { fill: var(--soft, #57606a); } .axis { stroke: var(--line, #b8c0c8); fill: none; } "
    ".front { stroke: var(--accent, #2457a5); fill: none; stroke-width: 1.5; stroke-dasharray: 4 3; } "
    + " ".join(f".k{i} {{ fill: var(--k{i}, {c}); }}" for i, c in enumerate(COLOURS))
)
"""Of every plot; on the page its variables follow light and dark."""

CSS = STYLE + PLOT_STYLE + "\n"


def report(plain: Mapping[str, Any], others: Sequence[Mapping[str, Any]] = (), picture: str = "", fit: str = "") -> str:
    """The page of a report.

    Args:
        plain: as `document.gather` makes it.
        others: reports of further models for the same target, for the plot of accuracy against energy.
        picture: an SVG of the chip, from `loihi.drawing`.
        fit: a sentence about it.
    """
    model, target, data, bill = plain["model"], plain["target"], plain["data"], plain["bill"]
    shape = "x".join(map(str, model["input"]["shape"]))
    body = [
        f"<header><h1>{escape(model['file'])} on {escape(target['name'])}</h1>",
        f'<p class="soft">{escape(target["summary"])}. {data["samples"]:,} samples ({escape(data["what"])}), '
        f"input {shape} of {model['input']['bits']} bits.</p>",
        f'<p class="verdict">{escape(verdict(plain))}</p></header>',
    ]
    if target["limits"]:
        body.append(f"<p><strong>Exceeds a limit of the target:</strong> {escape(target['limits'])}</p>")
    body += [
        "<h2>Accuracy</h2>",
        f'<div class="brief">{_accuracy(plain)}</div>',
        "<h2>Where it goes</h2>",
        _plots(plain, others),
    ]
    body += ["<h2>Populations</h2>", _populations(plain), _machine(plain["machine"]), "<h2>The bill</h2>", _bill(bill)]
    body += _twins(plain)
    if fit:
        body += ["<h2>On the chip</h2>", f"<p>{escape(fit)}</p>"]
        body += [f'<figure class="paper">{picture}</figure>'] if picture else []
    facts = {
        "model file, SHA-256": model["sha256"],
        "network": model["network"],
        "inputs, SHA-256": data["sha256"],
        "prices, SHA-256": target["prices"],
        **plain["versions"],
    }
    body += ["<h2>Again</h2>", f"<pre>{escape(plain['command'])}</pre>", _facts(facts)]
    return document(f"{model['file']} on {target['name']}", body)


def comparison(plain: Mapping[str, Any]) -> str:
    """The page of `document.compare`."""
    a, b = plain["a"], plain["b"]
    names = [f"{side['model']['file']} on {side['target']}" for side in (a, b)]
    rows = [
        [
            row["figure"],
            *(_value(row["figure"], row[key]) for key in ("a", "b")),
            _value(row["figure"], row["difference"], signed=True),
            "-" if row["ratio"] is None else f"{row['ratio']:.3f}",
        ]
        for row in plain["rows"]
    ]
    body = [f"<header><h1>{escape(names[0])}<br>and {escape(names[1])}</h1></header>"]
    body += [f'<p class="verdict">{escape(note)}</p>' for note in plain["notes"]]
    body.append(
        table(["figure", "> A", "> B", "> B - A", "> B / A"], rows, "Means per inference. A is the first report.")
    )
    for key, name in zip("ab", names, strict=True):
        side = plain[key]
        facts = {"network": side["model"]["network"], "inputs": f"{side['data']['samples']:,}, {side['data']['what']}"}
        body += [f"<h2>{key.upper()}: {escape(name)}</h2>", _facts(facts)]
    return document(f"{names[0]} and {names[1]}", body)


def _value(name: str, value: float | None, signed: bool = False) -> str:
    if value is None:
        return "-"
    text = f"{value:.2%}" if name in ("accuracy", "firing rate") else figure(value)
    return f"+{text}" if signed and value > 0 else text


def document(title: str, body: Iterable[str]) -> str:
    """An HTML page that loads nothing and runs nothing: its policy admits its own style sheet only."""
    hashed = base64.b64encode(hashlib.sha256(CSS.encode()).digest()).decode()
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            f"<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'sha256-{hashed}'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{CSS}</style></head><body><main>",
            *body,
            "</main></body></html>\n",
        ]
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str, last: Sequence[str] = ()) -> str:
    """An HTML table; columns whose title starts with '>' are aligned to the right. All texts are escaped."""
    right = [column.startswith(">") for column in columns]

    def cells(row: Sequence[str]) -> str:
        made = [f'<th scope="row">{escape(row[0]).replace(".", ".<wbr>")}</th>']
        made += [
            f'<td class="n">{escape(c)}</td>' if r else f"<td>{escape(c)}</td>" for c, r in zip(row, right, strict=True)
        ][1:]
        return f"<tr>{''.join(made)}</tr>"

    head = "".join(
        f'<th scope="col"{" class=n" if r else ""}>{escape(c.lstrip("> "))}</th>'
        for c, r in zip(columns, right, strict=True)
    )
    foot = f"<tfoot>{cells(last)}</tfoot>" if last else ""
    return (
        f'<p class="soft">{escape(caption)}</p>'
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table aria-label="{escape(caption)}">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(map(cells, rows))}</tbody>{foot}</table></div>"
    )


def _facts(facts: Mapping[str, Any]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items()) + "</dl>"


def _accuracy(plain: Mapping[str, Any]) -> str:
    n, rows = plain["data"]["samples"], []
    for name, row in plain["accuracy"].items():
        right = "-" if row["correct"] is None else f"{row['correct'] / n:.2%} ({row['correct']:,})"
        rows.append([ENGINES[name], right, f"{row['equal_to_emulator']:,} of {n:,}"])
    said = "" if plain["data"]["labels"] else " There are no labels: only agreement is known."
    return table(["run by", ">right", ">same prediction as the emulator"], rows, f"Over {n:,} samples.{said}")


def _populations(plain: Mapping[str, Any]) -> str:
    priced, rows = bool(plain["bill"]["lines"]), []
    kinds = ("synops", "synops_nonzero", "macs", "dense_macs")

    def memory(bits: float) -> str:
        return f"{bits / 8192:,.1f}"

    for p in plain["populations"]:
        rate = [f"{p['rate']:.1%}", f"{p['silent']:,}"] if "rate" in p else ["-", "-"]
        rows.append(
            [
                p["name"],
                p["synapses"],
                f"{p['neurons']:,}",
                *rate,
                *(figure(p["counts"][kind]) for kind in kinds),
                memory(p["weight_memory_bits"]),
                *([figure(p["energy_nj"])] if priced else []),
            ]
        )
    found = plain["populations"]
    last = ["total", "", f"{sum(p['neurons'] for p in found):,}", "", f"{sum(p.get('silent', 0) for p in found):,}"]
    last += [figure(plain["totals"][kind]) for kind in kinds] + [memory(sum(p["weight_memory_bits"] for p in found))]
    columns = [
        "population",
        "synapses",
        ">neurons",
        ">rate",
        ">never fire",
        ">synops",
        ">non-zero",
        ">MACs",
        ">dense MACs",
        ">weights KiB",
    ]
    energy = ""
    timed = plain["machine"] or {}
    if "cycles" in timed:
        columns += [">cycles", ">queue peak"]
        for row, each in zip(rows, timed["populations"].values(), strict=True):
            row[-1 if priced else len(row) : -1 if priced else len(row)] = [
                figure(each["cycles"]["mean"]),
                f"{each['queue_peak']['max']:,}",
            ]
        last += [figure(timed["cycles"]["mean"]), f"{timed['queue_peak']:,}"]
    if priced:
        unpriced = bool(plain["bill"]["unpriced"])
        columns.append(">priced part nJ" if unpriced else ">energy nJ")
        last.append("no total" if unpriced else figure(sum(p["energy_nj"] for p in found)))
        energy = " Static power belongs to no population." if plain["bill"]["rate_hz"] else ""
    text = (
        "Means per inference. Synops: spike times programmed synapse, exact at borders; non-zero: those whose weight is not zero; "
        f"MACs: non-zero multi-bit input times synapse; dense MACs: what a machine without sparsity would do.{energy}"
    )
    return table(columns, rows, text, last)


def _machine(timed: Mapping[str, Any] | None) -> str:
    """A sentence about cycles and queues, or why there are none."""
    if timed is None:
        return ""
    if "refused" in timed:
        return f"<p><strong>Does not fit the target's machine:</strong> {escape(timed['refused'])}</p>"
    cycles, micro = timed["cycles"], timed["microseconds"]
    text = (
        f"{timed['cores']} cores of {timed['elements']} processing elements at {timed['clock_mhz']} MHz: "
        f"{figure(cycles['mean'])} cycles per inference ({figure(cycles['min'])} to {figure(cycles['max'])}), "
        f"{figure(micro['mean'])} µs; at most {timed['queue_peak']:,} of {timed['queue_capacity']:,} events wait in one queue."
    )
    return f"<p>{escape(text)}</p>"


def _twins(plain: Mapping[str, Any]) -> list[str]:
    """The same network without spikes on the same target: what an advantage has to be measured against."""
    found, bill = plain.get("twins_nj") or {}, plain["bill"]
    if not found or bill["total"] is None:
        return []
    own = sum(line["nj"] for line in bill["lines"] if line["event"] != "static")
    rows = [["this network", figure(own), "1"]]
    rows += [[f"{name} twin", figure(nj), f"{nj / own:.3g}" if own else "-"] for name, nj in found.items()]
    text = (
        "The same synapses with multi-bit activations in the place of spikes, on the same target, without static power. Dense: "
        "every synapse is computed. Zero-skipping: as many zeros as there are silent neurons here are skipped. Accuracies differ."
    )
    head = ["network", ">nJ per inference", ">times this network"]
    return ["<h2>Against networks without spikes</h2>", f'<div class="brief">{table(head, rows, text)}</div>']


def _bill(bill: Mapping[str, Any]) -> str:
    rows = []
    for number, line in enumerate(bill["lines"], 1):
        least = {"min": "≥ ", "max": "≤ "}.get(line["bound"], "")
        grade = f"{line['evidence']}, {line['scope']}"
        cells = [
            kind_name(line["event"]),
            figure(line["count"]),
            f"{least}{line['pj']:,.4g}",
            figure(line["nj"]),
            grade,
            f"({number})",
        ]
        rows.append(cells)
    rows += [
        [kind_name(kind), figure(n), "unknown", "unknown", "unpublished, not zero", bill["reasons"].get(kind, "")]
        for kind, n in bill["unpriced"].items()
    ]
    last: list[str] = []
    if bill["total"] is not None and bill["lines"]:
        last = ["total", "", "", ("≥ " if bill["bound"] == "min" else "") + figure(bill["total"]), bill["evidence"], ""]
    made = [
        table(
            ["event", ">per inference", ">pJ each", ">nJ", "evidence", "source"],
            rows,
            f"Per inference on {bill['target']}.",
            last,
        )
    ]
    if bill["unpriced"]:
        made.append("<p>There is no total: the terms marked unknown have no price, and unknown is not zero.</p>")
    if bill["rate_hz"] is None:
        made.append(
            '<p class="soft">No static power is in this bill: no inference rate was given, or none is known.</p>'
        )
    if bill["lines"]:
        sources = "".join(f"<li>{escape(line['source'])}</li>" for line in bill["lines"])
        made.append(f"<h3>Sources</h3><ol>{sources}</ol>")
    if bill["not_modelled"]:
        terms = "".join(f"<li>{escape(term)}</li>" for term in bill["not_modelled"])
        made.append(f"<h3>Not in the bill</h3><ul>{terms}</ul>")
    return "\n".join(made)


def _plots(plain: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    bill, made = plain["bill"], []
    kinds = [line["event"] for line in bill["lines"]]
    least = " (priced part)" if bill["unpriced"] else ""
    if kinds:
        rows = [(kind_name(line["event"]), [(index, line["nj"])]) for index, line in enumerate(bill["lines"])]
        made.append(_figure(f"Energy by kind of event, nJ{least}", bars(rows), "Mean of one inference."))
        found = [kind for kind in kinds if kind in KINDS]
        rows = [
            (p["name"], [(kinds.index(kind), p["energy_by_kind_nj"][kind]) for kind in found])
            for p in plain["populations"]
        ]
        used = [kind for kind in found if any(p["energy_by_kind_nj"][kind] for p in plain["populations"])]
        last = _figure(f"Energy by population, nJ{least}", bars(rows), "", _legend(kinds, used))
        spread = bill["distribution"]
        text = f"p5 {figure(spread['p5'])}, mean {figure(spread['mean'])}, p95 {figure(spread['p95'])} nJ over {bill['samples']:,} samples."
        made.append(_figure(f"Energy of each sample, nJ{least}", histogram(plain["energy_histogram"], "samples"), text))
    else:
        rows = [(p["name"], [(0, p["counts"]["synops"]), (1, p["counts"]["macs"])]) for p in plain["populations"]]
        legend = _legend(["synops", "macs"], ["synops", "macs"])
        last = _figure("Operations by population", bars(rows), "Nothing is priced: counts only.", legend)
    if any("rate" in p for p in plain["populations"]):
        silent, always = (sum(p.get(key, 0) for p in plain["populations"]) for key in ("silent", "always"))
        text = f"How often each neuron fires, as a share of the samples; {silent:,} never do, {always:,} always."
        made.append(_figure("Firing rates", histogram(plain["rate_histogram"], "neurons", percent=True), text))
    points = [
        (r["model"]["file"], r["bill"]["at_least"], r["accuracy"]["emulator"]["correct"] / r["data"]["samples"])
        for r in (plain, *others)
        if r["bill"]["lines"] and r["accuracy"]["emulator"]["correct"] is not None
    ]
    if others and points:
        text = "Each point is a model; the dashed line joins those that no other beats in both."
        made.append(_figure(f"Accuracy against energy{least}", scatter(points, "nJ per inference", "accuracy"), text))
    return f'<div class="plots">{"".join([*made, last])}</div>'


def _figure(title: str, svg: str, text: str, legend: str = "") -> str:
    return f"<figure><h3>{escape(title)}</h3>{svg}{legend}<figcaption>{escape(text)}</figcaption></figure>"


def _legend(kinds: Sequence[str], used: Sequence[str]) -> str:
    swatch = '<svg viewBox="0 0 10 10" aria-hidden="true"><rect width="10" height="10" class="k{}"/></svg>'
    items = (f"<li>{swatch.format(kinds.index(kind) % 10)}{escape(kind_name(kind))}</li>" for kind in used)
    return f'<ul class="legend">{"".join(items)}</ul>'


def _svg(height: float, parts: Iterable[str], label: str, alone: bool = False) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" viewBox="0 0 {WIDTH} {height:.0f}" role="img"'
    head += f' aria-label="{escape(label)}">'
    if alone:
        head += f'<style>{PLOT_STYLE}</style><rect width="{WIDTH}" height="{height:.0f}" fill="white"/>'
    return head + "".join(parts) + "</svg>"


def _text(x: float, y: float, words: str, anchor: str = "start", soft: bool = True) -> str:
    dress = ' class="soft"' if soft else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{dress}>{escape(words)}</text>'


def _rule(y: float, left: float, right: float, words: str) -> str:
    """A horizontal line of a grid, with its tick's label before it."""
    return f'<path d="M{left} {y:.1f}H{WIDTH - right}" class="axis"/>' + _text(left - 6, y + 4, words, "end")


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 7]}…{text[-6:]}"


def bars(rows: Sequence[tuple[str, Sequence[tuple[int, float]]]]) -> str:
    """Horizontal bars, each a row's parts (colour, value >= 0) one behind the other, with its sum at the end."""
    left, end, step = 136, 58, 22
    most = max((sum(v for _, v in parts) for _, parts in rows), default=0) or 1.0
    scale, made = (WIDTH - left - end) / most, []
    for index, (name, parts) in enumerate(rows):
        x, y, total = float(left), index * step + 4, sum(v for _, v in parts)
        made.append(f"<g><title>{escape(name)}: {figure(total)}</title>")
        made.append(_text(left - 8, y + 12, _short(name, 21), "end", soft=False))
        for colour, value in parts:
            if value > 0:
                made.append(
                    f'<rect x="{x:.2f}" y="{y}" width="{max(value * scale, 0.5):.2f}" height="15" class="k{colour % 10}"/>'
                )
                x += value * scale
        made.append(_text(x + 5, y + 12, figure(total)) + "</g>")
    label = "Bars: " + ", ".join(f"{name} {figure(sum(v for _, v in parts))}" for name, parts in rows)
    return _svg(len(rows) * step + 6, made, label)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, at most `most` + 1 of them."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw)) if raw > 0 else 1.0
    step = next(k * power for k in (1, 2, 2.5, 5, 10) if k * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def histogram(plain: Mapping[str, Sequence[float]], what: str, percent: bool = False) -> str:
    """Bars of `counts` between `edges`."""
    edges, counts = plain["edges"], plain["counts"]
    left, right, top, floor = 46, 22, 18, 176
    low, high, most = edges[0], edges[-1], max(counts, default=0) or 1

    def at(value: float) -> float:
        return left + (value - low) / (high - low) * (WIDTH - left - right)

    made = [_text(left, 10, what)]
    for tick in ticks(0, most, 4):
        if tick == int(tick):
            made.append(_rule(floor - tick / most * (floor - top), left, right, f"{tick:,.0f}"))
    for a, b, n in zip(edges, edges[1:], counts, strict=False):
        tall = n / most * (floor - top)
        box = f'x="{at(a) + 0.5:.2f}" y="{floor - tall:.2f}" width="{max(at(b) - at(a) - 1, 0.5):.2f}" height="{tall:.2f}"'
        made.append(f'<rect {box} class="k0"><title>{n:,}</title></rect>')
    for tick in ticks(low, high):
        text = f"{tick:.0%}" if percent else figure(tick)
        made.append(_text(at(tick), floor + 16, text, "middle"))
    return _svg(floor + 24, made, f"Histogram of {sum(counts):,} {what} from {figure(low)} to {figure(high)}")


def front(points: Sequence[tuple[str, float, float]]) -> list[int]:
    """The points (name, cost, quality) that no other beats in one without losing in the other, by rising cost."""
    kept: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i][1], -points[i][2])):
        if not kept or points[index][2] > points[kept[-1]][2]:
            kept.append(index)
    return kept


def scatter(points: Sequence[tuple[str, float, float]], across: str, up: str, alone: bool = False) -> str:
    """Points (name, cost, quality as a share), their Pareto front joined; a logarithmic axis where costs differ thirtyfold.

    Args:
        alone: with a style sheet of its own, as a file.
    """
    left, right, top, floor = 52, 16, 24, 250
    costs, shares = [p[1] for p in points], [p[2] for p in points]
    log = min(costs) > 1e-9 and max(costs) > 30 * min(costs)
    transform = math.log10 if log else float
    low, high = transform(min(costs)), transform(max(costs))
    pad = max((high - low) * 0.08, abs(high) * 0.02) or 1.0
    low, high = low - pad, high + pad
    base, roof = min(shares), max(shares)
    margin = max((roof - base) * 0.15, 0.005)
    base, roof = base - margin, roof + margin

    def at(cost: float, share: float) -> tuple[float, float]:
        x = left + (transform(cost) - low) / (high - low) * (WIDTH - left - right)
        return x, floor - (share - base) / (roof - base) * (floor - top)

    made = [_text(4, 12, up), f'<path d="M{left} {top}V{floor}H{WIDTH - right}" class="axis"/>']
    for tick in ticks(base, min(roof, 1), 5):
        digits = 0 if roof - base > 0.2 else 1 if roof - base > 0.01 else 2
        made.append(_rule(at(costs[0], tick)[1], left, right, f"{tick:.{digits}%}"))
    marks = (
        [m * 10.0**k for k in range(math.floor(low), math.ceil(high) + 1) for m in (1, 3)] if log else ticks(low, high)
    )
    for tick in marks:
        if low <= (math.log10(tick) if log else tick) <= high:
            made.append(_text(at(tick, base)[0], floor + 16, figure(tick), "middle"))
    made.append(_text(WIDTH - right, floor + 33, across + (" (logarithmic)" if log else ""), "end"))
    best = front(points)
    made.append(
        '<path d="M' + "L".join("{:.1f} {:.1f}".format(*at(*points[i][1:])) for i in best) + '" class="front"/>'
    )
    spots = [at(*p[1:]) for p in points]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in spots]
    order = [*best, *(i for i in range(len(points)) if i not in best)]
    for index in order:
        (x, y), name = spots[index], points[index][0]
        colour = 0 if index in best else 8
        title = f"{escape(name)}: {figure(costs[index])}, {shares[index]:.2%}"
        made.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" class="k{colour}"><title>{title}</title></circle>')
        text = _short(name, 24)
        wide = 6.2 * len(text)
        for x0, y0 in (
            (x + 7, y + 2),
            (x + 8, y - 8),
            (x - 8 - wide, y - 8),
            (x - wide / 2, y - 22),
            (x - wide / 2, y + 8),
        ):
            box = (x0, y0, x0 + wide, y0 + 13)
            inside = box[0] >= left and box[2] <= WIDTH - 2 and box[1] >= top - 10 and box[3] <= floor
            if inside and not any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken):
                taken.append(box)
                made.append(_text(x0, y0 + 10, text, soft=False))
                break
    return _svg(floor + 40, made, f"{up} against {across}, {len(points)} points", alone)
