"""What the charts draw, by the specification that the browser gets."""

from __future__ import annotations

import pandas as pd

from dashboard.charts import history_chart
from repair.controls import CONTROLS


def test_every_training_has_a_name_and_a_color_of_its_own() -> None:
    roles = ["repair", *CONTROLS, "of-a-later-version"]
    history = pd.DataFrame(
        [
            {"role": role, "epoch": epoch, "val_ce": 1.0 / (1 + epoch), "best": epoch == 2}
            for role in roles
            for epoch in range(3)
        ]
    )
    document = history_chart(history).to_dict()
    scale = document["layer"][0]["encoding"]["color"]["scale"]
    assert len(set(scale["domain"])) == len(set(scale["range"])) == len(roles)
    assert scale["domain"][:3] == [
        "repair",
        "control: plain cross entropy",
        "control: shuffled maps",
    ]
    assert scale["domain"][-1] == "control: of-a-later-version"
    assert not any(name == f"control: {role}" for role in CONTROLS for name in scale["domain"])
    (drawn,) = document["datasets"].values()
    assert {row["trained"] for row in drawn} == set(scale["domain"])
