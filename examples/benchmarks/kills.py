"""Kill commands at random moments, and see what they leave: SIGKILL to all that take long.

Every run is a fork of a process that has imported everything, so that a kill costs no start of Python; it is killed
either after a random share of the time that the command takes, or at a random one of its operations on files. Then

- nothing at its place can be loaded that the command would not have written,
- the identical command succeeds, with --resume where it names that, and writes the bytes that it writes when nobody
  kills it,
- nothing unfinished is left after that.

Two processes of ``accelerate launch`` make a merge, too: one of them is killed, their launcher, or all; one process or
two go on with it, and write what a single one writes that nobody kills.

    python examples/benchmarks/kills.py                    100 kills, about five minutes on two cores
    python examples/benchmarks/kills.py --kills 8 --seed 1
    python examples/benchmarks/kills.py --only "merge by two" --kills 50
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from forks import VICTIMS, forked, in_fork, launched

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

_TWO = "merge by two"
COMMANDS: dict[str, tuple[str, ...]] = {
    "merge": ("merge", "merge.yml", "out", "--quiet"),
    "merge --force": ("merge", "merge.yml", "out", "--quiet", "--force"),
    "merge --as-adapter": ("merge", "merge.yml", "out", "--quiet", "--as-adapter"),
    "merge in pieces": ("merge", "merge.yml", "out", "--quiet", "--out-shard-size", "3K"),
    "route": ("route", "route.yml", "out"),
    "tune": ("tune", "merge.yml", "--task", "tasks.yml", "-q", "--search", "density=0.1,0.2", "-o", "out"),
    "profile": (
        "profile",
        "base",
        "--data",
        "a=texts.jsonl:text",
        "--data",
        "b=more.jsonl:text",
        "-o",
        "p.safetensors",
    ),
    "describe": (
        "describe",
        "profile.safetensors",
        "--describer",
        "describer",
        "--limit",
        "4",
        "--batch-size",
        "2",
        "-o",
        "labels.json",
    ),
    "evaluate": ("evaluate", "base", "--task", "tasks.yml", "-q", "-o", "s.json"),
    "evaluate --force": ("evaluate", "base", "--task", "tasks.yml", "-q", "-o", "s.json", "--force"),
    _TWO: ("merge", "merge.yml", "out", "--quiet", "--out-shard-size", "3K"),
}
_TIMES = re.compile(rb'"(seconds|loading_seconds)": [0-9.e-]+')
# Nothing but times, or figures of them, differs in these.
_TIMED = ("tune.json", "trace.jsonl", "scores.png")


def make_inputs(folder: Path) -> None:
    """Write tiny models, adapters, data and configurations."""
    import yaml

    from tests.support import chat, routed, tiny

    tiny.save_experts(folder)
    chat.save_chat_model(folder / "describer")
    chat.save_profile(folder, folder / "base")
    tiny.write_texts(folder / "texts.jsonl", 12)
    tiny.write_texts(folder / "more.jsonl", 12, 1)
    merge = {
        "merge_method": "neuro_merging",
        "base_model": "base",
        "models": [{"model": "expert-a"}, {"model": "expert-b"}],
        "dtype": "float32",
    }
    data = {"source": "texts.jsonl", "split": "[:6]", "validation_split": "[6:]"}
    (folder / "merge.yml").write_text(yaml.safe_dump(merge))
    (folder / "tasks.yml").write_text(yaml.safe_dump({"tasks": [{"name": "p", "kind": "perplexity", "data": data}]}))
    for number, name in enumerate(routed.EXPERTS):
        routed.save_adapter(folder / "base", "llama", folder / "adapters" / name, number)
        (folder / "data").mkdir(exist_ok=True)
        routed.write_topic(folder / "data" / f"{name}.jsonl", name, 60, number)
    content = routed.settings("llama", router={"epochs": 5, "samples": 20}, enhancement={"samples": 2})
    (folder / "route.yml").write_text(yaml.safe_dump(content))


def import_everything() -> None:
    """Import what the commands do, so that a fork need not."""
    import accelerate.commands.launch  # noqa: F401
    import datasets  # noqa: F401
    import mergekit.merge  # noqa: F401
    import peft  # noqa: F401
    import torch
    import torch.distributed.run
    import transformers.models.llama.modeling_llama  # noqa: F401

    import neuron_methods.evaluation.tuning.study
    import neuron_methods.plugin.merging
    import neuron_methods.profiling.describing
    import neuron_methods.routing.build
    import neuron_methods.sharing.publishing  # noqa: F401
    from neuron_methods.cli import SUBCOMMANDS, main

    torch.set_num_threads(1)
    for name in SUBCOMMANDS:
        main.get_command(None, name)


def written(folder: Path, inputs: frozenset[str]) -> dict[str, bytes]:
    """Read all that a command has left in a folder, but for times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name.split("/")[0] not in inputs and name not in (".log", ".events0", ".events1") and not path.is_dir():
            found[name] = b"" if path.name in _TIMED else _without_chance(path.read_bytes())
    return found


def _without_chance(data: bytes) -> bytes:
    """A file but for times, and for the order of metadata, which safetensors draws anew in every process."""
    length = int.from_bytes(data[:8], "little")
    if data[8:9] == b"{" and 8 + length <= len(data):
        return json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True).encode() + data[8 + length :]
    return _TIMES.sub(b"", data)


def broken(folder: Path, reference: dict[str, bytes], earlier: dict[str, bytes]) -> list[str]:
    """List what can be loaded at a killed command's place, and is neither what it writes nor what was there before."""
    found = []
    for name, data in written(folder, frozenset()).items():
        hidden = any(part.startswith(".") for part in name.split("/"))
        if hidden or name.endswith(".jsonl") or name not in reference:
            continue
        if name == "p.safetensors":  # that of the sources which are finished is whole, too
            found += _of_profile(folder / name)
        elif data not in (reference[name], earlier.get(name)) and name.endswith((".safetensors", ".json", ".yml")):
            found.append(f"{name} is none of what the command writes")
    whole = (
        "out/model.safetensors",
        "out/model.safetensors.index.json",
        "out/adapter_model.safetensors",
        "out/router.safetensors",
    )
    if any((folder / name).exists() for name in whole):  # a model is there: then all of it is
        found += [
            f"{name} is missing" for name in reference if name.startswith("out/") and not (folder / name).exists()
        ]
    return found


def _of_profile(path: Path) -> list[str]:
    from neuron_methods.neurons.profile_file import NeuronProfile, read_exemplars
    from neuron_methods.support.errors import UserError

    try:
        read_exemplars(path, NeuronProfile.load(path).info.exemplars)
    except UserError as error:
        return [str(error)]
    return []


def trials(kills: int, seed: int, folder: Path, commands: list[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Kill commands in turn.

    Yields:
        (command, how it was killed, what was wrong).
    """
    draw = random.Random(seed)
    origin = folder / "inputs"
    origin.mkdir()
    in_fork(lambda: make_inputs(origin))  # what it leaves in a process, no command is to find
    inputs = frozenset(os.listdir(origin))
    known: dict[str, tuple[dict[str, bytes], float, list[int]]] = {}
    for number in range(kills):
        command = commands[number % len(commands)]
        arguments, run = COMMANDS[command], launched if command == _TWO else forked
        if command not in known:
            known[command] = _undisturbed(command, origin, folder / f"reference-{number}", inputs)
        reference, seconds, events = known[command]
        place = _copy(origin, folder / f"trial-{number}")
        earlier: dict[str, bytes] = {}
        if "--force" in command and draw.random() < 0.7:  # over an output that is there
            forked(arguments, place)
            earlier = written(place, inputs)
        rank = draw.randrange(len(events))
        whom = {"rank": rank, "victim": draw.choice(VICTIMS)} if run is launched else {}
        if draw.random() < 0.5:
            moment = draw.random() * seconds
            how, kill = f"after {moment:.2f} s", {"after": moment}
        else:
            at = draw.randint(1, events[rank])
            how, kill = f"at operation {at} of {events[rank]}", {"at": at}
        if whom:
            how += f" of process {rank}, {whom['victim']}"
        try:
            status = run(arguments, place, **kill, **whom)
        except TimeoutError as error:
            yield command, how, [str(error)]
            continue
        how += f" (it had ended, {status})" if status == 0 or (not whom and status != -signal.SIGKILL) else ""
        wrong = broken(place, reference, earlier)
        there = (place / "s.json", place / "labels.json", *([] if command == "tune" else [place / "out"]))
        finished = status == 0 or any(path.exists() for path in there)
        run = draw.choice((forked, launched)) if whom else forked
        again = run(arguments if not finished else (*arguments, *_anew(arguments)), place)
        if again and "--resume goes on with it" in (place / ".log").read_text():
            again = run((*arguments, "--resume"), place)
        if again:
            wrong.append(f"the same command again: {again}, {(place / '.log').read_text()[-300:]!r}")
        after = written(place, inputs)
        wrong += [f"{name} is left" for name in after.keys() - reference.keys()]
        wrong += [f"{name} is not what it was" for name in reference if after.get(name) != reference[name]]
        yield command, how, wrong
        if not wrong:
            shutil.rmtree(place)


def _undisturbed(
    command: str, origin: Path, place: Path, inputs: frozenset[str]
) -> tuple[dict[str, bytes], float, list[int]]:
    """What a command writes that nobody kills, its seconds, and how many operations on files its processes have."""
    arguments, run = COMMANDS[command], launched if command == _TWO else forked

    def once(run: Callable[..., int], **how: int) -> tuple[dict[str, bytes], float]:
        started = time.perf_counter()
        if run(arguments, _copy(origin, place), **how):
            raise SystemExit(f"{command}: {(place / '.log').read_text()}")
        seconds = time.perf_counter() - started
        found = written(place, inputs)
        counts[:] = [int(path.read_text() or 1) for path in sorted(place.glob(".events*"))]
        shutil.rmtree(place)
        return found, seconds

    counts: list[int] = []
    reference, seconds = once(forked)
    if run is launched:
        also, seconds = once(run)
        if also != reference:
            raise SystemExit(f"{command}: two processes do not write what one does")
    once(run, at=0)
    return reference, seconds, counts


def _anew(arguments: tuple[str, ...]) -> tuple[str, ...]:
    """What the command needs where the kill came too late, and its output is there."""
    return () if "--force" in arguments else ("--force",)


def _copy(origin: Path, place: Path) -> Path:
    place.mkdir()
    for path in origin.iterdir():
        os.symlink(path, place / path.name)
    return place


def main() -> int:
    """Kill, and print what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=COMMANDS, action="append", help="Kill this command; several may be named.")
    parser.add_argument("--json", type=Path, help="Write what was found.")
    chosen = parser.parse_args()
    import_everything()
    counts: Counter[str] = Counter()
    faults = []
    with tempfile.TemporaryDirectory(prefix="mergekit-neuron-kills-", ignore_cleanup_errors=True) as folder:
        for command, how, wrong in trials(chosen.kills, chosen.seed, Path(folder), chosen.only or [*COMMANDS]):
            counts[command] += 1
            for fault in wrong:
                faults.append(f"{command}, killed {how}: {fault}")
                print(faults[-1], file=sys.stderr)
    for command, count in counts.items():
        print(f"{command}: {count} kills")
    print(f"{sum(counts.values())} kills, {len(faults)} faults")
    if chosen.json is not None:
        chosen.json.write_text(json.dumps({"kills": dict(counts), "faults": faults}, indent=2) + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
