"""The papers that this package leans on, each once, and what of a method is ours and not theirs.

A sentence that says what a paper says, or what the code beside it does, names its source in brackets, as (Fang et al.,
section 3), by the names and places of this list. What has no source here is called ours. tests/test_sources.py holds
the package, its recipes and its documents to both.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any


@dataclass(frozen=True)
class Source:
    """A paper, and what of it is known here.

    Attributes:
        name: what a sentence calls it.
        title: its title, which may be shortened where no card shows it.
        venue: where it appeared, and when.
        id: of arXiv, or of the ACL Anthology.
        places: parts of it, and files of the code beside it, that a sentence may name.
        code: where that code is.
    """

    name: str
    title: str
    venue: str
    id: str
    places: tuple[str, ...] = ()
    code: str = ""

    @property
    def url(self) -> str:
        """Where to read it."""
        return f"https://aclanthology.org/{self.id}/" if "acl" in self.id else f"https://arxiv.org/abs/{self.id}"

    @property
    def line(self) -> str:
        """Name, title and venue in one line."""
        return ", ".join(filter(None, (self.name, self.title, self.venue)))


@dataclass(frozen=True)
class OwnChoice:
    """Something that a method does otherwise than its paper, or where no source says what to do.

    Attributes:
        text: a clause that tells it.
        conditions: (parameter, test of its value): where all hold, the method does so; where there are none, always.
    """

    text: str
    conditions: tuple[tuple[str, Callable[[Any], bool]], ...] = ()

    def holds(self, values: Mapping[str, Collection[Any]]) -> bool:
        """Tell whether it is true of a merge, by all values that each parameter has in it."""
        return all(any(map(test, values.get(name, ()))) for name, test in self.conditions)


@dataclass(frozen=True)
class Kin:
    """A method of others that resembles one of ours, and what both share."""

    source: Source
    shares: str


def ours(text: str, **conditions: str | Callable[[float], bool]) -> OwnChoice:
    """Declare a choice of ours, under conditions on parameters: a word that is set, or a test of a number."""

    def met(condition: str | Callable[[float], bool], value: Any) -> bool:
        return value == condition if isinstance(condition, str) else isinstance(value, int | float) and condition(value)

    return OwnChoice(text, tuple((name, partial(met, condition)) for name, condition in conditions.items()))


# The methods that are implemented here. Of Liang's paper the equations were not to be had: its stages are known from
# the reviews of its submission to ICLR 2026.
FANG = Source(
    "Fang et al.",
    "To See a World in a Spark of Neuron: Disentangling Multi-Task Interference for Training-Free Model Merging",
    "EMNLP 2025",
    "2503.05320",
    (
        "section 3",
        "experiments",
        "NeuroMerging.py",
        "merging_methods.py",
        "merge_7b.py",
        "merge.sh",
        "eval.sh",
        "eval_double.sh",
        "inference.py",
    ),
    "https://github.com/ZzzitaoFang/NeuroMerging",
)
LIANG = Source(
    "Liang",
    "MIN-Merging: Merge the Important Neurons for Model Merging",
    "2025",
    "2510.17890",
    ("abstract", "reviews", "experiments"),
)
GU = Source(
    "Gu et al.",
    "NeuronMerge: Merging Models via Functional Neuron Groups",
    "Findings of ACL 2025",
    "2025.findings-acl.471",
    ("abstract", "experiments"),
)

# Kin of `neuron_response`.
WUDI = Source(
    "Cheng et al.",
    "Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task Vectors",
    "ICML 2025",
    "2503.08099",
)
ACTMAT = Source("ACTMat", "", "2026", "2604.01329")
REGMEAN = Source(
    "Jin et al.", "Dataless Knowledge Fusion by Merging Weights of Language Models", "ICLR 2023", "2212.09849"
)

# Methods of mergekit, and mergekit.
MERGEKIT = Source(
    "Goddard et al.",
    "Arcee's MergeKit: A Toolkit for Merging Large Language Models",
    "EMNLP 2024 (Industry Track)",
    "2403.13257",
)
TASK_ARITHMETIC = Source("Ilharco et al.", "Editing Models with Task Arithmetic", "ICLR 2023", "2212.04089")
TIES = Source(
    "Yadav et al.",
    "TIES-Merging: Resolving Interference When Merging Models",
    "NeurIPS 2023",
    "2306.01708",
    ("abstract",),
)
DARE = Source(
    "Yu et al.",
    "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
    "ICML 2024",
    "2311.03099",
)
SOUPS = Source(
    "Wortsman et al.",
    "Model Soups: Averaging Weights of Multiple Fine-tuned Models Improves Accuracy without Increasing Inference Time",
    "ICML 2022",
    "2203.05482",
)

#: What parts of the package are built on.
PARTS = (
    Source("Marczak et al.", "No Task Left Behind: Isotropic Model Merging", "ICML 2025", "2502.04959", ("section 3",)),
    Source("Gargiulo et al.", "Task Singular Vectors", "CVPR 2025", "2412.00081", ("abstract",)),
    Source("Wan et al.", "FuseChat: Knowledge Fusion of Chat Models", "2024", "2408.07990"),
    Source(
        "Lu et al.",
        "Twin-Merging: Dynamic Integration of Modular Expertise in Model Merging",
        "NeurIPS 2024",
        "2406.15479",
        ("abstract",),
    ),
    Source("Liu et al.", "DoRA: Weight-Decomposed Low-Rank Adaptation", "ICML 2024", "2402.09353"),
    Source("Liu et al.", "Energy-based Out-of-distribution Detection", "NeurIPS 2020", "2010.03759"),
    Source("Lee et al.", "Detecting Out-of-Distribution Samples", "NeurIPS 2018", "1807.03888"),
    Source("Halko, Martinsson and Tropp", "Finding Structure with Randomness", "2011", "0909.4061"),
    Source("Clarkson and Woodruff", "Regression in Input Sparsity Time", "STOC 2013", "1207.6365"),
    Source("Ghashami et al.", "Frequent Directions", "2015", "1501.01711"),
    Source("Zhou et al.", "Batch Calibration", "2023", "2309.17249"),
    Source("Hansen", "The CMA Evolution Strategy: A Tutorial", "2016", "1604.00772"),
    Source("Rajpurkar et al.", "SQuAD", "EMNLP 2016", "1606.05250"),
    Source("Chen et al.", "pass@1 of programs", "2021", "2107.03374"),
    Source("Post", "BLEU as sacrebleu computes it", "WMT 2018", "1804.08771"),
    Source("Radford et al.", "Learning Transferable Visual Models", "ICML 2021", "2103.00020"),
)
SOURCES = (FANG, LIANG, GU, WUDI, ACTMAT, REGMEAN, MERGEKIT, TASK_ARITHMETIC, TIES, DARE, SOUPS, *PARTS)
