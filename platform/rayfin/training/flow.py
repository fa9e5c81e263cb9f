"""The callback that decides when a trial is evaluated and saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from rayfin.config import TrainConfig
from rayfin.training.clock import Clock


class Flow(TrainerCallback):
    """Has a trial evaluated and saved every so many steps, and evaluated at the last one.

    `begins` is called before the first step, `stepped` with the number of each optimizer step that
    was made, and `save_now` after it: whether it is to be saved in any case.
    """

    def __init__(
        self,
        train: TrainConfig,
        clock: Clock,
        begins: Callable[[], None],
        stepped: Callable[[int], None],
        save_now: Callable[[], bool],
    ) -> None:
        self._train, self._clock = train, clock
        self._begins, self._stepped, self._save_now = begins, stepped, save_now

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._begins()
        self._clock.first_step = state.global_step
        self._clock.start()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._clock.stop()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._stepped(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        last = state.global_step == self._train.max_steps
        control.should_evaluate = last or state.global_step % self._train.evaluate_every == 0
        # The last checkpoint would be deleted at once: the adapter is written instead.
        now = self._save_now()
        control.should_save = not last and (now or state.global_step % self._train.save_every == 0)
