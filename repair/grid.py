"""`repair grid`: which learning rate and which lambda? One layer, many short trainings.

By default the paper's grid (section 4.2): learning rates 0.01, 0.1, 0.3 by lambdas 0.9, 0.7, 0.5.
What enters the layer is computed once for all of them. Points are judged on the validation split
alone; the best one is then held against the network before and against plain cross entropy on the
test split, which has chosen nothing.

Optuna keeps the trials, in a SQLite file inside the run or at any storage URL. The same command
again does what is left; several processes or machines that share a storage share the work.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audit import console
from audit.errors import UsageError
from audit.files import write_json, write_table
from audit.runs import Run, open_run
from repair.config import RepairConfig
from repair.grid_request import GridRequest, Sampler
from repair.grid_storage import failures_told, open_storage, without_password

if TYPE_CHECKING:
    import optuna

    from audit.networks import Layer, Network, Split
    from repair.cache import CrossingTensors
    from repair.decision import Predictions
    from repair.guidance import Guidance
    from repair.training import Trained

_HEARTBEAT_S = 10
_POINT = "point"  # marks trials that stand for a point of the grid
_PLAIN = "plain cross entropy, lr "


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A finished search: its record, as grid.json holds it, and where it lies."""

    record: dict[str, Any]
    folder: Path


def search(run: Run, config: RepairConfig, request: GridRequest) -> Grid:
    """Return the search of one layer's learning rate and lambda, finished or gone on with.

    Args:
        run: The scan.
        config: All other settings; its own learning rate and lambda are not used.
        request: What to search.

    Raises:
        LayermendError: The run, its model, its images or the study cannot be used.
    """
    bench = _Bench.open(run, config, request)
    study = _open_study(bench)
    with failures_told(bench.storage):
        record = _carry_out(bench, study)
    write_json(bench.folder / "grid.json", record)
    write_table(bench.folder / "trials.parquet", record["trials"])
    return Grid(record=record, folder=bench.folder)


def _carry_out(bench: _Bench, study: optuna.Study) -> dict[str, Any]:
    """Do what is left of a search, in several processes where asked; return its record."""
    request = bench.request
    if request.workers > 1:
        spawned = request.workers - 1
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(max_workers=spawned, mp_context=context) as pool:
            alone = replace(request, workers=1, storage=bench.storage, study=bench.study)
            waiting = [
                pool.submit(_work, bench.run.path, bench.config, alone) for _ in range(spawned)
            ]
            bench.work(study)
            for one in waiting:
                one.result()
    else:
        bench.work(study)
    bench.try_plain(study)
    return bench.record(study)


def _work(run: Path, config: RepairConfig, request: GridRequest) -> None:
    """Take part in a search from another process."""
    bench = _Bench.open(open_run(run), config, request)
    bench.work(_open_study(bench))


@dataclass(kw_only=True)
class _Bench:
    """Everything that a trial needs: the layer, its images as they enter it, the settings."""

    run: Run
    config: RepairConfig
    request: GridRequest
    network: Network
    layer: Layer
    split: Split
    crossing: dict[str, CrossingTensors]
    guidance: Guidance | None
    class_weights: Any
    settings: dict[str, Any]
    study: str
    folder: Path
    storage: str
    trained: dict[str, Trained] = field(default_factory=dict)

    @classmethod
    def open(cls, run: Run, config: RepairConfig, request: GridRequest) -> _Bench:
        from audit.environment import choose_device
        from repair.crossing import choose_room, cross_splits
        from repair.layer import check_has_maps, flagged_layer
        from repair.material import RepairImages, find_guide
        from repair.sources import open_scanned_network

        network = open_scanned_network(
            run,
            model=request.model,
            device=choose_device(request.device),
            trust_pickle=request.trust_pickle,
            code=request.code,
        )
        layer = network.layer(request.layer or flagged_layer(run))
        check_has_maps(layer, config)
        images = RepairImages.open(
            run, network, data=request.data, train=request.train, seed=config.seed
        )
        guide = find_guide(run, network, images, config, masks=request.masks, group=request.group)
        guidance = guide(layer)
        settings = _settings(run, network, layer, config, request)
        mark = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        study = request.study or f"{layer.name}-{mark}"
        folder = run.path / "grids" / study.replace("/", "_")
        folder.mkdir(parents=True, exist_ok=True)
        split = network.program.split(layer.name)
        crossing = cross_splits(
            network,
            split,
            images.folder,
            images.positions,
            choose_room(request.cache_gib),
            batch_size=config.batch_size,
            beside=config.beside,
        )
        return cls(
            run=run,
            config=config,
            request=request,
            network=network,
            layer=layer,
            split=split,
            crossing=crossing,
            guidance=guidance,
            class_weights=images.class_weights(network, config),
            settings=settings,
            study=study,
            folder=folder,
            storage=request.storage or f"sqlite:///{folder / 'study.db'}",
        )

    # ---------------------------------------------------------------- trials

    def work(self, study: optuna.Study) -> None:
        """Do trials until none is left, those that other processes lost included."""
        import optuna

        if self.request.sampler != "grid":
            done = optuna.study.MaxTrialsCallback(
                self.request.trials, states=(optuna.trial.TrialState.COMPLETE,)
            )
            if len(_complete(study)) < self.request.trials:
                study.optimize(self.objective, callbacks=[done])
            return
        total = len(self.request.points)
        with console.progress("trying the grid", total) as bar:
            shown = 0
            while True:
                found = len(_points_done(study))
                bar.advance(found - shown)
                shown = found
                if found == total:
                    return
                _fail_lost_trials(study)
                _enqueue_missing(study, self.request.points)
                if _waiting(study):
                    study.optimize(self.objective, n_trials=1)
                else:  # the others are at work on what is left
                    time.sleep(0.5)

    def objective(self, trial: optuna.Trial) -> float:
        """Train one point and return what it reached on the validation split."""
        import optuna

        if self.request.sampler == "grid" and _POINT not in trial.user_attrs:
            raise optuna.TrialPruned  # another process took the last point
        rates, balances = self.request.rates, self.request.balances
        config = replace(
            self.config,
            learning_rate=trial.suggest_float("lr", min(rates), max(rates), log=True),
            balance=trial.suggest_float("lambda", min(balances), max(balances)),
        )
        outcome = self.outcome(self.train(config, self.config.loss))
        for name, value in outcome.items():
            trial.set_user_attr(name, value)
        return float(outcome["val_ce" if self.request.objective == "ce" else "val_accuracy"])

    def try_plain(self, study: optuna.Study) -> None:
        """Train by plain cross entropy at every learning rate of the grid, once."""
        for rate in self.request.rates:
            if _PLAIN + str(rate) not in study.user_attrs:
                config = replace(self.config, loss="ce", learning_rate=rate)
                outcome = self.outcome(self.train(config, "ce"))
                study.set_user_attr(_PLAIN + str(rate), {"lr": rate, **outcome})

    def train(self, config: RepairConfig, loss: str) -> Trained:
        from repair.training import train_layer

        guided = loss != "ce" and self.guidance is not None
        return train_layer(
            self.split,
            self.crossing["train"],
            self.crossing["val"],
            config,
            loss=loss,
            also=self._norm_after(),
            masks=self.guidance.masks if guided and self.guidance else None,
            class_weights=self.class_weights,
        )

    def _norm_after(self) -> Mapping[str, Any]:
        if not self.config.with_norm:
            return {}
        return self.network.program.norm_parameters_after(self.layer.name)

    @staticmethod
    def outcome(trained: Trained) -> dict[str, Any]:
        best = trained.history[trained.best_epoch]
        return {
            "val_accuracy": best["val_accuracy"],
            "val_ce": best["val_ce"],
            "best_epoch": trained.best_epoch,
            "stopped": trained.stopped,
            "seconds": round(trained.seconds, 2),
        }

    # ---------------------------------------------------------------- what it came to

    def record(self, study: optuna.Study) -> dict[str, Any]:
        """Return the table, the best point, and its one look at the test split."""
        from audit.environment import versions
        from repair.decision import compare

        rows = _rows(study)
        plain = [study.user_attrs[_PLAIN + str(rate)] for rate in self.request.rates]
        best, best_plain = self._best(rows), self._best(plain)
        ours = self._judge(
            replace(self.config, learning_rate=best["lr"], balance=best["lambda"]),
            self.config.loss,
        )
        theirs = self._judge(replace(self.config, loss="ce", learning_rate=best_plain["lr"]), "ce")
        before = self._judge(None, "")
        classes, seed = self.network.card.classes, self.config.seed
        return {
            "command": without_password(self.request.command, self.request.storage),
            "study": self.study,
            "storage": None if self.request.storage is None else "given",
            "settings": self.settings,
            "versions": versions("optuna"),
            "sampler": self.request.sampler,
            "objective": self.request.objective,
            "rates": list(self.request.rates),
            "lambdas": list(self.request.balances),
            "trials": rows,
            "plain": plain,
            "best": best,
            "best_plain": best_plain,
            "importance": importance(study),
            "test": {
                "before": before.metrics(classes, seed=seed),
                "best": ours.metrics(classes, seed=seed),
                "plain": theirs.metrics(classes, seed=seed),
                "versus_before": compare(before, ours, seed=seed).as_dict(),
                "versus_plain": compare(theirs, ours, seed=seed).as_dict(),
            },
        }

    def _best(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if self.request.objective == "ce":
            return min(rows, key=lambda row: row["val_ce"])
        return max(rows, key=lambda row: (row["val_accuracy"], -row["val_ce"]))

    def _judge(self, config: RepairConfig | None, loss: str) -> Predictions:
        from repair.training import predict

        parameters = None if config is None else self.train(config, loss).parameters
        return predict(self.split, self.crossing["test"], parameters)[0]


def importance(study: optuna.Study) -> dict[str, Any]:
    """Return how much of the objective's variance each setting explains (fANOVA), or why not."""
    import optuna

    finished = _complete(study)
    if len({trial.value for trial in finished}) < 2:
        return {"values": None, "why": "all points reached the same, so nothing mattered"}
    if len(finished) < 4:
        return {"values": None, "why": f"{len(finished)} points are too few to tell"}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    values = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {"values": {name: float(value) for name, value in values.items()}, "why": None}


# -------------------------------------------------------------------- the study


def _open_study(bench: _Bench) -> optuna.Study:
    """Return the study of these settings, a new one or an earlier one."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = open_storage(bench.storage, heartbeat_s=_HEARTBEAT_S)
    seed = bench.config.seed
    samplers: dict[Sampler, Callable[[], optuna.samplers.BaseSampler]] = {
        "grid": lambda: optuna.samplers.RandomSampler(seed=seed),  # every point is enqueued
        "tpe": lambda: optuna.samplers.TPESampler(seed=seed),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
    }
    study = optuna.create_study(
        study_name=bench.study,
        storage=storage,
        sampler=samplers[bench.request.sampler](),
        direction="minimize" if bench.request.objective == "ce" else "maximize",
        load_if_exists=True,
    )
    known = study.user_attrs.get("settings")
    if known is None:
        study.set_user_attr("settings", bench.settings)
    elif known != bench.settings:
        differing = [key for key in bench.settings if known.get(key) != bench.settings[key]]
        raise UsageError(
            f"the study {bench.study} was made with another {', '.join(differing)}; "
            "give this search another name with --study"
        )
    return study


def _settings(
    run: Run, network: Network, layer: Layer, config: RepairConfig, request: GridRequest
) -> dict[str, Any]:
    """Return all that must be equal for two trials to be comparable."""
    left_out = ("lr", "lambda", "controls", "seeds")
    data = run.info.get("data") or {}
    return {
        "layer": layer.name,
        "model": network.sha256,
        "data": str(data.get("fingerprint", "")),
        "train": str(request.train) if request.train else None,
        "masks": str(request.masks) if request.masks else None,
        "group": request.group,
        "objective": request.objective,
        **{name: value for name, value in config.as_dict().items() if name not in left_out},
    }


def _fail_lost_trials(study: optuna.Study) -> None:
    """Mark the trials of processes that were killed, which have had no heartbeat for a while."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)


def _enqueue_missing(study: optuna.Study, points: Sequence[dict[str, float]]) -> None:
    """Enqueue the points that nobody has done, is doing or will do."""
    import optuna

    state = optuna.trial.TrialState
    alive = {
        _key(trial)
        for trial in study.get_trials(deepcopy=False)
        if trial.state in (state.COMPLETE, state.RUNNING, state.WAITING)
    }
    for point in points:
        if tuple(point.values()) not in alive:
            study.enqueue_trial(point, user_attrs={_POINT: list(point.values())})


def _key(trial: optuna.trial.FrozenTrial) -> tuple[float, ...]:
    return tuple(trial.user_attrs.get(_POINT, ()))


def _points_done(study: optuna.Study) -> set[tuple[float, ...]]:
    return {_key(trial) for trial in _complete(study) if _key(trial)}


def _waiting(study: optuna.Study) -> bool:
    import optuna

    return bool(study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,)))


def _complete(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    import optuna

    return study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))


def _rows(study: optuna.Study) -> list[dict[str, Any]]:
    """Return one row for each point, in the order of the table; a point done twice, once."""
    rows: dict[tuple[float, float], dict[str, Any]] = {}
    for trial in _complete(study):
        key = (float(trial.params["lr"]), float(trial.params["lambda"]))
        # Databases give a trial's attributes in orders of their own.
        told = {name: trial.user_attrs[name] for name in sorted(trial.user_attrs.keys() - {_POINT})}
        rows.setdefault(key, {"lr": key[0], "lambda": key[1], **told})
    return [rows[key] for key in sorted(rows, key=lambda key: (key[0], -key[1]))]
