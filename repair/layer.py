"""Repair one layer of a scanned network and prove what it did: `repair layer`.

    open what the scan saw          network, images, splits (repair.sources)
    compute the prefix once         what enters the layer, for every image (repair.cache)
    train the layer                 by the loss; again for each control (repair.training)
    judge on the test split         never seen by training, nor by the choice of the epoch
    train the controls elsewhere    other layers, each with its own prefix (repair.controls)
    write the repaired network      and check by hash that nothing but the layer changed

Everything lands in a folder inside the run; a repair that was killed resumes there.
"""

from __future__ import annotations

import io
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from audit import console
from audit.environment import choose_device, device_record, peak_memory_mib, versions
from audit.errors import RunError, UsageError
from audit.files import replacing, sha256_file, write_bytes
from audit.images import load_pixels
from audit.networks import Layer, Network, Split, write_card
from audit.networks.network import sha256_state
from audit.parallel import ALONE, Team
from audit.runs import RepairFolder, Run, open_repair
from audit.statistics import bootstrap_mean
from repair.after import SCORED_IMAGES, MapComparison, calibration_record, compare_maps
from repair.cache import CrossingTensors
from repair.config import AUTO, RepairConfig
from repair.controls import PlannedControl, plan_controls, ranked_layers
from repair.counterfactuals import Counterfactuals
from repair.crossing import (
    cache_kinds,
    cache_line,
    cache_record,
    choose_room,
    cross_splits,
    further_versions,
)
from repair.decision import Predictions, compare, decide, judge_changed
from repair.defaults import settle
from repair.guidance import Guidance
from repair.layer_choice import best_layer, layer_candidates, try_layers
from repair.maps import GALLERY_METHOD, choose_gallery, map_similarity, true_class_maps
from repair.material import (
    CHANGED,
    RepairImages,
    find_guide,
    find_targets,
    hidden_pixels,
    make_counterfactuals,
)
from repair.outcome import (
    Control,
    Judged,
    Repeat,
    changed_record,
    control_record,
    penalty_record,
    plain_control,
    seeds_record,
    training_record,
)
from repair.rates import RATES, best_rate, try_rates
from repair.sources import open_scanned_network
from repair.temperature import fit_temperature
from repair.tracking import TrainingLog, check_tensorboard
from repair.training import DamagedCheckpointError, Row, Trained, predict, train_layer

_SPLITS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class RepairRequest:
    """What to repair and with what at hand; the numbers are decided by `RepairConfig`.

    Attributes:
        layer: Module path or alias, or `auto` for the one of those that the scan blames whose short
            repair does most; the layer that the scan flagged when None.
        train: Folder of further training images.
        data: Where the run's images are, if they have moved.
        model: Where the run's model is, if it has moved.
        device: `auto`, `cpu` or `cuda`.
        cache_gib: Memory for what crosses the cut; a quarter of what is available when None.
        cache_disk_gib: Disk for what that memory cannot hold; when None, a quarter of what is free,
            or nothing where `cache_gib` is 0.
        masks: Folder of masks or COCO file that says where the objects are.
        group: Error group of the scan whose region maps must leave.
        choose: Settings that the run decides, of `loss`, `counterfactuals`, `donors`, `distill` and
            `temperature`, see `repair.defaults`.
        tensorboard: Log every epoch for TensorBoard, in the repair's folder.
        resume: Go on with the newest unfinished repair, by the settings it was started with.
        stated: Settings (fields of `RepairConfig`) that must equal those of a resumed repair.
        command: The command line, for the record.
        trust_pickle: Let a pickled module run its code.
        code: Folder with the code of a pickled module.
    """

    layer: str | None = None
    train: Path | None = None
    data: Path | None = None
    model: str | None = None
    device: str = "auto"
    cache_gib: float | None = None
    cache_disk_gib: float | None = None
    masks: Path | None = None
    group: str | None = None
    choose: frozenset[str] = frozenset()
    tensorboard: bool = False
    resume: bool = False
    stated: frozenset[str] = frozenset()
    command: tuple[str, ...] = ()
    trust_pickle: bool = False
    code: Path | None = None


def repair_layer(
    run: Run, config: RepairConfig, request: RepairRequest, *, team: Team = ALONE
) -> RepairFolder:
    """Return the finished repair of one layer of the run's network.

    Args:
        run: The scan.
        config: The settings that decide the numbers.
        request: What to repair, and with what at hand.
        team: Processes that share the work; the first one alone judges and writes.

    Raises:
        LayermendError: The layer, the run, its model or its images cannot be used; what was begun
            is marked as failed.
    """
    device = choose_device(request.device)
    if request.tensorboard:
        check_tensorboard()
    resumed = _unfinished(run, request) if request.resume else None
    if resumed is not None:
        config, request = _recorded_settings(resumed, config, request)
    name = request.layer or flagged_layer(run, otherwise=_TRY_THEM)
    network = open_scanned_network(
        run,
        model=request.model,
        device=team.device or device,
        trust_pickle=request.trust_pickle,
        code=request.code,
    )
    images = RepairImages.open(
        run, network, data=request.data, train=request.train, seed=config.seed
    )
    tried: dict[str, float] = {}
    if name == AUTO:
        tried = _try_layers(run, network, images, config, request, team)
        name = best_layer(tried)
    layer = network.layer(name)
    settled = None
    if resumed is None:
        config, settled = settle(
            run, layer, config, request.choose, masks=request.masks, group=request.group
        )
    check_has_maps(layer, config)
    guide = find_guide(run, network, images, config, masks=request.masks, group=request.group)
    guidance = guide(layer)  # refused before a folder is made
    hidden = hidden_pixels(run, network, images, config, masks=request.masks, group=request.group)
    counterfactuals = make_counterfactuals(network, images, config, hidden)
    told = guidance or hidden
    record = _opening_record(network, layer, config, request, device, told)
    record["counterfactuals"] = {
        split: len(made[0].donors) for split, made in counterfactuals.items() if split != CHANGED
    }
    if tried:
        record["layers_tried"] = tried
    repair = resumed
    if repair is None:
        name = run.start_repair(layer.name, record).name if team.leads else ""
        repair = open_repair(run.path / "repairs" / team.leaders(name))
    if settled is not None:
        console.say(settled)
    if told is not None:
        console.say(told.sentence)
    if config.with_norm and not network.program.norm_parameters_after(layer.name):
        console.say(f"no batch norm follows {layer.name} alone; --with-norm changes nothing there")
    if resumed is not None and team.leads:
        resumed.write_info(status="running", failure=None)
    try:
        controls, left_out = plan_controls(
            config.controls,
            layer,
            network.program.layers,
            _ranked_layers(run, layer.name),
            loss=config.loss,
            needs_maps=config.needs_maps,
            counterfactuals=config.counterfactuals,
            distill=bool(config.distill),
            tempered=config.temperature != 1,
            one_mask=guidance is not None
            and guidance.source != "masks"
            and config.loss_function.adds_up,
            seed=config.seed,
        )
        for sentence in left_out.values():
            console.say(sentence)
        if team.leads:
            repair.write_info(controls_left_out=left_out)
        with TrainingLog.open(repair.path if request.tensorboard and team.leads else None) as log:
            job = _Repair(
                run,
                repair,
                network,
                layer,
                config,
                request,
                images,
                controls,
                guide,
                hidden,
                counterfactuals,
                log,
                team,
            )
            job.finish()
    except KeyboardInterrupt:
        console.say("stopped; go on with `repair layer --resume`")
        raise
    except Exception as error:
        if team.leads:
            repair.fail(f"{type(error).__name__}: {error}")
        raise
    return repair


_TRY_THEM = ", or try them on what a repair learns from by --name auto"


def flagged_layer(run: Run, *, otherwise: str = "") -> str:
    """Return the layer that the run's verdict would have repaired.

    Args:
        otherwise: What else the error tells to do.

    Raises:
        RunError: It flags none.
    """
    flagged, verdict = run.flagged_layer, run.verdict.get("verdict")
    if verdict == "none" or flagged is None:
        best = run.best_by_trial
        most = f", such as --name {best}, whose short repair did most" if best else ""
        raise RunError(
            f"the scan found no layer at fault (verdict: {verdict}); to repair one all the same, "
            f"name it with --name LAYER{most}{otherwise}"
        )
    return flagged


def _try_layers(
    run: Run,
    network: Network,
    images: RepairImages,
    config: RepairConfig,
    request: RepairRequest,
    team: Team,
) -> dict[str, float]:
    """Return what short repairs of the layers come to that the scan blames."""
    names = layer_candidates(run)
    if not names:
        raise RunError("the scan ranks no layer; name the one to repair with --name LAYER")
    masks, group = request.masks, request.group
    config, _ = settle(run, None, config, request.choose, masks=masks, group=group)
    hidden = hidden_pixels(run, network, images, config, masks=masks, group=group)
    made = make_counterfactuals(network, images, config, hidden)
    with console.progress("trying short repairs, layers", len(names)) as bar:
        tried = try_layers(
            network,
            names,
            images.folder,
            _dealt(images.positions, team),
            config,
            choose_room(request.cache_gib, 0),
            counterfactuals=made,
            team=team,
            on_skip=images.skip,
            on_tried=bar.advance,
        )
    console.say(
        f"the layer is {best_layer(tried)}: of {len(names)} that the scan blames, its short repair "
        "does most for the validation images; --name LAYER names another"
    )
    return tried


_NOTHING = Predictions(
    labels=np.empty(0, np.int64),
    predicted=np.empty(0, np.int64),
    p_true=np.empty(0),
    cross_entropies=np.empty(0),
)


class _Repair:
    """One repair under way: its folder, and what the steps hand to each other."""

    def __init__(
        self,
        run: Run,
        repair: RepairFolder,
        network: Network,
        layer: Layer,
        config: RepairConfig,
        request: RepairRequest,
        images: RepairImages,
        controls: tuple[PlannedControl, ...],
        guidance: Callable[[Layer], Guidance | None],
        hidden: Guidance | None,
        counterfactuals: Mapping[str, Sequence[Counterfactuals]],
        log: TrainingLog | None,
        team: Team,
    ) -> None:
        self.run = run
        self.folder = repair
        self.network = network
        self.layer = layer
        self.config = config
        self.request = request
        self.images = images
        self.controls = controls
        self.guidance = guidance
        self.log = log
        self.team = team
        self.positions = _dealt(images.positions, team)
        donors = counterfactuals[CHANGED][0].donors if CHANGED in counterfactuals else {}
        if donors and team.leads:
            self.positions[CHANGED] = tuple(donors)
        self.hidden = hidden
        self.counterfactuals = counterfactuals
        self.targets: Tensor | None = None
        self.split: Split = network.program.split(layer.name)
        self.timings_s: dict[str, float] = {}

    def finish(self) -> None:
        """Run every step and leave a complete repair behind."""
        hashes = _hashes(self.network.program.state)
        crossing = self._cross()
        self._fit_temperature(crossing["val"])
        with self._timed("answers"):
            self.targets = find_targets(
                self.network, self.images, self.config, self.hidden, self.positions["train"]
            )
        sizes = self._sizes(crossing)
        repaired = self._train(crossing)
        here = [c for c in self.controls if c.layer == self.layer.name and not c.originals]
        controls = [self._train_control(one, self.split, crossing) for one in here]
        repeats = self._repeat(here, crossing)
        if not self.team.leads:  # the rest, but for the other layers' training, is not shared
            crossing.clear()
            for one in self.controls:
                if one not in here:
                    self._train_elsewhere(one)
            return
        with self._timed("judging"):
            judged = self._judge(crossing["test"], repaired)
            readable = len(crossing.get(CHANGED, ()))
            changed = self._judge(crossing[CHANGED], repaired) if readable else None
        with self._timed("maps"):
            similarity = self._write_maps(crossing["test"], judged, repaired)
        with self._timed("cases"):
            maps = self._compare_maps(judged, repaired)
        cache = cache_record(crossing)
        crossing.clear()  # its memory goes to the layers that follow
        controls += [self._train_elsewhere(one) for one in self.controls if one not in here]
        controls.sort(key=lambda ran: self.controls.index(ran.plan))
        frozen = self._write_network(repaired, hashes)
        self._write_tables(judged, similarity, maps, repaired, controls)
        self._write_record(
            judged, changed, similarity, maps, frozen, cache, sizes, repaired, controls, repeats
        )
        for state in self.folder.path.glob("state-*.pt"):
            state.unlink()
        for left in self.folder.path.glob("cache*"):
            shutil.rmtree(left, ignore_errors=True)

    def _sizes(self, crossing: Mapping[str, CrossingTensors]) -> dict[str, int]:
        """Return how many images each split has, in all processes together."""
        own = torch.tensor([len(crossing[name]) for name in _SPLITS])
        (sizes,) = self.team.sums([own.to(self.network.program.device)])
        return dict(zip(_SPLITS, map(int, sizes.tolist()), strict=True))

    def _cross(self) -> dict[str, CrossingTensors]:
        """Return what crosses the cut, by split, and record where it is kept."""
        earlier = self.folder.info.get("cache", {}).get("splits", {})

        def note(crossing: Mapping[str, CrossingTensors]) -> None:
            record = cache_record(crossing)
            # Split by split: a kill between two of them must not change what was chosen.
            record["splits"] = {**earlier, **record["splits"]}
            if self.team.leads:
                self.folder.write_info(cache=record)

        room = choose_room(self.request.cache_gib, self.request.cache_disk_gib, self._cache_path)
        with self._timed("cache"):
            crossing = cross_splits(
                self.network,
                self.split,
                self.images.folder,
                self.positions,
                room,
                earlier=earlier,
                batch_size=self.config.batch_size,
                beside=self.config.beside,
                counterfactuals=self.counterfactuals,
                on_skip=self.images.skip,
                on_choice=note,
            )
        console.say(cache_line(self.layer.name, crossing))
        return crossing

    @property
    def _cache_path(self) -> Path:
        return self._cache_folder("cache")

    def _cache_folder(self, name: str) -> Path:
        return self.folder.path / (name if self.team.leads else f"{name}-{self.team.rank}")

    def _train(self, crossing: Mapping[str, CrossingTensors]) -> Trained:
        trained = self._epochs("the repair", self.split, crossing)
        self.timings_s["repair"] = trained.seconds
        return trained

    def _epochs(
        self,
        what: str,
        split: Split,
        crossing: Mapping[str, CrossingTensors],
        *,
        control: PlannedControl | None = None,
        seed: int | None = None,
    ) -> Trained:
        """Train the repair or a control, by the configured seed or another one."""
        config, again = self.config, ""
        if seed is not None:
            config, again = replace(config, seed=seed), f"-seed{seed}"
        if control is not None and control.as_sure:
            config = replace(config, temperature=1.0)
        loss = control.loss if control else config.loss
        whole = control is not None and control.whole
        plain = control is not None and (control.labels_alone or control.originals)
        guidance = self.guidance(split.layer) if loss != "ce" else None
        role = (control.name if control else "repair") + again

        def train(config: RepairConfig, **more: Any) -> Trained:
            return train_layer(
                split,
                crossing["train"],
                crossing["val"],
                config,
                loss=loss,
                versions=further_versions(crossing, "train"),
                also={} if whole else self._norm_after(split.layer),
                role=role,
                shuffled=control is not None and control.shuffled,
                masks=guidance.masks if guidance else None,
                targets=None if plain else self.targets,
                class_weights=self.images.class_weights(self.network, self.config),
                surgical=control is not None and control.surgical,
                team=self.team,
                **more,
            )

        if config.learning_rate == AUTO:
            plan = control.name if control else "repair"  # further seeds go by the first one's rate
            config = replace(config, learning_rate=self._rate(what, plan, config, train))
        with console.progress(f"training {what}, epochs", self.config.epochs) as bar:

            def finished(row: Row) -> None:
                bar.advance()
                if self.log is not None:
                    self.log.add({**row, "role": role})

            trained = train(
                config,
                state_path=self._state_path((control.name if control else loss) + again),
                on_epoch=finished,
            )
        if trained.stopped:
            console.say(f"{what} {trained.stopped}")
        return trained

    def _rate(
        self,
        what: str,
        plan: str,
        config: RepairConfig,
        train: Callable[[RepairConfig], Trained],
    ) -> float:
        """Return the learning rate that does best; a resumed repair keeps the one it had."""
        known = self.folder.info.get("rates", {})
        if plan not in known:
            rates = len(RATES[config.optimizer])
            with (
                self._timed(f"learning rates of {plan}"),
                console.progress(f"learning rates for {what}", rates) as bar,
            ):
                tried = try_rates(train, config, on_tried=bar.advance)
            chosen = {"chosen": best_rate(tried), "val_ce": {f"{r:g}": v for r, v in tried.items()}}
            known = {**known, plan: chosen}
            if self.team.leads:
                self.folder.write_info(rates=known)
            else:
                self.folder.info["rates"] = known
            console.say(
                f"learning rate {chosen['chosen']:g} for {what}: of {len(tried)} tried for a few "
                "epochs the one with the lowest validation cross entropy"
            )
        return float(known[plan]["chosen"])

    def _fit_temperature(self, validation: CrossingTensors) -> None:
        """Settle what the losses of the repair and of all controls divide logits by."""
        if self.config.temperature == AUTO:
            found = fit_temperature(self.split, validation, team=self.team)
            console.say(
                f"the loss divides logits by {found:.3g}, which makes the network as sure as it is "
                "right on the validation images"
            )
            self.config = replace(self.config, temperature=found)
        if self.team.leads:
            self.folder.write_info(temperature=self.config.divisor)

    def _norm_after(self, layer: Layer) -> dict[str, Tensor]:
        if not self.config.with_norm:
            return {}
        return self.network.program.norm_parameters_after(layer.name)

    def _train_control(
        self, plan: PlannedControl, split: Split, crossing: Mapping[str, CrossingTensors]
    ) -> Control:
        """Train and judge a control; one whose checkpoint is damaged starts again."""
        what = f"the control {plan.name}"
        try:
            trained = self._epochs(what, split, crossing, control=plan)
        except DamagedCheckpointError:
            console.say(f"the checkpoint of {what} is damaged; it starts again")
            self._state_path(plan.name).unlink()
            trained = self._epochs(what, split, crossing, control=plan)
        self.timings_s[plan.name] = trained.seconds
        said = self._predict(split, crossing["test"], trained)
        return Control(plan=plan, trained=trained, predictions=said)

    def _predict(self, split: Split, test: CrossingTensors, trained: Trained) -> Predictions:
        """Return what a trained network says of the test images, which the first process has."""
        return predict(split, test, trained.parameters)[0] if self.team.leads else _NOTHING

    def _repeat(
        self, plans: Sequence[PlannedControl], crossing: Mapping[str, CrossingTensors]
    ) -> list[Repeat]:
        """Train the repair and its controls on the same layer again, by further seeds."""
        repeats: list[Repeat] = []
        if not self.config.further_seeds:
            return repeats
        with self._timed("repeats"):
            for seed in self.config.further_seeds:
                for plan in (None, *plans):
                    what = f"the control {plan.name}" if plan else "the repair"
                    trained = self._epochs(
                        f"{what}, seed {seed}", self.split, crossing, control=plan, seed=seed
                    )
                    said = self._predict(self.split, crossing["test"], trained)
                    name = plan.name if plan else "repair"
                    repeats.append(Repeat(seed=seed, name=name, predictions=said))
        return repeats

    def _train_elsewhere(self, plan: PlannedControl) -> Control:
        """Train and judge a control on another layer or other images, with a cache of its own."""
        program = self.network.program
        split = program.uncut() if plan.whole else program.split(plan.layer)
        crossing = self._cross_elsewhere(plan, split)
        control = self._train_control(plan, split, crossing)
        crossing.clear()
        shutil.rmtree(self._cache_folder(f"cache-{plan.name}"), ignore_errors=True)
        return control

    def _cross_elsewhere(self, plan: PlannedControl, split: Split) -> dict[str, CrossingTensors]:
        """Return what crosses the cut of a control's layer, by split."""
        recorded: Mapping[str, Any] = self.folder.info.get("control_caches", {})
        folder = self._cache_folder(f"cache-{plan.name}")
        with self._timed(f"cache of {plan.name}"):
            crossing = cross_splits(
                self.network,
                split,
                self.images.folder,
                {name: self.positions[name] for name in _SPLITS},
                choose_room(self.request.cache_gib, self.request.cache_disk_gib, folder),
                earlier=recorded.get(plan.name),
                batch_size=self.config.batch_size,
                beside=self.config.beside if plan.loss != "ce" else {},
                counterfactuals={} if plan.originals else self.counterfactuals,
                on_skip=self.images.skip,
            )
        if self.team.leads:
            kinds = {**recorded, plan.name: cache_kinds(crossing)}
            self.folder.write_info(control_caches=kinds)
        return crossing

    def _judge(self, test: CrossingTensors, repaired: Trained) -> Judged:
        before, found = predict(self.split, test)
        after, _ = predict(self.split, test, repaired.parameters)
        return Judged(before=before, after=after, positions=found)

    def _write_maps(
        self, test: CrossingTensors, judged: Judged, repaired: Trained
    ) -> np.ndarray | None:
        """Write the gallery; return the SSIM of each test image, None where there are no maps."""
        if not self.layer.has_maps:
            return None
        before = true_class_maps(self.split, test)
        after = true_class_maps(self.split, test, repaired.parameters)
        similarity = map_similarity(before, after)
        rows = choose_gallery(judged.before, judged.after)
        shown = [int(judged.positions[row]) for row in rows]
        pixels = load_pixels(self.images.folder, shown, self.network.card.preprocessing).pixels
        entries = [
            {"id": f"{number:04d}", **self._gallery_entry(judged, row), "ssim": similarity[row]}
            for number, row in enumerate(rows)
        ]
        index = {
            "images": entries,
            "layers": [self.layer.name],
            "methods": [GALLERY_METHOD],
            "shown_layer": self.layer.name,
            "shown_method": GALLERY_METHOD,
        }
        method, name = GALLERY_METHOD, self.layer.name
        self.folder.write_maps(method, name, before[rows].numpy(), "before")
        self.folder.write_maps(method, name, after[rows].numpy(), "after")
        self.folder.write_gallery(index, list(pixels.permute(0, 2, 3, 1).numpy()))
        return similarity

    def _compare_maps(self, judged: Judged, repaired: Trained) -> MapComparison | None:
        total = 2 * min(len(judged.positions), SCORED_IMAGES)
        with console.progress("judging maps before and after", total) as bar:
            return compare_maps(
                self.run,
                self.network,
                repaired.parameters,
                self.images.folder,
                judged.positions.tolist(),
                judged.before,
                judged.after,
                layer=self.layer.name,
                seed=self.config.seed,
                batch_size=self.config.batch_size,
                on_batch=bar.advance,
            )

    def _gallery_entry(self, judged: Judged, row: int) -> dict[str, Any]:
        record = self.images.folder.records[int(judged.positions[row])]
        classes = self.network.card.classes
        return {
            "path": record.path,
            "label_name": record.class_name,
            "predicted_name": classes[judged.before.predicted[row]],
            "right": judged.before.right[row],
            "split": record.split,
            "p_true": judged.before.p_true[row],
            "predicted_after_name": classes[judged.after.predicted[row]],
            "right_after": judged.after.right[row],
            "p_true_after": judged.after.p_true[row],
        }

    def _write_network(self, repaired: Trained, hashes: Mapping[str, str]) -> dict[str, Any]:
        """Write the repaired network; return which tensors the file and the network share."""
        network = self.network.with_state(repaired.parameters)
        state = network.program.state
        stored = [name for name in network.program.exported.state_dict if name in state]
        with replacing(self.folder.weights) as temporary:
            save_file({name: state[name].cpu().contiguous() for name in stored}, temporary)
        provenance = {
            **network.card.provenance,
            "repaired_layer": self.layer.name,
            "repaired_from": Path(self.network.source).name,
            "repaired_from_sha256": self.network.sha256,
        }
        card = replace(network.card, provenance=provenance)
        write_card(card, self.folder.card)
        if network.card.arch is None:  # weights alone could not be opened again
            buffer = io.BytesIO()
            torch.export.save(network.program.to_exported(), buffer)
            write_bytes(self.folder.program, buffer.getvalue())
            write_card(card, self.folder.program.with_suffix(".toml"))
        # Judged by what lies on the disk; constants that no state dict holds, by the network.
        now = _hashes({**state, **load_file(self.folder.weights)})
        changed = [name for name, value in hashes.items() if now.get(name) != value]
        learned = {*self.split.parameter_names, *self._norm_after(self.layer)}
        others = [name for name in hashes if name not in learned]
        identical = [name for name in others if name not in changed]
        return {"tensors": len(others), "identical": len(identical), "changed": changed}

    def _write_tables(
        self,
        judged: Judged,
        similarity: np.ndarray | None,
        maps: MapComparison | None,
        repaired: Trained,
        controls: Sequence[Control],
    ) -> None:
        histories = [repaired.history, *(control.trained.history for control in controls)]
        self.folder.write_history([row for history in histories for row in history])
        records = [self.images.folder.records[int(place)] for place in judged.positions]
        columns: dict[str, Any] = {
            "path": [record.path for record in records],
            "label": judged.before.labels,
            "label_name": [record.class_name for record in records],
            "split": [record.split for record in records],
            **self._columns(judged.before, "before"),
            **self._columns(judged.after, "after"),
        }
        plain = plain_control(controls)
        if plain is not None:
            columns |= self._columns(plain.predictions, "control")
        if similarity is not None:
            columns["ssim"] = similarity
        if maps is not None:
            columns |= maps.columns(len(records))
        self.folder.write_images(columns)

    def _columns(self, predictions: Predictions, when: str) -> dict[str, Any]:
        classes = self.network.card.classes
        return {
            f"predicted_{when}": predictions.predicted,
            f"predicted_{when}_name": [classes[label] for label in predictions.predicted],
            f"right_{when}": predictions.right,
            f"p_true_{when}": predictions.p_true,
            f"ce_{when}": predictions.cross_entropies,
        }

    def _write_record(
        self,
        judged: Judged,
        changed: Judged | None,
        similarity: np.ndarray | None,
        maps: MapComparison | None,
        frozen: Mapping[str, Any],
        cache: Mapping[str, Any],
        sizes: Mapping[str, int],
        repaired: Trained,
        controls: Sequence[Control],
        repeats: Sequence[Repeat],
    ) -> None:
        seeds = seeds_record(judged, controls, repeats, self.config)
        plain = plain_control(controls)
        left_out = list(self.folder.info.get("controls_left_out", {}).values())
        seed, classes = self.config.seed, self.network.card.classes
        difference = compare(judged.before, judged.after, seed=seed)
        decision = decide(judged.before, judged.after, difference, classes)
        verdict, reasons = decision.verdict, list(decision.reasons)
        beside = None
        if changed is not None:
            changes = compare(changed.before, changed.after, seed=seed)
            reasons.append(judge_changed(changed.before, changed.after, changes))
            beside = changed_record(changed, changes, classes, seed=seed)
        if repaired.best_epoch == 0:
            reasons.append(
                "No epoch lowered the validation cross entropy, so the weights are the old ones."
            )
        if repaired.stopped:
            reasons.append(f"Training {repaired.stopped}.")
        if frozen["identical"] != frozen["tensors"]:
            verdict = "rejected"
            reasons.insert(0, "Tensors outside the layer changed, which must never happen.")
        self.folder.finish(
            model={
                **self.folder.info["model"],
                "sha256_after": sha256_file(self.folder.weights),
            },
            frozen=frozen,
            cache=cache,
            data=self.images.as_dict(),
            splits=sizes,
            training=training_record(repaired),
            before=judged.before.metrics(classes, seed=seed),
            after=judged.after.metrics(classes, seed=seed),
            difference=difference.as_dict(),
            counterfactual_test=beside,
            controls=[control_record(judged, c, self.network, seed=seed) for c in controls],
            seeds=seeds,
            ssim=_ssim_record(similarity, seed),
            cases=maps.as_dict(seed=seed) if maps else None,
            calibration=calibration_record(
                judged.before, judged.after, plain.predictions if plain else None, seed=seed
            ),
            decision=verdict,
            reasons=reasons,
            penalty=penalty_record(judged, controls, self.config, left_out=left_out, seeds=seeds),
            timings_s=self.timings_s,
            peak_memory_mib=peak_memory_mib(),
        )

    def _state_path(self, name: str) -> Path:
        """Return where a training's checkpoint lies: the repair's by its loss, others by name."""
        return self.folder.path / f"state-{name}.pt"

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        started_s = time.perf_counter()
        yield
        self.timings_s[step] = time.perf_counter() - started_s


def _dealt(positions: Mapping[str, tuple[int, ...]], team: Team) -> dict[str, tuple[int, ...]]:
    """Return this process's part of the images; the test images are the first one's."""
    return {
        split: team.part(found) if split != "test" else found if team.leads else ()
        for split, found in positions.items()
    }


def _ranked_layers(run: Run, but: str) -> list[str]:
    """Return the run's other layers, best first; none where the run has no table of them."""
    try:
        return ranked_layers(run.layers, but=but)
    except RunError:
        return []


def _unfinished(run: Run, request: RepairRequest) -> RepairFolder:
    for repair in run.repairs:
        names = (repair.layer, repair.info.get("alias"))
        if repair.status != "complete" and request.layer in (None, AUTO, *names):
            return repair
    which = f" of {request.layer}" if request.layer not in (None, AUTO) else ""
    raise RunError(f"no unfinished repair{which} in {run.path}; start one without --resume")


def _recorded_settings(
    repair: RepairFolder, config: RepairConfig, request: RepairRequest
) -> tuple[RepairConfig, RepairRequest]:
    """Return the settings that a repair was started with; what the user states must agree."""
    recorded = RepairConfig.from_dict(repair.info["config"])
    if other := recorded.disagreement(config, request.stated):
        raise UsageError(
            f"{repair.name} was started with {other}; "
            "leave it out to resume, or start a new repair without --resume"
        )
    was = repair.info["config"]
    console.say(f"resuming {repair.name}")
    return recorded, replace(
        request,
        layer=repair.layer,
        train=request.train or (Path(was["train"]) if was.get("train") else None),
        masks=request.masks or (Path(was["masks"]) if was.get("masks") else None),
        group=request.group or was.get("group"),
    )


def check_has_maps(layer: Layer, config: RepairConfig) -> None:
    """Raise UsageError where the loss looks at maps and the layer has none."""
    if config.needs_maps and not layer.has_maps:
        raise UsageError(
            f"{layer.name} has no spatial output, so there are no maps to penalize; "
            "repair it with --loss ce"
        )


def _opening_record(
    network: Network,
    layer: Layer,
    config: RepairConfig,
    request: RepairRequest,
    device: str,
    guidance: Guidance | None,
) -> dict[str, Any]:
    sources = {"train": request.train, "masks": request.masks}
    asked = {name: str(path) if path else None for name, path in sources.items()}
    return {
        "command": list(request.command),
        "alias": layer.alias,
        "config": {**config.as_dict(), **asked, "group": request.group},
        "guidance": guidance.as_dict() if guidance else None,
        "versions": versions(),
        "device": device_record(device),
        "model": {
            "source": network.source,
            "arch": network.card.arch,
            "sha256_before": network.sha256,
        },
    }


def _ssim_record(similarity: np.ndarray | None, seed: int) -> dict[str, Any] | None:
    if similarity is None:
        return None
    return {**bootstrap_mean(similarity, seed=seed).as_dict(), "n": len(similarity)}


def _hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: sha256_state({name: value}) for name, value in tensors.items()}
