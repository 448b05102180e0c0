"""The training run: engine, data, steps, validation, checkpoints, export.

from model.presets import preset_config
from training import Pretrainer, TrainingArguments

Pretrainer(
    model=preset_config("tiny"),
    args=TrainingArguments(output_dir="outputs", num_train_epochs=1),
    train_dataset=[{"question": "2 + 2?", "answer": "4"}],
).train()
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from data.loader import Data, TrainLoader, prepare_rows
from data.tokenizer_asset import load_tokenizer
from inference.evaluation import evaluate_loss
from inference.generation import draw_answers
from model import PragnosiaConfig, PragnosiaForCausalLM
from model.components import CacheConfig
from model.router import nudge_biases
from model.step_routing import pool_uses, restore_pool_uses
from training import checkpoint as disk
from training.cache_stage import evaluate_latents, with_traces
from training.components import has_labelled_steps, own_answers
from training.config import DataArguments, TrainingArguments, UserError, parse_size
from training.engine import (
    DTYPES,
    build_engine,
    build_model,
    build_placement,
    device_with_room,
    limit_gpu_memory,
    set_learning_rates,
    start_ranks,
)
from training.export import export_model, probe_logits, verify_export
from training.metrics import (
    MetricsLog,
    component_metrics,
    draw_loss_curve,
    duration,
    memory_metrics,
    perplexity,
    router_load_metrics,
    validation_line,
    validation_metrics,
)
from training.plan import STREAM_NEEDS_STEPS, Plan, check_host_memory, plan_run, resolve_device
from training.randomness import random_state, set_random_state, set_seeds
from training.schedule import learning_rate_factor
from training.segments import in_segments
from training.step import StepResult, reduce_results, train_step
from training.universal import UNIVERSAL_CLIENT_STATE, load_state, to_universal
from training.weights import Source, directory_weights, fill_counts, initial_weights, model_weights

STATE_TAG = "state"
OWN_ANSWERS = "own_answers.npz"
BIASES_REST = 0.03  # the share of the steps, at the end, in which biases of routers stay (DeepSeek-V3)


class Interrupted(Exception):
    """The run was asked to stop and has saved itself; `signal_number` says how it was asked."""

    def __init__(self, signal_number: int, checkpoint: Path):
        super().__init__(f"stopped by {signal.Signals(signal_number).name}; saved {checkpoint}")
        self.signal_number = signal_number


class Pretrainer:
    """Trains a model on a dataset through DeepSpeed; every rank makes one and calls `train`.

    Args:
        model: a configuration, or a model in memory whose weights are the starting point.
        args: how to train.
        train_dataset: `data.loader.Data`, or rows: {"messages"}, {"prompt", "answer"}, {"question", "answer"} or
            {"text"}.
        memory_module, cache_module, tree_module: configurations of the components that `args` use, or modules
            that have one as `config` (their weights start anew); default the usual ones.
        tokenizer: default the one in data/tokenizer.
        data_args: row length and the like, for rows.
        init_from: weights to start from instead of random ones.
        name: model size in the run's directory name.
        settings: recorded in run.json.

    Raises:
        UserError: settings or data that cannot work.
    """

    def __init__(
        self,
        model: PragnosiaConfig | PragnosiaForCausalLM,
        args: TrainingArguments,
        train_dataset: Data | Iterable,
        *,
        memory_module=None,
        cache_module=None,
        tree_module=None,
        tokenizer=None,
        data_args: DataArguments | None = None,
        init_from: Source | None = None,
        name: str = "custom",
        settings: dict | None = None,
    ):
        self.args = args
        self.device_type = resolve_device(args.device)
        self.ranks = start_ranks(self.device_type)
        if args.gpu_memory:
            limit_gpu_memory(parse_size("--gpu-memory", args.gpu_memory), self.ranks.device)
        self.is_main = self.ranks.rank == 0
        self.tokenizer = tokenizer or load_tokenizer()
        self.data_args = data_args or DataArguments()
        if isinstance(model, PragnosiaForCausalLM):
            fresh = initial_weights(args.seed, model.config.initializer_range)
            init_from, model = model_weights(model, fresh), model.config
        self.name, self.settings = name, settings or {}
        self.resume_from = disk.resolve_checkpoint(args.resume) if args.resume else None
        self.plan: Plan = plan_run(
            model,
            args,
            self.data_args,
            is_trained=bool(init_from or args.resume),
            resume_from=self.resume_from,
            size=name,
            device=self.device_type,
            world_size=self.ranks.world_size,
            memory=memory_module,
            cache=cache_module,
            tree=tree_module,
        )
        check_host_memory(self.plan, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        self.config = self.plan.config
        disk.check_vocabulary(self.tokenizer, self.config, "this run")
        self.config.pad_token_id = self.tokenizer.pad_token_id
        self.config.eos_token_id = self.tokenizer.eos_token_id
        self.source = init_from or initial_weights(args.seed, self.config.initializer_range)
        if not isinstance(train_dataset, Data):
            steps = has_labelled_steps(self.config, args)
            train_dataset = prepare_rows(train_dataset, self.data_args, self.tokenizer, args.seed, steps)
        self.data = train_dataset
        self.own_answers = own_answers(
            self.config, args, self.data, self.tokenizer, self.data_args.max_length
        )
        run_name = f"pragnosia_{name}_{self.config.num_experts}experts_{time.strftime('%Y%m%d-%H%M%S')}"
        self.run_dir, self.resume_from, self.lock = disk.claim_run(
            Path(args.output_dir).expanduser().absolute() / run_name, self.resume_from, self.is_main
        )
        self.step = self.epoch = self.step_in_epoch = self.bad_steps = self.bad_validations = self.tokens = 0
        self.best_loss, self.last_saved = float("inf"), -1
        self.signal_number, self.asked_at = 0, float("inf")

    # -- the run ---------------------------------------------------------------------------------------------

    def train(self) -> Path:
        """Run to the end and return the run's directory.

        Raises:
            Interrupted: after SIGINT or SIGTERM, with interrupted_checkpoint/ written.
            UserError: the loss is not finite for too long, or the export cannot be verified.
        """
        set_seeds(self.args.seed, self.args.deterministic)
        self.loader = TrainLoader(
            self.data.train,
            micro_batch_size=self.args.per_device_train_batch_size,
            accumulation=self.args.gradient_accumulation_steps,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            seed=self.args.seed,
            num_workers=self.data_args.num_workers,
        )
        self._build()
        self.total_steps = self._total_steps()
        if self.resume_from is not None and self.is_main:
            disk.set_aside(self.run_dir, self.step)
        self.log = MetricsLog(
            self.run_dir, self.args.reporters, self.settings, active=self.is_main, resume_step=self.step
        )
        if self.is_main:
            disk.write_json(self.run_dir / "run.json", self._record())
        handlers = {
            number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            self._train_epochs()
            self._finish()
        except Interrupted:
            raise
        except (Exception, KeyboardInterrupt) as error:
            if full := disk.is_full(error):
                what = f"No space left on the disk of {self.run_dir}"
            else:
                what = str(error)
                self._emergency(error)
            if full or isinstance(error, OSError):
                raise UserError(
                    f"{what}, stopped at step {self.step}; complete checkpoints are untouched: "
                    f"{'free some space' if full else 'mend it'} and --resume {self.run_dir}"
                ) from error
            raise
        finally:
            self.log.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return self.run_dir

    def _train_epochs(self) -> None:
        self.log.start_bar(self.step, self.total_steps)
        window: list[StepResult] = []
        window_start, waited = time.perf_counter(), 0.0
        while not self._done():
            batches = iter(self.loader.epoch(self.epoch, self.step_in_epoch))
            while not self._done():
                asked = time.perf_counter()
                microbatches = next(batches, None)
                waited += time.perf_counter() - asked
                if microbatches is None:
                    self.epoch, self.step_in_epoch = self.epoch + 1, 0
                    break
                window.append(self._step(microbatches))
                if self.step % self.args.logging_steps == 0 or self._done():
                    self._log(window, time.perf_counter() - window_start, waited)
                    window = []
                    window_start, waited = time.perf_counter(), 0.0
                paused = time.perf_counter()
                if self.step % self.args.eval_steps == 0 and self._validate():
                    self.total_steps = self.step
                if self._is_save_due():
                    self.save(f"checkpoint-{self.step}")
                self._stop_if_asked()
                window_start += time.perf_counter() - paused  # speeds are of steps alone

    def _is_save_due(self) -> bool:
        """At every --save-steps, at the end of an epoch and of the run; never after steps that were refused."""
        args, per_epoch = self.args, self.loader.steps_per_epoch
        if args.save_strategy == "no" or self.bad_steps or self.last_saved == self.step:
            return False
        at_interval = args.save_strategy == "steps" and self.step % args.save_steps == 0
        return at_interval or self.step_in_epoch == per_epoch or self._done()

    def _step(self, microbatches: list[dict]) -> StepResult:
        factor = learning_rate_factor(
            self.args.lr_scheduler_type, self.step, self.total_steps or self.step + 1, self.args.warmup_steps
        )
        set_learning_rates(self.engine, self.args, factor)
        self.learning_rates = (self.args.learning_rate * factor, self.args.local_learning_rate * factor)
        if self.args.stage == "cache":
            cache, key = CacheConfig(**self.config.cache), f"{self.args.seed}/{self.step}"
            microbatches = [with_traces(batch, cache, key) for batch in microbatches]
        if self.own_answers is not None:
            self.own_answers.refresh(partial(draw_answers, self.engine, self.tokenizer), self.step)
            self.own_answers.mix(microbatches, self.loader, self.step)
        result = train_step(self.engine, in_segments(microbatches, self.args.segments))
        is_moving = self.step < (1 - BIASES_REST) * (self.total_steps or self.step + 1)
        if self.args.load_balance == "bias" and self.args.stage == "base" and result.applied and is_moving:
            load_LE = result.load_LE.clone()
            dist.all_reduce(load_LE)
            nudge_biases(self.engine.module, load_LE)
        self.step += 1
        self.step_in_epoch += 1
        self.tokens += result.num_tokens
        self.log.advance()
        # With fp16, an update refused for a finite loss is the loss scale finding its range.
        is_bad = not (result.applied or (result.finite and self.plan.precision == "fp16"))
        if is_bad:
            self.log.say(f"step {self.step}: loss or gradient is not finite, weights not updated")
        if result.refused:
            self.log.say(f"step {self.step}: {result.refused} experts not updated, gradient not finite")
        self.bad_steps = self.bad_steps + 1 if is_bad or result.refused else 0
        if self.bad_steps >= self.args.max_nan_steps:
            good = [path.name for path in disk.checkpoints(self.run_dir)]  # none is written after bad steps
            raise UserError(
                f"loss or gradients not finite for {self.bad_steps} steps in a row (--max-nan-steps), "
                f"stopped at step {self.step}: lower --learning-rate or --local-learning-rate and --resume "
                f"{self.run_dir / good[-1] if good else 'an earlier run (no checkpoint was written yet)'}"
            )
        return result

    def _done(self) -> bool:
        return self.total_steps is not None and self.step >= self.total_steps

    def _total_steps(self) -> int | None:
        per_epoch = self.loader.steps_per_epoch
        if self.args.max_steps is not None:
            return self.args.max_steps
        if per_epoch is None:
            raise UserError(STREAM_NEEDS_STEPS)
        # From here on: a resumed run may take another number of rows a step than the one it goes on from.
        return self.step + per_epoch * (self.args.num_train_epochs - self.epoch) - self.step_in_epoch

    # -- what a person sees ----------------------------------------------------------------------------------

    def _log(self, window: list[StepResult], seconds: float, waited: float) -> None:
        sums, load_LE = reduce_results(window)
        targets, tokens = max(1.0, sums["targets"]), max(1.0, sums["tokens"])
        rows = len(window) * self.loader.rows_per_step
        loss = sums["loss_sum"] / targets
        metrics = {
            "loss": loss,
            "perplexity": perplexity(loss),
            "learning_rate": self.learning_rates[0],
            "local_learning_rate": self.learning_rates[1],
            "tokens_per_second": sums["tokens"] / seconds,
            "samples_per_second": rows / seconds,
            "step_seconds": seconds / len(window),
            "data_wait_seconds": waited / len(window),
            "epoch": self.epoch + self.step_in_epoch / (self.loader.steps_per_epoch or 1),
            "tokens": self.tokens,
            "steps_refused": sum(not result.applied for result in window),
            "experts_refused": sum(result.refused for result in window),
            "router/balance_loss": sums["balance"] / tokens,
            "router/z_loss": sums["z"] / tokens,
            "router/entropy": sums["entropy"] / tokens,
            **({} if load_LE is None else router_load_metrics(load_LE)),
            **component_metrics(sums),
            **memory_metrics(self.ranks.device),
        }
        if window[-1].grad_norm is not None:
            metrics["grad_norm"] = window[-1].grad_norm
        eta = ""
        if self.total_steps is not None:
            metrics["eta_seconds"] = (self.total_steps - self.step) * seconds / len(window)
            eta = f"  eta {duration(metrics['eta_seconds'])}"
        self.log.write(self.step, metrics)
        memory = metrics.get("memory/gpu_peak_gb", metrics["memory/host_gb"])
        rates = "/".join(f"{rate:.1e}" for rate in self.learning_rates)
        self.log.say(
            f"step {self.step}/{self.total_steps or '?'}  loss {loss:.4f}  ppl {metrics['perplexity']:.4g}  "
            f"lr {rates}  grad {metrics.get('grad_norm', 0):.2f}  {metrics['tokens_per_second']:,.0f} tok/s  "
            f"{memory:.2f} GB  cv {metrics.get('router/load_cv', 0):.2f}{eta}"
        )

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Validation loss of each family and overall; in stage cache that of the tokens after latents."""
        share = {
            "batch_size": self.args.per_device_train_batch_size,
            "rank": self.ranks.rank,
            "world_size": self.ranks.world_size,
            "device": self.ranks.device,
        }
        if self.args.stage == "cache":
            cache = CacheConfig(**self.config.cache)
            return evaluate_latents(self.engine, self.data.validation, cache, **share)
        return evaluate_loss(self.engine, self.data.validation, **share)

    def _validate(self) -> bool:
        """Validate and log; True when patience has run out."""
        if not any(len(dataset) for dataset in self.data.validation.values()):
            return False
        results = self.evaluate()
        self.log.write(self.step, validation_metrics(results))
        self.log.say(f"step {self.step}  validation loss: {validation_line(results)}")
        self.validated = (self.step, results)
        loss = results["overall"]["loss"]
        self.bad_validations = 0 if loss < self.best_loss else self.bad_validations + 1
        self.best_loss = min(self.best_loss, loss)
        patience = self.args.early_stopping_patience
        if patience is None or self.bad_validations < patience:
            return False
        self.log.say(f"no better validation loss {patience} times in a row: stopping early")
        return True

    def _finish(self) -> None:
        """Validate, draw the curve, export, verify."""
        self._stop_if_asked()
        if getattr(self, "validated", (None,))[0] != self.step:
            self._validate()
        if self.is_main:
            draw_loss_curve(self.run_dir)
        final, temporary = self.run_dir / "final_model", self.run_dir / ".tmp-final_model"
        self._export(temporary, self.args.export_format)
        expected = probe_logits(self.engine.module, self.ranks.device)
        if self.is_main:
            try:
                dtype = DTYPES[self.plan.precision]
                where = device_with_room(self.ranks.device, self.config.num_params() * dtype.itemsize)
                verify_export(temporary, expected, dtype, where, self.ranks.device)
            except Exception:
                disk.publish(temporary, self.run_dir / "unverified_model")
                raise
            disk.publish(temporary, final)
        dist.barrier()

    # -- state -----------------------------------------------------------------------------------------------

    def _build(self) -> None:
        args, resume = self.args, self.resume_from
        ds_config, universal = self.plan.ds_config, None
        if resume is not None:
            state = disk.read_state(resume)
            universal = self._universal(resume, state)
            if universal:
                ds_config = {
                    **ds_config,
                    "checkpoint": {**ds_config.get("checkpoint", {}), "load_universal": True},
                }
        model = build_model(
            self.config,
            self.source,
            ds_config,
            placement=build_placement(self.plan, args, self.ranks),
            device=self.ranks.device,
            dtype=DTYPES[self.plan.precision],
        )
        model.uses_balance_loss = args.load_balance == "aux"
        self.engine = build_engine(model, args, ds_config)
        if resume is None:
            return
        where, tag = (universal.parent, universal.name) if universal else (resume, STATE_TAG)
        load_state(self.engine, where, tag)
        self.engine.module.placement.load(resume / STATE_TAG)
        self._restore(resume, state)
        dist.barrier()
        if universal and self.is_main:
            shutil.rmtree(universal)

    def _data_identity(self) -> list:
        """What the place in the data refers to: the rows and their order."""
        rows = [[line["dataset"], line["rows"], line["tokens"], line["weight"]] for line in self.data.report]
        return [rows, self.args.seed, self.data_args.max_length]

    def _universal(self, resume: Path, state: dict) -> Path | None:
        """DeepSpeed's layout-free form of a checkpoint, made where the number of ranks, or of those that share the
        experts, has changed."""
        was_shared_by, is_shared_by = state.get("expert_parallel", 1), self.plan.expert_parallel
        if (state["world_size"], was_shared_by) == (self.ranks.world_size, is_shared_by):
            return None
        if self.plan.ds_config["zero_optimization"]["stage"] == 0:
            return None  # every rank holds everything of its part: any number of ranks can read it
        target = self.run_dir / ".tmp-universal"
        if self.is_main:
            to_universal(resume / STATE_TAG, target, self.config, shares_experts=is_shared_by > 1)
        dist.barrier()
        return target

    def save(self, name: str) -> Path:
        """Write checkpoint `name` of the run; collective."""
        final, temporary = self.run_dir / name, self.run_dir / f".tmp-{name}"
        if self.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        dist.barrier()
        try:
            self._write(temporary)
            dist.barrier()
            if self.is_main:
                disk.commit(temporary, final, self._trainer_state())
                disk.prune(self.run_dir, self.args.keep_checkpoints)
        except Exception:
            shutil.rmtree(temporary, ignore_errors=True)  # half a checkpoint only takes up space
            raise
        dist.barrier()
        self.last_saved = self.step
        self.log.say(f"step {self.step}  saved {final}")
        return final

    def _write(self, temporary: Path) -> None:
        # Where ranks share experts, DeepSpeed writes these facts itself.
        facts = UNIVERSAL_CLIENT_STATE if self.plan.expert_parallel == 1 else {}
        self.engine.save_checkpoint(str(temporary), tag=STATE_TAG, save_latest=False, client_state=facts)
        self.engine.module.placement.save(temporary / STATE_TAG)
        self._export(temporary / "model", "pragnosia")
        torch.save(random_state(), temporary / f"rank-{self.ranks.rank}.pt")
        if self.own_answers is not None and self.is_main:
            self.own_answers.save(temporary / OWN_ANSWERS)

    def _export(self, directory: Path, export_format: str) -> None:
        if self.is_main:
            shutil.rmtree(directory, ignore_errors=True)
        self.engine.empty_partition_cache()  # ZeRO-3 may have fetched ahead of a forward that does not come
        export_model(
            self.engine.module, self.tokenizer, directory, export_format=export_format, write=self.is_main
        )

    def _trainer_state(self) -> dict:
        return {
            "step": self.step,
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "rows_a_step": self.loader.rows_per_step,
            "tokens": self.tokens,
            "best_loss": self.best_loss,
            "bad_validations": self.bad_validations,
            "world_size": self.ranks.world_size,
            "expert_parallel": self.plan.expert_parallel,
            **self.plan.layout(self.args),
            "data": self._data_identity(),
            "pool_uses": pool_uses(self.engine.module),
        }

    def _restore(self, resume: Path, state: dict) -> None:
        self.step, self.epoch, self.tokens = state["step"], state["epoch"], state["tokens"]
        self.best_loss, self.bad_validations = state["best_loss"], state["bad_validations"]
        # The order of rows does not depend on how they are grouped, so another batch size goes on at the same row.
        rows = state["step_in_epoch"] * state["rows_a_step"]
        self.step_in_epoch = -(-rows // self.loader.rows_per_step)
        if state["data"] != self._data_identity():
            self.step_in_epoch = 0
            if self.is_main:
                print("the data, --seed or --max-length has changed: the epoch starts anew", flush=True)
        self.last_saved = self.step if resume.parent == self.run_dir else -1
        # DeepSpeed loses buffers where the number of ranks changes.
        fill_counts(self.engine.module, directory_weights(resume / "model"))
        restore_pool_uses(self.engine.module, state.get("pool_uses", []))
        if self.own_answers is not None and (resume / OWN_ANSWERS).exists():
            self.own_answers.load(resume / OWN_ANSWERS)
        own = resume / f"rank-{self.ranks.rank}.pt"
        if own.exists() and state["world_size"] == self.ranks.world_size:
            set_random_state(torch.load(own, weights_only=False))

    def _emergency(self, error: BaseException) -> None:
        """Save what there is, if it is whole.

        A rank that failed alone cannot save: the others are elsewhere in the step. Neither can one that failed, or
        was told for the second time to leave, while weights were being updated or written.
        """
        if isinstance(error, UserError | KeyboardInterrupt) or self.ranks.world_size > 1:
            return
        if self.step == self.last_saved:
            return
        if self.engine._running_engine_step or self.engine.module.placement.updating:
            self.log.say(f"{type(error).__name__} while weights were being updated: no emergency checkpoint")
            return
        try:
            self.log.say(f"{type(error).__name__}: saving an emergency checkpoint")
            self.save("emergency_checkpoint")
        except Exception as failure:
            print(f"the emergency checkpoint could not be written: {failure}", file=sys.stderr)

    def _on_signal(self, number: int, _frame) -> None:
        now = time.monotonic()
        if now > self.asked_at + 1:  # sooner it is the same request, which a launcher passed on
            raise KeyboardInterrupt  # asked twice: leave now
        self.signal_number, self.asked_at = self.signal_number or number, min(self.asked_at, now)

    def _stop_if_asked(self) -> None:
        number = self.signal_number
        if self.ranks.world_size > 1:
            flag = torch.tensor(number, device=self.ranks.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            number = int(flag)
        if number:
            raise Interrupted(number, self.save("interrupted_checkpoint"))

    # -- set-up ----------------------------------------------------------------------------------------------

    def _record(self) -> dict:
        return {
            "command": sys.argv,
            "settings": self.settings or {"training": asdict(self.args), "data": asdict(self.data_args)},
            "model": self.config.to_dict(),
            "parameters": {"total": self.config.num_params(), "active": self.config.active_params()},
            "placement": self.plan.placement,
            "expert_parallel": self.plan.expert_parallel,
            "deepspeed": self.plan.ds_config,
            "estimate_bytes": asdict(self.plan.memory),
            "data": self.data.report,
            "versions": {
                "python": sys.version.split()[0],
                "torch": torch.__version__,
                "deepspeed": deepspeed.__version__,
            },
            "device": torch.cuda.get_device_name() if self.device_type == "cuda" else "cpu",
            "world_size": self.ranks.world_size,
        }
