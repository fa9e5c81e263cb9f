"""The callback that decides when a trial is evaluated and saved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from rayfin.training.trainer import TrialTrainer


class Flow(TrainerCallback):
    """Has a trial evaluated and saved every so many steps, and evaluated at the last one."""

    def __init__(self, trainer: TrialTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer._score_base()
        self.trainer._clock.first_step = state.global_step
        self.trainer._clock.start()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer._clock.stop()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.method.after_optimizer_step(self.trainer.trained, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        train = self.trainer.train_config
        last = state.global_step == train.max_steps
        control.should_evaluate = last or state.global_step % train.evaluate_every == 0
        # The last checkpoint would be deleted at once: the adapter is written instead.
        now = self.trainer._to_be_saved_now()
        control.should_save = not last and (now or state.global_step % train.save_every == 0)
