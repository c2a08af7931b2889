"""What a merge method does in three sentences, where it is from, and how to cite it."""

from __future__ import annotations

from dataclasses import dataclass

from neuron_methods.support import sources
from neuron_methods.support.sources import Source


@dataclass(frozen=True)
class Citation:
    """A method's name and what it does, in three sentences; its source, None where it is ours; BibTeX."""

    name: str
    text: str
    source: Source | None
    bibtex: str


MERGEKIT = Citation(
    name="mergekit",
    text="",
    source=sources.MERGEKIT,
    bibtex="""@inproceedings{goddard-etal-2024-arcees,
  title     = {Arcee's {M}erge{K}it: A Toolkit for Merging Large Language Models},
  author    = {Goddard, Charles and Siriwardhana, Shamane and Ehghaghi, Malikeh and Meyers, Luke and
               Karpukhin, Vladimir and Benedict, Brian and McQuade, Mark and Solawetz, Jacob},
  booktitle = {Proceedings of the 2024 Conference on Empirical Methods in Natural Language Processing:
               Industry Track},
  year      = {2024},
}""",
)

_TASK_ARITHMETIC = Citation(
    name="Task Arithmetic",
    text="A task vector is the difference between an expert's weights and the base's. The task vectors of all experts "
    "are weighted and summed. The sum, times a scale, is added to the base.",
    source=sources.TASK_ARITHMETIC,
    bibtex="""@inproceedings{ilharco2023editing,
  title     = {Editing Models with Task Arithmetic},
  author    = {Ilharco, Gabriel and Ribeiro, Marco Tulio and Wortsman, Mitchell and Gururangan, Suchin and
               Schmidt, Ludwig and Hajishirzi, Hannaneh and Farhadi, Ali},
  booktitle = {International Conference on Learning Representations},
  year      = {2023},
}""",
)

_TIES = Citation(
    name="TIES",
    text="Each task vector keeps only its largest entries. Every entry elects a sign by the sum over the experts. The "
    "values that carry the elected sign are averaged and added to the base.",
    source=sources.TIES,
    bibtex="""@inproceedings{yadav2023ties,
  title     = {{TIES}-Merging: Resolving Interference When Merging Models},
  author    = {Yadav, Prateek and Tam, Derek and Choshen, Leshem and Raffel, Colin and Bansal, Mohit},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2023},
}""",
)

_DARE = Citation(
    name="DARE",
    text="Each task vector loses a random share of its entries. What is left is scaled up to make good for it. The "
    "sparse task vectors are merged and added to the base.",
    source=sources.DARE,
    bibtex="""@inproceedings{yu2024language,
  title     = {Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch},
  author    = {Yu, Le and Yu, Bowen and Yu, Haiyang and Huang, Fei and Li, Yongbin},
  booktitle = {International Conference on Machine Learning},
  year      = {2024},
}""",
)

_SOUPS = Citation(
    name="Linear",
    text="The weights of all models are averaged entry by entry. Each model has a weight of its own. The average is "
    "taken in weight space, so that the result costs no more than one model to run.",
    source=sources.SOUPS,
    bibtex="""@inproceedings{wortsman2022model,
  title     = {Model Soups: Averaging Weights of Multiple Fine-tuned Models Improves Accuracy without Increasing
               Inference Time},
  author    = {Wortsman, Mitchell and Ilharco, Gabriel and Gadre, Samir Yitzhak and Roelofs, Rebecca and
               Gontijo-Lopes, Raphael and Morcos, Ari S. and Namkoong, Hongseok and Farhadi, Ali and
               Carmon, Yair and Kornblith, Simon and Schmidt, Ludwig},
  booktitle = {International Conference on Machine Learning},
  year      = {2022},
}""",
)

CITATIONS: dict[str, Citation] = {
    "neuro_merging": Citation(
        name="NeuroMerging",
        text="Each expert's update is trimmed to its largest entries, with one threshold per expert over the whole "
        "model. Every neuron's update is split into the part parallel to its base weights, which changes how sensitive "
        "the neuron is to the input it already reads, and the part orthogonal to them, which makes it read something "
        "new. The two parts are merged apart, the orthogonal one along its singular vectors, by electing a sign and "
        "averaging the values that carry it.",
        source=sources.FANG,
        bibtex="""@inproceedings{fang-etal-2025-neuromerging,
  title     = {To See a World in a Spark of Neuron: Disentangling Multi-Task Interference for Training-Free Model
               Merging},
  author    = {Fang, Zitao and Du, Guodong and Yu, Shuyang and Guo, Yifei and Zhang, Yiwei and Cao, Yiyao and
               Li, Jing and Tang, Ho-Kin and Goh, Sim Kuan},
  booktitle = {Proceedings of the 2025 Conference on Empirical Methods in Natural Language Processing},
  year      = {2025},
  eprint    = {2503.05320},
  archivePrefix = {arXiv},
}""",
    ),
    "min_merging": Citation(
        name="MIN-Merging",
        text="Every expert ranks the neurons of its update by importance and keeps the top share of them; the rest of "
        "its update is dropped. A neuron that several experts keep is shared out by weight and importance, or goes to "
        "the one that wants it most. A neuron is merged whole, over all the weights that it owns.",
        source=sources.LIANG,
        bibtex="""@misc{liang2025minmerging,
  title  = {{MIN}-Merging: Merge the Important Neurons for Model Merging},
  author = {Liang, Yunfei},
  year   = {2025},
  eprint = {2510.17890},
  archivePrefix = {arXiv},
}""",
    ),
    "neuron_merge": Citation(
        name="NeuronMerge",
        text="Every MLP neuron of the base is described by what makes it fire, and sorted into one functional group. "
        "Neurons of one group are merged by task arithmetic with coefficients of their own: an expert counts in the "
        "group it was trained for, less in general neurons, and little or not at all in the groups of others. "
        "Everything that is no MLP neuron's is merged by an ordinary method.",
        source=sources.GU,
        bibtex="""@inproceedings{gu-etal-2025-neuronmerge,
  title     = {{N}euron{M}erge: Merging Models via Functional Neuron Groups},
  author    = {Gu, Wangyun and Gao, Qianghua and Li-Xin, Zhang and Shen, Xu and Ye, Jieping},
  booktitle = {Findings of the Association for Computational Linguistics: ACL 2025},
  pages     = {9015--9037},
  year      = {2025},
  url       = {https://aclanthology.org/2025.findings-acl.471/},
}""",
    ),
    "neuron_response": Citation(
        name="Merging by response",
        text="A fine-tuning update is a sum of errors times inputs, so its rows stand for the inputs an expert was "
        "trained on, unless they are measured. Every neuron gets the update that answers each expert's inputs as that "
        "expert's neuron does, by least squares with a ridge whose shrinking is undone. Norms, biases and token "
        "embeddings are averaged.",
        source=None,
        bibtex="""@inproceedings{cheng2025whoever,
  title     = {Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task Vectors},
  author    = {Cheng, Runxi and Xiong, Feng and Wei, Yongxian and Zhu, Wanyun and Yuan, Chun},
  booktitle = {International Conference on Machine Learning},
  year      = {2025},
}
@inproceedings{jin2023dataless,
  title     = {Dataless Knowledge Fusion by Merging Weights of Language Models},
  author    = {Jin, Xisen and Ren, Xiang and Preotiuc-Pietro, Daniel and Cheng, Pengxiang},
  booktitle = {International Conference on Learning Representations},
  year      = {2023},
}""",
    ),
    "linear": _SOUPS,
    "task_arithmetic": _TASK_ARITHMETIC,
    "ties": _TIES,
    "dare_ties": _DARE,
    "dare_linear": _DARE,
}
