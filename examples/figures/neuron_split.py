"""Draw the picture of the README: one neuron, two experts, and the two subspaces NeuroMerging merges apart.

    python examples/figures/neuron_split.py            writes neuron_split.svg beside this file

The vectors are computed, not drawn by hand: an example neuron with two inputs is split by the kernels of the package.
The colours keep apart for colour-blind readers and on light and dark backgrounds alike.
"""

from __future__ import annotations

from pathlib import Path

import torch

from neuron_methods.kernels.subspace import gram_matrices, split_gram

WIDTH, HEIGHT, SCALE = 900, 300, 58
BASE, FIRST, SECOND, MUTED = "#8c8c8c", "#0f83c4", "#d9730d", "#9a9a9a"


def arrow(start: torch.Tensor, end: torch.Tensor, colour: str, *, dashed: bool = False, width: float = 2.5) -> str:
    """An SVG arrow between two points of the plane, y upwards."""
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    (x1, y1), (x2, y2) = start.tolist(), end.tolist()
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}"'
        f'{dash} marker-end="url(#head-{colour[1:]})"/>'
    )


def label(at: torch.Tensor, text: str, colour: str, anchor: str = "start") -> str:
    """SVG text at a point."""
    x, y = at.tolist()
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}">{text}</text>'


def main() -> None:
    """Write the figure."""
    w = torch.tensor([2.6, 1.1])
    task_vectors = torch.tensor([[0.1, 2.2], [1.9, -0.9]])
    rows = torch.cat([task_vectors, w.unsqueeze(0)]).unsqueeze(0)
    coefficients, _ = split_gram(gram_matrices(rows))
    parallel = coefficients[0].float().unsqueeze(1) * w

    origin = torch.tensor([80.0, 220.0])

    def place(vector: torch.Tensor) -> torch.Tensor:
        return origin + torch.stack([vector[0], -vector[1]]) * SCALE

    zero, tip = place(torch.zeros(2)), place(w)
    parts = [arrow(zero, tip, BASE, width=4)]
    parts.append(label(zero + torch.tensor([4.0, 26.0]), "base weights w of one neuron", BASE))
    for index, colour in enumerate((FIRST, SECOND)):
        end = place(w + task_vectors[index])
        corner = place(w + parallel[index])
        parts += [
            arrow(tip, end, colour),
            arrow(tip, corner, colour, dashed=True, width=1.8),
            arrow(corner, end, colour, dashed=True, width=1.8),
            label(end + torch.tensor([8.0, -2.0 + 18.0 * index]), f"τ{'₁₂'[index]} (expert {index + 1})", colour),
        ]
    lines = [
        ("parallel to w (dashed, along w):", "how strongly the neuron answers to what it reads already", MUTED),
        ("orthogonal to w (dashed, away from w):", "what new input it learns to read", MUTED),
        ("NeuroMerging", "elects and averages each part over the experts, apart,", BASE),
        ("", "and by default keeps the orthogonal one: w + λ₂ ψ⊥", BASE),
    ]
    y = 92.0
    for head, tail, colour in lines:
        weight = f'<tspan font-weight="600">{head}</tspan> ' if head else ""
        parts.append(f'<text x="480" y="{y:.0f}" fill="{colour}">{weight}</text>')
        y += 20 if head else 0
        parts.append(f'<text x="480" y="{y:.0f}" fill="{colour}">{tail}</text>')
        y += 34 if head != "NeuroMerging" else 20
    heads = "".join(
        f'<marker id="head-{c[1:]}" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="6" markerHeight="6" '
        f'orient="auto-start-reverse"><path d="M0 0L10 5L0 10z" fill="{c}"/></marker>'
        for c in (BASE, FIRST, SECOND)
    )
    first, second = (100 * parallel.square().sum(dim=1) / task_vectors.square().sum(dim=1)).tolist()
    title = (
        "One neuron's base weights and the updates of two experts, each split into a part parallel and a part "
        f"orthogonal to the base weights; {first:.0f} % and {second:.0f} % of the energy is parallel"
    )
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'font-family="sans-serif" font-size="14"><title>{title}</title><defs>{heads}</defs>{"".join(parts)}</svg>\n'
    )
    target = Path(__file__).with_suffix(".svg")
    target.write_text(svg, encoding="utf-8")
    print(target.name)


if __name__ == "__main__":
    main()
