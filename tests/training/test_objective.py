"""Losses, weights, schedules and averages against their formulas."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from tiny_run import WORDS, tiny_trainer
from torch import nn

from zigma.flow import PATHS, flow_loss
from zigma.training.average import Average
from zigma.training.captions import Described, Labels, Texts
from zigma.training.objective import Objective
from zigma.training.optim import schedule
from zigma.training.optimizers import make_optimizer
from zigma.training.tables import FlowTable, OptimizerTable, TextTable


@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
@pytest.mark.parametrize("prediction", ["velocity", "noise", "score"])
def test_min_snr_weighs_what_is_wrong_about_the_data_the_same_in_every_prediction(path, prediction):
    """Hang et al. weigh the error of the data; the same error must weigh the same however it is said."""
    objective = Objective(FlowTable(path=path, prediction=prediction, weighting="min-snr", snr_gamma=2.0))
    generator = torch.Generator().manual_seed(0)
    x1, x0 = (torch.randn(64, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.linspace(0.05, 0.95, 64, dtype=torch.float64)
    error = torch.randn(64, 5, generator=generator, dtype=torch.float64)
    flow = PATHS[path]()

    def predict(x, t):
        alpha, sigma = flow.alpha(t)[:, None], flow.sigma(t)[:, None]
        noise = (x - alpha * (x1 + error)) / sigma  # what a model thinks that takes x1 + error for the data
        if prediction == "noise":
            return noise
        return flow.target(noise, x1 + error, t) if prediction == "velocity" else -noise / sigma

    snr = (flow.alpha(t) / flow.sigma(t)) ** 2
    expected = snr.clamp(max=2.0) * error.square().mean(1)
    torch.testing.assert_close(objective.losses(predict, x1, x0, t), expected, rtol=1e-4, atol=1e-6)


def test_without_a_weight_the_loss_is_the_flows():
    objective, generator = Objective(FlowTable(path="gvp", prediction="noise")), torch.Generator().manual_seed(0)
    x1 = torch.randn(3, 2, 4, 4)
    x0, t = objective.draw(x1, generator)
    losses = objective.losses(lambda x, t: x * 0.5, x1, x0, t)
    same = {"path": PATHS["gvp"](), "prediction": "noise", "x0": x0, "t": t, "reduction": "none"}
    expected = flow_loss(lambda x, t: x * 0.5, x1, **same)
    assert torch.equal(losses, expected) and losses.shape == (3,)


def test_the_validation_loss_is_a_figure_of_the_weights_alone(tmp_path):
    trainer = tiny_trainer(tmp_path, held_out=2)
    trainer.resume()
    first = trainer.validate()
    state = trainer.generator.get_state()
    torch.manual_seed(7)
    assert trainer.validate() == first and torch.equal(trainer.generator.get_state(), state)
    assert not set(trainer.seen) & set(trainer.examples.held_out) and len(trainer.seen) == 4
    for _ in range(3):
        trainer.train_step()
    assert trainer.validate() != first


def test_the_checkpoint_of_the_least_validation_loss_stays(tmp_path):
    """And a loss counts for the weights that it was measured on alone."""
    run = {"steps": 12, "validate_every": 3, "save_steps": 2, "keep_last": 1}
    trainer = tiny_trainer(tmp_path, held_out=2, run=run)
    trainer.resume()
    measured = {}

    def on_step(trainer, loss):
        if trainer.step % 3 == 0:
            measured[trainer.step] = trainer.validation

    trainer.run(on_step)
    least = min(measured, key=measured.get)
    assert trainer.folder.best().step == least and trainer.folder.best().loss == measured[least]
    kept = {checkpoint.step: checkpoint.loss for checkpoint in trainer.folder.whole()}
    assert kept == {least: measured[least], 12: measured[12]}


@pytest.mark.parametrize("name", ["constant", "cosine", "linear"])
def test_schedules_warm_up_hold_and_fall(name):
    assert [schedule(p, name, 0.1, 0.4) for p in (0.0, 0.05, 0.1, 0.3)] == pytest.approx([0, 0.5, 1, 1])
    middle = {"constant": 1.0, "linear": 0.5, "cosine": 0.5 * (1 + math.cos(math.pi / 2))}[name]
    assert schedule(0.7, name, 0.1, 0.4) == pytest.approx(middle)
    assert schedule(1.0, name, 0.1, 0.4) == pytest.approx(1.0 if name == "constant" else 0.0)


def test_matrices_are_decayed_and_nothing_else(tmp_path):
    trainer = tiny_trainer(tmp_path)
    decayed, plain = trainer.optimizer.optimizers[0].param_groups
    names = {id(p): name for name, p in trainer.learning()}
    assert decayed["weight_decay"] == 0.02 and plain["weight_decay"] == 0
    assert all(p.dim() >= 2 for p in decayed["params"])
    kept = {names[id(p)] for p in plain["params"]}
    assert {name for name in names.values() if name.endswith(("A_log", ".D", "bias", "pos_embed"))} <= kept
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_an_optimiser_of_another_package_is_asked_for_by_name(monkeypatch):
    for name in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    named = [("a.weight", nn.Parameter(torch.ones(2, 2)))]
    with pytest.raises(ImportError, match="pip install bitsandbytes, or take 'adamw'"):
        make_optimizer(named, OptimizerTable(name="adamw8bit"))
    frozen = [("a.weight", nn.Parameter(torch.ones(2), requires_grad=False))]
    with pytest.raises(ValueError, match="no parameter learns"):
        make_optimizer(frozen, OptimizerTable())


def test_prodigy_learns(tmp_path):
    pytest.importorskip("prodigyopt")
    trainer = tiny_trainer(tmp_path, optimizer={"name": "prodigy", "lr": 1.0}, run={"steps": 60})
    trainer.resume()
    losses = [trainer.train_step() for _ in range(60)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_adamw8bit_learns_and_keeps_bytes(tmp_path):
    pytest.importorskip("bitsandbytes")
    tables = {"optimizer": {"name": "adamw8bit"}, "model": {"config": {"embed_dim": 64, "depth": 1, "patch_size": 2}}}
    trainer = tiny_trainer(tmp_path, run={"steps": 40}, **tables)
    trainer.resume()
    losses = [trainer.train_step() for _ in range(40)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    states = [state for group in trainer.optimizer.optimizers for state in group.state.values()]
    assert any(value.dtype == torch.uint8 and value.numel() >= 4096 for state in states for value in state.values()
               if torch.is_tensor(value))  # fmt: skip


def test_the_gradient_is_clipped_before_the_step(tmp_path):
    """With plain descent a step can be no longer than the rate times the limit."""
    trainer = tiny_trainer(tmp_path, optimizer={"clip": 1e-3, "warmup": 0.0, "weight_decay": 0.0})
    trainer.optimizer = type(trainer.optimizer)(torch.optim.SGD([p for _, p in trainer.learning()], lr=1.0))
    before = [p.detach().clone() for _, p in trainer.learning()]
    trainer.train_step()
    moved = sum((p - b).square().sum() for (_, p), b in zip(trainer.learning(), before, strict=True)).sqrt()
    assert 0.9e-3 < moved < 1.001e-3


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path, accumulate):
    def one_step(name: str, parts: int):
        torch.manual_seed(0)
        trainer = tiny_trainer(tmp_path / name, run={"accumulate": parts}, model={"config": {
            "embed_dim": 16, "depth": 2, "patch_size": 2}})  # fmt: skip
        loss = trainer.train_step()
        return loss, torch.cat([p.grad.flatten() for _, p in trainer.learning()])

    loss, whole = one_step("whole", 1)
    other, parts = one_step("parts", accumulate)
    assert other == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("rate", "every"), [(0.9, 1), (0.995, 1), (0.999, 5), (0.9999, 10)])
def test_the_average_follows_its_formula(rate, every):
    layer = nn.Linear(3, 2)
    average = Average(layer.named_parameters(), rate)
    expected = layer.weight.detach().clone()
    for n in range(1, 141):
        rhythm = every if n > 100 else 1  # at first every update counts
        with torch.no_grad():
            layer.weight.add_(torch.randn(2, 3))
        average.update()
        if n % rhythm:
            continue
        decay = min(rate, (1 + n) / (10 + n)) ** rhythm
        expected = decay * expected + (1 - decay) * layer.weight.detach()
    own = layer.weight.detach().clone()
    with average.in_place():
        torch.testing.assert_close(layer.weight.detach(), expected)
    assert torch.equal(layer.weight, own)


def test_captions_are_dropped_and_styled_at_their_rates():
    pictures = [Described(("fox left", "red fox"), style="flat")]
    table = TextTable(dropout=0.25, style_rate=0.5, trigger="zz")
    seen: list[str] = []
    texts = Texts(pictures, table, lambda text: seen.append(text) or torch.tensor([len(seen) - 1]))
    drawn = texts.draw([0] * 4000, [True] * 4000, torch.Generator().manual_seed(0)).flatten().long()
    rates = {text: (drawn == i).float().mean().item() for i, text in enumerate(seen)}
    assert rates.keys() == {"", "zz fox right", "zz red fox", "zz fox right flat", "zz red fox flat"}
    assert rates[""] == pytest.approx(0.25, abs=0.03)
    assert all(rate == pytest.approx(0.1875, abs=0.03) for text, rate in rates.items() if text)


def test_labels_are_dropped_only_where_there_is_a_null():
    pictures = [Described(label=1), Described(label=0)]
    generator = torch.Generator().manual_seed(0)
    drawn = Labels(pictures, TextTable(dropout=0.5), 7).draw([0, 1] * 500, [False] * 1000, generator)
    assert set(drawn.tolist()) == {0, 1, 7} and (drawn == 7).float().mean() == pytest.approx(0.5, abs=0.05)
    kept = Labels(pictures, TextTable(dropout=0.5), None).draw([0, 1], [False] * 2, generator)
    assert kept.tolist() == [1, 0]


def test_losses_that_are_no_numbers_stop_a_run_and_spoil_nothing(tmp_path, caplog):
    trainer = tiny_trainer(tmp_path, run={"nan_limit": 3, "steps": 50})
    trainer.resume()
    trainer.train_step()
    trainer.save()
    before = {name: p.detach().clone() for name, p in trainer.learning()}
    for variants in trainer.examples.latents:
        for x in variants:
            x[:] = float("nan")
    words = rf"no number 3 times in a row at step 3, last with .*({'|'.join(WORDS)})-\d.png"
    with pytest.raises(RuntimeError, match=words):
        trainer.run()
    assert caplog.text.count("this batch changes nothing") == 2
    for name, parameter in trainer.learning():
        assert torch.equal(parameter, before[name]), name
    assert [checkpoint.step for checkpoint in trainer.folder.whole()] == [1]


def test_a_gradient_that_is_no_number_changes_nothing(tmp_path, caplog):
    trainer = tiny_trainer(tmp_path)
    before = {name: p.detach().clone() for name, p in trainer.learning()}
    trainer.learning()[3][1].register_hook(lambda gradient: gradient * float("inf"))
    trainer.train_step()
    assert "this batch changes nothing" in caplog.text
    for name, parameter in trainer.learning():
        assert torch.equal(parameter, before[name]), name


def test_the_loss_falls_and_every_weight_learns(tmp_path):
    trainer = tiny_trainer(tmp_path, run={"steps": 60})
    trainer.resume()
    before = {name: p.detach().clone() for name, p in trainer.learning()}
    losses = [trainer.train_step() for _ in range(60)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert [name for name, p in trainer.learning() if torch.equal(p, before[name])] == []
