"""Trackers of experiments (`report_to`): a module for each, with all that rayfin knows of it."""

from rayfin.trackers.base import TRACKERS, Answers, Point, Run, Tracker, check_installed, register
from rayfin.trackers.mlflow import MLflow
from rayfin.trackers.sender import Sender
from rayfin.trackers.tensorboard import TensorBoard
from rayfin.trackers.trackio import Trackio
from rayfin.trackers.wandb import WeightsAndBiases

__all__ = [
    "TRACKERS",
    "Answers",
    "MLflow",
    "Point",
    "Run",
    "Sender",
    "TensorBoard",
    "Tracker",
    "Trackio",
    "WeightsAndBiases",
    "check_installed",
    "register",
]
