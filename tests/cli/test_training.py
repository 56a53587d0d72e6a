"""Training runs, successive halving and targets, on problems small enough to follow by hand."""

import math

import pytest
import torch
from torch import nn

from kfac_triton.cli.demo import training
from kfac_triton.cli.demo.training import TrainingRun, shuffled_batches, steps_to, tune

IMAGES = torch.rand(12, 4, generator=torch.Generator().manual_seed(0))
TOO_LARGE = 1e25  # one step makes weights whose product float32 cannot hold


def linear_run(lr, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    return TrainingRun(model, torch.optim.SGD(model.parameters(), lr=lr), IMAGES, 3, seed)


def test_each_epoch_shows_every_image_once_in_a_new_order():
    batches = shuffled_batches(IMAGES, 4, seed=0)
    epochs = [torch.cat([next(batches) for _ in range(3)]) for _ in range(2)]
    everything = {tuple(image.tolist()) for image in IMAGES}
    for epoch in epochs:
        assert {tuple(image.tolist()) for image in epoch} == everything
    assert not torch.equal(*epochs)


def test_batches_all_have_the_same_size():
    batches = shuffled_batches(IMAGES, 5, seed=0)
    assert [len(next(batches)) for _ in range(5)] == [5] * 5


def test_run_matches_a_plain_training_loop():
    run = linear_run(0.1)
    run.advance(2)
    run.advance(5)  # goes on with the state kept
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = shuffled_batches(IMAGES, 3, seed=0)
    expected = []
    for _ in range(5):
        images = next(batches)
        loss = nn.functional.binary_cross_entropy_with_logits(model(images), images, reduction="sum") / 3
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert run.batch_losses == pytest.approx(expected, rel=1e-6)
    assert torch.equal(run.model[0].weight, model[0].weight)


def test_reported_loss_is_the_mean_over_the_last_epoch():
    run = linear_run(0.1)
    run.epoch = 3
    run.batch_losses = [9.0, 6.0, 3.0, 0.0, 3.0]
    assert run.losses == [9.0, 7.5, 6.0, 3.0, 2.0]


def test_seconds_count_training_steps_alone(monkeypatch):
    clock = iter([10.0, 11.0, 50.0, 52.0, 90.0, 94.0])  # start and end of three steps, with long breaks between
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(clock))
    run = linear_run(0.1)
    run.advance(3)
    assert run.seconds == [1.0, 3.0, 7.0]


def test_diverged_run_stops_and_has_infinite_loss():
    run = linear_run(TOO_LARGE)
    run.advance(20)
    assert run.diverged
    assert len(run.batch_losses) == len(run.seconds) == 2
    assert run.loss_on(IMAGES) == math.inf


def test_halving_follows_the_rules():
    steps = []
    lr, winner, trials = tune(linear_run, (1e-4, 1e-3, 1e-2, 1e-1), 8, steps.append)
    reference = {lr: linear_run(lr) for lr in (1e-4, 1e-3, 1e-2, 1e-1)}
    for lr, run in reference.items():
        run.advance(8 if lr in (1e-2, 1e-1) else 2)
    # On this easy problem a larger rate is better: the two largest go on, the largest wins.
    assert {lr: trial[0] for lr, trial in trials.items()} == {1e-4: 2, 1e-3: 2, 1e-2: 8, 1e-1: 8}
    assert {lr: trial[1] for lr, trial in trials.items()} == {
        lr: pytest.approx(run.loss_on(IMAGES)) for lr, run in reference.items()
    }
    assert lr == 1e-1
    assert training.Result("SGD", {"lr": lr}, winner, trials, 0.0).edge == "highest"
    assert winner.batch_losses == reference[1e-1].batch_losses
    assert len(steps) == 2 * 2 + 2 * 8 == training.Contestant(linear_run, tuple(trials), {}).total_steps(8)
    assert steps[0] == f"lr 0.0001, loss {reference[1e-4].batch_losses[0]:.1f}"


def test_last_loss_decides_not_the_first_round():
    class Scripted:
        """A run whose full training loss is looked up by the number of steps."""

        def __init__(self, losses):
            self.table, self.batch_losses, self.images = losses, [], None

        def advance(self, steps, on_step):
            self.batch_losses = [0.0] * steps

        def loss_on(self, images):
            return self.table[len(self.batch_losses)]

    table = {1: {2: 9.0, 8: 0.0}, 2: {2: 4.0, 8: 3.0}, 3: {2: 3.0, 8: 3.5}, 4: {2: 9.5, 8: 0.0}}
    lr, run, trials = tune(lambda lr: Scripted(table[lr]), (1, 2, 3, 4), 8, lambda text: None)
    assert lr == 2
    assert training.Result("SGD", {"lr": lr}, run, trials, 0.0).edge is None


def test_diverged_rates_drop_out():
    lr, _, trials = tune(linear_run, (1e-3, 1e-2, TOO_LARGE, 2 * TOO_LARGE), 40, lambda text: None)
    assert lr == 1e-2
    assert trials[TOO_LARGE] == (2, math.inf)


def test_all_rates_diverged():
    _, run, _ = tune(linear_run, (TOO_LARGE, 2 * TOO_LARGE), 40, lambda text: None)
    assert run.diverged
    assert steps_to(run.losses, run.losses[-1]) is None


def test_one_learning_rate_is_fixed():
    """It takes all its steps, nothing is tuned, and its only value is no edge of a grid."""
    lr, run, trials = tune(linear_run, (1e-2,), 8, lambda text: None)
    reference = linear_run(1e-2)
    reference.advance(8)
    assert run.batch_losses == reference.batch_losses
    assert trials == {lr: (8, reference.loss_on(IMAGES))}
    result = training.Result("SGD", {"lr": lr}, run, trials, 0.0)
    assert not result.is_tuned and result.edge is None and result.train_loss == trials[lr][1]
    assert training.Contestant(linear_run, (1e-2,), {}).total_steps(8) == 8


@pytest.mark.parametrize(
    ("target", "expected"),
    [(10.0, 1), (9.0, 1), (8.9, 2), (4.0, 3), (3.9, 5), (2.0, 5), (1.9, None), (math.nan, None)],
)
def test_steps_to_target(target, expected):
    assert steps_to([9.0, 7.0, 4.0, 5.0, 2.0, 3.0], target) == expected


def test_all_contestants_start_alike(monkeypatch):
    monkeypatch.setattr(training, "build_autoencoder", lambda seed: build_tiny(seed))
    images = training.Images(IMAGES, IMAGES)
    results = [training.compete(name, images, 3, 0, 8, lambda text: None) for name in training.CONTESTANTS]
    assert len({round(result.run.batch_losses[0], 5) for result in results}) == 1
    assert [len(result.run.batch_losses) for result in results] == [8, 8, 8, 8]
    for result in results:
        expected = training.full_loss(result.run.model, IMAGES)
        assert result.train_loss == result.held_out_loss == pytest.approx(expected)


def test_the_seed_fixes_the_label_draws_too(monkeypatch):
    monkeypatch.setattr(training, "build_autoencoder", lambda seed: build_tiny(seed))
    losses = {}
    for seed, again in ((0, 0), (0, 1), (1, 0)):
        torch.seed()
        result = training.compete(training.AUTO, training.Images(IMAGES, IMAGES), 3, seed, 4, lambda text: None)
        losses[seed, again] = result.run.batch_losses
    assert losses[0, 0] == losses[0, 1] != losses[1, 0]


def build_tiny(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4))
