"""The tasks: right answers, no leakage from training to held-out, the same for the same seed."""

import pytest

from neuron_methods.demo.questions import TRAIN_EXAMPLES, DemoTask, Example, build_tasks, digest, split
from neuron_methods.support.errors import UserError


@pytest.fixture(scope="module")
def tasks() -> dict[str, DemoTask]:
    return {task.name: task for task in build_tasks(120, seed=0)}


def numbers(example: Example) -> tuple[int, int]:
    first, plus, second, equals = example.prompt.split()
    assert (plus, equals) == ("+", "=")
    return int(first), int(second)


def test_sizes(tasks) -> None:
    assert list(tasks) == ["arithmetic", "german", "python"]
    for task in tasks.values():
        assert len(task.held_out) == 120
        assert len(set(task.held_out)) == 120
        assert len(task.train) == len(set(task.train))
    assert {len(tasks[name].train) for name in ("arithmetic", "german")} == {TRAIN_EXAMPLES}
    # How many signatures there are depends on the version of Python.
    assert 400 <= len(tasks["python"].train) <= TRAIN_EXAMPLES


def test_arithmetic_is_right_and_no_held_out_sum_is_trained_on(tasks) -> None:
    task = tasks["arithmetic"]
    for example in task.train + task.held_out:
        assert sum(numbers(example)) == int(example.answer)
    trained = {frozenset(numbers(example)) for example in task.train}
    assert not trained & {frozenset(numbers(example)) for example in task.held_out}


def test_no_held_out_pair_of_adjective_and_noun_is_trained_on_but_each_word_is(tasks) -> None:
    def english(examples):
        # Singular and plural of an English noun share their first three letters here, and no two nouns do.
        return [(words[1], words[2][:3]) for words in (example.answer.split() for example in examples)]

    trained, held_out = english(tasks["german"].train), english(tasks["german"].held_out)
    assert not set(trained) & set(held_out)
    for place in (0, 1):
        assert {pair[place] for pair in held_out} <= {pair[place] for pair in trained}


def test_no_held_out_function_is_trained_on(tasks) -> None:
    def names(examples):
        return {example.answer.split("(")[0] for example in examples}

    assert not names(tasks["python"].train) & names(tasks["python"].held_out)


def test_no_held_out_prompt_is_trained_on(tasks) -> None:
    for task in tasks.values():
        assert not {e.prompt for e in task.train} & {e.prompt for e in task.held_out}


def test_the_seed_decides(tasks) -> None:
    again = {task.name: task for task in build_tasks(120, seed=0)}
    other = {task.name: task for task in build_tasks(120, seed=1)}
    for name, task in tasks.items():
        assert again[name] == task
        assert digest(again[name].train) == digest(task.train)
        assert digest(other[name].train) != digest(task.train)
        assert digest(other[name].held_out) != digest(task.held_out)


def test_training_does_not_depend_on_how_many_examples_are_scored(tasks) -> None:
    for few in build_tasks(7, seed=0):
        assert few.train == tasks[few.name].train
        assert few.held_out == tasks[few.name].held_out[:7]


@pytest.mark.parametrize("examples", [0, -3, 100_000])
def test_an_impossible_number_of_examples_is_refused(examples) -> None:
    with pytest.raises(UserError, match=f"--examples {examples}: each task holds out 1 to"):
        build_tasks(examples, seed=0)


def test_split_keeps_keys_apart() -> None:
    import random

    keyed = [(number // 3, Example(str(number), "")) for number in range(30)]
    train, held_out = split(keyed, train=100, held_out=4, rng=random.Random(0))
    held_keys = {int(example.prompt) // 3 for example in held_out}
    assert len(held_out) == len(held_keys) == 4
    assert sorted(int(e.prompt) for e in train) == [n for n in range(30) if n // 3 not in held_keys]
