from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests import studies
from tuner.spec.study import Budget
from tuner.study import verifying
from tuner.study.store import Store
from tuner.verify.arm import Finalist


@pytest.fixture
def made(tmp_path):
    """A study of USD 20 for 2.50 per GPU-hour, of which a launch of a minute is spent."""
    store = Store(tmp_path / "s")
    studies.measured(0, (studies.step(1.0, studies.objective()),), store, baseline=True)
    budget = Budget(launches=None, hours=None, usd=20.0, verify_share=0.2)
    study = studies.study(tmp_path / "s", budget=budget)
    return SimpleNamespace(study=study, traffic=SimpleNamespace(heldout=[object()])), store


def arm(study, gpus, trial=None):
    config = replace(study.space.config({}, study.model), gpus=gpus)
    return Finalist(f"{gpus} GPUs", config, 1.0, trial=trial)


def test_a_verification_lasts_as_long_as_its_dearest_configuration_can_be_paid(made):
    ready, store = made
    left_usd = 20 - 2.5 / 60
    for gpus in (1, 8):
        within = verifying.limits(ready, store, [arm(ready.study, 1), arm(ready.study, gpus)])
        assert within and within.seconds == pytest.approx(left_usd / (2.5 * gpus) * 3600)


def test_gpus_of_another_price_are_paid_at_theirs(made):
    ready, store = made
    studies.measured(1, (studies.step(1.0, studies.objective()),), store, price_usd_per_gpu_hour=10.0)
    within = verifying.limits(ready, store, [arm(ready.study, 2, trial=1)])
    assert within and within.seconds == pytest.approx((20 - 12.5 / 60) / 20 * 3600)
