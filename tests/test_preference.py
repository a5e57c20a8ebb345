"""DPO: loss and every gradient in chunks equal the textbook loss by autograd on whole sequences."""

from __future__ import annotations

import random
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from chunkflow.planning.cost import Cost
from chunkflow.planning.planner import PlanSettings, plan_step
from chunkflow.planning.schedule import Action, Kind
from chunkflow.settings.options import Dpo
from chunkflow.training import parallel, preference
from tests.helpers.layouts import Pipeline, join, layout_config, small_model
from tests.helpers.processes import run_ranks
from tests.helpers.reference import (
    assert_same_gradients,
    chunk_tensors,
    gradients,
    naive_attention,
    naive_cross_entropy,
    runner_of,
    whole_sequence,
)

SETTINGS = (
    Dpo(),
    Dpo(beta=0.7),
    Dpo(beta=0.3, label_smoothing=0.2),
    Dpo(beta=2.0, length_normalised=True),
    Dpo(beta=1.0, label_smoothing=0.1, length_normalised=True),
)


def random_pairs(rng: random.Random, longest: int, count: int):
    """Sequences of so many pairs, the answers of one behind the same prompt. The first differ; of the others
    some are equal, and in some there is no target in one answer."""
    generator, sequences = torch.Generator().manual_seed(rng.randrange(1 << 30)), []
    for number in range(count):
        prompt = torch.randint(96, (rng.randint(1, longest),), generator=generator)
        answers = [torch.randint(96, (rng.randint(1, longest // 2),), generator=generator) for _ in range(2)]
        kind = rng.choice(["tie", "masked", "usual"]) if number else "usual"
        answers[1] = answers[0] if kind == "tie" else answers[1]
        for place, answer in enumerate(answers):
            tokens = torch.cat([prompt, answer])
            targets = torch.cat([tokens[1:], torch.tensor([-100])])
            targets[: len(prompt) - 1] = -100
            if kind == "masked" and place == number % 2:
                targets[:] = -100
            sequences.append((tokens, targets))
    return sequences


def policy_and_reference(family="llama3", **changes):
    """A small model, and the model that its training has started from."""
    policy, reference = small_model(family, **changes), small_model(family, **changes)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return policy, reference


def textbook(policy, reference, sequences, settings):
    """Loss and gradients of the mean over pairs with targets in both answers, and the reference's
    log-probabilities: autograd through all whole sequences at once, by the naive functions."""
    counts = [int((labels != -100).sum()) for _, labels in sequences]

    def log_probability(model, tokens, labels):
        with mock.patch.object(sys.modules[type(model).__module__], "chunk_attention", naive_attention):
            return -model(tokens, whole_sequence(tokens, labels, naive_cross_entropy))

    with torch.no_grad():
        references = torch.stack([log_probability(reference, *sequence) for sequence in sequences])
    policy.zero_grad()
    logps, losses = [log_probability(policy, *sequence) for sequence in sequences], []
    for chosen in range(0, len(sequences), 2):
        ratios = [logps[one] - references[one] for one in (chosen, chosen + 1)]
        if settings.length_normalised:
            ratios = [ratio / max(counts[chosen + place], 1) for place, ratio in enumerate(ratios)]
        margin = settings.beta * (ratios[0] - ratios[1])
        if min(counts[chosen : chosen + 2]):
            smoothing = settings.label_smoothing
            losses.append(-(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin))
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item(), gradients(policy), references, counts


def both_phases(runner, models, plan, replica, rank, sequences, references, counts, settings, reshard=False):
    """Of one rank: what dpo.py does in a step. The pairs' figures and the runner's result."""
    chunks = chunk_tensors(plan.groups[replica], sequences)
    data = SimpleNamespace(plan=plan, chunks=chunks, rows=range(len(sequences)))
    forwards = plan.forward_programs[replica][rank]
    assert {entry.kind for entry in forwards if isinstance(entry, Action)} == {Kind.EVALUATE}
    logps = preference.log_probabilities(runner, models, forwards, data, replica)
    pairs = preference.dpo(settings, logps, references, counts)
    for model in models:
        parallel.begin_step(model, reshard)
    weighed = sum(preference.counted(counts)), pairs.sequence_weights
    program = plan.programs[replica][rank]
    result = runner.step(program, plan.groups[replica], chunks, *weighed, sequences=len(sequences))
    return pairs, logps, result


@pytest.mark.proves("one process + DPO + k > 1", "one process + DPO + tied", "one process + DPO + no_enable")
@pytest.mark.parametrize("seed", range(10))
def test_chunks_give_the_textbook_loss_and_gradients(seed):
    rng = random.Random(seed)
    settings = SETTINGS[seed % len(SETTINGS)]
    policy, reference = policy_and_reference(rng.choice(["llama3", "qwen3"]), tied_embeddings=bool(seed % 2))
    sequences = random_pairs(rng, rng.choice([10, 60, 120]), rng.randint(1, 4))
    loss, expected, references, counts = textbook(policy, reference, sequences, settings)
    k, lengths = rng.choice([1, 2, 9]), [len(tokens) for tokens, _ in sequences]
    plan = PlanSettings(
        Cost.of_model(policy.args),
        enable=seed != 7,
        chunk_size=rng.randint(8, 40),
        k=k,
        forward_first=True,
    )
    policy.zero_grad()
    arguments = [plan_step(lengths, plan), 0, 0, sequences, references, counts, settings]
    with mock.patch.object(dist, "all_reduce"):  # there are no others
        pairs, logps, result = both_phases(runner_of(policy), [], *arguments)
    assert abs(pairs.loss.item() - loss) <= 1e-10 * loss
    assert_same_gradients(gradients(policy), expected, 1e-10)
    assert max(result.live_chunks) <= k
    assert torch.allclose(result.loss_of_sequences, -logps, rtol=1e-12, atol=0), "both phases say the same"


def test_figures_of_pairs():
    logps = torch.tensor([-3.0, -5.0, -2.0, -2.0, -9.0, -1.0, -4.0, 0.0], dtype=torch.float64)
    references = torch.tensor([-4.0, -4.0, -2.0, -2.0, -8.0, -2.0, -1.0, 0.0], dtype=torch.float64)
    counts = [2.0, 4.0, 1.0, 1.0, 5.0, 1.0, 3.0, 0.0]  # the last pair does not count
    pairs = preference.dpo(Dpo(beta=0.5), logps, references, counts)
    assert preference.counted(counts) == pairs.counted_P.tolist() == [True, True, True, False]
    means = preference.means(pairs.sums(), 3)
    assert means == pytest.approx(
        {
            "reward_margin": (1.0 + 0.0 - 1.0) / 3,
            "reward_accuracy": 1 / 3,  # a tie is not won
            "chosen_logp": -14 / 3,
            "rejected_logp": -8 / 3,
            "chosen_reward": 0.0,
            "rejected_reward": (-0.5 + 0.0 + 0.5) / 3,
        }
    )
    losses = [-F.logsigmoid(torch.tensor(margin)).item() for margin in (1.0, 0.0, -1.0)]
    assert pairs.loss.item() == pytest.approx(sum(losses) / 3)
    assert pairs.sequence_weights[6:].tolist() == [0, 0]
    by_source = preference.losses_by_source(pairs, ["a", "b", "c"], [0, 0, 1, 1, 0, 0, 2, 2])
    assert by_source == pytest.approx({"a": (losses[0] + losses[2]) / 2, "b": losses[1]})
    normalised = preference.dpo(Dpo(beta=0.5, length_normalised=True), logps, references, counts)
    assert normalised.chosen_rewards_P.tolist() == pytest.approx([0.25, 0.0, -0.1, -0.5])
    assert normalised.chosen_logps_P.tolist() == [-3.0, -2.0, -9.0, -4.0], "sums still"
    # Where a margin is large, what is left of its gradient has all its digits.
    sure = preference.dpo(Dpo(beta=1.0), torch.tensor([60.0, 0.0]).double(), torch.zeros(2).double(), [1, 1])
    assert sure.sequence_weights[0].item() == pytest.approx(torch.tensor(-60.0).double().exp().item(), 1e-12)


def on_ranks():
    """Two ranks: FSDP2 with sequences over both, with and without ZeRO-3, then two stages."""
    processes, seen = join(), set()
    for reshard in ("never", "always"):
        policy, reference = policy_and_reference()
        sharded, _ = policy_and_reference()
        parallel.apply_fsdp(sharded, processes.data_mesh, layout_config().training, reshard == "always")
        for seed in range(2):
            rng, settings = random.Random(f"{reshard}/{seed}"), SETTINGS[2 * seed + 1]
            sequences = random_pairs(rng, 70, 2 * seed + 1)
            loss, expected, *known = textbook(policy, reference, sequences, settings)
            lengths = [len(tokens) for tokens, _ in sequences]
            k, lockstep = rng.choice([1, 2]), reshard == "always"
            plan = PlanSettings(
                Cost.of_model(policy.args), 2, chunk_size=16, k=k, lockstep=lockstep, spread_over=2,
                kv_tokens=rng.choice([0, 60]), forward_first=True,
            )  # fmt: skip
            made = plan_step(lengths, plan, [dist.get_rank()])
            runner = runner_of(sharded, parallel.before_last_backward, blocks=processes.blocks)
            place = [sharded], made, dist.get_rank(), 0
            pairs, _, result = both_phases(runner, *place, sequences, *known, settings, lockstep)
            got = {name: parameter.grad.full_tensor() for name, parameter in sharded.named_parameters()}
            sharded.zero_grad()
            assert abs(pairs.loss.item() - loss) <= 1e-10 * loss and max(result.live_chunks) <= k
            assert_same_gradients(got, expected, 1e-10)
            owners = {
                segment.sequence: rank
                for rank, groups in enumerate(made.groups)
                for group in groups
                for chunk in group.chunks
                for segment in chunk.segments
            }
            apart = any(owners[one] != owners[one + 1] for one in range(0, len(lengths), 2))
            seen |= {"spread"} if made.spread_sequences else set()
            seen |= {"apart"} if apart else set()
    mesh = dist.init_device_mesh("cpu", (2, 1), mesh_dim_names=("pp", "dp_shard"))
    policy, reference = policy_and_reference()
    pipeline = Pipeline("llama3", mesh, 1, policy)
    for seed in range(2):
        rng, settings = random.Random(seed), SETTINGS[seed + 2]
        sequences = random_pairs(rng, 40, 2)
        loss, expected, *known = textbook(policy, reference, sequences, settings)
        plan = pipeline.plan([len(tokens) for tokens, _ in sequences], 1 + seed, forward_first=True)
        models = list(pipeline.models.values())
        for model in models:
            model.zero_grad()
        pairs, _, _ = both_phases(
            pipeline.runner, models, plan, 0, pipeline.rank, sequences, *known, settings
        )
        got = {n: p.grad.full_tensor() for model in models for n, p in model.named_parameters()}
        assert abs(pairs.loss.item() - loss) <= 1e-10 * loss
        assert_same_gradients(got, {name: expected[name] for name in got}, 1e-10)
    return seen


@pytest.mark.proves("never/always + shared + DPO", "stages + DPO + k > 1")
def test_pairs_over_ranks_and_stages_give_the_textbook_gradients():
    assert run_ranks(on_ranks, 2) == [{"spread", "apart"}] * 2


def test_plans_of_forwards_alone_have_the_groups_of_the_step():
    """So that references and log-probabilities are computed alike."""
    changed = False
    for seed in range(8):
        rng = random.Random(seed)
        lengths = [rng.choice([rng.randint(1, 60), rng.randint(300, 900)]) for _ in range(12)]
        plan = PlanSettings(Cost(1000.0, 1.0), 4, chunk_size=64, k=1, forward_first=True)
        groups = plan_step(lengths, plan).groups
        assert plan_step(lengths, plan._replace(forward_only=True)).groups == groups
        usual = plan_step(lengths, plan._replace(forward_only=True, forward_first=False))
        changed |= usual.groups != groups
    assert changed, "which is not so by itself"
