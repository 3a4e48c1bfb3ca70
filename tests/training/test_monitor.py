"""What the monitor logs, under real Trainers."""

import lightning as L
import pytest

from clipfilter_wds.training.monitor import ClipFilterMonitor
from tests.support.fitting import THRESHOLD, Recorder, data_module, new_trainer, on_ranks
from tests.support.processes import run_ranks


class Log(L.pytorch.loggers.logger.DummyLogger):
    """A logger that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: dict[str, float] = {}
        self.steps: list[int] = []

    def log_metrics(self, metrics, step=None):
        self.metrics.update(metrics)
        if "clipfilter/keep_rate" in metrics:
            self.steps.append(step)


class Scores(Recorder):
    """Remembers the scores of each batch, too."""

    def training_step(self, batch, index):
        self.scores = [*getattr(self, "scores", []), batch["score"].tolist()]
        return super().training_step(batch, index)


def fit_logged(data, *, as_it_is=False):
    """What is logged on this rank at the end of an epoch, and the loader's counts and the batches' scores there."""
    log, module, data = Log(), Scores(), data_module(data)
    options = {"logger": log, "log_every_n_steps": 1, "max_epochs": 1, "callbacks": [ClipFilterMonitor()]}
    trainer = new_trainer(**options, **on_ranks())
    if as_it_is:
        data.setup("fit")
        loader = data.train_dataloader()
        trainer.fit(module, loader)
    else:
        trainer.fit(module, datamodule=data)
        loader = data.train_loader
    logged = {name: value for name, value in log.metrics.items() if name.startswith("clipfilter/")}
    return logged, loader.stats, module.scores


@pytest.mark.parametrize("as_it_is", [False, True], ids=["data module", "loader"])
def test_it_logs_what_the_filter_does(data, as_it_is):
    logged, stats, scores = fit_logged({**data, "val": None}, as_it_is=as_it_is)
    assert logged["clipfilter/keep_rate"] == pytest.approx(stats.keep_rate)
    assert logged["clipfilter/score_mean"] == pytest.approx(sum(scores[-1]) / len(scores[-1]))
    assert logged["clipfilter/score_mean"] > THRESHOLD
    assert logged["clipfilter/dropped/below_threshold"] == stats.dropped["below_threshold"] > 10
    assert logged["clipfilter/samples_per_second"] >= 0
    assert 0 <= logged["clipfilter/wait_share"] <= 1
    assert len(logged) == 5


def test_values_are_those_of_all_ranks(data):
    # With no further batch on one rank the epoch ends for both, so nothing is scored after the last time of logging.
    first, second = run_ranks(2, fit_logged, {**data, "val": None})
    stats, scores = first[1] + second[1], first[2][-1] + second[2][-1]
    logged = first[0]
    assert second[0] == logged
    assert first[1] != second[1]
    assert logged["clipfilter/score_mean"] == pytest.approx(sum(scores) / len(scores))
    assert logged["clipfilter/keep_rate"] == pytest.approx(stats.keep_rate)
    assert logged["clipfilter/dropped/below_threshold"] == stats.dropped["below_threshold"]
    assert 0 <= logged["clipfilter/wait_share"] <= 1


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"log_every_n_steps": 5}, [4, 9]),  # an epoch has fewer batches
        ({"log_every_n_steps": 2, "accumulate_grad_batches": 2}, [1, 3, 5]),
        ({"log_every_n_steps": 0}, []),
    ],
    ids=str,
)
def test_it_logs_at_the_steps_at_which_the_trainer_does(data, options, steps):
    log = Log()
    limits = {"max_epochs": 3, "limit_train_batches": 4}
    trainer = new_trainer(logger=log, callbacks=[ClipFilterMonitor()], **limits, **options)
    trainer.fit(Recorder(), datamodule=data_module({**data, "val": None}))
    assert log.steps == steps


def test_without_a_filter_it_says_where_one_belongs():
    class OwnData(Recorder):
        def train_dataloader(self):
            return [{"__key__": ["a"]}]

    with pytest.raises(TypeError, match="finds no filter: train from a ClipFilterDataModule"):
        new_trainer(callbacks=[ClipFilterMonitor()]).fit(OwnData())
