"""The tasks on which the default step of K-FAC was chosen: each trains with every optimiser, and the table has its best rates."""

import math

import pandas as pd
import pytest

from studies import development
from studies.development import RATES, TASKS, table_of


@pytest.mark.parametrize(
    ("task", "optimizer"),
    [  # the step of K-FAC may mind the layers and the loss, and Muon the layers; the other optimisers mind nothing
        (task, optimizer)
        for task in TASKS
        for optimizer in RATES
        if task in ("group norm", "transformer") or optimizer in ("kfac adam", "kfac natural", "muon")
    ],
)
def test_every_task_trains_with_every_optimiser(task: str, optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, batch, _, loss = TASKS[task]
    monkeypatch.setitem(development.TASKS, task, (make, batch, 3, loss))
    monkeypatch.setattr(development, "EARLY", 0)
    settings = {"task": task, "optimizer": optimizer, "rate": RATES[optimizer][0], "seed": 1}
    first, *again = (
        {row["quantity"]: row["value"] for row in development.run(settings)}
        for _ in range(2 if task == "group norm" else 1)
    )
    assert again in ([], [first])
    assert all(math.isfinite(value) and value > 0 for value in first.values())
    assert set(first) == {"held-out loss", "worst batch loss"}


def test_a_training_that_diverges_is_infinitely_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    make, batch, _, loss = TASKS["regression"]
    monkeypatch.setitem(development.TASKS, "regression", (make, batch, 50, loss))
    rows = list(development.run({"task": "regression", "optimizer": "sgd", "rate": 1e6, "seed": 1}))
    assert [row["value"] for row in rows] == [math.inf, math.inf]


def test_tuned_optimisers_have_their_best_rate_and_the_default_its_own() -> None:
    rows = [
        {
            "network": task,
            "optimizer": name,
            "setting": rate,
            "seed": seed,
            "quantity": "held-out loss",
            "value": rate + seed,
        }
        for task in TASKS
        for name, rates in RATES.items()
        for rate in rates
        for seed in (0, 1)
    ]
    table = table_of(pd.DataFrame(rows))
    assert table.loc["sgd"].tolist() == pytest.approx([0.5 + min(RATES["sgd"])] * len(TASKS))
    assert table.loc["kfac adam"].tolist() == pytest.approx([0.5 + RATES["kfac adam"][0]] * len(TASKS))
