"""Orbax checkpoints: saving, restoring, and what must match between a checkpoint and a run."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy, save_decision_policy

from jax_model5 import disk, processes
from jax_model5.config import TrainConfig, flatten, flatten_settings
from jax_model5.errors import UserError, require
from jax_model5.startup import machine, note, versions
from jax_model5.step import TrainState
from jax_model5.trees import leaves_of

# Fields that may change when a run goes on. A mesh and remat change only how sums are rounded;
# what data.source holds is compared by its tokens.
FREE_FIELDS = {
    *("workdir", "eval_every", "checkpoint_every", "keep", "tracker", "profile_steps"),
    *("mesh.data", "mesh.fsdp", "model.remat"),
    *("data.cache_dir", "data.source", "data.subset", "data.n_docs", "data.text_field"),
    *("data.separator", "data.split_on_end_of_text", "data.skip_bad_rows"),
}


class Checkpoints:
    """The checkpoints of one run: `state` [step, params, opt_state] and `meta` of each step."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self._keep = folder, keep

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        """Made when it is first written to, for it makes the folder."""
        return ocp.CheckpointManager(
            self.folder.absolute(),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.LatestN(self._keep),
                save_decision_policy=save_decision_policy.FixedIntervalPolicy(1),
                cleanup_tmp_directories=True,
            ),
        )

    def save(self, state: TrainState, config: TrainConfig, fingerprint: str) -> None:
        """Saves in the background; the state may be donated as soon as this returns.

        Raises:
          UserError: this save or the one before it could not be written.
        """
        tree = flax.serialization.to_state_dict(state)
        meta = disk.sealed(
            {
                "config": dataclasses.asdict(config),
                "data": fingerprint,
                "packages": versions(),
                "machine": machine(),
                "checksums": _checksums(tree),
            }
        )
        items = ocp.args.Composite(state=ocp.args.StandardSave(tree), meta=ocp.args.JsonSave(meta))
        with self._write_errors():
            self._manager.save(int(state.step), args=items)

    def wait(self) -> None:
        """Returns when the last save is on disk."""
        with self._write_errors():
            self._manager.wait_until_finished()

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def restore(
        self, abstract_state: TrainState, config: TrainConfig, fingerprint: str
    ) -> TrainState | None:
        """The newest whole checkpoint, on the devices of `abstract_state`; None without any.

        A damaged one is announced and moved aside once an older one has been restored.

        Raises:
          UserError: the checkpoint belongs to another config, text or shape; all are damaged.
        """
        abstract = flax.serialization.to_state_dict(abstract_state)

        def read(saved: ocp.CheckpointManager, step: int) -> tuple[dict, dict[str, Any]]:
            meta = read_meta(saved, step)
            _require_same_run(meta, config, fingerprint)
            return _read_state(saved, step, abstract), meta

        newest, damaged = _newest_whole(self.folder, read)
        if newest is None:
            if damaged:
                fix = f"move {self.folder} away to start from step 0"
                raise _all_damaged("workdir", config.workdir, damaged, fix)
            return None
        tree, meta = newest
        for change in changes_around(meta):
            note(change)
        self._move_aside(damaged, int(tree["step"]))
        return flax.serialization.from_state_dict(abstract_state, tree)

    def _move_aside(self, damaged: list[int], restored: int) -> None:
        for step in damaged:
            aside = self.folder.with_name("damaged_checkpoints") / f"{step}-{time.time_ns()}"
            if jax.process_index() == 0:
                aside.parent.mkdir(exist_ok=True)
                (self.folder / str(step)).rename(aside)
            note(f"it was moved to {aside}; going on from checkpoint {restored}")
        if damaged:
            multihost_utils.sync_global_devices("damaged checkpoints are moved aside")
            self._manager.reload()

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and tensorstore raise many kinds
            if isinstance(error, jax.errors.JaxRuntimeError) and processes.are_several():
                raise  # another process is gone
            reason = str(error).split("\n")[0][:200]
            raise UserError(
                f"workdir={str(self.folder.parent)!r}: the checkpoint cannot be written: {reason}; "
                "make room or name another folder. Older checkpoints are kept"
            ) from None


def read_params(
    workdir: str, abstract: dict, field: str = "workdir", step: int | None = None
) -> dict:
    """Some or all parameters of a run's newest whole checkpoint, on the devices of `abstract`.

    With `step` that step's instead. The run's folder is only read, also while the run goes on.

    Raises:
      UserError: no checkpoint, only damaged ones, or a leaf of another shape; `field` is the
        key that `workdir` was given by.
    """
    folder = Path(workdir).expanduser() / "checkpoints"
    if not folder.is_dir():
        raise UserError(
            f"{field}={workdir!r}: holds no checkpoints/; name the folder of a run, or one that "
            "python -m jax_model5.huggingface import wrote"
        )

    def read(saved: ocp.CheckpointManager, at: int) -> tuple[dict, dict[str, Any]]:
        return _read_state(saved, at, {"params": abstract}), read_meta(saved, at)

    newest, damaged = _newest_whole(folder, read, step)
    if newest is None and damaged:
        raise _all_damaged(field, workdir, damaged, "name another run")
    if newest is None:
        what = (
            "has saved no checkpoint yet" if step is None else f"has no checkpoint of step {step}"
        )
        raise UserError(f"{field}={workdir!r}: {what}; name another run")
    params = newest[0]["params"]
    require_finite(params, field, workdir)
    return params


def require_finite(params: dict, field: str, value: str) -> None:
    """Raises UserError with the names of the leaves that hold NaN or infinity."""
    is_finite = jax.device_get(jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), params))
    wrong = [name for name, good in leaves_of(is_finite).items() if not good]
    require(not wrong, field, value, f"{', '.join(wrong)} hold NaN or infinity; name others")


def open_saved(folder: Path) -> ocp.CheckpointManager:
    """The checkpoints in a folder, only to be read, by each process for itself.

    A context manager. A process that cannot read does not leave the others in Orbax's barrier.
    """
    index = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(index, {index}, f"process_{index}")
    handlers = {
        "state": ocp.PyTreeCheckpointHandler(multiprocessing_options=alone),
        "meta": ocp.JsonCheckpointHandler(multiprocessing_options=alone),
    }
    options = ocp.CheckpointManagerOptions(read_only=True, multiprocessing_options=alone)
    return ocp.CheckpointManager(folder.absolute(), item_handlers=handlers, options=options)


def _newest_whole(
    folder: Path, read: Callable[[ocp.CheckpointManager, int], Any], only: int | None = None
) -> tuple[Any, list[int]]:
    """What `read` makes of the newest step that is not damaged, if any; and the damaged ones."""
    damaged: list[int] = []
    if not folder.is_dir():
        return None, damaged
    with open_saved(folder) as saved:
        for step in sorted(saved.all_steps(), reverse=True):
            if only not in (None, step):
                continue
            tree, meta, reason = {}, {}, ""
            try:
                tree, meta = read(saved, step)
            except UserError:
                raise
            except Exception as error:  # Orbax and tensorstore raise many kinds
                reason = str(error).split("\n")[0][:120] or type(error).__name__
            # What one process cannot read none restores; only then are sums taken over all of them.
            if not processes.any_of(bool(reason)):
                reason = _changed_bits(_checksums(tree), meta)
                if not processes.any_of(bool(reason)):
                    return (tree, meta), damaged
            note(f"checkpoint {step} is damaged ({reason or 'another process cannot read it'})")
            damaged.append(step)
    return None, damaged


def _all_damaged(field: str, workdir: str, damaged: list[int], fix: str) -> UserError:
    return UserError(f"{field}={workdir!r}: none of its checkpoints {damaged} can be read; {fix}")


def read_meta(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """ValueError where a bit of it has changed; before version 0.2 it had no seal."""
    meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
    if "machine" in meta and not disk.is_sealed(meta):
        raise ValueError("the bits of meta changed on disk")
    return meta


def _read_state(manager: ocp.CheckpointManager, step: int, abstract: dict) -> dict:
    """The leaves of `abstract`, which may be a part of the state."""
    # Orbax casts a wrong dtype without a word, so compare before it reads.
    found, wanted = leaves_of(manager.item_metadata(step).state.tree), leaves_of(abstract)
    if "opt_state" not in abstract:
        found = {name: leaf for name, leaf in found.items() if name in wanted}
    if wrong := shape_changes(found, wanted):
        raise UserError(
            f"the checkpoint does not fit the model: {'; '.join(wrong)}; set the model keys as the "
            "config.yaml beside it has them"
        )
    arguments = ocp.checkpoint_utils.construct_restore_args(abstract)
    restore = ocp.args.PyTreeRestore(abstract, arguments, partial_restore=True)
    return manager.restore(step, args=ocp.args.Composite(state=restore)).state


def read_whole(manager: ocp.CheckpointManager, step: int) -> dict[str, np.ndarray]:
    """Every leaf of a step in the host's memory, by its path; ValueError where bits changed."""
    tree = manager.item_metadata(step).state.tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    restore = ocp.args.PyTreeRestore(restore_args=as_numpy)
    state = manager.restore(step, args=ocp.args.Composite(state=restore)).state
    if changed := _changed_bits(_checksums(state), read_meta(manager, step)):
        raise ValueError(changed)
    return leaves_of(state)


def _changed_bits(sums: dict[str, int], meta: dict[str, Any]) -> str:
    """Which leaves are no longer those that were saved; empty where all are."""
    wrong = [leaf for leaf in sums if sums[leaf] != meta["checksums"].get(leaf)]
    return f"the bits of {', '.join(wrong[:3])} changed on disk" if wrong else ""


def config_changes(stored: dict[str, Any], config: TrainConfig) -> list[str]:
    """Fields that would change the numbers, as "model.d_model: 128 -> 256"."""
    # A field that is younger than the checkpoint had its default.
    before = _as_words(flatten(TrainConfig()) | flatten_settings(stored))
    now = _as_words(flatten(config))
    free = set(FREE_FIELDS)
    if config.optimizer.schedule == "constant":
        free.add("steps")  # only a schedule that ends depends on where it ends
    names = sorted((before.keys() | now.keys()) - free)
    return [
        f"{name}: {before.get(name)} -> {now.get(name)}"
        for name in names
        if before.get(name) != now.get(name)
    ]


def _as_words(settings: dict[str, Any]) -> dict[str, Any]:
    """Sequences as text, as older checkpoints hold them."""
    return {
        key: " ".join(value) if isinstance(value, list | tuple) else value
        for key, value in settings.items()
    }


def _require_same_run(meta: dict[str, Any], config: TrainConfig, fingerprint: str) -> None:
    changes = config_changes(meta["config"], config)
    if meta["data"] != fingerprint:
        changes.append("data: the text or its tokens are others")
    if changes:
        raise UserError(
            f"workdir={config.workdir!r}: holds a run with other numbers ({'; '.join(changes)}); "
            "name another workdir, or set these back"
        )


def shape_changes(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """The leaves, by their paths, whose shape or dtype is another, as "wte is ... there"."""

    def kind(leaf: Any) -> str:
        return "missing" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"

    return [
        f"{name} is {kind(found.get(name))} there and {kind(wanted.get(name))} here"
        for name in sorted(found.keys() | wanted.keys())
        if kind(found.get(name)) != kind(wanted.get(name))
    ]


@jax.jit
def _bit_sums(tree: Any) -> Any:
    def bit_sum(leaf: jax.Array) -> jax.Array:
        return jnp.sum(jax.lax.bitcast_convert_type(leaf, jnp.uint32), dtype=jnp.uint32)

    return jax.tree.map(bit_sum, tree)


def _checksums(tree: Any) -> dict[str, int]:
    """Sum of each leaf's bits mod 2**32, on any number of devices: Orbax itself keeps none."""
    return {name: int(bit_sum) for name, bit_sum in leaves_of(_bit_sums(tree)).items()}


def changes_around(meta: dict[str, Any]) -> list[str]:
    """What is another package or machine than when the checkpoint was written, a line each."""
    packages = _changed(meta["packages"], versions())
    around = _changed(meta.get("machine", {}), machine())
    lines = [f"packages changed, the last bits may differ: {', '.join(packages)}"] * bool(packages)
    if around:
        what = f"written on another machine: {', '.join(around)}"
        lines.append(f"{what}; sums are split otherwise there, and the last bits may differ")
    return lines


def _changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    names = [name for name in now if name in before and before[name] != now[name]]
    return [f"{name} {before[name]} -> {now[name]}" for name in names]
