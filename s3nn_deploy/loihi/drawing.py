"""A picture of a fit: every chip, every core, filled as far as its fullest resource is, in the colours of its groups."""

from html import escape

from s3nn_deploy.loihi.fit import Core, Fit
from s3nn_deploy.targets import LIMITS

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#dd7700", "#774422", "#44bb99", "#777777")
"""Told apart by most eyes; Tol's bright scheme and four more."""

ACROSS, SIDE, GAP, TOP = 16, 34, 6, 30


def svg(fit: Fit) -> str:
    """The fit as an SVG document; hovering over a core names what it holds."""
    names = list(fit.tiles)
    colour = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    down = -(-fit.per_chip // ACROSS)
    width = ACROSS * (SIDE + GAP) + GAP
    height = fit.chips * (TOP + down * (SIDE + GAP)) + TOP + 18 * -(-len(names) // 3) + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for chip in range(fit.chips):
        top = chip * (TOP + down * (SIDE + GAP))
        used = sum(core.number // fit.per_chip == chip for core in fit.cores)
        parts.append(
            f'<text x="{GAP}" y="{top + 20}">{escape(fit.target)}, chip {chip + 1} of {fit.chips}: {used} of {fit.per_chip} cores</text>'
        )
        for place in range(fit.per_chip):
            x, y = GAP + place % ACROSS * (SIDE + GAP), top + TOP + place // ACROSS * (SIDE + GAP)
            number = chip * fit.per_chip + place
            core = fit.cores[number] if number < len(fit.cores) else None
            parts += _core(fit, core, x, y, colour)
    top = fit.chips * (TOP + down * (SIDE + GAP)) + TOP
    for index, name in enumerate(names):
        x, y = GAP + index % 3 * width // 3, top + index // 3 * 18
        parts.append(f'<rect x="{x}" y="{y - 10}" width="12" height="12" fill="{colour[name]}"/>')
        count = len(fit.on(name))
        parts.append(f'<text x="{x + 18}" y="{y}">{escape(name)}: {count} core{"s" * (count > 1)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _core(fit: Fit, core: Core | None, x: int, y: int, colour: dict[str, str]) -> list[str]:
    frame = f'<rect x="{x}" y="{y}" width="{SIDE}" height="{SIDE}" fill="#f4f4f4" stroke="#999"/>'
    if core is None:
        return [frame]
    shares = fit.utilisation(core)
    key = max(shares, key=lambda k: shares[k])
    held = ", ".join(f"{tile.group} ({tile.neurons:,} neurons)" for tile in core.tiles)
    title = f"core {core.number}: {held}; {shares[key]:.0%} of {LIMITS[key]}"
    made, bottom = [f"<g><title>{escape(title)}</title>", frame], float(y + SIDE)
    for tile in core.tiles:
        tall = SIDE * tile.uses[key] / fit.limits[key]
        bottom -= tall
        block = f'x="{x}" y="{bottom:.2f}" width="{SIDE}" height="{tall:.2f}" fill="{colour[tile.group]}"'
        made.append(f'<rect {block} stroke="white" stroke-width="0.5"/>')
    return [*made, "</g>"]
