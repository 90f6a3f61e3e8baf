"""The one loop."""

import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxllm.adapters import prepend_virtual_tokens
from jaxllm.checkpoints import open_checkpoint, resolve_model
from jaxllm.config import to_dict
from jaxllm.errors import ConfigError
from jaxllm.models import config_from_hf
from jaxllm.sharding import ShardingRules, fit_to_model, make_mesh
from jaxllm.tokenizers import load_tokenizer
from jaxllm.training import processes
from jaxllm.training.checkpointing import Checkpointer
from jaxllm.training.config import TrainConfig
from jaxllm.training.data import Dataset, make_dataset
from jaxllm.training.metrics import MetricsLog, Progress, peak_flops, training_flops
from jaxllm.training.model import check_reward, export, trained_model, without_reference
from jaxllm.training.objectives import mismatched
from jaxllm.training.optim import evaluation_params
from jaxllm.training.parts import Params
from jaxllm.training.program import make_program
from jaxllm.training.step import init_state, place_batch
from jaxllm.training.watch import check_installed, open_watchers

_KEYS = {"lm": "messages, prompt and completion, or text", "preference": "chosen and rejected", "kto": "prompt, completion and label"}


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. `path`: what was exported, if anything; `stopped`: why before its last step, if it was."""

    steps: int
    loss: float | None
    eval_loss: float | None
    skipped_steps: int
    path: Path | None
    stopped: str | None


class Trainer:
    """Fine-tunes as a TrainConfig says: `Trainer(config).train()`.

    Making one loads the model and opens the data, and raises ConfigError, CheckpointError or DataError for what is wrong with them
    before anything is written. All that a run needs to go on is in its checkpoints: killed at any moment and started again, it takes
    the same steps on the same examples, bit for bit.
    """

    def __init__(self, config: TrainConfig):
        self.config = c = config
        self.path = resolve_model(c.model)
        self.mesh = make_mesh(data=c.mesh.data, fsdp=c.mesh.fsdp, tensor=c.mesh.tensor)
        processes.check_mesh(self.mesh)
        self.source = source = open_checkpoint(self.path)
        self.model_config = config_from_hf(source.config)
        check_installed(c)
        check_reward(c, self.model_config.family)
        if c.max_length > self.model_config.max_positions:
            raise ConfigError(f"max_length={c.max_length} exceeds the {self.model_config.max_positions} positions of {c.model}")
        self.tokenizer = load_tokenizer(self.path)
        self.total_steps = count_steps(c, self.dataset())
        self.rules = fit_to_model(ShardingRules(), self.model_config, self.mesh)
        decoder = trained_model(c, source, self.tokenizer, self.mesh, self.rules)
        self.program, trainable, frozen = make_program(c, decoder, self.mesh, self.rules, self.total_steps)
        del decoder
        place = lambda params: jax.device_put(params, self.program.parts.shardings(params, self.mesh, self.rules))
        trainable, self.frozen = place(trainable), place(frozen)
        self.state = init_state(trainable, self.program.optimizer, self.program.settings, c.seed)
        self._step = self.program.train_step(self.state)
        self._evaluation_step = self.program.evaluation_step()

    def train(self) -> TrainResult:
        """Runs to the last step, or until SIGTERM, on which it saves and returns. Raises CheckpointError if it cannot write."""
        c, out = self.config, Path(self.config.output_dir)
        best = ("eval_loss", "min") if c.keep_best and c.eval_data else None
        with Checkpointer(out / "checkpoints", keep_last=c.keep_last, keep_best=best) as checkpointer, processes.termination() as asked:
            return _Run(self, checkpointer, out).to_the_end(asked)

    def export(self, out: Path) -> Path:
        """Writes what has been trained: the adapter in PEFT's format, or the model as a Hugging Face folder."""
        best = {name: processes.whole(x) for name, x in self._best_params().items()}
        model = without_reference(self.program.parts.merge(best, self.frozen))
        processes.first_alone(lambda: export(self.config, model, self.source, self.tokenizer, self.path, out))
        return out

    def model(self) -> nnx.Module:
        """The decoder as it is best now: the moving average, if one is kept."""
        return without_reference(self.program.parts.merge(self._best_params(), self.frozen))

    def _best_params(self) -> Params:
        state = self.state
        return state.ema if state.ema is not None else evaluation_params(self.config.optimizer, state.opt_state, state.params)

    def evaluate(self) -> dict[str, float]:
        """`eval_loss` and the objective's metrics over all of eval_data, each an average over its weights."""
        c = self.config
        once = replace(c.eval_data, epochs=1, shuffle=False)
        rows = c.batch_size // c.gradient_accumulation_steps
        data = make_dataset(once, self.tokenizer, batch_size=rows, max_length=c.text_length)
        sums: dict[str, np.ndarray] = {}
        params = self._best_params()
        for batch in _fitting(c, data):
            batch = place_batch(self.prepared(batch), self.mesh, self.rules, lead=0)
            for name, pair in self._evaluation_step(params, self.frozen, batch).items():
                sums[name] = sums.get(name, 0) + np.array([float(x) for x in pair])
        if not sums:
            raise ConfigError("eval_data has no example")
        return {f"eval_{name}": float(total / max(weight, 1e-9)) for name, (total, weight) in sums.items()}

    def dataset(self) -> Dataset:
        """See `training_data`."""
        return training_data(self.config, self.tokenizer)

    def prepared(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What the objective reads, from what the data gives."""
        if self.config.virtual_tokens:
            batch = prepend_virtual_tokens(batch, self.model_config, self.config.virtual_tokens)
        if self.config.objective.name == "kto":
            a = self.config.gradient_accumulation_steps  # answers are exchanged within a micro-batch
            parts = [mismatched(jax.tree.map(lambda x, i=i: np.split(x, a)[i], batch)) for i in range(a)]
            batch = jax.tree.map(lambda *x: np.concatenate(x), *parts)
        return batch


def training_data(config: TrainConfig, tokenizer: Any) -> Dataset:
    """The training data from its beginning, in batches of a whole step. Raises ConfigError for records that the objective cannot read."""
    c = config
    data = c.data if c.data.epochs or c.max_steps is not None else replace(c.data, epochs=1)
    return _fitting(c, make_dataset(data, tokenizer, batch_size=c.batch_size, max_length=c.text_length, seed=c.seed))


def count_steps(config: TrainConfig, data: Dataset) -> int:
    """The steps of a run; all of `data` is drawn where they are not given. Raises ConfigError if there are none."""
    steps = config.max_steps if config.max_steps is not None else sum(1 for _ in data)  # only packing tells how many there are
    if not steps:
        raise ConfigError("the data has no example: see `data`")
    return steps


def _fitting(config: TrainConfig, data: Dataset) -> Dataset:
    wanted = {"tokens": "lm", "pairs": "preference", "labels": "kto"}[config.objective.data]
    if data.family != wanted:
        name = config.objective.name
        raise ConfigError(f"objective {name} reads records with {_KEYS[wanted]}; the data's have {_KEYS[data.family]}")
    if data.family == "preference" and config.virtual_tokens:
        raise ConfigError("prompt and prefix tuning on pairs are not implemented: use lora")
    return data


class _Run:
    """The loop's own state."""

    def __init__(self, trainer: Trainer, checkpointer: Checkpointer, out: Path):
        self.t, self.checkpointer, self.out = trainer, checkpointer, out
        self.data = trainer.dataset()
        self.step, self.best, self.waited, self.eval_loss = 0, math.inf, 0, None
        self.evaluated = self.saved = None  # at which step it last was
        if checkpointer.steps():
            restored = checkpointer.restore("latest", onto=trainer.state)
            trainer.state, self.step, self.saved = restored.state, restored.step, restored.step
            self.data.set_state(restored.iterator_state)
            self.best, self.waited = restored.metrics.get("best", math.inf), int(restored.metrics["waited"])
            self.eval_loss = restored.metrics.get("last_eval_loss")
            print(f"going on from step {self.step} of {checkpointer.folder}", file=sys.stderr)
        self.began = self.step
        self.logs: list[Any] = []  # the first process tells, the others are silent
        if processes.is_first():
            write_config(trainer.config, out / "config.yaml")
            self.logs = [MetricsLog(out / "metrics.jsonl", self.step if self.saved is not None else -1)]
            self.logs += open_watchers(trainer.config, out, self.step)
        self.peak = trainer.config.peak_flops or peak_flops(list(trainer.mesh.devices.flat))

    def to_the_end(self, asked_to_stop: Callable[[int], bool]) -> TrainResult:
        t, c = self.t, self.t.config
        stopped, window, loss = self._out_of_patience(), _Window(), None
        if c.eval_on_start and self.step == 0:
            self._evaluate()
        progress = Progress(t.total_steps, self.step, silent=not processes.is_first())
        while self.step < t.total_steps and stopped is None:
            batch = next(self.data, None)
            if batch is None:
                stopped = f"the data ended before max_steps={c.max_steps}: raise data.epochs"
                break
            window.add(batch)
            tracing = jax.profiler.trace(str(self.out / "profile")) if self.step + 1 in c.profile_steps else nullcontext()
            with tracing:
                t.state, metrics = t._step(t.state, t.frozen, self._place(batch))
                window.metrics.append(metrics)
                if self.step + 1 in c.profile_steps:
                    jax.block_until_ready(t.state)
            self.step += 1
            last = self.step == t.total_steps
            if last or self.step % c.logging_steps == 0:
                values = window.values(t, self.step, self.data.counts["tokens"], self.peak)
                loss, window = values["loss"], _Window()
                self._tell(values)
                progress.show(self.step, values)
            if c.eval_data is not None and (last or (c.eval_steps is not None and self.step % c.eval_steps == 0)):
                self._evaluate()
                stopped = self._out_of_patience()
                window.restart()
            if asked_to_stop(self.step):
                stopped = "SIGTERM"
            if last or stopped is not None or self.step % c.save_steps == 0:
                self._save()
        self.checkpointer.wait()
        progress.close()
        for log in self.logs:
            log.close()
        path = self._export() if c.export and stopped != "SIGTERM" else None
        return TrainResult(self.step, loss, self.eval_loss, int(t.state.skipped), path, stopped)

    def _export(self) -> Path:
        """Writes the result, unless there was nothing left to do and it is there already."""
        path, note = self.out / ("adapter" if self.t.config.adapter is not None else "model"), self.out / "exported.json"
        made = json.dumps({"step": self.step, "export_dtype": self.t.config.export_dtype})
        there = self.step == self.began and path.exists() and note.exists() and note.read_text(encoding="utf-8") == made
        if processes.first_says(there):
            return path
        if processes.is_first():
            note.unlink(missing_ok=True)  # the folder appears whole or not at all, and after it the note
        self.t.export(path)
        if processes.is_first():
            note.write_text(made, encoding="utf-8")
        return path

    def _tell(self, values: dict[str, Any]) -> None:
        for log in self.logs:
            log.write(values)

    def _place(self, batch: dict[str, np.ndarray]) -> Any:
        t, a = self.t, self.t.config.gradient_accumulation_steps
        cut = jax.tree.map(lambda x: x.reshape(a, x.shape[0] // a, *x.shape[1:]), t.prepared(batch))
        return place_batch(cut, t.mesh, t.rules)

    def _evaluate(self) -> None:
        values = self.t.evaluate()
        self.eval_loss, self.evaluated = values["eval_loss"], self.step
        self._tell({"step": self.step, **values})
        self.waited = 0 if self.eval_loss < self.best else self.waited + 1
        self.best = min(self.best, self.eval_loss)

    def _out_of_patience(self) -> str | None:
        """Why to stop early, if so: of a run that goes on, too."""
        patience = self.t.config.early_stopping_patience
        stop = patience is not None and self.waited >= patience
        return f"eval_loss has not fallen for {self.waited} evaluations (early_stopping_patience)" if stop else None

    def _save(self) -> None:
        if self.saved == self.step:
            return
        metrics = {"waited": self.waited}
        if self.eval_loss is not None:
            metrics |= {"last_eval_loss": self.eval_loss, "best": self.best}
            if self.evaluated == self.step:
                metrics["eval_loss"] = self.eval_loss
        data, config = self.data.get_state(), to_dict(self.t.config)
        self.checkpointer.save(self.step, self.t.state, iterator_state=data, metrics=metrics, config=config)
        self.saved = self.step


class _Window:
    """What is summed between two lines of metrics."""

    def __init__(self) -> None:
        self.metrics: list[Any] = []
        self.tokens, self.squared = 0, 0.0
        self.restart()

    def restart(self) -> None:
        """Time that goes to something else is not counted."""
        self.start, self.counted = time.monotonic(), 0

    def add(self, batch: dict[str, Any]) -> None:
        for part in [batch] if "tokens" in batch else batch.values():
            used = part["segment_ids"] > 0
            self.tokens, self.counted = self.tokens + int(used.sum()), self.counted + int(used.sum())
            # The sum over segments of length squared is twice that of positions + 1, as near as MFU needs it.
            self.squared += float((2 * (part["positions"] + 1) * used).sum())

    def values(self, trainer: Trainer, step: int, tokens: int, peak: float | None) -> dict[str, Any]:
        metrics = jax.device_get(self.metrics)  # waits for the steps
        seconds = time.monotonic() - self.start
        done = [m for m in metrics if m["finite"]]
        weight = sum(float(m["weight"]) for m in done)
        mean = lambda name: sum(float(m[name]) * float(m["weight"]) for m in done) / weight if weight else math.nan
        rate = self.counted / seconds
        flops = training_flops(trainer.model_config, self.squared, self.tokens, frozen=trainer.config.adapter is not None)
        mfu = None if peak is None or not self.tokens else flops * self.counted / self.tokens / seconds / peak
        out = {"step": step, "loss": mean("loss"), "learning_rate": float(metrics[-1]["learning_rate"])}
        out |= {"grad_norm": float(metrics[-1]["grad_norm"]), "tokens": tokens, "tokens_per_s": rate, "mfu": mfu}
        told = ("loss", "learning_rate", "grad_norm", "weight", "finite")
        return out | {name: mean(name) for name in metrics[-1] if name not in told} | {"skipped_steps": int(trainer.state.skipped)}


def write_config(config: TrainConfig, file: Path) -> None:
    """The settings as they were resolved, beside the run."""
    import yaml

    file.write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")
