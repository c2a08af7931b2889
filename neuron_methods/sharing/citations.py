"""What a merge method does in three sentences, its paper, and how to cite it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Citation:
    """A method's name and what it does, in three sentences; its paper, in one line, where to read it, its BibTeX."""

    name: str
    text: str
    paper: str
    url: str
    bibtex: str


MERGEKIT = Citation(
    name="mergekit",
    text="",
    paper="Goddard et al., Arcee's MergeKit: A Toolkit for Merging Large Language Models, EMNLP 2024 (Industry Track)",
    url="https://arxiv.org/abs/2403.13257",
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
    paper="Ilharco et al., Editing Models with Task Arithmetic, ICLR 2023",
    url="https://arxiv.org/abs/2212.04089",
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
    paper="Yadav et al., TIES-Merging: Resolving Interference When Merging Models, NeurIPS 2023",
    url="https://arxiv.org/abs/2306.01708",
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
    paper="Yu et al., Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch, "
    "ICML 2024",
    url="https://arxiv.org/abs/2311.03099",
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
    paper="Wortsman et al., Model Soups: Averaging Weights of Multiple Fine-tuned Models Improves Accuracy without "
    "Increasing Inference Time, ICML 2022",
    url="https://arxiv.org/abs/2203.05482",
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

#: Forms of `neuro_merging` that are not the paper's, by parameter and value; of a number, by whether it is below 1.
VARIANTS: dict[str, dict[str, str]] = {
    "trim": {
        "tensor": "each expert's update is trimmed in every tensor by itself",
        "differing": "instead of each expert's largest entries, those are kept in which the experts differ most",
    },
    "consensus": {"sum": "values that carry the elected sign are added up, not averaged"},
    "lambda_orthogonal": {
        "norm": "every neuron's merged update is made as long as the experts' are on average",
    },
    "spectral_exponent": {
        "below 1": "the singular values of every tensor's merged update are raised to a power below 1, and its length "
        "is kept"
    },
}

CITATIONS: dict[str, Citation] = {
    "neuro_merging": Citation(
        name="NeuroMerging",
        text="Each expert's update is trimmed to its largest entries, with one threshold per expert over the whole "
        "model. Every neuron's update is split into the part parallel to its base weights, which changes how sensitive "
        "the neuron is to the input it already reads, and the part orthogonal to them, which makes it read something "
        "new. The two parts are merged apart, the orthogonal one along its singular vectors, by electing a sign and "
        "averaging the values that carry it.",
        paper="Fang et al., To See a World in a Spark of Neuron: Disentangling Multi-Task Interference for "
        "Training-Free Model Merging, EMNLP 2025",
        url="https://arxiv.org/abs/2503.05320",
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
        paper="Liang, MIN-Merging: Merge the Important Neurons for Model Merging, 2025",
        url="https://arxiv.org/abs/2510.17890",
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
        paper="Gu et al., NeuronMerge: Merging Models via Functional Neuron Groups, Findings of ACL 2025",
        url="https://aclanthology.org/2025.findings-acl.471/",
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
        paper="A method of this package; its objective is that of Cheng et al., Whoever Started the Interference "
        "Should End It: Guiding Data-Free Model Merging via Task Vectors, ICML 2025",
        url="https://arxiv.org/abs/2503.08099",
        bibtex="""@inproceedings{cheng2025whoever,
  title     = {Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task Vectors},
  author    = {Cheng, Runxi and Xiong, Feng and Wei, Yongxian and Zhu, Wanyun and Yuan, Chun},
  booktitle = {International Conference on Machine Learning},
  year      = {2025},
}""",
    ),
    "linear": _SOUPS,
    "task_arithmetic": _TASK_ARITHMETIC,
    "ties": _TIES,
    "dare_ties": _DARE,
    "dare_linear": _DARE,
}
